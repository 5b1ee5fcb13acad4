//! One stream socket with a deadline on every wait.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockType, SockaddrLike, SockaddrStorage, getsockname,
    getsockopt, recvmsg, send, sendmsg, setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use rustix::net::RecvFlags;

use super::error::Fault;
use crate::rights;

/// Descriptors that one message can bring; more are refused, and closed.
const MAX_DESCRIPTORS: usize = 4;

/// A connected Unix stream socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    deadline: Duration,
}

/// What one receive brought.
#[derive(Debug)]
pub(super) enum Received {
    /// So many bytes, and the descriptors that came with them.
    Bytes(usize, Vec<OwnedFd>),
    /// Nothing is there (only without waiting).
    Nothing,
    /// The peer has closed.
    Closed,
}

impl Socket {
    /// Takes a connected socket and gives it its deadline.
    pub fn new(fd: OwnedFd, deadline: Duration) -> Result<Self, Fault> {
        let deadline = deadline.max(Duration::from_millis(1));
        let kind = getsockopt(&fd, sockopt::SockType).map_err(|error| fault("getsockopt", error))?;
        let address: SockaddrStorage =
            getsockname(fd.as_raw_fd()).map_err(|error| fault("getsockname", error))?;
        if kind != SockType::Stream || address.family() != Some(AddressFamily::Unix) {
            return Err(Fault::Descriptor("not a Unix stream socket"));
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|error| fault("fcntl", error))?;
        let flags = OFlag::from_bits_truncate(flags);
        if flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags.difference(OFlag::O_NONBLOCK)))
                .map_err(|error| fault("fcntl", error))?;
        }
        let mut socket = Self { fd, deadline };
        socket.set_deadline(deadline)?;
        Ok(socket)
    }

    /// Changes the deadline of later exchanges.
    pub fn set_deadline(&mut self, deadline: Duration) -> Result<(), Fault> {
        self.deadline = deadline.max(Duration::from_millis(1));
        let timeout = TimeVal::milliseconds(i64::try_from(self.deadline.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&self.fd, sockopt::SendTimeout, &timeout).map_err(|error| fault("setsockopt", error))?;
        setsockopt(&self.fd, sockopt::ReceiveTimeout, &timeout).map_err(|error| fault("setsockopt", error))
    }

    /// Sends all of `bytes`, the descriptors beside the first of them. One system call unless the socket is full.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        let first = self.send_once(bytes, descriptors, MsgFlags::empty());
        match first {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(sent) => self.send_rest(bytes.get(sent..).unwrap_or_default(), &[]),
            Err(Errno::EINTR) => self.send_rest(bytes, descriptors),
            Err(error) => Err(self.failure("send", error)),
        }
    }

    /// The slow path: the socket was full or a signal came.
    fn send_rest(&self, mut bytes: &[u8], mut descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        let end = self.end();
        while !bytes.is_empty() {
            match self.send_once(bytes, descriptors, MsgFlags::MSG_DONTWAIT) {
                Ok(sent) => {
                    bytes = bytes.get(sent..).unwrap_or_default();
                    descriptors = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, end)?,
                Err(error) => return Err(self.failure("send", error)),
            }
        }
        Ok(())
    }

    fn send_once(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<usize, Errno> {
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        if descriptors.is_empty() {
            return send(self.fd.as_raw_fd(), bytes, flags);
        }
        let mut numbers = [0; MAX_DESCRIPTORS];
        let count = descriptors.len().min(MAX_DESCRIPTORS);
        for (number, descriptor) in numbers.iter_mut().zip(descriptors) {
            *number = descriptor.as_raw_fd();
        }
        let rights = [ControlMessage::ScmRights(numbers.get(..count).unwrap_or_default())];
        sendmsg::<()>(self.fd.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None)
    }

    /// Receives what is there, waiting for the first byte until the deadline. Descriptors that come are refused.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Fault> {
        let mut end = None;
        loop {
            let flags = if end.is_none() { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
            let mut space = [IoSliceMut::new(buffer)];
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut space, None, flags) {
                Ok(message) if message.flags.contains(MsgFlags::MSG_CTRUNC) => {
                    return Err(Fault::Descriptors { expected: 0, received: 1 });
                }
                Ok(message) if message.bytes == 0 => return Err(Fault::Closed),
                Ok(message) => return Ok(message.bytes),
                Err(Errno::EINTR) => {
                    end.get_or_insert_with(|| self.end());
                }
                Err(Errno::EAGAIN) => match end {
                    None => return Err(Fault::Deadline(self.deadline)),
                    Some(end) => self.wait(PollFlags::POLLIN, end)?,
                },
                Err(error) => return Err(self.failure("recvmsg", error)),
            }
        }
    }

    /// Receives what is there with its descriptors, without waiting.
    pub fn receive_now(&self, buffer: &mut [u8]) -> Result<Received, Fault> {
        let received = match rights::receive(self.as_fd(), buffer, MAX_DESCRIPTORS, RecvFlags::empty()) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Received::Nothing),
            Err(Errno::ECONNRESET) => return Ok(Received::Closed),
            Err(error) => return Err(fault("recvmsg", error)),
        };
        if received.lost || received.count > MAX_DESCRIPTORS {
            return Err(Fault::Descriptors { expected: 1, received: received.count });
        }
        let bytes = received.bytes;
        Ok(if bytes == 0 { Received::Closed } else { Received::Bytes(bytes, received.descriptors) })
    }

    /// Receives with descriptors, waiting for the first byte until the deadline.
    pub fn receive_with_descriptors(&self, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Fault> {
        let end = self.end();
        loop {
            match self.receive_now(buffer)? {
                Received::Bytes(count, descriptors) => return Ok((count, descriptors)),
                Received::Nothing => self.wait(PollFlags::POLLIN, end)?,
                Received::Closed => return Err(Fault::Closed),
            }
        }
    }

    /// When an exchange that begins now must be over.
    pub fn end(&self) -> Instant {
        let now = Instant::now();
        now.checked_add(self.deadline).unwrap_or(now)
    }

    /// Fails when `end` has passed.
    pub fn check(&self, end: Instant) -> Result<(), Fault> {
        if Instant::now() >= end { Err(Fault::Deadline(self.deadline)) } else { Ok(()) }
    }

    fn wait(&self, events: PollFlags, end: Instant) -> Result<(), Fault> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Fault::Deadline(self.deadline));
        }
        // Rounded up: a remainder below a millisecond must not become a busy loop.
        let milliseconds = left.as_millis().saturating_add(1);
        let timeout = PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.fd.as_fd(), events)], timeout) {
            Ok(0) => Err(Fault::Deadline(self.deadline)),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(fault("poll", error)),
        }
    }

    fn failure(&self, call: &'static str, error: Errno) -> Fault {
        match error {
            Errno::EAGAIN => Fault::Deadline(self.deadline),
            Errno::EPIPE | Errno::ECONNRESET => Fault::Closed,
            error => fault(call, error),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn fault(call: &'static str, error: Errno) -> Fault {
    Fault::Socket { call, error }
}
