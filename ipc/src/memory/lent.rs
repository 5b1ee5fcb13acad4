//! Guest memory lent to the kernel for `io_uring`, `preadv`, `recvmsg` and their kin.
//!
//! Contains unsafe code: the system calls that take pointers, and `Send` for the pointers they take.
//!
//! The kernel writes past every Rust type, so the guard that gives out the pointers marks what was written: exactly
//! the bytes that a completion reports, and everything when nobody reported a completion, since a failed or
//! cancelled operation may have written any part of its buffer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Direction, GuestMemory, GuestRam, MemoryError, single};

/// One contiguous piece of a lent range.
#[derive(Clone, Copy, Debug)]
struct Piece {
    address: u64,
    iovec: libc::iovec,
}

/// Finds the pieces of a range: one, unless it spans regions that adjoin.
fn pieces(
    memory: &GuestMemory,
    address: u64,
    len: u64,
    mut each: impl FnMut(Piece),
) -> Result<(), MemoryError> {
    let out_of_range = || MemoryError::OutOfRange { address, len };
    let length = usize::try_from(len).map_err(|_| out_of_range())?;
    if let Some(slice) = single(memory, address, length) {
        #[expect(clippy::disallowed_methods, reason = "the guards below mark what the kernel writes")]
        let iov_base = slice.ptr_guard_mut().as_ptr().cast();
        each(Piece { address, iovec: libc::iovec { iov_base, iov_len: length } });
        return Ok(());
    }
    let mut next = address;
    for slice in memory.get_slices(GuestAddress(address), length) {
        let slice = slice.map_err(|_| out_of_range())?;
        #[expect(clippy::disallowed_methods, reason = "the guards below mark what the kernel writes")]
        let iovec = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
        each(Piece { address: next, iovec });
        next = next.saturating_add(slice.len() as u64);
    }
    Ok(())
}

/// Marks `len` bytes at `address`, which lie in RAM.
fn mark(memory: &GuestMemory, address: u64, len: usize) {
    if let Some(slice) = single(memory, address, len) {
        return slice.bitmap().mark_dirty(0, len);
    }
    for slice in memory.get_slices(GuestAddress(address), len).flatten() {
        slice.bitmap().mark_dirty(0, slice.len());
    }
}

/// One range of guest memory lent to the kernel.
///
/// Whoever starts an asynchronous operation on it keeps the guard until the operation has ended, and then calls
/// [`LentBuffer::complete`]. A guard for writing that is dropped without it marks all of its range.
#[must_use = "a buffer that is dropped marks all of its range"]
#[derive(Debug)]
pub struct LentBuffer {
    memory: Arc<GuestMemory>,
    address: u64,
    len: usize,
    direction: Direction,
    iovecs: Iovecs,
}

#[derive(Debug)]
enum Iovecs {
    One([libc::iovec; 1]),
    /// The range spans regions that adjoin.
    Many(Vec<libc::iovec>),
}

// SAFETY: the pointers lead into guest RAM, which `memory` keeps mapped wherever the guard is, which any thread may access,
// and of which no references are ever made.
unsafe impl Send for LentBuffer {}
// SAFETY: a shared guard gives out copies of its pointers and lengths and changes nothing.
unsafe impl Sync for LentBuffer {}

