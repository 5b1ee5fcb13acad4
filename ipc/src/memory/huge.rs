//! Huge pages for guest RAM, whatever the host's switch for shared memory says.
//!
//! Contains unsafe code: advice to the kernel on the mappings of guest RAM.
//!
//! A first touch of a page by the guest is a nested page fault, and there are 512 pages in a huge page. Most hosts give
//! huge pages to private memory by themselves, and to shared memory, as guest RAM here is, only where
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` has been changed. MADV_COLLAPSE (Linux 6.1) works without: it
//! puts a block of 2 MiB, of which at least one page is there, into a huge page. As everywhere with transparent huge
//! pages, a block of which little is used costs memory.

use std::ptr::NonNull;

use nix::libc;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::ram::{GuestRam, Region};

/// Bytes of a huge page.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

impl GuestRam {
    /// Keeps the kernel, and everything here, from backing this RAM with huge pages.
    pub fn refuse_huge_pages(&self) {
        for region in self.memory().iter() {
            advise(region, 0, region.len(), libc::MADV_NOHUGEPAGE);
        }
    }

    /// Whether the kernel knows MADV_COLLAPSE.
    pub fn can_back_with_huge_pages(&self) -> bool {
        self.memory().iter().all(|region| advise(region, 0, 0, libc::MADV_COLLAPSE))
    }

    /// Backs the whole blocks of 2 MiB among `len` bytes at `address` with huge pages, for a loader that is about to fill
    /// them. Where the host cannot, nothing happens.
    pub fn back_with_huge_pages(&self, address: u64, len: u64) {
        for region in self.memory().iter() {
            let start = region.start_addr().raw_value();
            let from =
                address.saturating_sub(start).checked_next_multiple_of(HUGE_PAGE_SIZE).unwrap_or(u64::MAX);
            let to = address.saturating_add(len).saturating_sub(start).min(region.len());
            let to = to - to % HUGE_PAGE_SIZE;
            for block in from / HUGE_PAGE_SIZE..to / HUGE_PAGE_SIZE {
                advise(region, block * HUGE_PAGE_SIZE, 1, libc::MADV_POPULATE_READ);
            }
            if from < to {
                advise(region, from, to - from, libc::MADV_COLLAPSE);
            }
        }
    }
}

/// Asks for huge pages at the first touch, which hosts with `advise` or more in that file give.
pub(super) fn ask(region: &Region) {
    advise(region, 0, region.len(), libc::MADV_HUGEPAGE);
}

/// Advises the kernel on `len` bytes at `offset` of a region; whether it took the advice.
fn advise(region: &Region, offset: u64, len: u64, advice: libc::c_int) -> bool {
    let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else { return false };
    if offset.checked_add(len).is_none_or(|end| end as u64 > region.len()) {
        return false;
    }
    #[expect(clippy::disallowed_methods, reason = "advice to the kernel writes nothing")]
    let start = NonNull::new(region.as_ptr());
    // SAFETY: the range lies within the mapping that `region` owns (checked above); neither populating nor collapsing changes
    // its contents or its life.
    start.is_some_and(|start| unsafe { libc::madvise(start.add(offset).as_ptr().cast(), len, advice) } == 0)
}
