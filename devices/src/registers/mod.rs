//! The process of a device that is registers and no queues: accesses from the core over vfio-user, orders from the supervisor.
//!
//! | file | what |
//! | --- | --- |
//! | `interrupt` | the eventfd that the core gives it |
//! | `state` | what a successor needs, in a file that outlives the process |

mod interrupt;
mod state;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_ipc::channel::message::{FromDevice, Progress, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::{Connection, RegisterDevice, Served, ServerError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use interrupt::Interrupt;
pub use state::{STATE_SIZE, StateFile};

/// How long the core may take to read a reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

/// Why such a process ends.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The core broke the register protocol, or went away in the middle of a message.
    #[error(transparent)]
    Registers(#[from] ServerError),
    /// The file with what the device keeps.
    #[error("the file with what the device keeps: {0}")]
    File(#[from] io::Error),
    /// A system call failed.
    #[error("poll: {0}")]
    Poll(Errno),
}

/// What a device adds to its registers to be a process of its own.
pub trait DeviceProcess: RegisterDevice {
    /// Descriptors that the device holds.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;

    /// The core has something to say: called before it is heard.
    ///
    /// # Errors
    /// The file cannot be read.
    fn begin(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Milliseconds until [`Self::tick`] is to be called, whatever else happens.
    fn timeout(&self) -> Option<i32> {
        None
    }

    /// Acts upon a deadline that has come; called after everything else that happens, too.
    ///
    /// # Errors
    /// The supervisor cannot be told.
    fn tick(&mut self, channel: &Channel) -> Result<(), ChannelError> {
        let _ = channel;
        Ok(())
    }

    /// An order of the supervisor that is for this device only.
    fn order(&mut self, message: ToDevice) {
        tracing::warn!(?message, "a control message that this device does not know");
    }

    /// Why the file can no longer be written, once.
    fn take_failure(&mut self) -> Option<io::Error>;

    /// The process ends, whatever the reason.
    ///
    /// # Errors
    /// The file cannot be written.
    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The two sockets of the process, and the device.
pub struct Registers<'a> {
    connection: Connection,
    device: Box<dyn DeviceProcess>,
    channel: &'a Channel,
}

impl<'a> Registers<'a> {
    /// Serves `device` to the core at the other end of `socket`. To be called before the process is sealed.
    ///
    /// # Errors
    /// The socket is none.
    pub fn new(
        socket: OwnedFd,
        device: Box<dyn DeviceProcess>,
        channel: &'a Channel,
    ) -> Result<Self, RegistersError> {
        Ok(Self { connection: Connection::new(socket, REPLY_DEADLINE)?, device, channel })
    }

    /// Every descriptor that the process holds beyond standard input, output and error.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = [self.connection.as_fd(), self.channel.as_fd()];
        sockets.into_iter().chain(self.device.descriptors()).collect()
    }

    /// Serves until the core or the supervisor ends it.
    ///
    /// # Errors
    /// The core breaks the register protocol, a system call fails, or what the device keeps cannot be stored.
    pub fn run(mut self) -> Result<(), RegistersError> {
        let result = self.serve();
        self.device.end()?;
        result
    }

    fn serve(&mut self) -> Result<(), RegistersError> {
        loop {
            let mut fds =
                [self.channel.as_fd(), self.connection.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let timeout = self.device.timeout().map(PollTimeout::try_from);
            let timeout = timeout.and_then(Result::ok).unwrap_or(PollTimeout::NONE);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(RegistersError::Poll(errno)),
            }
            let [control, core] = fds.map(|fd| fd.any().unwrap_or(true));
            if core {
                self.device.begin()?;
                if self.connection.serve(&mut *self.device)? == Served::Closed {
                    return Ok(());
                }
            }
            if control && !self.control()? {
                return Ok(());
            }
            self.device.tick(self.channel)?;
            if let Some(error) = self.device.take_failure() {
                return Err(error.into());
            }
        }
    }

    /// Acts on one message of the supervisor. False: stop.
    fn control(&mut self) -> Result<bool, RegistersError> {
        match self.channel.recv::<ToDevice>(Some(Duration::ZERO)) {
            Ok((ToDevice::Stop, _)) | Err(ChannelError::PeerClosed) => return Ok(false),
            Ok((ToDevice::Ping, _)) => self.channel.send(&FromDevice::Alive(Progress::Fine), &[])?,
            Ok((message, _)) => self.device.order(message),
            Err(ChannelError::Deadline) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }
}
