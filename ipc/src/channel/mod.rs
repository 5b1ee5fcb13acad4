//! Control messages between the supervisor and its processes.
//!
//! A channel is one `SOCK_SEQPACKET` pair: a packet is a message (postcard, [`message`]), its descriptors come with it by
//! `SCM_RIGHTS`. Whatever arrives is hostile: a packet is at most [`MAX_MESSAGE`] bytes with at most [`MAX_DESCRIPTORS`]
//! descriptors, must decode without a rest, and every descriptor that came with a refused packet is closed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;

mod device_config;
pub mod message;
mod packet;
#[cfg(test)]
mod tests;

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors that one message carries.
pub const MAX_DESCRIPTORS: usize = 64;

/// Why a message was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end was closed, or sent the empty packet that means the same.
    #[error("the other end of the control channel is closed")]
    PeerClosed,
    /// Nothing arrived, or could be sent, in time.
    #[error("the other end of the control channel did not answer in time")]
    Deadline,
    /// The message does not fit.
    #[error("a control message of {length} bytes is longer than {MAX_MESSAGE}")]
    TooLong {
        /// Encoded length in bytes; for a received packet the length before it was cut.
        length: usize,
    },
    /// More descriptors than a message may carry, or than this process may hold.
    #[error(
        "a control message with more than {MAX_DESCRIPTORS} descriptors, or more than this process may open"
    )]
    TooManyDescriptors,
    /// The packet is not a message of the expected type.
    #[error("a malformed control message: {0}")]
    Malformed(postcard::Error),
    /// The message decoded, but bytes were left.
    #[error("a control message with {0} bytes too many")]
    TrailingBytes(usize),
    /// A field names a descriptor that did not come, or that another field named already.
    #[error("a control message names descriptor {index}, which did not come with it or is used twice")]
    NoSuchDescriptor {
        /// The index in the message.
        index: u8,
    },
    /// Descriptors came that no field names.
    #[error("a control message came with {count} descriptors that it does not name")]
    UnusedDescriptors {
        /// How many.
        count: usize,
    },
    /// A system call failed.
    #[error("the control channel failed: {0}")]
    Io(#[from] io::Error),
}

/// One end of a control channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Makes both ends, close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Io`] when no descriptor is left.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(io::Error::from)?;
        Ok((Self { socket: ours }, Self { socket: theirs }))
    }

    /// Takes over a descriptor that is one end of a channel, in a jailed process descriptor 3.
    #[must_use]
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Gives the descriptor up, for [`crate::jail::JailSpec::channel`].
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Sends a message without waiting.
    ///
    /// # Errors
    /// [`ChannelError::Deadline`] when the peer has not read what was sent before; else as [`Self::send_within`].
    pub fn send<M: Serialize>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.send_within(message, descriptors, Duration::ZERO)
    }

    /// Sends a message, waiting at most `deadline` for room in the peer's queue.
    ///
    /// # Errors
    /// [`ChannelError::TooLong`], [`ChannelError::TooManyDescriptors`], [`ChannelError::PeerClosed`],
    /// [`ChannelError::Deadline`], [`ChannelError::Io`].
    pub fn send_within<M: Serialize>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<(), ChannelError> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::TooManyDescriptors);
        }
        let bytes = postcard::to_stdvec(message).map_err(ChannelError::Malformed)?;
        // An empty packet cannot be told from the end of the channel, and no message encodes to nothing.
        if bytes.is_empty() {
            return Err(ChannelError::Malformed(postcard::Error::SerializeBufferFull));
        }
        if bytes.len() > MAX_MESSAGE {
            return Err(ChannelError::TooLong { length: bytes.len() });
        }
        let end = Instant::now().checked_add(deadline);
        loop {
            match packet::send(self.socket.as_fd(), &bytes, descriptors) {
                Ok(()) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, end)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ChannelError::PeerClosed),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    /// Receives one message and its descriptors, which are close-on-exec; `None` waits without bound, which only a
    /// process may do that has nothing else to do until the supervisor speaks.
    ///
    /// # Errors
    /// Any [`ChannelError`]; the packet is gone and its descriptors are closed, the channel stays usable except after
    /// [`ChannelError::PeerClosed`].
    pub fn recv<M: DeserializeOwned>(
        &self,
        deadline: Option<Duration>,
    ) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        let end = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        let mut bytes = Vec::new();
        let received = loop {
            // The buffer is as long as the packet: a fixed one of the greatest length would stay dirty in every process.
            let received = packet::length(self.socket.as_fd()).and_then(|length| {
                bytes.resize(length.min(MAX_MESSAGE), 0);
                packet::receive(self.socket.as_fd(), &mut bytes)
            });
            match received {
                Ok(received) => break received,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, end)?,
                Err(Errno::ECONNRESET) => return Err(ChannelError::PeerClosed),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        };
        if received.length == 0 {
            return Err(ChannelError::PeerClosed);
        }
        if received.descriptors_cut {
            return Err(ChannelError::TooManyDescriptors);
        }
        let packet = bytes.get(..received.length).ok_or(ChannelError::TooLong { length: received.length })?;
        let (message, rest) = postcard::take_from_bytes(packet).map_err(ChannelError::Malformed)?;
        if !rest.is_empty() {
            return Err(ChannelError::TrailingBytes(rest.len()));
        }
        Ok((message, received.descriptors))
    }

    /// Waits for the socket; `None` waits without bound.
    fn wait(&self, events: PollFlags, end: Option<Instant>) -> Result<(), ChannelError> {
        loop {
            let timeout = match end {
                None => PollTimeout::NONE,
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ChannelError::Deadline);
                    }
                    // Rounded up, so that the last fraction of a millisecond is not a busy loop.
                    let left = left.saturating_add(Duration::from_micros(999));
                    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
                }
            };
            match nix::poll::poll(&mut [PollFd::new(self.socket.as_fd(), events)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
