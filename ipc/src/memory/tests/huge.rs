//! Huge pages: placement, what becomes huge, and that contents and marks stay as they are.

use super::super::{Direction, GuestRam, HUGE_PAGE_SIZE, HugePages};
use super::dirty;

/// KiB of this process's mapping at `address` that huge pages of shared memory back.
fn huge_kib(address: u64) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{address:x}-");
    let mapping = smaps.split("VmFlags").find(|part| part.lines().any(|line| line.starts_with(&start)));
    let line = mapping.unwrap().lines().find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[expect(clippy::disallowed_methods, reason = "the address alone")]
fn host_address(ram: &GuestRam) -> u64 {
    ram.host_mappings().next().unwrap().host_address
}

fn write(ram: &GuestRam, address: u64, value: u64) {
    ram.view(address, 8, Direction::Write).unwrap().write(0, value).unwrap();
}

fn read(ram: &GuestRam, address: u64) -> u64 {
    ram.view(address, 8, Direction::Read).unwrap().read(0).unwrap()
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the addresses alone")]
fn host_and_guest_addresses_agree_below_a_huge_page() {
    let rams: Vec<_> =
        (1..6).map(|pages| GuestRam::create(HUGE_PAGE_SIZE * 3 + pages * 4096).unwrap()).collect();
    for mapping in rams.iter().flat_map(GuestRam::host_mappings) {
        assert_eq!(mapping.host_address % HUGE_PAGE_SIZE, mapping.guest_address % HUGE_PAGE_SIZE);
    }
    for mapping in super::ram().host_mappings() {
        assert_eq!(mapping.host_address % HUGE_PAGE_SIZE, mapping.guest_address % HUGE_PAGE_SIZE);
    }
}

#[test]
fn blocks_in_use_become_huge_and_keep_their_contents() {
    let ram = GuestRam::create(HUGE_PAGE_SIZE * 8 + 4096).unwrap();
    let mut pages = HugePages::new(&ram).expect("Linux 6.1 with transparent huge pages");
    assert_eq!(pages.collapse_used(), 0);
    for block in [1, 3, 6] {
        write(&ram, block * HUGE_PAGE_SIZE + 8 * block, 7 + block);
    }
    // The part of a block at the end cannot be huge.
    write(&ram, 8 * HUGE_PAGE_SIZE, 99);
    let marked = dirty(&ram);
    assert_eq!(pages.collapse_used(), 3);
    assert_eq!(pages.collapse_used(), 0);
    assert_eq!(huge_kib(host_address(&ram)), 3 * HUGE_PAGE_SIZE / 1024);
    for block in [1, 3, 6] {
        assert_eq!(read(&ram, block * HUGE_PAGE_SIZE + 8 * block), 7 + block);
        assert_eq!(read(&ram, block * HUGE_PAGE_SIZE), 0);
    }
    write(&ram, 0, 1);
    write(&ram, 7 * HUGE_PAGE_SIZE, 1);
    assert_eq!(pages.collapse_used(), 2);
    let later: Vec<u64> = dirty(&ram).difference(&marked).copied().collect();
    assert_eq!(later, [0, 7 * HUGE_PAGE_SIZE]);
}

#[test]
fn a_run_goes_on_ahead_of_the_guest_in_its_direction() {
    let ram = GuestRam::create(HUGE_PAGE_SIZE * 16).unwrap();
    let mut pages = HugePages::new(&ram).unwrap();
    write(&ram, 4 * HUGE_PAGE_SIZE, 1);
    assert_eq!(pages.collapse_used(), 1);
    // Block 5 ends a run of one below: 6 comes too. Then 7 ends a run of three.
    write(&ram, 5 * HUGE_PAGE_SIZE, 1);
    assert_eq!(pages.collapse_used(), 2);
    write(&ram, 7 * HUGE_PAGE_SIZE, 1);
    assert_eq!(pages.collapse_used(), 4);
    // Downwards, and no further than the first block.
    write(&ram, 3 * HUGE_PAGE_SIZE, 1);
    assert_eq!(pages.collapse_used(), 4);
    assert_eq!(huge_kib(host_address(&ram)), 11 * HUGE_PAGE_SIZE / 1024);
    assert_eq!(dirty(&ram).len(), 4);
}

#[test]
fn a_loader_gets_whole_blocks_and_no_marks() {
    let ram = GuestRam::create(HUGE_PAGE_SIZE * 8).unwrap();
    ram.back_with_huge_pages(HUGE_PAGE_SIZE - 4096, HUGE_PAGE_SIZE * 3);
    assert_eq!(huge_kib(host_address(&ram)), 2 * HUGE_PAGE_SIZE / 1024);
    for range in
        [(0, 4096), (HUGE_PAGE_SIZE * 7, u64::MAX), (u64::MAX, 1), (HUGE_PAGE_SIZE * 100, HUGE_PAGE_SIZE)]
    {
        ram.back_with_huge_pages(range.0, range.1);
    }
    assert_eq!(huge_kib(host_address(&ram)), 3 * HUGE_PAGE_SIZE / 1024);
    assert!(dirty(&ram).is_empty());
}

#[test]
fn refused_huge_pages_stay_small() {
    let ram = GuestRam::create(HUGE_PAGE_SIZE * 2).unwrap();
    ram.refuse_huge_pages();
    ram.back_with_huge_pages(0, HUGE_PAGE_SIZE * 2);
    write(&ram, 0, 1);
    let mut pages = HugePages::new(&ram).unwrap();
    assert_eq!(pages.collapse_used(), 0);
    assert_eq!(huge_kib(host_address(&ram)), 0);
}
