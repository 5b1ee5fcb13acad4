//! Several ranges of guest memory lent at once: what a device process does with the buffers of a descriptor chain.
//!
//! Contains unsafe code: the system calls that take pointers, the zeroed structure of some, and `Send` for the pointers they take.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::lent::{MOST_IOVECS, limits, mark, pieces, read_at, write_at};
use super::{Direction, GuestMemory, GuestRam, MemoryError};

/// Several ranges of guest memory lent to the kernel in one operation: the buffers of a descriptor chain.
///
/// Made once and used again: [`LentVector::complete`] empties it and keeps its storage, so that a request allocates
/// nothing. Whoever starts an asynchronous operation on it keeps it as it is until the operation has ended.
#[derive(Debug)]
pub struct LentVector {
    memory: Arc<GuestMemory>,
    direction: Direction,
    /// Guest addresses of `iovecs`, entry by entry.
    addresses: Vec<u64>,
    iovecs: Vec<libc::iovec>,
    /// Entries before this one have been moved.
    moved: usize,
}

// SAFETY: as for LentBuffer.
unsafe impl Send for LentVector {}
// SAFETY: as for LentBuffer.
unsafe impl Sync for LentVector {}

impl LentVector {
    pub(super) fn new(ram: &GuestRam, direction: Direction) -> Self {
        let memory = ram.shared_memory();
        Self { memory, direction, addresses: Vec::new(), iovecs: Vec::new(), moved: 0 }
    }

    /// Begins a new operation with other memory or another direction. An operation that was neither completed nor failed counts as
    /// failed.
    pub fn restart(&mut self, ram: &GuestRam, direction: Direction) {
        self.fail();
        if !Arc::ptr_eq(&self.memory, ram.inner_memory()) {
            self.memory = ram.shared_memory();
        }
        self.direction = direction;
    }

    /// Adds `len` bytes at `address`.
    ///
    /// # Errors
    /// The range is not wholly RAM; the list is as before.
    pub fn push(&mut self, address: u64, len: u64) -> Result<(), MemoryError> {
        let before = self.iovecs.len();
        let (addresses, iovecs) = (&mut self.addresses, &mut self.iovecs);
        let pushed = pieces(&self.memory, address, len, |piece| {
            addresses.push(piece.address);
            iovecs.push(piece.iovec);
        });
        if pushed.is_err() {
            self.addresses.truncate(before);
            self.iovecs.truncate(before);
        }
        pushed
    }

