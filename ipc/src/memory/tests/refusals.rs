//! What must not be mapped or reached, and what a created RAM looks like from outside.

use std::fs::File;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::super::{Direction, GuestRam, HOLE_END, HOLE_START, MAX_REGIONS, MemoryError, PAGE_SIZE};
use super::{REGIONS, file, ram, region};

fn attach_one(guest_address: u64, size: u64, offset: u64) -> Result<GuestRam, MemoryError> {
    GuestRam::attach_unsealed(vec![region(guest_address, size, offset, file(4 * PAGE_SIZE))])
}

#[test]
fn created_regions_can_neither_grow_nor_shrink_nor_be_unsealed() {
    let ram = GuestRam::create(8 * PAGE_SIZE).unwrap();
    let fd = ram.regions().next().unwrap().share().unwrap().fd;
    let seals = SealFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GET_SEALS).unwrap());
    assert!(seals.contains(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL));
    let file = File::from(fd);
    file.set_len(0).unwrap_err();
    file.set_len(9 * PAGE_SIZE).unwrap_err();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap_err();
}

#[test]
fn large_memory_is_two_regions_around_the_hole_and_both_can_be_reached() {
    let ram = GuestRam::create(HOLE_START + 2 * PAGE_SIZE).unwrap();
    let regions: Vec<_> = ram.regions().map(|r| (r.guest_address, r.size, r.offset)).collect();
    assert_eq!(regions, [(0, HOLE_START, 0), (HOLE_END, 2 * PAGE_SIZE, 0)]);
    assert_eq!((ram.size(), ram.end()), (HOLE_START + 2 * PAGE_SIZE, HOLE_END + 2 * PAGE_SIZE));
    for address in [0, HOLE_START - 8, HOLE_END, ram.end() - 8] {
        ram.view(address, 8, Direction::Write).unwrap().write(0, address).unwrap();
    }
    assert_eq!(ram.dirty_pages().count(), 4);
    assert!(ram.view(HOLE_START - 4, 8, Direction::Read).is_err());
    assert!(ram.view(HOLE_START, 1, Direction::Read).is_err());
}

#[test]
fn what_one_process_writes_another_reads() {
    let core = GuestRam::create(4 * PAGE_SIZE).unwrap();
    let device = GuestRam::attach(core.regions().map(|r| r.share().unwrap()).collect()).unwrap();
    core.view(4096, 8, Direction::Write).unwrap().write(0, 42u64).unwrap();
    assert_eq!(device.view(4096, 8, Direction::Read).unwrap().read::<u64>(0).unwrap(), 42);
    assert!(device.dirty_pages().is_empty(), "each process has its own bitmap");
}

#[test]
fn ram_is_kept_out_of_core_dumps() {
    let ram = GuestRam::create(8 * PAGE_SIZE).unwrap();
    #[expect(clippy::disallowed_methods, reason = "tested here")]
    let start = format!("{:x}-", ram.host_mappings().next().unwrap().host_address);
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let flags = maps.split(&start).nth(1).unwrap().lines().find(|line| line.starts_with("VmFlags")).unwrap();
    assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    assert!(matches!(attach_one(1, PAGE_SIZE, 0), Err(MemoryError::Unaligned { field: "address", .. })));
    let sealed = GuestRam::attach(vec![region(0, 100, 0, file(PAGE_SIZE))]);
    assert!(matches!(sealed, Err(MemoryError::Unaligned { field: "size", value: 100, .. })));
    assert!(matches!(attach_one(0, 0, 0), Err(MemoryError::Unaligned { field: "size", value: 0, .. })));
    assert!(matches!(attach_one(0, PAGE_SIZE, 7), Err(MemoryError::Unaligned { field: "file offset", .. })));
    let top = !(PAGE_SIZE - 1);
    assert!(matches!(attach_one(top, PAGE_SIZE, 0), Err(MemoryError::Overflow { .. })));
    assert!(matches!(attach_one(1 << 52, PAGE_SIZE, 0), Err(MemoryError::Overflow { .. })));
    assert!(matches!(attach_one(0, PAGE_SIZE, top), Err(MemoryError::Overflow { .. })));
    assert!(matches!(attach_one(0, top, 0), Err(MemoryError::Overflow { .. })));
}

