//! A piece of guest memory in one region: what rings, descriptors and most buffers are. vm-memory's own accesses may span regions and go
//! through an iterator of pieces each time, which costs a disk's queue more than all else that it does by itself.

use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

/// `len` bytes at `address`, if they lie in one region. Writes through it mark by themselves.
#[inline]
pub fn single<M: GuestMemoryBackend>(
    memory: &M,
    address: u64,
    len: usize,
) -> Option<VolatileSlice<'_, BS<'_, <M::R as GuestMemoryRegion>::B>>> {
    let (region, offset) = memory.to_region_addr(GuestAddress(address))?;
    region.get_slice(offset, len).ok()
}
