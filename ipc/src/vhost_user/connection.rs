//! Framing of vhost-user messages on a stream socket: header, payload, descriptors, deadlines.
//!
//! Follows "Message Specification" and "Communication" of the vhost-user protocol. Both ends use it, so it
//! judges only what holds for every message: the version, the size, the number of descriptors. What a request
//! means is up to the caller.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use thiserror::Error;

use super::deadline::Deadline;
use crate::rights;

/// Size of a message header, bytes.
pub const HEADER_SIZE: usize = 12;
/// Largest payload accepted or sent, bytes: a whole configuration space of 4 KiB with its 12-byte header, rounded up.
pub const MAX_PAYLOAD: usize = 0x1000 + 0x100;
/// Largest number of descriptors accepted or sent with a message: a memory table of 32 regions.
pub const MAX_DESCRIPTORS: usize = 32;

/// The protocol's version, bits 0 and 1 of the flags.
const VERSION: u32 = 0x1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// What a message is, as its header's flags tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A request without NEED_REPLY; some requests are answered all the same.
    Request,
    /// A request with NEED_REPLY: the receiver answers with a u64, zero for success, where it has no other reply.
    RequestNeedingReply,
    /// A reply.
    Reply,
}

impl Kind {
    fn flags(self) -> u32 {
        VERSION
            | match self {
                Kind::Request => 0,
                Kind::RequestNeedingReply => NEED_REPLY,
                Kind::Reply => REPLY,
            }
    }
}

/// A message as received: nothing of its contents has been judged.
#[derive(Debug)]
pub struct Message {
    /// Request code; in a reply that of the request.
    pub request: u32,
    /// Request or reply.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
    /// At most [`MAX_DESCRIPTORS`], close-on-exec; closed when dropped.
    pub descriptors: Vec<OwnedFd>,
}

/// Why a message could not be sent or received. After any of them the stream's position is unknown: close it.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection inside a message.
    #[error("the peer closed the connection in the middle of a message")]
    ClosedInside,
    /// The peer did not send, or take, the message in time.
    #[error("the deadline passed while {0}")]
    Late(&'static str),
    /// Header with another version than 1.
    #[error("header flags {0:#x} have a version other than 1")]
    Version(u32),
    /// Header with reserved flags, or with both REPLY and NEED_REPLY.
    #[error("header flags {0:#x} contradict each other or are reserved")]
    Flags(u32),
    /// Payload too large.
    #[error("a payload of {size} bytes exceeds the limit of {MAX_PAYLOAD}")]
    TooLarge {
        /// Size as announced.
        size: usize,
    },
    /// Too many descriptors.
    #[error("{count} descriptors in a message exceed the limit of {MAX_DESCRIPTORS}")]
    TooManyDescriptors {
        /// How many arrived.
        count: usize,
    },
    /// Descriptors arrived after the header.
    #[error("descriptors arrived in the middle of a message")]
    MisplacedDescriptors,
    /// The kernel could not deliver all descriptors (MSG_CTRUNC).
    #[error("descriptors were lost: this process has reached its limit of open descriptors")]
    DescriptorsLost,
    /// System call failed.
    #[error("the socket failed while {what}: {errno}")]
    Socket {
        /// The activity.
        what: &'static str,
        /// The error.
        errno: Errno,
    },
}

/// One end of a vhost-user connection (front-end channel or back-end channel).
///
/// System calls on the socket never block (`MSG_DONTWAIT`, whatever the socket's own mode); waits are poll(2) up to the deadline.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

impl From<UnixStream> for Connection {
    fn from(stream: UnixStream) -> Self {
        Self { stream }
    }
}

impl From<OwnedFd> for Connection {
    fn from(descriptor: OwnedFd) -> Self {
        Self { stream: descriptor.into() }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> Self {
        connection.stream.into()
    }
}

impl Connection {
    /// Two connected ends, close-on-exec.
    ///
    /// # Errors
    /// When socketpair(2) fails.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = UnixStream::pair()?;
        Ok((a.into(), b.into()))
    }

    /// Sends one message.
    ///
    /// # Errors
    /// [`ConnectionError::TooLarge`], [`ConnectionError::TooManyDescriptors`] before anything is sent;
    /// [`ConnectionError::Late`] when the peer does not take it in time, [`ConnectionError::Closed`] when it is gone.
    pub fn send(
        &self,
        request: u32,
        kind: Kind,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), ConnectionError> {
        let size = match u32::try_from(payload.len()) {
            Ok(size) if payload.len() <= MAX_PAYLOAD => size,
            _ => {
                return Err(ConnectionError::TooLarge { size: payload.len() });
            }
        };
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(ConnectionError::TooManyDescriptors { count: descriptors.len() });
        }
        let mut bytes = Vec::with_capacity(HEADER_SIZE.saturating_add(payload.len()));
        for word in [request, kind.flags(), size] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(payload);

