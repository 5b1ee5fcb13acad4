//! The guest's memory map: what is RAM and what only looks like it.

use bulkhead_ipc::memory::GuestRam;

/// Extended BIOS data area, the last KiB below 640 KiB.
pub(super) const EBDA_START: u64 = 0x9_FC00;
/// Video memory and option ROMs: no RAM from here on.
const VIDEO_START: u64 = 0xA_0000;
/// The BIOS area, where ACPI tables are.
pub const BIOS_START: u64 = 0xE_0000;
const BIOS_END: u64 = 0x10_0000;

/// What a range of guest addresses is. Values are those of e820 and of PVH's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum MapKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MapEntry {
    /// First guest address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map of a machine with this RAM: RAM without what lies in `reserved` (guest address, bytes) and without
/// 9FC00–FFFFF, of which 9FC00–9FFFF and E0000–FFFFF are reserved. Lowest address first, no overlaps among RAM.
pub fn memory_map(ram: &GuestRam, reserved: &[(u64, u64)]) -> Vec<MapEntry> {
    let regions = ram.regions().map(|region| (region.guest_address, region.size));
    build(regions, reserved)
}

fn build(regions: impl Iterator<Item = (u64, u64)>, reserved: &[(u64, u64)]) -> Vec<MapEntry> {
    let mut kept: Vec<(u64, u64)> =
        vec![(EBDA_START, VIDEO_START - EBDA_START), (BIOS_START, BIOS_END - BIOS_START)];
    kept.extend(reserved.iter().filter(|(_, size)| *size > 0));
    let mut cuts = kept.clone();
    cuts.push((VIDEO_START, BIOS_START - VIDEO_START));
    cuts.sort_unstable();

    let mut map: Vec<_> =
        kept.into_iter().map(|(address, size)| MapEntry { address, size, kind: MapKind::Reserved }).collect();
    for (start, size) in regions {
        let (mut next, end) = (start, start.saturating_add(size));
        for &(cut, cut_size) in &cuts {
            push_ram(&mut map, next, cut.min(end));
            next = next.max(cut.saturating_add(cut_size));
        }
        push_ram(&mut map, next, end);
    }
    map.sort_unstable();
    map
}

fn push_ram(map: &mut Vec<MapEntry>, start: u64, end: u64) {
    if let Some(size) = end.checked_sub(start).filter(|size| *size > 0) {
        map.push(MapEntry { address: start, size, kind: MapKind::Ram });
    }
}

#[cfg(test)]
mod tests {
    use super::MapKind::{Ram, Reserved};
    use super::*;

    fn plain(map: &[MapEntry]) -> Vec<(u64, u64, MapKind)> {
        map.iter().map(|entry| (entry.address, entry.address + entry.size, entry.kind)).collect()
    }

    #[test]
    fn low_memory_leaves_bios_areas_out() {
        let map = build([(0, 0x1000_0000), (1 << 32, 0x1000)].into_iter(), &[]);
        let expected = [
            (0, 0x9_FC00, Ram),
            (0x9_FC00, 0xA_0000, Reserved),
            (0xE_0000, 0x10_0000, Reserved),
            (0x10_0000, 0x1000_0000, Ram),
            (1 << 32, (1 << 32) + 0x1000, Ram),
        ];
        assert_eq!(plain(&map), expected);
    }

    #[test]
    fn reserved_ranges_are_cut_out_wherever_they_lie() {
        let reserved = [(0x30_0000, 0x1000), (0x30_0800, 0x1000), (0xFEC0_0000, 0x1000), (0x40_0000, 0)];
        let map = build([(0, 0x40_0000)].into_iter(), &reserved);
        let ram: Vec<_> = plain(&map).into_iter().filter(|entry| entry.2 == Ram).collect();
        assert_eq!(ram, [(0, 0x9_FC00, Ram), (0x10_0000, 0x30_0000, Ram), (0x30_1800, 0x40_0000, Ram)]);
        assert!(plain(&map).contains(&(0xFEC0_0000, 0xFEC0_1000, Reserved)));
    }

    #[test]
    fn ranges_at_the_ends_of_the_address_space_do_no_harm() {
        let map = build([(0, 0x1000), (u64::MAX - 0xFFF, 0xFFF)].into_iter(), &[(u64::MAX, u64::MAX)]);
        assert_eq!(map.iter().filter(|entry| entry.kind == Ram).count(), 2);
        assert!(build(std::iter::empty(), &[]).iter().all(|entry| entry.kind == Reserved));
    }
}
