//! Finds where a compressed kernel unpacks itself, so that it does so on huge pages.
//!
//! It fills tens of megabytes at a place of its choice, and a nested page fault for each page of 4 KiB takes longer than the
//! unpacking. So RAM above what the loader filled is only read until the first write there, which tells the place: that gets
//! huge pages, and RAM is as always again.

use bulkhead_ipc::memory::{GuestRam, HUGE_PAGE_SIZE, PAGE_SIZE};

use crate::boot::Unpacking;
use crate::machine::{Backing, MemorySlot};

/// What is known of the kernel until it has unpacked; nothing for others.
#[derive(Default)]
pub(super) struct UnpackingWatch(Option<Unpacking>);

impl UnpackingWatch {
    /// A kernel that will unpack itself is about to run.
    pub(super) fn begin(&mut self, unpacking: Unpacking) {
        self.0 = Some(unpacking);
    }

    /// The slots that KVM needs for those that the machine's map asks for.
    pub(super) fn slots(&self, wanted: &[MemorySlot]) -> Vec<MemorySlot> {
        match self.0 {
            Some(Unpacking { above, .. }) => wanted.iter().flat_map(|slot| only_read(slot, above)).collect(),
            None => wanted.to_vec(),
        }
    }

    /// The guest left for a write at `address`. Whether the watch ends with it; what is about to be filled has huge pages then.
    pub(super) fn ends(&mut self, address: u64, ram: &GuestRam) -> bool {
        let Some(unpacking) = self.0.take_if(|unpacking| address >= unpacking.above) else { return false };
        // Kernels lie on 2 MiB at least (CONFIG_PHYSICAL_ALIGN). Another write means that the kernel stayed where it was.
        if address.is_multiple_of(HUGE_PAGE_SIZE) {
            ram.back_with_huge_pages(address, unpacking.size.saturating_add(HUGE_PAGE_SIZE - 1));
        }
        true
    }
}

/// A slot in two: what lies at `above` or higher is only read, if it is RAM.
fn only_read(slot: &MemorySlot, above: u64) -> impl Iterator<Item = MemorySlot> {
    let ram = slot.backing == Backing::Ram && slot.writable;
    let above = above.next_multiple_of(PAGE_SIZE);
    let below = if ram { above.saturating_sub(slot.address).min(slot.size) } else { slot.size };
    let low = MemorySlot { size: below, ..slot.clone() };
    let high = MemorySlot {
        address: slot.address.saturating_add(below),
        source: slot.source.saturating_add(below),
        size: slot.size.saturating_sub(below),
        writable: false,
        ..slot.clone()
    };
    [low, high].into_iter().filter(|slot| slot.size > 0)
}
