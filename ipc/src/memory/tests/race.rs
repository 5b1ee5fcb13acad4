//! Harvesting while others write loses no page.

use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::super::{GuestRam, PAGE_SIZE};

const PAGES: u64 = 16;

/// Copies dirty pages' first words as a migration would.
fn copy_dirty(ram: &GuestRam, copy: &mut [u64]) {
    for page in ram.take_dirty().pages() {
        copy[usize::try_from(page / PAGE_SIZE).unwrap()] = ram.memory().read_obj(GuestAddress(page)).unwrap();
    }
}

#[test]
fn pages_written_during_harvests_are_in_one_of_them() {
    let ram = GuestRam::create(PAGES * PAGE_SIZE).unwrap();
    let stop = AtomicBool::new(false);
    let mut copy = vec![0u64; usize::try_from(PAGES).unwrap()];
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (ram, stop) = (&ram, &stop);
            scope.spawn(move || {
                let mut value = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    value += 1;
                    let page = (value * 7 % (PAGES / 2)) * 2 + half;
                    ram.memory().write_obj(value, GuestAddress(page * PAGE_SIZE)).unwrap();
                }
            });
        }
        for _ in 0..20_000 {
            copy_dirty(&ram, &mut copy);
        }
        stop.store(true, Ordering::Relaxed);
    });
    copy_dirty(&ram, &mut copy);
    let now: Vec<u64> =
        (0..PAGES).map(|page| ram.memory().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()).collect();
    assert_eq!(copy, now);
}
