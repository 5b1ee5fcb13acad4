//! A virtio device as a service of its own, for front ends that are not ours: `bulkhead-device TYPE --socket-path PATH …`
//! ("Backend program conventions" of the vhost-user protocol).
//!
//! **To plug in a type**: write `pub const SERVICE: ServiceType` in `TYPE/service.rs` and add it to the end of [`TYPES`].
//!
//! The program that is started only listens. Each front end gets a process of its own, in the same jail and by the same code as
//! under a supervisor ([`crate::serve`]): one front end leaves nothing behind for the next, and a process that dies costs a
//! front end that reconnects a pause. The program that listens reads nothing of a front end or guest.
//!
//! - [`arguments`]: the command line; [`capabilities`]: what management software asks;
//! - [`entrance`]: sockets, by path, descriptor or systemd; `notify`: what systemd is told;
//! - [`outfit`]: what the device is given; `process`: its process.

pub mod arguments;
pub mod capabilities;
pub mod entrance;
mod notify;
pub mod outfit;
mod process;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::channel::message::DeviceConfig;
use bulkhead_ipc::jail::JailError;
use bulkhead_ipc::log::{self, LogLevel};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use tracing::{info, warn};

use arguments::{Arguments, Given, OptionSpec};
use entrance::{Entrance, EntranceError};
use outfit::{Outfit, OutfitError};
use process::{Begun, End, Served, is_hang_up};

/// Every type that can be a service.
pub const TYPES: &[&ServiceType] = &[
    &crate::blk::SERVICE,
    &crate::rng::SERVICE,
    &crate::console::SERVICE,
    &crate::vsock::SERVICE,
    &crate::net::SERVICE,
    &crate::fs::SERVICE,
];

/// Why a device type that there is cannot be a service.
#[must_use]
pub fn why_not(kind: &str) -> Option<&'static str> {
    match kind {
        "balloon" => Some("no front end can use one: QEMU has no vhost-user-balloon, and its own needs none"),
        "pmem" => {
            Some("the front end has to map the file itself, and there is none for vhost-user that does")
        }
        "uart" | "flash" | "keyboard" | "watchdog" => {
            Some("it is no virtio device, and serves a machine of bulkhead alone")
        }
        "relay" => Some("connect the front end to the back end itself"),
        _ => None,
    }
}

/// A device type as a service.
#[derive(Debug)]
pub struct ServiceType {
    /// The word of the command line; the same as in `bulkhead-device TYPE` under a supervisor.
    pub name: &'static str,
    /// Its name in `VHostUserBackendType` (docs/interop/vhost-user.json of QEMU). A type that is named there has a manifest in
    /// `dist/vhost-user/`.
    pub backend_type: &'static str,
    /// The features of its type there.
    pub features: &'static [&'static str],
    /// One sentence for a person.
    pub description: &'static str,
    /// The options beside those of every type.
    pub options: &'static [OptionSpec],
    /// Opens what the device needs and says what it is to be.
    pub prepare: fn(&Given, &mut Outfit) -> Result<DeviceConfig, StandaloneError>,
}

