//! One descriptor of a stream, and how to use it without ever blocking and without changing its flags: O_NONBLOCK belongs
//! to the open file description, and the other user of a terminal's is the user's shell.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::write;

/// A pipe that polls writable takes PIPE_BUF bytes without blocking (pipe(7)).
const PIPE_PIECE: usize = 4096;

/// A terminal that polls writable takes a little; how much it does not say. One that expands line ends (OPOST) and has room
/// for half of an expansion would block all the same: whoever opens a terminal for a device does so with O_NONBLOCK.
const TERMINAL_PIECE: usize = 256;

/// How to write without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// `send` with MSG_DONTWAIT.
    Socket,
    /// A regular file never blocks for another process's sake.
    File,
    /// `poll`, then at most so many bytes.
    Polled(usize),
}

/// A descriptor with the manner in which it is written. Clones are the same descriptor.
#[derive(Clone, Debug)]
pub struct End {
    fd: Arc<OwnedFd>,
    manner: Manner,
}

impl End {
    /// Looks at the descriptor once (`fstat`).
    pub fn new(fd: OwnedFd) -> Self {
        let mode = fstat(&fd).map_or(0, |status| status.st_mode);
        let manner = match SFlag::from_bits_truncate(mode) & SFlag::S_IFMT {
            SFlag::S_IFSOCK => Manner::Socket,
            SFlag::S_IFREG => Manner::File,
            SFlag::S_IFIFO => Manner::Polled(PIPE_PIECE),
            _ => Manner::Polled(TERMINAL_PIECE),
        };
        Self { fd: Arc::new(fd), manner }
    }

    /// Writes what fits, which is at least one byte.
    ///
    /// # Errors
    /// EAGAIN when nothing fits now; anything else means that the descriptor is of no more use.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let count = match self.manner {
            Manner::Socket => {
                send(self.fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?
            }
            Manner::File => write(&self.fd, bytes)?,
            Manner::Polled(_) if self.poll(PollFlags::POLLOUT).is_empty() => 0,
            Manner::Polled(piece) => write(&self.fd, bytes.get(..piece).unwrap_or(bytes))?,
        };
        if count == 0 { Err(Errno::EAGAIN) } else { Ok(count) }
    }

    /// What is true of the descriptor now: those of `flags`, a hang-up, an error.
    pub fn poll(&self, flags: PollFlags) -> PollFlags {
        let mut entry = [PollFd::new(self.as_fd(), flags)];
        match poll(&mut entry, PollTimeout::ZERO) {
            Ok(count) if count > 0 => entry.map(|entry| entry.revents().unwrap_or(PollFlags::POLLERR))[0],
            _ => PollFlags::empty(),
        }
    }

    /// Size of a file, bytes.
    pub(super) fn size(&self) -> Option<u64> {
        fstat(&self.fd).ok().and_then(|status| u64::try_from(status.st_size).ok())
    }

    /// Whether it is a socket.
    pub fn is_socket(&self) -> bool {
        self.manner == Manner::Socket
    }

    /// Whether both are the same descriptor.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.fd, &other.fd)
    }
}

impl From<OwnedFd> for End {
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd)
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
