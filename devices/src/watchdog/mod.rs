//! A watchdog of the Intel 6300ESB in a process of its own: registers from the core over vfio-user, a word to the supervisor when it
//! has run out. What follows is the supervisor's affair; only an NMI is its own interrupt, where it was given one.
//!
//! | file | what |
//! | --- | --- |
//! | `i6300esb` | registers and counter |
//! | `device` | both behind the register protocol, with their state in a file for a successor |

mod device;
mod i6300esb;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_ipc::channel::message::{FromDevice, Progress, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::{Connection, Served, ServerError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use device::{REGION_SIZE, STATE_SIZE, WatchdogDevice};
pub use i6300esb::{I6300Esb, Outcome};

/// How long the core may take to read a reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

/// Why a watchdog's process ends.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
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

/// The two sockets of the process, and the watchdog.
#[derive(Debug)]
pub struct Watchdog<'a> {
    connection: Connection,
    device: WatchdogDevice,
    channel: &'a Channel,
    interrupts: bool,
}

/// A watchdog with the state that is in its file; `expired`: it has reset the machine; `interrupts`: it raises its interrupt when it
/// runs out. To be called before the process is sealed.
///
/// # Errors
/// The socket is none.
pub fn open(
    socket: OwnedFd,
    state: File,
    (expired, interrupts): (bool, bool),
    channel: &Channel,
) -> Result<Watchdog<'_>, WatchdogError> {
    let device = WatchdogDevice::new(state, expired);
    Ok(Watchdog { connection: Connection::new(socket, REPLY_DEADLINE)?, device, channel, interrupts })
}

impl Watchdog<'_> {
    /// Every descriptor that the process holds beyond standard input, output and error.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = [self.connection.as_fd(), self.channel.as_fd()];
        sockets.into_iter().chain(self.device.descriptors()).collect()
    }

    /// Serves until the core or the supervisor ends it.
    ///
    /// # Errors
    /// The core breaks the register protocol, a system call fails, or the state cannot be stored.
    pub fn run(mut self) -> Result<(), WatchdogError> {
        loop {
            let mut fds =
                [self.channel.as_fd(), self.connection.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let timeout = self.device.timeout().map(PollTimeout::try_from);
            let timeout = timeout.and_then(Result::ok).unwrap_or(PollTimeout::NONE);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(WatchdogError::Poll(errno)),
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
            if self.device.tick() {
                // Said before it is noted: should this process die in between, its successor says it again.
                self.channel.send(&FromDevice::Expired, &[])?;
                if self.interrupts {
                    self.device.interrupt();
                }
                self.device.store();
            }
            if let Some(error) = self.device.take_failure() {
                return Err(error.into());
            }
        }
    }

    /// Acts on one message of the supervisor. False: stop.
    fn control(&mut self) -> Result<bool, WatchdogError> {
        match self.channel.recv::<ToDevice>(Some(Duration::ZERO)) {
            Ok((ToDevice::Stop, _)) | Err(ChannelError::PeerClosed) => return Ok(false),
            Ok((ToDevice::Ping, _)) => self.channel.send(&FromDevice::Alive(Progress::Fine), &[])?,
            Ok((message, _)) => tracing::warn!(?message, "a control message that this device does not know"),
            Err(ChannelError::Deadline) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }
}