#[test]
fn a_foreign_region_may_end_within_a_page() {
    let ram = GuestRam::attach_unsealed(vec![region(PAGE_SIZE, PAGE_SIZE + 100, 0, file(PAGE_SIZE + 100))])
        .unwrap();
    let view = ram.view(2 * PAGE_SIZE, 100, Direction::Write).unwrap();
    view.write(92, 1u64).unwrap();
    assert_eq!(ram.take_dirty().pages().collect::<Vec<_>>(), [2 * PAGE_SIZE]);
    assert!(!ram.contains(2 * PAGE_SIZE, 101));
    let vector = &mut ram.lend_vector(Direction::Write);
    assert!(vector.push(2 * PAGE_SIZE, 101).is_err());
}

#[test]
fn a_size_is_believed_only_as_far_as_the_file_goes() {
    assert!(matches!(attach_one(0, 5 * PAGE_SIZE, 0), Err(MemoryError::FileTooSmall { .. })));
    assert!(matches!(attach_one(0, 4 * PAGE_SIZE, PAGE_SIZE), Err(MemoryError::FileTooSmall { .. })));
    attach_one(0, 3 * PAGE_SIZE, PAGE_SIZE).unwrap();
    let huge = GuestRam::attach_unsealed(vec![region(0, 1 << 51, 0, file(1 << 42))]);
    assert!(matches!(huge, Err(MemoryError::FileTooSmall { .. })));
}

#[test]
fn a_region_larger_than_the_address_space_is_an_error_and_not_an_abort() {
    // A sparse memfd can say that it holds 4 PiB, more than 47 bits of user address space.
    let sparse = nix::sys::memfd::memfd_create(c"sparse", nix::sys::memfd::MFdFlags::empty()).unwrap();
    File::from(sparse.try_clone().unwrap()).set_len(1 << 52).unwrap();
    let attached = GuestRam::attach_unsealed(vec![region(0, 1 << 52, 0, sparse)]);
    assert!(matches!(attached, Err(MemoryError::Map { .. } | MemoryError::Create { .. })), "{attached:?}");
}

#[test]
fn regions_must_be_some_not_too_many_and_apart() {
    assert!(matches!(GuestRam::attach(vec![]), Err(MemoryError::NoRegions)));
    let many = |count: u64| {
        let backing = file(PAGE_SIZE);
        let one = |n: u64| region(n * PAGE_SIZE, PAGE_SIZE, 0, backing.try_clone().unwrap());
        GuestRam::attach_unsealed((0..count).map(one).collect())
    };
    let full = many(MAX_REGIONS as u64).unwrap();
    assert!(matches!(many(33), Err(MemoryError::TooManyRegions(33))));
    let one_more = full.insert_region(region(1 << 30, PAGE_SIZE, 0, file(PAGE_SIZE)));
    assert!(matches!(one_more, Err(MemoryError::TooManyRegions(33))));
    let overlapping = GuestRam::attach_unsealed(vec![
        region(0x4000, 0x2000, 0, file(0x2000)),
        region(0x3000, 0x1001 + 0xFFF, 0, file(0x2000)),
    ]);
    assert!(matches!(overlapping, Err(MemoryError::Overlap(0x3000, 0x4000))));
    let inside = ram().insert_region(region(REGIONS[0].0 + PAGE_SIZE, PAGE_SIZE, 0, file(PAGE_SIZE)));
    assert!(matches!(inside, Err(MemoryError::Overlap(..))));
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    let (pipe, _other) = std::io::pipe().unwrap();
    let attached = GuestRam::attach(vec![region(0, PAGE_SIZE, 0, pipe)]);
    assert!(matches!(attached, Err(MemoryError::NotAFile(_))));
    let read_only = File::open("/proc/self/exe").unwrap();
    let attached = GuestRam::attach_unsealed(vec![region(0, PAGE_SIZE, 0, read_only)]);
    assert!(matches!(attached, Err(MemoryError::Map { .. })));
}

#[test]
fn files_that_can_shrink_are_refused_unless_asked_for() {
    let unsealed = || vec![region(0x7000, PAGE_SIZE, 0, file(PAGE_SIZE))];
    assert!(matches!(GuestRam::attach(unsealed()), Err(MemoryError::NotSealed(0x7000))));
    GuestRam::attach_unsealed(unsealed()).unwrap();
}

