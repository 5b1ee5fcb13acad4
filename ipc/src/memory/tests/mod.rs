//! Tests of the whole layer, by what must hold: exact marks, refusals, the log.

mod huge;
mod log;
mod marks;
mod race;
mod refusals;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;

use super::{GuestRam, PAGE_SIZE, SharedRegion};

/// Two regions that adjoin, four pages each, and one of five pages apart from them.
const REGIONS: [(u64, u64); 3] = [(0x10000, 4), (0x14000, 4), (0x10_0000, 5)];

/// A plain file of `size` bytes, without seals.
fn file(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

fn region(guest_address: u64, size: u64, offset: u64, fd: impl Into<OwnedFd>) -> SharedRegion {
    SharedRegion { guest_address, size, offset, fd: fd.into() }
}

/// RAM as [`REGIONS`] says, all in one file.
fn ram() -> GuestRam {
    let backing = GuestRam::create(16 * PAGE_SIZE).unwrap();
    let backing = backing.regions().next().unwrap().share().unwrap();
    let mut offset = PAGE_SIZE;
    let regions = REGIONS.map(|(address, pages)| {
        let fd = backing.fd.try_clone().unwrap();
        let part = region(address, pages * PAGE_SIZE, offset, fd);
        offset += pages * PAGE_SIZE;
        part
    });
    GuestRam::attach(regions.into()).unwrap()
}

/// Pages that `len` bytes at `address` touch.
fn pages_of(address: u64, len: u64) -> BTreeSet<u64> {
    (address..address + len).map(|byte| byte / PAGE_SIZE * PAGE_SIZE).collect()
}

fn dirty(ram: &GuestRam) -> BTreeSet<u64> {
    ram.dirty_pages().pages().collect()
}
