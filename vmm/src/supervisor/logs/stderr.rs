//! Standard error as a place for messages that nobody has to read: a terminal that was stopped, or a pipe whose reader hangs,
//! must not stop the supervisor.
//!
//! That a descriptor polls writable says nothing about how much it takes, and its O_NONBLOCK is shared with whoever else
//! has it. So a pipe or terminal is opened once more, without waiting; a socket takes that wish with each call.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};

/// Where messages go unless they go to a file.
#[derive(Debug)]
pub struct Stderr {
    way: Way,
    /// The last message was written in part.
    torn: bool,
}

#[derive(Debug)]
enum Way {
    /// A description of our own of the same pipe or terminal.
    Own(File),
    Socket(OwnedFd),
    /// A file, which never waits; or something that cannot be opened again, where writing may wait although it polled writable.
    Shared(File),
}

impl Stderr {
    /// Looks at what `descriptor` is.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(descriptor: BorrowedFd<'_>) -> io::Result<Self> {
        let kind = fstat(descriptor).map_or(SFlag::empty(), |stat| SFlag::from_bits_truncate(stat.st_mode));
        let shared = || Ok::<_, io::Error>(Way::Shared(descriptor.try_clone_to_owned()?.into()));
        let way = match kind & SFlag::S_IFMT {
            SFlag::S_IFSOCK => Way::Socket(descriptor.try_clone_to_owned()?),
            SFlag::S_IFIFO | SFlag::S_IFCHR => {
                let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
                let again =
                    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
                again.map_or_else(|_| shared(), |file| Ok(Way::Own(file)))?
            }
            _ => shared()?,
        };
        Ok(Self { way, torn: false })
    }

    /// Writes a line, or what there is room for.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when not all of it was written.
    pub fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let whole = if self.torn { [b"\n", line].concat() } else { line.to_vec() };
        let written = self.write_some(&whole)?;
        if written > 0 {
            self.torn = written < whole.len();
        }
        if written < whole.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.way {
            Way::Own(file) => file.write(bytes),
            Way::Socket(socket) => {
                Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?)
            }
            Way::Shared(file) => {
                let mut ready = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut ready, PollTimeout::ZERO) == Ok(1) { file.write(bytes) } else { Ok(0) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc;
    use std::time::Duration;

    use nix::unistd::pipe;

    use super::*;

    /// Writes long lines until one is lost, makes room, and returns all that arrived.
    fn overflow(mut reader: impl Read + Send + 'static, writer: OwnedFd) -> String {
        let (done, finished) = mpsc::channel();
        std::thread::spawn(move || {
            let mut stderr = Stderr::new(writer.as_fd()).unwrap();
            // Longer than what makes a pipe poll writable.
            let line = format!("{}\n", "x".repeat(6999));
            while stderr.write(line.as_bytes()).is_ok() {}
            let mut text = vec![0; 1 << 16];
            let count = reader.read(&mut text).unwrap();
            stderr.write(b"after\n").unwrap();
            drop((stderr, writer));
            let mut text = String::from_utf8(text[..count].to_vec()).unwrap();
            reader.read_to_string(&mut text).unwrap();
            done.send(text).unwrap();
        });
        finished.recv_timeout(Duration::from_secs(10)).expect("it waits for the reader")
    }

    #[test]
    fn a_full_pipe_or_socket_makes_nobody_wait() {
        let (reader, writer) = pipe().unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        for text in [overflow(File::from(reader), writer), overflow(ours, theirs.into())] {
            assert!(text.ends_with("x\nafter\n"), "a line of its own");
        }
    }
}
