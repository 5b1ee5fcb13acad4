//! GDT and identity page tables for the 64-bit entry of a bzImage.

use bulkhead_ipc::memory::{Direction, GuestRam, MemoryError};

use super::entry::{Gdt, Mode, Segment};

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
/// Four page directories, each of 512 pages of 2 MiB: the first 4 GiB.
const DIRECTORIES: u64 = 0xB000;
const DIRECTORY_COUNT: u64 = 4;
const ENTRIES: u64 = 512;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Writes both tables; answers what makes the processor use them.
pub(super) fn write(ram: &GuestRam) -> Result<Mode, MemoryError> {
    let gdt = write_gdt(ram)?;
    write_table(ram, PML4, 1, |_| PDPT | PRESENT_WRITABLE)?;
    write_table(ram, PDPT, DIRECTORY_COUNT, |n| {
        DIRECTORIES.saturating_add(n.saturating_mul(0x1000)) | PRESENT_WRITABLE
    })?;
    // The directories follow each other, as do the pages that they map.
    write_table(ram, DIRECTORIES, DIRECTORY_COUNT * ENTRIES, |n| n << 21 | PRESENT_WRITABLE | LARGE)?;
    Ok(Mode::Long { cr3: PML4, gdt })
}

fn write_gdt(ram: &GuestRam) -> Result<Gdt, MemoryError> {
    // Selectors 10, 18 and 20; the task's descriptor has 16 bytes, and its base is 0.
    let entries =
        [0, 0, Segment::CODE_64.descriptor(), Segment::DATA.descriptor(), Segment::TASK.descriptor(), 0];
    let bytes: Vec<u8> = entries.iter().copied().flat_map(u64::to_le_bytes).collect();
    ram.view(GDT, bytes.len() as u64, Direction::Write)?.write_bytes(0, &bytes)?;
    Ok(Gdt { base: GDT, limit: u16::try_from(bytes.len().saturating_sub(1)).unwrap_or(u16::MAX) })
}

/// Writes `count` entries from `address` on.
fn write_table(
    ram: &GuestRam,
    address: u64,
    count: u64,
    entry: impl Fn(u64) -> u64,
) -> Result<(), MemoryError> {
    let bytes: Vec<u8> = (0..count).flat_map(|n| entry(n).to_le_bytes()).collect();
    ram.view(address, bytes.len() as u64, Direction::Write)?.write_bytes(0, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as a processor does (Intel SDM volume 3, 4.5.4).
    fn walk(ram: &GuestRam, cr3: u64, address: u64) -> Option<u64> {
        let mut table = cr3;
        for shift in [39, 30, 21] {
            let slot = table + (address >> shift & 511) * 8;
            let entry: u64 = ram.view(slot, 8, Direction::Read).unwrap().read(0).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000F_FFFF_FFFF_F000;
            if entry & LARGE != 0 {
                return Some(table + (address & 0x1F_FFFF));
            }
        }
        None
    }

    #[test]
    fn the_first_4_gib_are_where_they_are() {
        let ram = GuestRam::create(0x10_0000).unwrap();
        let Mode::Long { cr3, gdt } = write(&ram).unwrap() else { panic!("not long mode") };
        for address in [0, 0x1234, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, 0xC000_0001, 0xFFFF_FFFF] {
            assert_eq!(walk(&ram, cr3, address), Some(address));
        }
        assert_eq!(walk(&ram, cr3, 1 << 32), None);
        let code: u64 = ram.view(gdt.base + 0x10, 8, Direction::Read).unwrap().read(0).unwrap();
        assert_eq!((code, gdt.limit), (Segment::CODE_64.descriptor(), 47));
    }
}
