//! A PS/2 keyboard and its controller, in a process of their own: ports from the core over vfio-user, keys from the supervisor.
//!
//! | file | what |
//! | --- | --- |
//! | `keys` | the keyboard: commands and scan codes |
//! | `i8042` | the controller, ports 60 and 64 |
//! | `device` | both behind the register protocol, with their state in a file for a successor |

mod device;
mod i8042;
mod keys;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_ipc::channel::message::{FromDevice, Progress, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::{Connection, Served, ServerError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use device::{KeyboardDevice, REGION_SIZE, STATE_SIZE};
pub use i8042::{I8042, Port};

/// How long the core may take to read a reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

/// Why a keyboard process ends.
#[derive(Debug, thiserror::Error)]
pub enum KeyboardError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The core broke the register protocol, or went away in the middle of a message.
    #[error(transparent)]
    Registers(#[from] ServerError),
    /// The file with the state.
    #[error("the file that keeps the state: {0}")]
    File(#[from] std::io::Error),
    /// A system call failed.
    #[error("poll: {0}")]
    Poll(Errno),
}

/// The two sockets of the process, and the controller.
#[derive(Debug)]
pub struct Keyboard<'a> {
    connection: Connection,
    device: KeyboardDevice,
    channel: &'a Channel,
}

/// A controller with the state that is in its file. To be called before the process is sealed.
///
/// # Errors
/// The socket is none.
pub fn open(socket: OwnedFd, state: File, channel: &Channel) -> Result<Keyboard<'_>, KeyboardError> {
    let device = KeyboardDevice::new(state);
    Ok(Keyboard { connection: Connection::new(socket, REPLY_DEADLINE)?, device, channel })
}

impl Keyboard<'_> {
    /// Every descriptor that the process holds beyond standard input, output and error.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = [self.connection.as_fd(), self.channel.as_fd()];
        sockets.into_iter().chain(self.device.descriptors()).collect()
    }

    /// Serves until the core or the supervisor ends it.
    ///
    /// # Errors
    /// The core breaks the register protocol, a system call fails, or the state cannot be stored.
    pub fn run(mut self) -> Result<(), KeyboardError> {
        loop {
            let mut fds =
                [self.channel.as_fd(), self.connection.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(KeyboardError::Poll(errno)),
            }
            let [control, core] = fds.map(|fd| fd.any().unwrap_or(true));
            if core {
                self.device.begin()?;
                if self.connection.serve(&mut self.device)? == Served::Closed {
                    return Ok(());
                }
            }
            if control && !self.control()? {
                return Ok(());
            }
            if let Some(error) = self.device.take_failure() {
                return Err(error.into());
            }
        }
    }

    /// Acts on one message of the supervisor. False: stop.
    fn control(&mut self) -> Result<bool, KeyboardError> {
        match self.channel.recv::<ToDevice>(Some(Duration::ZERO)) {
            Ok((ToDevice::Stop, _)) | Err(ChannelError::PeerClosed) => return Ok(false),
            Ok((ToDevice::Ping, _)) => self.channel.send(&FromDevice::Alive(Progress::Fine), &[])?,
            Ok((ToDevice::Keys(keys), _)) => self.device.press(&keys),
            Ok((message, _)) => tracing::warn!(?message, "a control message that this device does not know"),
            Err(ChannelError::Deadline) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }
}
