//! The mapping of one region of guest RAM in this process, placed so that huge pages fit.
//!
//! Contains unsafe code: `mmap` into an address range that was reserved for it, and `munmap`.
//!
//! A huge page can back guest memory only where host and guest address agree in their low 21 bits; `mmap` by itself
//! gives shared memory any page.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::libc::c_void;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::{HUGE_PAGE_SIZE, PAGE_SIZE};

/// What guest RAM is mapped for.
pub(super) const ACCESS: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// A shared mapping of a file, kept out of core dumps; unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<c_void>,
    length: NonZeroUsize,
}

// SAFETY: the value only owns an address range; it reads and writes nothing there.
unsafe impl Send for Mapping {}
// SAFETY: as above, and `&Mapping` offers no more than the start of the range.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` on, and the rest of the last page, for `access`. The start agrees with `guest_address` in the bits below 2 MiB.
    ///
    /// # Errors
    /// The kernel's answer; `InvalidInput` for no bytes, or more than there are addresses.
    pub(super) fn new(
        file: &impl AsFd,
        offset: u64,
        length: u64,
        guest_address: u64,
        access: ProtFlags,
    ) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = i64::try_from(offset).map_err(|_| invalid())?;
        let length = length.checked_next_multiple_of(PAGE_SIZE).ok_or_else(invalid)?;
        let length = usize::try_from(length).ok().and_then(NonZeroUsize::new).ok_or_else(invalid)?;
        let block = usize::try_from(HUGE_PAGE_SIZE).map_err(|_| invalid())?;
        let room = length.checked_add(block).ok_or_else(invalid)?;
        // SAFETY: a mapping at an address of the kernel's choice takes nothing that is in use.
        let reserved = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
        let reserved = Self { start: reserved, length: room };
        let wanted = usize::try_from(guest_address & (HUGE_PAGE_SIZE - 1)).map_err(|_| invalid())?;
        let head = wanted.wrapping_sub(reserved.start.as_ptr().addr()) & (block - 1);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        // SAFETY: `head` is less than a block and the reservation a block longer than `length`, so that the range lies within it;
        // what MAP_FIXED replaces there is the reservation, which nobody else knows.
        let start = unsafe {
            let at = NonZeroUsize::new(reserved.start.as_ptr().addr() + head);
            mmap(at, length, access, flags, file, offset)
        }?;
        reserved.trim(head, length.get());
        let mapping = Self { start, length };
        // SAFETY: exactly the mapping made above; the advice changes neither its contents nor its life.
        unsafe { madvise(start, length.get(), MmapAdvise::MADV_DONTDUMP) }?;
        Ok(mapping)
    }

    /// The first byte.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Gives up the reservation before `head` and after `head + length`; what is between belongs to somebody else now.
    fn trim(self, head: usize, length: usize) {
        let (start, room) = (self.start, self.length.get());
        std::mem::forget(self);
        for (offset, end) in [(0, head), (head + length, room)] {
            if offset < end {
                // SAFETY: both pieces lie within the reservation, outside the new mapping, and nobody uses them.
                let _cannot_fail = unsafe { munmap(start.byte_add(offset), end - offset) };
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and whoever reads or writes there holds the region that owns this value.
        let _cannot_fail = unsafe { munmap(self.start, self.length.get()) };
    }
}
