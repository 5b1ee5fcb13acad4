//! A virtio device process under a supervisor: start message, seal, `Ready`, and then its two sockets.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, DeviceConfig, DeviceStart, FromDevice, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::{self, JailError, PolicyName};
use bulkhead_ipc::vhost_user::backend::{Daemon, DaemonError, EnterThread, VirtioDevice, WorkerError};
use bulkhead_ipc::vhost_user::connection::{Connection, ConnectionError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use tracing::{info, warn};

use crate::blk::{Blk, BlkError};
use crate::console::{Console, Controller};
use crate::rng::Rng;
use crate::stream::Ends;
use crate::uart::{self, UartError};

/// How long the supervisor may take to hear of a failure.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// Why a device process ends.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The process could not be sealed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The disk cannot be served.
    #[error(transparent)]
    Blk(#[from] BlkError),
    /// The UART ended.
    #[error(transparent)]
    Uart(#[from] UartError),
    /// A queue's thread could not be set up.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The front end's connection cannot be used any longer.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The program was started as another type than the start message says.
    #[error("this process was started as {started}, and told to serve {told}")]
    Type {
        /// The first argument.
        started: String,
        /// The start message.
        told: &'static str,
    },
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, Errno),
}

/// A device with what the process around it needs to know.
struct Parts {
    device: Box<dyn VirtioDevice>,
    main: PolicyName,
    queue: PolicyName,
    /// The descriptors that the device holds, for the seal.
    held: Vec<RawFd>,
    console: Option<Controller>,
}

/// The name by which `bulkhead-device` knows a device type.
fn type_name(config: &DeviceConfig) -> &'static str {
    match config {
        DeviceConfig::Blk(_) => "blk",
        DeviceConfig::Rng(_) => "rng",
        DeviceConfig::Console(_) => "console",
        DeviceConfig::Uart(_) => "uart",
    }
}

/// Serves the device that the start message describes, until the supervisor says stop, or either end is closed.
///
/// # Errors
/// [`ServeError`].
pub fn run(
    started: &str,
    start: DeviceStart,
    descriptors: Descriptors,
    channel: Channel,
) -> Result<(), ServeError> {
    let told = type_name(&start.config);
    if started != told {
        return Err(ServeError::Type { started: started.into(), told });
    }
    if let DeviceConfig::Uart(_) = start.config {
        return Ok(uart::run(start, descriptors, channel)?);
    }
    match prepare(&start, descriptors, &channel) {
        Ok((mut daemon, console)) => serve(&mut daemon, &channel, console.as_ref()),
        Err(error) => {
            let told = FromDevice::Failed(error.to_string());
            channel.send_within(&told, &[], FAREWELL_LIMIT)?;
            Err(error)
        }
    }
}

/// Builds the device, seals the process and answers `Ready`.
fn prepare(
    start: &DeviceStart,
    mut descriptors: Descriptors,
    channel: &Channel,
) -> Result<(Daemon, Option<Controller>), ServeError> {
    let connection = Connection::from(descriptors.take(start.socket)?);
    let parts = build(&start.config, &mut descriptors)?;
    descriptors.finish()?;

    let policy = parts.queue;
    let enter: EnterThread = Arc::new(move || jail::enter_thread(policy).map_err(io::Error::other));
    let mut daemon = Daemon::new(parts.device, &enter)?;
    let mut expected = parts.held;
    expected.extend(daemon.worker_descriptors());
    expected.extend([channel.as_fd().as_raw_fd(), connection.as_fd().as_raw_fd()]);
    let sealed = jail::seal(parts.main, &expected)?;
    channel.send(&FromDevice::Ready { policies: sealed.policies() }, &sealed.descriptors())?;
    drop(sealed);
    daemon.connect(connection)?;
    Ok((daemon, parts.console))
}

fn build(config: &DeviceConfig, descriptors: &mut Descriptors) -> Result<Parts, ServeError> {
    let mut held = Vec::new();
    let parts = match config {
        DeviceConfig::Blk(blk) => {
            let disk = hold(descriptors.take(blk.disk)?, &mut held);
            let device =
                Blk::new(disk.into(), blk.read_only, &blk.serial, blk.queues, blk.logical_block_size)?;
            (Box::new(device) as Box<dyn VirtioDevice>, PolicyName::BlkMain, PolicyName::BlkQueue, None)
        }
        DeviceConfig::Rng(rng) => {
            let source = hold(descriptors.take(rng.source)?, &mut held);
            (Box::new(Rng::new(File::from(source))) as _, PolicyName::RngMain, PolicyName::RngQueue, None)
        }
        DeviceConfig::Console(console) => {
            let mut end = |index: Option<_>| -> Result<_, ServeError> {
                let fd = index.map(|index| descriptors.take(index)).transpose()?;
                Ok(fd.map(|fd| hold(fd, &mut held)))
            };
            let ends = Ends::new(end(console.input)?, end(console.output)?);
            let device = Console::new(ends, console.size);
            let controller = Some(device.controller());
            (Box::new(device) as _, PolicyName::ConsoleMain, PolicyName::ConsoleQueue, controller)
        }
        DeviceConfig::Uart(_) => return Err(UartError::NotAUart.into()),
    };
    let (device, main, queue, console) = parts;
    Ok(Parts { device, main, queue, held, console })
}

/// Notes a descriptor that the device is about to own.
fn hold(fd: OwnedFd, held: &mut Vec<RawFd>) -> OwnedFd {
    held.push(fd.as_raw_fd());
    fd
}

/// Serves the control channel and the front end until either ends.
fn serve(daemon: &mut Daemon, channel: &Channel, console: Option<&Controller>) -> Result<(), ServeError> {
    loop {
        let Some(socket) = daemon.socket() else { return Ok(()) };
        let mut fds =
            [PollFd::new(channel.as_fd(), PollFlags::POLLIN), PollFd::new(socket, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(ServeError::System("poll", errno)),
        }
        let [control, front_end] = fds.map(|fd| fd.any().unwrap_or(true));
        if control && !control_message(daemon, channel, console)? {
            daemon.disconnect()?;
            return Ok(());
        }
        if front_end {
            match daemon.serve_message() {
                Ok(()) => {}
                Err(DaemonError::Connection(ConnectionError::Closed)) => {
                    info!("the front end has closed its connection");
                    daemon.disconnect()?;
                    return Ok(());
                }
                Err(error) => {
                    daemon.disconnect()?;
                    return Err(error.into());
                }
            }
        }
    }
}

/// Acts on one message of the supervisor. False: stop.
fn control_message(
    daemon: &mut Daemon,
    channel: &Channel,
    console: Option<&Controller>,
) -> Result<bool, ServeError> {
    let (message, descriptors) = match channel.recv::<ToDevice>(None) {
        Ok(received) => received,
        Err(ChannelError::PeerClosed) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    match (message, console) {
        (ToDevice::Stop, _) => return Ok(false),
        (ToDevice::Attach, Some(console)) => match <[OwnedFd; 1]>::try_from(descriptors) {
            Ok([stream]) => {
                console.attach(stream);
                daemon.wake_workers();
            }
            Err(descriptors) => {
                warn!(descriptors = descriptors.len(), "an attach message needs one descriptor")
            }
        },
        (ToDevice::Resize { columns, rows }, Some(console)) => {
            console.resize(columns, rows);
            daemon.config_changed();
        }
        (message, _) => warn!(?message, "a control message that this device does not know"),
    }
    Ok(true)
}

/// A front end's stream as a connection.
pub(crate) fn connection(stream: UnixStream) -> Connection {
    stream.into()
}
