//! The memory of the counters: words that are loaded and stored atomically.
//!
//! Contains unsafe code: mapping memory, and reading and writing it through references. No descriptor is kept.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{QUEUES, WORDS};

/// Words in all.
const LENGTH: usize = QUEUES * WORDS;
/// Bytes in all.
pub(super) const SIZE: NonZeroUsize = match NonZeroUsize::new(LENGTH * size_of::<u64>()) {
    Some(size) => size,
    None => NonZeroUsize::MIN,
};

/// A mapping of the counters.
#[derive(Debug)]
pub(super) struct Page {
    address: NonNull<c_void>,
    writable: bool,
}

// SAFETY: the mapping belongs to the process and not to a thread, and nothing but atomics is reached through it.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Maps the first [`SIZE`] bytes of a memfd that was made so large and sealed; a shorter one would end the process that
    /// touches what is missing, so a device process trusts its supervisor, which makes it, and nobody else is asked.
    pub(super) fn map(file: BorrowedFd<'_>, writable: bool) -> Result<Self, Errno> {
        let write = if writable { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let address =
            unsafe { mmap(None, SIZE, ProtFlags::PROT_READ | write, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { address, writable })
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        if index >= LENGTH {
            return None;
        }
        // SAFETY: the index is within the mapping, which is page-aligned and lives until `self` is dropped; every process that maps
        // it reaches the word by atomic operations or, if hostile, by writes that an atomic load tolerates: any value is valid.
        Some(unsafe { AtomicU64::from_ptr(self.address.as_ptr().cast::<u64>().add(index)) })
    }

    pub(super) fn load(&self, index: usize) -> u64 {
        self.word(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Nothing happens to a mapping that is for reading.
    pub(super) fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.word(index).filter(|_| self.writable) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: `self` owns the mapping and no reference into it outlives it.
        let _ = unsafe { munmap(self.address, SIZE.get()) };
    }
}
