//! Where guest RAM lies: below the hole for devices, and above 4 GiB.

use super::{MemoryError, PAGE_SIZE};

/// First address of the hole below 4 GiB, where PCI memory, IOAPIC, local APICs and firmware live.
pub const HOLE_START: u64 = 0xC000_0000;

/// First address above the hole: 4 GiB.
pub const HOLE_END: u64 = 1 << 32;

/// RAM ends at or below this address: 46 bits, what the smallest server processors decode.
const LIMIT: u64 = 1 << 46;

/// One piece of guest RAM before it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
}

/// Lays out `size` bytes of RAM: from 0 up to the hole at 3 GiB, the rest from 4 GiB.
///
/// # Errors
/// The size is 0, not a multiple of 4 KiB, or more than the address space holds.
pub fn layout(size: u64) -> Result<Vec<RegionLayout>, MemoryError> {
    const MOST: u64 = LIMIT - (HOLE_END - HOLE_START);
    if size == 0 {
        return Err(MemoryError::NoMemory);
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::UnalignedSize(size));
    }
    if size > MOST {
        return Err(MemoryError::TooMuchMemory { size, limit: MOST });
    }
    let low = size.min(HOLE_START);
    let mut regions = vec![RegionLayout { guest_address: 0, size: low }];
    if size > low {
        regions.push(RegionLayout { guest_address: HOLE_END, size: size - low });
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_region() {
        assert_eq!(layout(4096).unwrap(), [RegionLayout { guest_address: 0, size: 4096 }]);
        assert_eq!(layout(HOLE_START).unwrap(), [RegionLayout { guest_address: 0, size: HOLE_START }]);
    }

    #[test]
    fn memory_beyond_the_hole_continues_at_4_gib() {
        let regions = layout(HOLE_START + 4096).unwrap();
        assert_eq!(regions[0], RegionLayout { guest_address: 0, size: HOLE_START });
        assert_eq!(regions[1], RegionLayout { guest_address: HOLE_END, size: 4096 });
    }

    #[test]
    fn bad_sizes_are_refused_with_the_reason() {
        assert!(matches!(layout(0), Err(MemoryError::NoMemory)));
        assert!(matches!(layout(1024), Err(MemoryError::UnalignedSize(1024))));
        assert!(matches!(layout(!4095), Err(MemoryError::TooMuchMemory { .. })));
    }

    #[test]
    fn the_largest_memory_ends_at_the_limit() {
        let most = LIMIT - (HOLE_END - HOLE_START);
        let last = layout(most).unwrap()[1];
        assert_eq!(last.guest_address + last.size, LIMIT);
        assert!(layout(most + 4096).is_err());
    }
}
