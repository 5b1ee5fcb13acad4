//! Who is at the other end of a console: a terminal, a pipe, a file, a socket, or nobody.
//!
//! What the guest says is kept while nobody listens, the newest 64 KiB, and shown to the next who comes. A peer that does not read
//! holds the guest up for a second at most; after that the oldest bytes are dropped, and counted, until it reads again.
//!
//! Descriptors may be shared with others (a terminal's with the user's shell), so their flags are left alone: each is
//! asked by poll(2) before it is used, and written in pieces that a ready one takes at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollFlags};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::write;
use tracing::{info, warn};

use bulkhead_ipc::vhost_user::backend::poll_worker::own_event;

/// Bytes kept for a peer that is absent or slow.
pub const KEPT: usize = 64 * 1024;
/// How long a peer that reads nothing holds up the guest.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// What a pipe that is ready takes without blocking (PIPE_BUF).
const PIPE_PIECE: usize = 4096;
/// What a terminal that is ready takes without blocking, or nearly always so.
const TERMINAL_PIECE: usize = 256;

/// How a descriptor is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Socket,
    Regular,
    Pipe,
    Other,
}

fn kind(fd: &OwnedFd) -> Kind {
    let mode = fstat(fd).map_or(0, |status| status.st_mode);
    match SFlag::from_bits_truncate(mode) & SFlag::S_IFMT {
        SFlag::S_IFSOCK => Kind::Socket,
        SFlag::S_IFREG => Kind::Regular,
        SFlag::S_IFIFO => Kind::Pipe,
        _ => Kind::Other,
    }
}

/// A new peer, on its way to the worker.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// Where bytes for the guest come from.
    pub input: Option<Arc<OwnedFd>>,
    /// Where bytes from the guest go.
    pub output: Option<Arc<OwnedFd>>,
}

/// The present peer and what is kept for it.
#[derive(Debug)]
pub struct Peer {
    ends: Ends,
    kind: Kind,
    kept: VecDeque<u8>,
    /// Since when the peer has taken nothing although there is no more room.
    stalled: Option<Instant>,
    /// The peer had its time; what does not fit drops the oldest.
    given_up: bool,
    dropped: u64,
}

impl Default for Peer {
    fn default() -> Self {
        let ends = Ends::default();
        Self { ends, kind: Kind::Other, kept: VecDeque::new(), stalled: None, given_up: false, dropped: 0 }
    }
}

impl Peer {
    /// Lets `ends` take the place of the present peer.
    pub fn attach(&mut self, ends: Ends, epoll: &Epoll) {
        self.detach_input(epoll);
        self.detach_output(epoll);
        let both = match (&ends.input, &ends.output) {
            (Some(input), Some(output)) => input.as_raw_fd() == output.as_raw_fd(),
            _ => false,
        };
        let watch = |fd: &OwnedFd, flags| {
            // A regular file cannot be watched, and need not be: it is always ready.
            if let Err(errno) = epoll.add(fd, own_event(flags | EpollFlags::EPOLLET))
                && errno != Errno::EPERM
            {
                warn!(%errno, "a console's peer cannot be watched");
            }
        };
        match (&ends.input, &ends.output) {
            (Some(fd), _) if both => watch(fd, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT),
            (input, output) => {
                input.iter().for_each(|fd| watch(fd, EpollFlags::EPOLLIN));
                output.iter().for_each(|fd| watch(fd, EpollFlags::EPOLLOUT));
            }
        }
        self.kind = ends.output.as_deref().map_or(Kind::Other, kind);
        self.ends = ends;
        self.flush(epoll);
    }

    fn detach_input(&mut self, epoll: &Epoll) {
        if let Some(fd) = self.ends.input.take()
            && !self.ends.output.as_ref().is_some_and(|output| Arc::ptr_eq(output, &fd))
        {
            let _ = epoll.delete(&*fd);
        }
    }

