//! Where the initrd goes.

use bulkhead_ipc::memory::{GuestRam, HUGE_PAGE_SIZE, PAGE_SIZE};

use super::image::Image;
use super::{BootError, BootSource};

/// Bytes of tables that Linux makes before its allocator works, beside page descriptors.
const FIRST_TABLES: u64 = 8 << 20;

/// Bytes from which Linux takes its first pages: by the first process of a small system it has used so many, and seldom fewer.
const FIRST_PAGES: u64 = 28 << 20;

/// An initrd in guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    /// Guest address, on a page.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Loads the initrd, if there is one, on the highest page from which it ends at or below `limit`, above `kernel_end`. What the
/// kernel leaves free when it runs begins at `free`, if not lower.
pub(super) fn load(
    ram: &GuestRam,
    source: &BootSource<'_>,
    kernel_end: u64,
    free: u64,
    limit: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(file) = source.initrd else { return Ok(None) };
    let image = Image::new(file, "initrd")?;
    let initrd = place(image.size(), kernel_end, limit)?;
    back_with_huge_pages(ram, initrd.address, free, limit);
    image.load(ram, 0, initrd.size, initrd.address)?;
    Ok(Some(initrd))
}

/// Puts what the guest fills at once on huge pages: the initrd with its neighbours, the lowest free memory, and the top of RAM.
/// Whoever takes an initrd is a system, and Linux lays its array of page descriptors (64 bytes for each page) and its first
/// tables at the top, and just below the initrd what does not fit there; later it gives out pages from below.
fn back_with_huge_pages(ram: &GuestRam, initrd: u64, free: u64, limit: u64) {
    let start = (initrd - initrd % HUGE_PAGE_SIZE).saturating_sub(HUGE_PAGE_SIZE).max(free);
    ram.back_with_huge_pages(start, limit.saturating_sub(start));
    let first = free - free % HUGE_PAGE_SIZE;
    ram.back_with_huge_pages(first, FIRST_PAGES.min(ram.size() / 8).min(start.saturating_sub(first)));
    if let Some(last) = ram.regions().last() {
        let tables = (ram.size() / PAGE_SIZE * 64).saturating_add(FIRST_TABLES).min(last.size);
        let end = last.guest_address.saturating_add(last.size);
        ram.back_with_huge_pages(end.saturating_sub(tables), tables);
    }
}

fn place(size: u64, kernel_end: u64, limit: u64) -> Result<Initrd, BootError> {
    if size == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let lowest = kernel_end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
    let available = limit.saturating_sub(lowest);
    let address = limit.checked_sub(size).map(|address| address & !PAGE_SIZE.wrapping_sub(1));
    match address {
        Some(address) if address >= lowest => Ok(Initrd { address, size }),
        _ => Err(BootError::InitrdTooLarge { size, available }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lies_as_high_as_it_can() {
        assert_eq!(place(1, 0x1000, 0x9000).unwrap(), Initrd { address: 0x8000, size: 1 });
        assert_eq!(place(0x1001, 0x1000, 0x9000).unwrap(), Initrd { address: 0x7000, size: 0x1001 });
        assert_eq!(place(0x10, 0x1000, 0x9008).unwrap(), Initrd { address: 0x8000, size: 0x10 });
    }

    #[test]
    fn all_the_room_may_be_used_and_no_more() {
        assert_eq!(place(0x8000, 0xFFF, 0x9000).unwrap(), Initrd { address: 0x1000, size: 0x8000 });
        for (size, end) in [(0x8001, 0x1000), (0x8000, 0x1001), (1, 0x9000), (1, u64::MAX), (u64::MAX, 0)] {
            assert!(
                matches!(place(size, end, 0x9000), Err(BootError::InitrdTooLarge { .. })),
                "{size:x} {end:x}"
            );
        }
        assert!(matches!(
            place(0x8001, 0x1001, 0x9000),
            Err(BootError::InitrdTooLarge { size: 0x8001, available: 0x7000 })
        ));
    }
}
