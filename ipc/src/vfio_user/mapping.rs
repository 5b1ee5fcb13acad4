//! One shared page with one atomic word in it. Contains `unsafe`: mapping memory and reading it through a reference. No
//! descriptor is kept: the mapping alone holds the page.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::error::Fault;
use super::shadow::SHADOW_SIZE;

const LENGTH: NonZeroUsize = match NonZeroUsize::new(SHADOW_SIZE) {
    Some(length) => length,
    None => NonZeroUsize::MIN,
};

/// A mapping of the first [`SHADOW_SIZE`] bytes of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    address: NonNull<c_void>,
}

// SAFETY: the mapping belongs to the process and not to a thread, and nothing but an atomic is reached through it.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out `&AtomicU64` only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps; the caller has made sure that the file is and stays at least [`SHADOW_SIZE`] bytes long.
    pub fn new(file: BorrowedFd<'_>, writable: bool) -> Result<Self, Fault> {
        let write = if writable { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let address =
            unsafe { mmap(None, LENGTH, ProtFlags::PROT_READ | write, MapFlags::MAP_SHARED, file, 0) }
                .map_err(|error| Fault::Socket { call: "mmap", error })?;
        Ok(Self { address })
    }

    /// The first eight bytes. A mapping that was made read-only must only be loaded from.
    pub fn word(&self) -> &AtomicU64 {
        // SAFETY: the address is page-aligned and valid for SHADOW_SIZE bytes until `self` is dropped; every process that maps the
        // page reaches the word by atomic operations or, if hostile, by writes that an atomic load tolerates: any value is valid.
        unsafe { AtomicU64::from_ptr(self.address.as_ptr().cast()) }
    }

    /// The next eight bytes, likewise.
    pub fn second_word(&self) -> &AtomicU64 {
        // SAFETY: as above; eight bytes further the address is aligned for a word and far from the end of the page.
        unsafe { AtomicU64::from_ptr(self.address.as_ptr().cast::<u64>().add(1)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `self` owns the mapping and no reference into it outlives it.
        let _ = unsafe { munmap(self.address, SHADOW_SIZE) };
    }
}
