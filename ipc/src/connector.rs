//! Unix sockets for a process that may neither name nor accept one: what stands behind a vsock device.
//!
//! The host's end of a vsock is a listening socket at a path, and one socket at `PATH_PORT` for each port that the guest may
//! connect to (Firecracker's convention). A sealed process has no file system, and no policy allows `connect` or
//! `accept`. So both are done outside, by the supervisor or the parent of a service, on a channel of their own: the device asks for a
//! port and gets a connected descriptor or the reason why not, and gets every connection that was accepted. All that it
//! can choose is the number behind the underscore.
//!
//! The outside never waits for the device: an answer that has no room in the channel is dropped, and the socket is closed.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::{Deserialize, Serialize};

use crate::channel::{Channel, ChannelError};

/// Longest path that leaves room for `_4294967295` in a socket address, bytes.
pub const MAX_PATH: usize = 107 - 11;

/// Requests served, and connections accepted, in one go.
const AT_ONCE: usize = 16;

/// What the device asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// The port: connect to `PATH_PORT`.
    pub port: u32,
}

/// What the device is told. [`Answer::Accepted`] and [`Answer::Connected`] come with one descriptor, a stream socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Somebody has connected to the path.
    Accepted,
    /// The answer to [`Connect`].
    Connected {
        /// As asked.
        port: u32,
    },
    /// The answer to [`Connect`]: nobody listens there.
    Refused {
        /// As asked.
        port: u32,
        /// Why.
        errno: i32,
    },
}

/// The outside: connects and accepts for the device.
#[derive(Debug)]
pub struct Connector {
    path: PathBuf,
    channel: Channel,
}

impl Connector {
    /// A connector for sockets at `path` and beside it, and the end of its channel for the device.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(path: &Path) -> Result<(Self, OwnedFd), ChannelError> {
        let (ours, theirs) = Channel::pair()?;
        Ok((Self { path: path.to_owned(), channel: ours }, theirs.into_fd()))
    }

    /// Gives the device a connection that was accepted. One that cannot be given is closed.
    pub fn admit(&self, connection: &OwnedFd) {
        let _full_or_gone = self.channel.send(&Answer::Accepted, &[connection.as_fd()]);
    }

    /// Carries out what the device has asked for, as much as is good in one go. Call it when the channel is readable.
    ///
    /// # Errors
    /// The other end is closed, or sends nonsense: the channel is of no more use.
    pub fn serve(&self) -> Result<(), ChannelError> {
        for _ in 0..AT_ONCE {
            let (Connect { port }, _) = match self.channel.recv(Some(Duration::ZERO)) {
                Ok(received) => received,
                Err(ChannelError::Deadline) => return Ok(()),
                Err(error) => return Err(error),
            };
            let _full_or_gone = match self.connect(port) {
                Ok(socket) => self.channel.send(&Answer::Connected { port }, &[socket.as_fd()]),
                Err(errno) => self.channel.send(&Answer::Refused { port, errno: errno as i32 }, &[]),
            };
        }
        Ok(())
    }

    /// Connects without waiting: a listener whose queue is full refuses.
    fn connect(&self, port: u32) -> Result<OwnedFd, Errno> {
        let mut path: OsString = self.path.clone().into();
        path.push(format!("_{port}"));
        let address = UnixAddr::new(Path::new(&path))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address)?;
        Ok(socket)
    }

    /// Connects and accepts until the device has gone: for who has nothing else to do. `listener` is non-blocking.
    ///
    /// # Errors
    /// The channel failed, or waiting did. That the device has gone is no error.
    pub fn run(&self, listener: &UnixListener) -> Result<(), ChannelError> {
        loop {
            let mut fds = [
                PollFd::new(self.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
            match self.serve() {
                Ok(()) => {}
                Err(ChannelError::PeerClosed) => return Ok(()),
                Err(error) => return Err(error),
            }
            for _ in 0..AT_ONCE {
                match listener.accept() {
                    Ok((stream, _)) => self.admit(&stream.into()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Out of descriptors: those of ended connections come back.
                    Err(_) => {
                        std::thread::sleep(Duration::from_millis(50));
                        break;
                    }
                }
            }
        }
    }
}

impl AsFd for Connector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const LIMIT: Option<Duration> = Some(Duration::from_secs(5));

    fn answer(device: &Channel) -> (Answer, Option<UnixStream>) {
        let (answer, mut descriptors) = device.recv::<Answer>(LIMIT).unwrap();
        (answer, descriptors.pop().map(UnixStream::from))
    }

    #[test]
    fn a_port_is_the_socket_beside_the_path_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let (connector, device) = Connector::new(&path).unwrap();
        let device = Channel::from_fd(device);
        let listener = UnixListener::bind(folder.path().join("v.sock_52")).unwrap();
        device.send(&Connect { port: 52 }, &[]).unwrap();
        device.send(&Connect { port: 53 }, &[]).unwrap();
        connector.serve().unwrap();
        let (found, stream) = answer(&device);
        assert_eq!(found, Answer::Connected { port: 52 });
        let (mut peer, _) = listener.accept().unwrap();
        stream.unwrap().write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        peer.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        assert_eq!(answer(&device).0, Answer::Refused { port: 53, errno: libc::ENOENT });
        drop(device);
        assert!(matches!(connector.serve(), Err(ChannelError::PeerClosed)));
    }

    #[test]
    fn a_device_that_reads_nothing_makes_nobody_wait() {
        let folder = tempfile::tempdir().unwrap();
        let (connector, device) = Connector::new(&folder.path().join("v")).unwrap();
        let device = Channel::from_fd(device);
        let begin = std::time::Instant::now();
        for _ in 0..2000 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            connector.admit(&ours.into());
            // Either the device has it, or its other end sees the end at once.
            theirs.set_nonblocking(true).unwrap();
            assert!(matches!(theirs.read(&mut [0]), Ok(0) | Err(_)));
            let _full = device.send(&Connect { port: 1 }, &[]);
            connector.serve().unwrap();
        }
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
