//! A virtio device as a service of its own, for front ends that are not ours: `bulkhead-device TYPE --socket-path PATH …`
//! ("Backend programs" of the vhost-user protocol). There is no supervisor, and the process is not jailed by itself.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use bulkhead_ipc::tap::{Tap, TapError};
use bulkhead_ipc::vhost_user::backend::{Daemon, DaemonError, VirtioDevice, WorkerError, no_jail};
use bulkhead_ipc::vhost_user::connection::ConnectionError;
use thiserror::Error;
use tracing::{info, warn};

use crate::blk::{Blk, BlkError};
use crate::console::Console;
use crate::net::{self, Net, NetError};
use crate::rng::Rng;
use crate::serve::connection;
use crate::stream::Ends;

/// Why the service ends.
#[derive(Debug, Error)]
pub enum StandaloneError {
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// A file or socket could not be opened.
    #[error("{what} {path}: {error}")]
    Open {
        /// What it is for.
        what: &'static str,
        /// Its path.
        path: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The disk cannot be served.
    #[error(transparent)]
    Blk(#[from] BlkError),
    /// The network card cannot be served.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Its tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A queue's thread could not be set up, or has ended.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A queue's thread has ended.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// No connection could be accepted.
    #[error("the socket: {0}")]
    Accept(io::Error),
}

/// The options of the command line.
#[derive(Debug)]
struct Options {
    socket_path: String,
    blk_file: Option<String>,
    read_only: bool,
    serial: String,
    queues: u16,
    block_size: u32,
    tap: Option<String>,
    stream: Option<String>,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
}

fn usage(message: impl Into<String>) -> StandaloneError {
    StandaloneError::Usage(message.into())
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, StandaloneError> {
        let mut options = Self {
            socket_path: String::new(),
            blk_file: None,
            read_only: false,
            serial: String::new(),
            queues: 1,
            block_size: 512,
            tap: None,
            stream: None,
            mac: None,
            mtu: None,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (argument.as_str(), None),
            };
            if name == "--read-only" {
                options.read_only = true;
                continue;
            }
            let value = inline
                .or_else(|| arguments.next().cloned())
                .ok_or_else(|| usage(format!("{name} needs a value")))?;
            let number = || value.parse().map_err(|_| usage(format!("{name}: {value:?} is not a number")));
            match name {
                "--socket-path" => options.socket_path = value,
                "--blk-file" => options.blk_file = Some(value),
                "--serial" => options.serial = value,
                "--num-queues" => {
                    options.queues =
                        u16::try_from(number()?).map_err(|_| usage("--num-queues is too large"))?;
                }
                "--block-size" => options.block_size = number()?,
                "--tap" => options.tap = Some(value),
                "--stream" => options.stream = Some(value),
                "--mac" => options.mac = Some(mac(&value)?),
                "--mtu" => {
                    options.mtu = Some(u16::try_from(number()?).map_err(|_| usage("--mtu is too large"))?);
                }
                _ => return Err(usage(format!("unknown option {name}"))),
            }
        }
        if options.socket_path.is_empty() {
            return Err(usage("--socket-path is needed"));
        }
        Ok(options)
    }
}

/// A hardware address, as six pairs of digits with colons between.
fn mac(text: &str) -> Result<[u8; 6], StandaloneError> {
    let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().map_err(|_| usage(format!("--mac: {text:?} is not like 52:54:00:12:34:56")))
}

fn net(options: &Options) -> Result<Net, StandaloneError> {
    let pairs = if options.tap.is_some() { options.queues } else { 1 };
    let settings = net::Settings { mtu: options.mtu, pairs, ..net::Settings::default() };
    let settings = net::Settings { mac: options.mac.unwrap_or(settings.mac), ..settings };
    let backend = match (&options.tap, &options.stream) {
        (Some(name), None) => {
            let tap = Tap::open(name, pairs)?;
            tap.configure(options.mtu)?;
            net::Backend::Tap(tap)
        }
        // Connected when a front end is there.
        (None, Some(_)) => net::Backend::Stream(None),
        _ => return Err(usage("--tap NAME or --stream PATH is needed")),
    };
    let net = Net::new(settings, backend)?;
    net.use_first_queue_only();
    Ok(net)
}

fn open(what: &'static str, path: &str, write: bool) -> Result<File, StandaloneError> {
    OpenOptions::new().read(true).write(write).open(path).map_err(|error| StandaloneError::Open {
        what,
        path: path.into(),
        error,
    })
}

/// Standard input and output. A terminal is opened anew for the output, so that it can be made non-blocking without a change of
/// the shell's flags: one that expands line ends may not take what it polled ready for. Everything else is shared, for its
/// position in the file counts.
fn standard_ends() -> io::Result<Ends> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let output = if stdout.is_terminal() {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        OpenOptions::new().write(true).custom_flags(flags).open("/dev/stdout")?.into()
    } else {
        stdout.as_fd().try_clone_to_owned()?
    };
    Ok(Ends::new(Some(stdin.as_fd().try_clone_to_owned()?), Some(output)))
}

fn device(kind: &str, options: &Options) -> Result<Box<dyn VirtioDevice>, StandaloneError> {
    match kind {
        "blk" => {
            let path = options.blk_file.as_deref().ok_or_else(|| usage("--blk-file is needed"))?;
            let disk = open("disk", path, !options.read_only)?;
            let Options { read_only, ref serial, queues, block_size, .. } = *options;
            Ok(Box::new(Blk::new(disk, read_only, serial, queues, block_size)?))
        }
        "rng" => Ok(Box::new(Rng::new(open("entropy source", "/dev/urandom", false)?))),
        "console" => {
            let ends = standard_ends().map_err(|error| StandaloneError::Open {
                what: "standard input and output",
                path: String::new(),
                error,
            })?;
            Ok(Box::new(Console::new(ends, None)))
        }
        other => Err(usage(format!("unknown device type {other}"))),
    }
}

/// Serves one front end after the other on a socket.
///
/// # Errors
/// [`StandaloneError`]; the end of a connection is none.
pub fn run(kind: &str, arguments: &[String]) -> Result<(), StandaloneError> {
    let options = Options::parse(arguments)?;
    let mut network = None;
    let device = if kind == "net" {
        let net = net(&options)?;
        network = options.stream.as_deref().map(|path| (net.controller(), path));
        Box::new(net)
    } else {
        device(kind, &options)?
    };
    // A socket that an earlier process left behind.
    let _ = std::fs::remove_file(&options.socket_path);
    let listener = UnixListener::bind(&options.socket_path).map_err(|error| StandaloneError::Open {
        what: "socket",
        path: options.socket_path.clone(),
        error,
    })?;
    let mut daemon = Daemon::new(device, &no_jail())?;
    loop {
        let (stream, _) = listener.accept().map_err(StandaloneError::Accept)?;
        info!("a front end has connected");
        if let Some((controller, path)) = &network {
            match UnixStream::connect(path) {
                Ok(peer) => controller.attach(peer.into()),
                Err(error) => warn!(%error, path, "nobody listens: packets are dropped"),
            }
            daemon.wake_workers();
        }
        match daemon.run(connection(stream)) {
            Ok(()) | Err(DaemonError::Connection(ConnectionError::Closed)) => {
                info!("the front end has gone");
            }
            Err(DaemonError::Connection(error)) => warn!(%error, "the front end was let go"),
            Err(error) => return Err(error.into()),
        }
    }
}
