//! A flash chip that keeps firmware's variables, in a process of its own: commands from the core over vfio-user, contents in
//! a file.
//!
//! | file | what |
//! | --- | --- |
//! | `cfi` | the chip's command set, without files |
//! | `device` | the chip behind the register protocol, over its file and the memory that the guest reads |
//!
//! While the chip shows its array, the guest reads the memory that this process shares with the core, without an exit. Every
//! change goes to the file first: a process that is killed leaves a file in which each byte is as before or as after.

mod cfi;
mod device;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_ipc::channel::message::{FlashConfig, FromDevice, Progress, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::memory::MemoryError;
use bulkhead_ipc::vfio_user::{Connection, Served, ServerError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use cfi::{BLOCK, Chip, Store};
pub use device::{FlashDevice, MODE_ARRAY, MODE_BUSY, MODE_READY, REGION_BYTES, REGION_MODE};

/// How long the core may take to read a reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

/// Why a flash process ends.
#[derive(Debug, thiserror::Error)]
pub enum FlashError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The core broke the register protocol, or went away in the middle of a message.
    #[error(transparent)]
    Registers(#[from] ServerError),
    /// The memory that the guest reads.
    #[error("the memory that shows the contents: {0}")]
    Memory(#[from] MemoryError),
    /// The file.
    #[error("the file with the contents: {0}")]
    File(#[from] std::io::Error),
    /// A size that such a chip cannot have.
    #[error("a flash chip consists of blocks of {BLOCK} bytes; {0} bytes is no such size")]
    Size(u64),
    /// A system call failed.
    #[error("poll: {0}")]
    Poll(Errno),
}

/// The two sockets of the process, and the chip.
#[derive(Debug)]
pub struct Flash<'a> {
    connection: Connection,
    device: FlashDevice,
    channel: &'a Channel,
}

/// Makes the chip show what is in its file. To be called before the process is sealed.
///
/// # Errors
/// The file cannot be read or is too short, or the memory is not as the configuration says.
pub fn open<'a>(
    socket: OwnedFd,
    file: File,
    memory: OwnedFd,
    config: &FlashConfig,
    channel: &'a Channel,
) -> Result<Flash<'a>, FlashError> {
    let device = FlashDevice::open(file, memory, config.size)?;
    Ok(Flash { connection: Connection::new(socket, REPLY_DEADLINE)?, device, channel })
}

impl Flash<'_> {
    /// Every descriptor that the process holds beyond standard input, output and error.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = [self.connection.as_fd(), self.channel.as_fd()];
        sockets.into_iter().chain(self.device.descriptors()).collect()
    }

    /// Serves until the core or the supervisor ends it.
    ///
    /// # Errors
    /// The core breaks the register protocol, a system call fails, or the file cannot be written.
    pub fn run(mut self) -> Result<(), FlashError> {
        let result = self.serve();
        // A power failure of the host shall not take what a machine that ended has stored.
        self.device.sync()?;
        result
    }

    fn serve(&mut self) -> Result<(), FlashError> {
        loop {
            let mut fds =
                [self.channel.as_fd(), self.connection.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(FlashError::Poll(errno)),
            }
            let [control, core] = fds.map(|fd| fd.any().unwrap_or(true));
            if core && self.connection.serve(&mut self.device)? == Served::Closed {
                return Ok(());
            }
            if let Some(error) = self.device.take_failure() {
                return Err(error.into());
            }
            if control && !self.control()? {
                return Ok(());
            }
        }
    }

    /// Acts on one message of the supervisor. False: stop.
    fn control(&self) -> Result<bool, FlashError> {
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