/// Why the service ends.
#[derive(Debug, Error)]
pub enum StandaloneError {
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// The socket.
    #[error(transparent)]
    Entrance(#[from] EntranceError),
    /// A file of the device.
    #[error(transparent)]
    Outfit(#[from] OutfitError),
    /// The jail of the device's process.
    #[error("the device's process cannot be started: {0}")]
    Jail(#[from] JailError),
    /// Its control channel.
    #[error("the device's process cannot be told what to do: {0}")]
    Channel(#[from] ChannelError),
    /// The device says that it cannot serve.
    #[error("the device cannot be served: {0}")]
    Refused(String),
    /// The process has ended otherwise than it should.
    #[error("the device's process {0}")]
    Died(String),
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

impl StandaloneError {
    /// A sentence about the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    fn system(what: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System(what, errno.into())
    }
}

/// The type of this name.
pub fn find(name: &str) -> Option<&'static ServiceType> {
    TYPES.iter().copied().find(|service| service.name == name)
}

/// Why nobody is listened to any more.
enum Heard {
    /// A front end has connected.
    FrontEnd(UnixStream),
    /// SIGTERM or SIGINT.
    Signal,
}

/// A service that is set up.
struct Service {
    recipe: process::Recipe,
    signals: SignalFd,
    persistent: bool,
}

/// Serves front ends, one after the other, until the first has gone (with `--persistent`: until SIGTERM).
///
/// # Errors
/// [`StandaloneError`]; the end of a connection is none.
pub fn run(service: &'static ServiceType, arguments: Vec<String>) -> Result<(), StandaloneError> {
    let Arguments { socket, persistent, log, given } = Arguments::parse(service, arguments)?;
    log::init(log);
    let mut outfit = Outfit::default();
    let config = (service.prepare)(&given, &mut outfit)?;
    // Before the first process: it must find them blocked, and nobody may end it between the socket's making and its removal.
    let mut mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    if outfit.is_resizable() {
        mask.add(Signal::SIGHUP);
    }
    mask.thread_block().map_err(StandaloneError::system("block signals"))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(StandaloneError::system("signalfd"))?;
    let recipe = process::Recipe::new(service.name, config, outfit, log)?;
    let service = Service { recipe, signals, persistent };
    // The kernel builds a jail meanwhile.
    let begun = service.recipe.begin()?;
    match Entrance::open(&socket)? {
        Entrance::Connected(stream) => {
            notify::ready();
            service.serve(begun, stream).map(drop)
        }
        Entrance::Listening(door) => {
            // The socket exists already, so that a front end that is started at the same time waits and is not refused.
            match service.rehearse(begun, notify::ready)? {
                Served::Left => service.listen(door.listener()),
                Served::Stopped => Ok(()),
            }
        }
    }
}

impl Service {
    /// Starts and seals a process for nobody: what is wrong with the device or the host's jails is known before a front end comes.
    /// Then does this, while the process ends.
    fn rehearse(&self, begun: Begun, when_sealed: fn()) -> Result<Served, StandaloneError> {
        let (ours, theirs) =
            UnixStream::pair().map_err(|error| StandaloneError::System("a socket pair", error))?;
        drop(ours);
        // A front end that leaves at once is no news here.
        let log = self.recipe.log().min(LogLevel::Warn);
        let process = begun.serve(&self.recipe, &OwnedFd::from(theirs), log)?;
        self.finish(process.when_ready(when_sealed))
    }

    fn listen(&self, listener: &UnixListener) -> Result<(), StandaloneError> {
        loop {
            crate::footprint::release_program();
            let stream = match self.hear(listener)? {
                Heard::FrontEnd(stream) => stream,
                Heard::Signal => return Ok(()),
            };
            info!("a front end has connected");
            match self.recipe.begin().and_then(|begun| self.serve(begun, stream)) {
                Ok(Served::Stopped) => return Ok(()),
                Ok(Served::Left) if self.persistent => info!("the front end has gone"),
                Ok(Served::Left) => return Ok(()),
                Err(error) if self.persistent => warn!(%error, "the front end is let go"),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for a front end.
    fn hear(&self, listener: &UnixListener) -> Result<Heard, StandaloneError> {
        loop {
            let mut fds = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(StandaloneError::system("poll")(errno)),
            }
            let [signal, front_end] = fds.map(|fd| fd.any().unwrap_or(true));
            // The next process takes the disk as large as it is then.
            if signal && self.signals.read_signal().is_ok_and(|it| it.is_some_and(|it| !is_hang_up(&it))) {
                return Ok(Heard::Signal);
            }
            if front_end {
                match listener.accept() {
                    Ok((stream, _)) => return Ok(Heard::FrontEnd(stream)),
                    // It has gone again, or another process of a shared socket was faster.
                    Err(error) if is_passing(&error) => {}
                    Err(error) => return Err(StandaloneError::System("accept", error)),
                }
            }
        }
    }

    /// Serves one front end until it has gone.
    fn serve(&self, begun: Begun, stream: UnixStream) -> Result<Served, StandaloneError> {
        self.finish(begun.serve(&self.recipe, &OwnedFd::from(stream), self.recipe.log())?)
    }

    fn finish(&self, process: process::Process) -> Result<Served, StandaloneError> {
        let End { served, problem } = process.wait(&self.signals, self.recipe.outfit())?;
        match problem {
            Some(problem) => Err(problem),
            None => Ok(served),
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}
