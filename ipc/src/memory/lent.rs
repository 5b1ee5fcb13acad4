//! Guest memory lent to the kernel for `io_uring`, `preadv`, `recvmsg` and their kin.
//!
//! Contains unsafe code: the system calls that take pointers, the zeroed structure of some, and `Send` for the pointers they take.
//!
//! The kernel writes past every Rust type, so the guard that gives out the pointers marks what was written: exactly
//! the bytes that a completion reports, and everything when nobody reported a completion, since a failed or
//! cancelled operation may have written any part of its buffer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{Direction, GuestMemory, GuestRam, MemoryError, single};

/// One contiguous piece of a lent range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) address: u64,
    pub(super) iovec: libc::iovec,
}

/// Finds the pieces of a range: one, unless it spans regions that adjoin.
pub(super) fn pieces(
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
pub(super) fn mark(memory: &GuestMemory, address: u64, len: usize) {
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
    /// The slice moves with the guard: an operation that keeps a pointer to it needs a [`LentVector`](super::LentVector).
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

/// The most entries that one `preadv` or `pwritev` takes (IOV_MAX).
pub(super) const MOST_IOVECS: usize = 1024;

pub(super) fn limits(iovecs: &[libc::iovec], offset: Option<u64>) -> io::Result<(libc::c_int, Option<i64>)> {
    let count = libc::c_int::try_from(iovecs.len().min(MOST_IOVECS)).unwrap_or_default();
    let offset = offset.map(i64::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok((count, offset))
}

/// `preadv`, or `readv` without an offset, into buffers bound to `direction`.
pub(super) fn read_at(
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
pub(super) fn write_at(
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