    /// What is left to move, for the kernel. The slice stays where it is until the list is changed.
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.iovecs.get(self.moved..).unwrap_or_default()
    }

    /// Bytes that are left to move.
    pub fn len(&self) -> usize {
        self.iovecs().iter().map(|iovec| iovec.iov_len).fold(0, usize::saturating_add)
    }

    /// Whether nothing is left to move.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes `bytes` to the first that are left to move, which stay lent: [`LentVector::advance`] follows.
    ///
    /// # Errors
    /// Guest memory cannot be written; part of it may have been.
    pub fn store(&self, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut rest = bytes;
        for (address, len) in self.ranges() {
            let Some((part, tail)) = rest.split_at_checked(len.min(rest.len())) else { break };
            self.memory
                .write_slice(part, GuestAddress(address))
                .map_err(|_| MemoryError::OutOfRange { address, len: part.len() as u64 })?;
            rest = tail;
        }
        Ok(())
    }

    /// Fills `bytes` from the first that are left to move, which stay lent: [`LentVector::advance`] follows.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn load(&self, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = bytes;
        for (address, len) in self.ranges() {
            let len = len.min(rest.len());
            let Some((part, tail)) = rest.split_at_mut_checked(len) else { break };
            self.memory
                .read_slice(part, GuestAddress(address))
                .map_err(|_| MemoryError::OutOfRange { address, len: len as u64 })?;
            rest = tail;
        }
        Ok(())
    }

    /// Addresses and lengths of what is left to move.
    fn ranges(&self) -> impl Iterator<Item = (u64, usize)> {
        let addresses = self.addresses.get(self.moved..).unwrap_or_default();
        addresses.iter().zip(self.iovecs()).map(|(address, iovec)| (*address, iovec.iov_len))
    }

    /// The kernel has moved the next `count` bytes; the rest stays lent, for a second try after a short one.
    pub fn advance(&mut self, count: usize) {
        let mut left = count;
        while let (Some(iovec), Some(address)) =
            (self.iovecs.get_mut(self.moved), self.addresses.get_mut(self.moved))
        {
            let part = left.min(iovec.iov_len);
            if self.direction.writes() {
                mark(&self.memory, *address, part);
            }
            left = left.saturating_sub(part);
            if part < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(part);
                iovec.iov_len = iovec.iov_len.saturating_sub(part);
                *address = address.saturating_add(part as u64);
                return;
            }
            self.moved = self.moved.saturating_add(1);
        }
    }

    /// Ends the loan: the kernel has moved the next `count` bytes and touched no others. The list is empty then.
    pub fn complete(&mut self, count: usize) {
        self.advance(count);
        self.clear();
    }

    /// Ends the loan of an operation that failed or was cancelled: all that is left is marked. The list is empty then.
    pub fn fail(&mut self) {
        self.advance(usize::MAX);
        self.clear();
    }

    fn clear(&mut self) {
        self.addresses.clear();
        self.iovecs.clear();
        self.moved = 0;
    }

    /// Reads from `offset` of a file (`preadv`), and advances. 0 is the end of the file.
    ///
    /// # Errors
    /// What the kernel says; the caller tries again, or calls [`LentVector::fail`], or drops the list.
    /// A list that is not for writing is refused.
    pub fn read_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let count = read_at(self.direction, self.iovecs(), file, Some(offset))?;
        self.advance(count);
        Ok(count)
    }

    /// As [`LentVector::read_at`], but only what is there without waiting (RWF_NOWAIT): EAGAIN otherwise.
    ///
    /// # Errors
    /// As [`LentVector::read_at`]; EOPNOTSUPP where the file system cannot say.
    pub fn read_at_once(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        if !self.direction.writes() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (count, offset) = limits(self.iovecs(), Some(offset))?;
        let (fd, iovecs) = (file.as_raw_fd(), self.iovecs().as_ptr());
        // SAFETY: as in `read_at`.
        let read = unsafe { libc::preadv2(fd, iovecs, count, offset.unwrap_or_default(), libc::RWF_NOWAIT) };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        self.advance(read);
        Ok(read)
    }

    /// Reads from a stream (`readv`), and advances. 0 is the end of the stream.
    ///
    /// # Errors
    /// As [`LentVector::read_at`].
    pub fn read_from(&mut self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        let count = read_at(self.direction, self.iovecs(), stream, None)?;
        self.advance(count);
        Ok(count)
    }

    /// Writes to `offset` of a file (`pwritev`), and advances.
    ///
    /// # Errors
    /// What the kernel says. A list that is not for reading is refused.
    pub fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let count = write_at(self.direction, self.iovecs(), file, Some(offset))?;
        self.advance(count);
        Ok(count)
    }

    /// Writes to a stream (`writev`), and advances.
    ///
    /// # Errors
    /// As [`LentVector::write_at`].
    pub fn write_to(&mut self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        let count = write_at(self.direction, self.iovecs(), stream, None)?;
        self.advance(count);
        Ok(count)
    }

    /// Sends to a stream socket without waiting and without a signal when nobody reads it (`sendmsg`), and advances.
    ///
    /// # Errors
    /// What the kernel says: EAGAIN when the socket has no room. A list that is not for reading is refused.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        if !self.direction.reads() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let message = message(self.iovecs());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message names entries of `iovecs` and nothing else; each is a piece of guest RAM that this guard keeps
        // mapped and that no Rust reference leads to, and the kernel only reads it; the descriptor is open while it is borrowed.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        let count = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        self.advance(count);
        Ok(count)
    }

    /// Receives from a stream socket without waiting (`recvmsg`), and advances. 0 is the end of the stream; descriptors that
    /// come along are closed.
    ///
    /// # Errors
    /// What the kernel says: EAGAIN when nothing is there. A list that is not for writing is refused. Nothing was written then, and
    /// `complete(0)` ends the loan without a mark.
    pub fn receive_from(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        if !self.direction.writes() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut message = message(self.iovecs());
        // SAFETY: as in `send_to`, but that the kernel writes into the pieces, which are marked below; there is no room for
        // an address or control data, so that it writes nothing else.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        let count = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        self.advance(count);
        Ok(count)
    }
}

/// A message of these buffers, as many as one call takes, without address and control data.
fn message(iovecs: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zero means "nothing".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len().min(MOST_IOVECS);
    message
}

impl Drop for LentVector {
    fn drop(&mut self) {
        self.fail();
    }
}
