//! The vhost-user dirty log.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::super::{DirtyLog, GuestRam, MemoryError, PAGE_SIZE};
use super::{file, ram, region};

fn map(file: &File, offset: u64, size: u64) -> Result<DirtyLog, MemoryError> {
    DirtyLog::map(file.try_clone().unwrap().into(), offset, size)
}

fn byte(file: &File, at: u64) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

fn touch(ram: &GuestRam, page: u64) {
    ram.memory().write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap();
}

/// One region of 64 pages at 0.
fn small() -> GuestRam {
    GuestRam::create(64 * PAGE_SIZE).unwrap()
}

#[test]
fn the_lowest_page_is_the_lowest_bit_of_the_first_byte() {
    let (ram, log) = (small(), file(8));
    ram.set_log(Some(map(&log, 0, 8).unwrap())).unwrap();
    for page in [0, 9, 63] {
        touch(&ram, page);
    }
    assert_eq!([0, 1, 2, 7].map(|at| byte(&log, at)), [0b1, 0b10, 0, 0x80]);
}

#[test]
fn a_bit_that_the_front_end_cleared_is_set_again() {
    let (ram, log) = (small(), file(8));
    ram.set_log(Some(map(&log, 0, 8).unwrap())).unwrap();
    touch(&ram, 3);
    log.write_all_at(&[0; 8], 0).unwrap();
    // The own bitmap still has the page; the log must not rely on it.
    touch(&ram, 3);
    assert_eq!(byte(&log, 0), 0b1000);
}

#[test]
fn a_log_may_begin_anywhere_in_its_file_and_leaves_the_rest_alone() {
    let (ram, log) = (small(), file(10_000));
    log.write_all_at(&[0x5A; 10_000], 0).unwrap();
    log.write_all_at(&[0; 8], 4099).unwrap();
    ram.set_log(Some(map(&log, 4099, 8).unwrap())).unwrap();
    (0..64).for_each(|page| touch(&ram, page));
    assert_eq!([4098, 4099, 4106, 4107].map(|at| byte(&log, at)), [0x5A, 0xFF, 0xFF, 0x5A]);
}

#[test]
fn switched_off_it_stays_as_it_is_and_the_bitmap_goes_on() {
    let (ram, log) = (small(), file(8));
    ram.set_log(Some(map(&log, 0, 8).unwrap())).unwrap();
    touch(&ram, 1);
    ram.set_log(None).unwrap();
    touch(&ram, 2);
    assert_eq!(byte(&log, 0), 0b10);
    assert_eq!(ram.dirty_pages().count(), 2);
}

#[test]
fn a_second_log_replaces_the_first() {
    let (ram, first, second) = (small(), file(8), file(8));
    ram.set_log(Some(map(&first, 0, 8).unwrap())).unwrap();
    ram.set_log(Some(map(&second, 0, 8).unwrap())).unwrap();
    touch(&ram, 0);
    assert_eq!((byte(&first, 0), byte(&second, 0)), (0, 1));
}

#[test]
fn regions_added_later_are_logged_too() {
    let (ram, log) = (small(), file(16));
    ram.set_log(Some(map(&log, 0, 16).unwrap())).unwrap();
    let grown = ram.insert_region(region(64 * PAGE_SIZE, 4 * PAGE_SIZE, 0, file(4 * PAGE_SIZE))).unwrap();
    touch(&grown, 65);
    assert_eq!(byte(&log, 8), 0b10);
    let replaced = grown.replace_regions(vec![region(0, 2 * PAGE_SIZE, 0, file(2 * PAGE_SIZE))]).unwrap();
    touch(&replaced, 1);
    assert_eq!(byte(&log, 0), 0b10);
    // Derived values share the log: switching it off in one does so in all.
    ram.set_log(None).unwrap();
    touch(&replaced, 0);
    assert_eq!(byte(&log, 0), 0b10);
}

#[test]
fn a_log_set_before_any_region_covers_what_comes() {
    let (ram, log) = (GuestRam::empty(), file(1));
    ram.set_log(Some(map(&log, 0, 1).unwrap())).unwrap();
    let grown = ram.insert_region(region(4096, 4096, 0, file(4096))).unwrap();
    touch(&grown, 1);
    assert_eq!(byte(&log, 0), 0b10);
    let far = grown.insert_region(region(8 * PAGE_SIZE, 4096, 0, file(4096)));
    assert!(matches!(far, Err(MemoryError::LogTooSmall { size: 1, needed: 2, .. })));
}

#[test]
fn a_log_that_loses_the_tail_is_refused_and_the_old_one_stays() {
    let (ram, log) = (ram(), file(64));
    let needed = ram.end().div_ceil(PAGE_SIZE * 8);
    ram.set_log(Some(map(&log, 0, needed).unwrap())).unwrap();
    let short = map(&log, 0, needed - 1).unwrap();
    assert!(matches!(ram.set_log(Some(short)), Err(MemoryError::LogTooSmall { .. })));
    touch(&ram, ram.end() / PAGE_SIZE - 1);
    assert_ne!(byte(&log, needed - 1), 0);
}

#[test]
fn bad_logs_are_refused() {
    let log = file(8);
    assert!(matches!(map(&log, 0, 0), Err(MemoryError::BadLog { .. })));
    assert!(matches!(map(&log, u64::MAX, 8), Err(MemoryError::BadLog { .. })));
    assert!(matches!(map(&log, 1 << 62, 1 << 62), Err(MemoryError::BadLog { .. })));
    assert!(matches!(map(&log, 0, 9), Err(MemoryError::FileTooSmall { actual: 8, needed: 9, .. })));
    assert!(matches!(map(&log, 1, 8), Err(MemoryError::FileTooSmall { .. })));
    let (pipe, _other) = std::io::pipe().unwrap();
    assert!(matches!(DirtyLog::map(pipe.into(), 0, 8), Err(MemoryError::NotAFile(_))));
    let read_only = File::open("/proc/self/exe").unwrap();
    assert!(matches!(DirtyLog::map(read_only.into(), 0, 8), Err(MemoryError::Map { .. })));
}