        let mut rest: &[u8] = &bytes;
        let mut descriptors = descriptors;
        while !rest.is_empty() {
            match self.send_part(rest, descriptors) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    descriptors = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, deadline, "sending")?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ConnectionError::Closed),
                Err(errno) => {
                    return Err(ConnectionError::Socket { what: "sending", errno });
                }
            }
        }
        Ok(())
    }

    /// Receives one message, all of it before the deadline.
    ///
    /// # Errors
    /// See [`ConnectionError`].
    pub fn receive(&self, deadline: Deadline) -> Result<Message, ConnectionError> {
        let mut header = [0; HEADER_SIZE];
        let mut descriptors = Vec::new();
        self.fill(&mut header, true, &mut descriptors, deadline)?;
        let (request, kind, size) = parse_header(&header)?;
        let mut payload = vec![0; size];
        self.fill(&mut payload, false, &mut descriptors, deadline)?;
        Ok(Message { request, kind, payload, descriptors })
    }

    /// Waits without bound for the start of a message, then receives it within `limit`.
    /// For a back end between two requests.
    ///
    /// # Errors
    /// See [`ConnectionError`].
    pub fn receive_next(&self, limit: Duration) -> Result<Message, ConnectionError> {
        self.wait(PollFlags::POLLIN, Deadline::never(), "waiting")?;
        self.receive(Deadline::after(limit))
    }

    /// Waits until the socket is ready, hung up or in error; the next system call tells which.
    fn wait(&self, events: PollFlags, deadline: Deadline, what: &'static str) -> Result<(), ConnectionError> {
        loop {
            let mut fds = [PollFd::new(self.stream.as_fd(), events)];
            match poll(&mut fds, deadline.poll_timeout()) {
                Ok(0) if deadline.passed() => return Err(ConnectionError::Late(what)),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(ConnectionError::Socket { what, errno }),
            }
        }
    }

    fn send_part(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Errno::EMSGSIZE);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags).map_err(to_errno)
    }

    /// Reads until `buffer` is full. `first`: nothing of the message has been read yet.
    fn fill(
        &self,
        buffer: &mut [u8],
        first: bool,
        descriptors: &mut Vec<OwnedFd>,
        deadline: Deadline,
    ) -> Result<(), ConnectionError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let held = descriptors.len();
            let received = self.receive_part(rest, descriptors)?;
            // They come with the message's first byte. A peer that adds some to every byte must not get so far as to exhaust
            // this process's descriptors, which other devices need too.
            if descriptors.len() > held && !(first && filled == 0) {
                return Err(ConnectionError::MisplacedDescriptors);
            }
            match received {
                Ok(0) if first && filled == 0 => return Err(ConnectionError::Closed),
                Ok(0) => return Err(ConnectionError::ClosedInside),
                Ok(count) => {
                    filled = filled.saturating_add(count);
                    // A peer that sends a byte now and then must not keep this loop alive beyond the deadline.
                    if deadline.passed() && filled < buffer.len() {
                        return Err(ConnectionError::Late("receiving"));
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, deadline, "receiving")?,
                Err(Errno::ECONNRESET) if first && filled == 0 => {
                    return Err(ConnectionError::Closed);
                }
                Err(Errno::ECONNRESET) => return Err(ConnectionError::ClosedInside),
                Err(errno) => {
                    return Err(ConnectionError::Socket { what: "receiving", errno });
                }
            }
        }
        Ok(())
    }

    fn receive_part(
        &self,
        buffer: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<Result<usize, Errno>, ConnectionError> {
        let mut received = match rights::receive(self.as_fd(), buffer, MAX_DESCRIPTORS, RecvFlags::empty()) {
            Ok(received) => received,
            Err(errno) => return Ok(Err(errno)),
        };
        if received.count > MAX_DESCRIPTORS {
            return Err(ConnectionError::TooManyDescriptors { count: received.count });
        }
        if received.lost {
            return Err(ConnectionError::DescriptorsLost);
        }
        descriptors.append(&mut received.descriptors);
        Ok(Ok(received.bytes))
    }
}

fn to_errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

/// Takes request code, kind and payload size out of a header.
fn parse_header(header: &[u8; HEADER_SIZE]) -> Result<(u32, Kind, usize), ConnectionError> {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *header;
    let request = u32::from_le_bytes([a, b, c, d]);
    let flags = u32::from_le_bytes([e, f, g, h]);
    let size = u32::from_le_bytes([i, j, k, l]);
    if flags & VERSION_MASK != VERSION {
        return Err(ConnectionError::Version(flags));
    }
    let kind = match flags & !VERSION_MASK {
        0 => Kind::Request,
        NEED_REPLY => Kind::RequestNeedingReply,
        REPLY => Kind::Reply,
        _ => return Err(ConnectionError::Flags(flags)),
    };
    match usize::try_from(size) {
        Ok(size) if size <= MAX_PAYLOAD => Ok((request, kind, size)),
        _ => Err(ConnectionError::TooLarge { size: usize::try_from(size).unwrap_or(usize::MAX) }),
    }
}

#[cfg(test)]
mod tests;
