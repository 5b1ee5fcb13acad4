//! Writing to a descriptor that somebody else may share, without ever blocking and without changing its flags: O_NONBLOCK
//! belongs to the open file description, and the other end of a terminal's is the user's shell.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};

/// A pipe that polls writable takes PIPE_BUF bytes without blocking (pipe(7)).
const PIPE_CHUNK: usize = 4096;

/// A terminal that polls writable takes a little; how much it does not say.
const TERMINAL_CHUNK: usize = 256;

/// How to write without blocking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// `send` with MSG_DONTWAIT.
    Socket,
    /// A regular file, or O_NONBLOCK is set already.
    Plain,
    /// `poll`, then at most so many bytes.
    Polled(usize),
}

/// Where output goes.
#[derive(Debug)]
pub struct Sink {
    fd: OwnedFd,
    manner: Manner,
}

impl Sink {
    /// Looks at the descriptor once.
    ///
    /// # Errors
    /// `fstat` or `fcntl` fails.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        let manner = if kind == SFlag::S_IFSOCK {
            Manner::Socket
        } else if kind == SFlag::S_IFREG || flags.contains(OFlag::O_NONBLOCK) {
            Manner::Plain
        } else if kind == SFlag::S_IFIFO {
            Manner::Polled(PIPE_CHUNK)
        } else {
            Manner::Polled(TERMINAL_CHUNK)
        };
        Ok(Self { fd, manner })
    }

    /// Writes what fits.
    ///
    /// # Errors
    /// EAGAIN when nothing fits now; anything else means that the sink is broken.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.manner {
            Manner::Socket => {
                send(self.fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
            }
            Manner::Plain => nix::unistd::write(&self.fd, bytes),
            Manner::Polled(chunk) => {
                let mut entry = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut entry, PollTimeout::ZERO)? == 0 {
                    return Err(Errno::EAGAIN);
                }
                nix::unistd::write(&self.fd, bytes.get(..chunk).unwrap_or(bytes))
            }
        }
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