impl LentBuffer {
    pub(super) fn new(
        ram: &GuestRam,
        address: u64,
        len: u64,
        direction: Direction,
    ) -> Result<Self, MemoryError> {
        let memory = ram.shared_memory();
        let length = usize::try_from(len).map_err(|_| MemoryError::OutOfRange { address, len })?;
        let mut iovecs = Iovecs::One([libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }]);
        let mut count = 0usize;
        pieces(&memory, address, len, |piece| {
            match &mut iovecs {
                Iovecs::One(one) if count == 0 => *one = [piece.iovec],
                Iovecs::One([first]) => iovecs = Iovecs::Many(vec![*first, piece.iovec]),
                Iovecs::Many(many) => many.push(piece.iovec),
            }
            count = count.saturating_add(1);
        })?;
        Ok(Self { memory, address, len: length, direction, iovecs })
    }

    /// Guest-physical address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the bytes are in this process, for the kernel. One entry, unless the range spans regions that adjoin.
    /// The slice moves with the guard: an operation that keeps a pointer to it needs a [`LentVector`].
    pub fn iovecs(&self) -> &[libc::iovec] {
        match &self.iovecs {
            Iovecs::One(one) => one,
            Iovecs::Many(many) => many,
        }
    }

    /// Ends the loan: the kernel has moved the first `count` bytes and touched no others.
    pub fn complete(mut self, count: usize) {
        self.mark(count);
        self.len = 0;
    }

    /// Reads from `offset` of a file (`preadv`) and ends the loan. 0 is the end of the file.
    ///
    /// # Errors
    /// What the kernel says; all of the range is marked then. A buffer that is not for writing is refused.
    pub fn read_at(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let count = read_at(self.direction, self.iovecs(), file, Some(offset))?;
        self.complete(count);
        Ok(count)
    }

    /// Reads from a stream (`readv`) and ends the loan. 0 is the end of the stream.
    ///
    /// # Errors
    /// As [`LentBuffer::read_at`].
    pub fn read_from(self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        let count = read_at(self.direction, self.iovecs(), stream, None)?;
        self.complete(count);
        Ok(count)
    }

    /// Writes to `offset` of a file (`pwritev`) and ends the loan.
    ///
    /// # Errors
    /// What the kernel says. A buffer that is not for reading is refused.
    pub fn write_at(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let count = write_at(self.direction, self.iovecs(), file, Some(offset))?;
        self.complete(count);
        Ok(count)
    }

    /// Writes to a stream (`writev`) and ends the loan.
    ///
    /// # Errors
    /// As [`LentBuffer::write_at`].
    pub fn write_to(self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        let count = write_at(self.direction, self.iovecs(), stream, None)?;
        self.complete(count);
        Ok(count)
    }

    fn mark(&self, count: usize) {
        if self.direction.writes() {
            mark(&self.memory, self.address, count.min(self.len));
        }
    }
}

impl Drop for LentBuffer {
    fn drop(&mut self) {
        self.mark(self.len);
    }
}

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
}

impl Drop for LentVector {
    fn drop(&mut self) {
        self.fail();
    }
}

/// The most entries that one `preadv` or `pwritev` takes (IOV_MAX).
const MOST_IOVECS: usize = 1024;

fn limits(iovecs: &[libc::iovec], offset: Option<u64>) -> io::Result<(libc::c_int, Option<i64>)> {
    let count = libc::c_int::try_from(iovecs.len().min(MOST_IOVECS)).unwrap_or_default();
    let offset = offset.map(i64::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok((count, offset))
}

/// `preadv`, or `readv` without an offset, into buffers bound to `direction`.
fn read_at(
    direction: Direction,
    iovecs: &[libc::iovec],
    file: BorrowedFd<'_>,
    offset: Option<u64>,
) -> io::Result<usize> {
    if !direction.writes() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (count, offset) = limits(iovecs, offset)?;
    // SAFETY: `iovecs` holds at least `count` entries, each a piece of guest RAM that its guard keeps mapped for the
    // duration of the call and that no Rust reference leads to; the descriptor is open while it is borrowed.
    let read = unsafe {
        match offset {
            Some(offset) => libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count, offset),
            None => libc::readv(file.as_raw_fd(), iovecs.as_ptr(), count),
        }
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// `pwritev`, or `writev` without an offset, from buffers bound to `direction`.
fn write_at(
    direction: Direction,
    iovecs: &[libc::iovec],
    file: BorrowedFd<'_>,
    offset: Option<u64>,
) -> io::Result<usize> {
    if !direction.reads() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (count, offset) = limits(iovecs, offset)?;
    // SAFETY: as in `read_at`; the kernel only reads the buffers.
    let written = unsafe {
        match offset {
            Some(offset) => libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, offset),
            None => libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count),
        }
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}
