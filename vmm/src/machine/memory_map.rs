//! The memory map: what of physical memory a CPU reaches without leaving the guest. Derived from the flat view, as the
//! host's KVM wants it: slots of RAM, of RAM that is only read, and of ROM.

use std::fmt;
use std::sync::Arc;

use bulkhead_ipc::memory::{GuestRam, MappedFile, PAGE_SIZE};

use super::tree::Endpoint;

/// Where RAM changes hands with PAM, and where it never does: no slot crosses this, so that firmware, which flips PAM
/// often, never touches the large slot.
const CONVENTIONAL_END: u64 = 1 << 20;

/// A chip that holds bytes: a firmware ROM, or flash. Methods are called from vCPU threads, several at a time.
pub trait MemoryChip: Send + Sync {
    /// What to call it in messages.
    fn name(&self) -> &str;

    /// Its bytes, in regions at the guest-physical addresses where it decodes. Always the same object. What lies in the last
    /// 128 KiB below 4 GiB shows below 1 MiB too, where PAM lets accesses through.
    fn memory(&self) -> &GuestRam;

    /// Whether reads show the bytes as they are, so that the guest may read them without an exit. When the answer changes,
    /// it may only change in [`write`](Self::write) or [`reset`](Self::reset).
    fn shows_bytes(&self) -> bool {
        true
    }

    /// The guest reads while [`shows_bytes`](Self::shows_bytes) is false. `address` lies in one of the regions.
    fn read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    /// The guest writes. A ROM ignores it.
    fn write(&self, _address: u64, _data: &[u8]) {}

    /// RST#.
    fn reset(&self) {}
}

/// What lies behind a slot.
#[derive(Clone)]
pub enum Backing {
    /// Guest RAM.
    Ram,
    /// A ROM or flash.
    Chip(Arc<dyn MemoryChip>),
    /// A file, which nothing here looks into.
    File(Arc<MappedFile>),
}

impl PartialEq for Backing {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ram, Self::Ram) => true,
            (Self::Chip(a), Self::Chip(b)) => std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b)),
            (Self::File(a), Self::File(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram => f.write_str("RAM"),
            Self::Chip(chip) => f.write_str(chip.name()),
            Self::File(_) => f.write_str("file"),
        }
    }
}

/// Whole pages of physical memory that a CPU reads, and perhaps writes, without an exit.
#[derive(Clone, Debug, PartialEq)]
pub struct MemorySlot {
    /// The first address.
    pub address: u64,
    /// The size in bytes.
    pub size: u64,
    /// What is there.
    pub backing: Backing,
    /// The address of the first byte in the memory of `backing`.
    pub source: u64,
    /// Writes need no exit either.
    pub writable: bool,
}

impl MemorySlot {
    /// The whole pages of a range of addresses, `last` excluded, that `endpoint` answers from `source` on.
    pub(super) fn new(
        (first, end): (u64, u64),
        endpoint: &Endpoint,
        source: u64,
        writable: bool,
    ) -> Option<Self> {
        let backing = match endpoint {
            Endpoint::Dram => Backing::Ram,
            Endpoint::Chip(chip) if chip.shows_bytes() => Backing::Chip(chip.clone()),
            Endpoint::File(file) => Backing::File(file.clone()),
            _ => return None,
        };
        let address = first.checked_next_multiple_of(PAGE_SIZE)?;
        let source = source.checked_add(address.checked_sub(first)?)?;
        let size = (end & !(PAGE_SIZE - 1)).checked_sub(address)?;
        let mappable = size > 0 && source.is_multiple_of(PAGE_SIZE);
        mappable.then_some(Self { address, size, backing, source, writable })
    }

    /// Makes one of two neighbours, if they are of one kind.
    pub(super) fn join(&mut self, next: &Self) -> bool {
        let adjoins = |a: u64, b: u64| a.checked_add(self.size) == Some(b);
        let joins = adjoins(self.address, next.address)
            && adjoins(self.source, next.source)
            && next.address != CONVENTIONAL_END
            && (&self.backing, self.writable) == (&next.backing, next.writable);
        if joins {
            self.size = self.size.saturating_add(next.size);
        }
        joins
    }
}