#[test]
fn regions_come_in_any_order_and_go_one_by_one() {
    let ram = GuestRam::attach_unsealed(vec![
        region(0x8000, PAGE_SIZE, 0, file(PAGE_SIZE)),
        region(0x2000, PAGE_SIZE, 0, file(PAGE_SIZE)),
    ])
    .unwrap();
    assert_eq!(ram.regions().map(|r| r.guest_address).collect::<Vec<_>>(), [0x2000, 0x8000]);
    ram.view(0x8000, 1, Direction::Write).unwrap().write(0, 1u8).unwrap();
    assert!(matches!(ram.remove_region(0x2000, 0x2000), Err(MemoryError::NoSuchRegion { .. })));
    let left = ram.remove_region(0x2000, PAGE_SIZE).unwrap();
    assert!(left.view(0x2000, 1, Direction::Read).is_err());
    assert_eq!(left.dirty_pages().pages().collect::<Vec<_>>(), [0x8000], "bitmaps are shared");
    let none = left.remove_region(0x8000, PAGE_SIZE).unwrap();
    assert_eq!((none.size(), none.end(), none.contains(0, 1)), (0, 0, false));
    assert_eq!(
        ram.view(0x8000, 1, Direction::Read).unwrap().read::<u8>(0).unwrap(),
        1,
        "old value still mapped"
    );
}

#[test]
fn views_hold_to_range_and_direction() {
    let ram = ram();
    let base = REGIONS[0].0;
    for (address, len) in [(base - 1, 2), (REGIONS[2].0 + 5 * 4096 - 1, 2), (u64::MAX, 2), (base, u64::MAX)] {
        assert!(matches!(ram.view(address, len, Direction::Read), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(ram.lend(address, len, Direction::Read), Err(MemoryError::OutOfRange { .. })));
    }
    let view = ram.view(base + 8, 16, Direction::Read).unwrap();
    assert!(matches!(view.write(0, 1u8), Err(MemoryError::WrongDirection { .. })));
    assert!(matches!(view.zero(0, 1), Err(MemoryError::WrongDirection { .. })));
    assert!(matches!(view.lend(0, 1, Direction::ReadWrite), Err(MemoryError::WrongDirection { .. })));
    assert!(matches!(view.read::<u64>(9), Err(MemoryError::OutOfView { offset: 9, len: 8, view_len: 16 })));
    assert!(matches!(view.read::<u8>(u64::MAX), Err(MemoryError::OutOfView { .. })));
    assert!(matches!(view.part(8, 9), Err(MemoryError::OutOfView { .. })));
    assert!(matches!(view.load::<u64>(4, Ordering::Acquire), Err(MemoryError::UnalignedAccess { .. })));
    let write_only = ram.view(base, 16, Direction::Write).unwrap();
    assert!(matches!(write_only.part(4, 4).unwrap().read::<u8>(0), Err(MemoryError::WrongDirection { .. })));
    assert!(matches!(write_only.read_bytes(0, &mut [0]), Err(MemoryError::WrongDirection { .. })));
    assert!(ram.dirty_pages().is_empty());
}

#[test]
fn buffers_hold_to_their_direction() {
    let ram = ram();
    let target = file(16);
    let lend = |direction| ram.lend(REGIONS[0].0, 16, direction).unwrap();
    let refused = |error: std::io::Error| assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    refused(lend(Direction::Read).read_at(target.as_fd(), 0).unwrap_err());
    refused(lend(Direction::Write).write_at(target.as_fd(), 0).unwrap_err());
    let overflow = lend(Direction::Read).write_at(target.as_fd(), u64::MAX).unwrap_err();
    assert_eq!(overflow.kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn a_file_that_ends_early_says_how_much_is_missing() {
    let view = ram().view(REGIONS[0].0, 8192, Direction::Write).unwrap();
    let copied = view.copy_from_file(0, file(5000).as_fd(), 0, 8192);
    assert!(matches!(copied, Err(MemoryError::EndOfFile { missing: 3192 })));
}

#[test]
fn merged_words_stay_inside_their_region() {
    let ram = ram();
    let mut pages = ram.take_dirty();
    assert!(pages.merge_words(REGIONS[0].0, &[u64::MAX, u64::MAX]));
    assert_eq!(pages.count(), 4, "four pages, whatever else the words say");
    assert!(!pages.merge_words(0xDEAD_0000, &[1]));
    let mut sum = ram.take_dirty();
    assert!(sum.merge(&pages));
    assert_eq!(sum, pages);
}