    fn detach_output(&mut self, epoll: &Epoll) {
        if let Some(fd) = self.ends.output.take()
            && !self.ends.input.as_ref().is_some_and(|input| Arc::ptr_eq(input, &fd))
        {
            let _ = epoll.delete(&*fd);
        }
        self.stalled = None;
        self.given_up = false;
    }

    /// The input, if reading it will not block: bytes, an end or an error are waiting.
    pub fn ready_input(&self) -> Option<BorrowedFd<'_>> {
        let input = self.ends.input.as_ref()?;
        ready(input, PollFlags::POLLIN).then(|| input.as_fd())
    }

    /// The input has ended or failed.
    pub fn input_ended(&mut self, epoll: &Epoll) {
        self.detach_input(epoll);
    }

    /// Bytes that [`Self::say`] can take now. With a peer that is merely slow it may be none; then the caller waits, and comes
    /// back on an event or after [`Self::patience`].
    pub fn room(&self) -> usize {
        if self.ends.output.is_none() || self.given_up {
            return KEPT;
        }
        KEPT.saturating_sub(self.kept.len())
    }

    /// How long the guest should wait for the peer, from now; `None` if it need not.
    pub fn patience(&self) -> Option<Duration> {
        let since = self.stalled?;
        (!self.given_up).then(|| PATIENCE.saturating_sub(since.elapsed()))
    }

    /// The guest says something, at most [`KEPT`] bytes.
    pub fn say(&mut self, mut bytes: &[u8], epoll: &Epoll) {
        if self.kept.is_empty() {
            while !bytes.is_empty() {
                match self.write(bytes) {
                    Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                    Err(error) => {
                        self.write_failed(&error, epoll);
                        break;
                    }
                }
            }
        }
        let room = KEPT.saturating_sub(self.kept.len());
        let excess = bytes.len().saturating_sub(room).min(self.kept.len());
        if excess > 0 {
            self.kept.drain(..excess);
            self.dropped = self.dropped.saturating_add(excess as u64);
        }
        self.kept.extend(bytes);
    }

    /// Writes what is kept, as far as the peer takes it.
    pub fn flush(&mut self, epoll: &Epoll) {
        let mut progress = false;
        while !self.kept.is_empty() {
            let (first, _) = self.kept.as_slices();
            match self.write(first) {
                Ok(count) => {
                    self.kept.drain(..count.min(self.kept.len()));
                    progress |= count > 0;
                }
                Err(error) => {
                    self.write_failed(&error, epoll);
                    break;
                }
            }
        }
        if progress || self.kept.len() < KEPT {
            self.stalled = None;
            self.given_up = false;
        } else if self.ends.output.is_some() {
            let since = *self.stalled.get_or_insert_with(Instant::now);
            self.given_up = since.elapsed() >= PATIENCE;
        }
        if progress && self.dropped > 0 {
            info!(bytes = self.dropped, "output was dropped because nobody read it");
            self.dropped = 0;
        }
        if self.kept.is_empty() {
            // Idle consoles hold no buffer.
            self.kept = VecDeque::new();
        }
    }

    fn write_failed(&mut self, error: &io::Error, epoll: &Epoll) {
        match error.kind() {
            io::ErrorKind::WouldBlock => {}
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => {
                self.detach_output(epoll);
            }
            _ => {
                warn!(%error, "a console's output failed and is given up");
                self.detach_output(epoll);
            }
        }
    }

    /// Writes some of `bytes` without blocking.
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let output = self.ends.output.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let piece = match self.kind {
            Kind::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                return Ok(send(output.as_raw_fd(), bytes, flags)?);
            }
            Kind::Regular => bytes.len(),
            Kind::Pipe => PIPE_PIECE,
            Kind::Other => TERMINAL_PIECE,
        };
        if !ready(output, PollFlags::POLLOUT) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(write(output, bytes.get(..piece).unwrap_or(bytes))?)
    }
}

/// Whether a descriptor is ready, hung up or in error now.
fn ready(fd: &OwnedFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests;
