//! Huge pages for guest RAM, whatever the host's switch for shared memory says.
//!
//! Contains unsafe code: advice to the kernel on the mappings of guest RAM.
//!
//! A first touch of a page by the guest is a nested page fault, and there are 512 pages in a huge page. Most hosts give
//! huge pages to private memory by themselves, and to shared memory, as guest RAM here is, only where
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` has been changed. MADV_COLLAPSE (Linux 6.1) works without: it
//! puts a block of 2 MiB, of which at least one page is there, into a huge page. As everywhere with transparent huge
//! pages, a block of which little is used costs memory.

use std::ptr::NonNull;

use nix::libc;
use nix::unistd::{Whence, lseek};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::ram::{GuestRam, Region};

/// Bytes of a huge page.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// How often a block is tried: a page of it may be in use by the kernel just now.
const ATTEMPTS: u8 = 3;
/// The most blocks that are made huge before the guest has touched them.
const AHEAD: usize = 4;
/// A block that is not tried any more: it is huge, or it cannot be.
const DONE: u8 = ATTEMPTS;

impl GuestRam {
    /// Keeps the kernel, and everything here, from backing this RAM with huge pages.
    pub fn refuse_huge_pages(&self) {
        for region in self.memory().iter() {
            advise(region, 0, region.len(), libc::MADV_NOHUGEPAGE);
        }
    }

    /// Backs the whole blocks of 2 MiB among `len` bytes at `address` with huge pages, for a loader that is about to fill
    /// them. Where the host cannot, nothing happens.
    pub fn back_with_huge_pages(&self, address: u64, len: u64) {
        for region in self.memory().iter() {
            let start = region.start_addr().raw_value();
            let from =
                address.saturating_sub(start).checked_next_multiple_of(HUGE_PAGE_SIZE).unwrap_or(u64::MAX);
            let to = address.saturating_add(len).saturating_sub(start).min(region.len());
            let to = to - to % HUGE_PAGE_SIZE;
            for block in from / HUGE_PAGE_SIZE..to / HUGE_PAGE_SIZE {
                advise(region, block * HUGE_PAGE_SIZE, 1, libc::MADV_POPULATE_READ);
            }
            if from < to {
                advise(region, from, to - from, libc::MADV_COLLAPSE);
            }
        }
    }
}

/// Turns blocks that the guest has begun to use into huge pages.
#[derive(Debug)]
pub struct HugePages {
    ram: GuestRam,
    /// For each region the attempts on each of its blocks.
    attempts: Vec<Vec<u8>>,
}

impl HugePages {
    /// Blocks of `ram`, none of them tried; nothing where the kernel does not know MADV_COLLAPSE.
    #[must_use]
    pub fn new(ram: &GuestRam) -> Option<Self> {
        let known = ram.memory().iter().all(|region| advise(region, 0, 0, libc::MADV_COLLAPSE));
        let blocks = |region: &Region| usize::try_from(region.len() / HUGE_PAGE_SIZE).unwrap_or(0);
        let attempts = ram.memory().iter().map(|region| vec![0; blocks(region)]).collect();
        known.then(|| Self { ram: ram.clone(), attempts })
    }

    /// Looks for blocks that have become used since the last time; answers how many are huge now that were not.
    pub fn collapse_used(&mut self) -> usize {
        let regions = self.ram.memory().iter().zip(&mut self.attempts);
        regions.map(|(region, attempts)| collapse_region(region, attempts)).sum()
    }
}

/// Asks for huge pages at the first touch, which hosts with `advise` or more in that file give.
pub(super) fn ask(region: &Region) {
    advise(region, 0, region.len(), libc::MADV_HUGEPAGE);
}

fn collapse_region(region: &Region, attempts: &mut [u8]) -> usize {
    let mut collapsed = 0;
    let mut block = 0;
    while let Some(open) = next_open(attempts, block) {
        // The next block that holds data, which may be one that is done.
        let Some(used) = next_used(region, open) else { break };
        block = used.saturating_add(1);
        let Some(count) = attempts.get_mut(used).filter(|count| **count < DONE) else {
            block = used;
            continue;
        };
        let done = advise(region, used as u64 * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE, libc::MADV_COLLAPSE);
        *count = if done { DONE } else { count.saturating_add(1) };
        if done {
            collapsed += 1 + look_ahead(region, attempts, used);
        }
    }
    collapsed
}

/// From a block to the one at a distance in some direction.
type Step = fn(usize, usize) -> Option<usize>;

/// What is filled from one end to the other meets huge pages: beyond a block that ends a run of them, as many more as the run
/// has, up to [`AHEAD`]. Answers how many.
fn look_ahead(region: &Region, attempts: &mut [u8], block: usize) -> usize {
    let done = |attempts: &[u8], at: Option<usize>| at.and_then(|at| attempts.get(at)) == Some(&DONE);
    let run = |step: Step| (1..=AHEAD).take_while(|distance| done(attempts, step(block, *distance))).count();
    let (below, above) = (run(usize::checked_sub), run(usize::checked_add));
    let (step, length): (Step, usize) =
        if below >= above { (usize::checked_add, below) } else { (usize::checked_sub, above) };
    let mut ahead = 0;
    for next in (1..=length).map_while(|distance| step(block, distance)) {
        let Some(count) = attempts.get_mut(next).filter(|count| **count < DONE) else { break };
        let offset = next as u64 * HUGE_PAGE_SIZE;
        let made = advise(region, offset, 1, libc::MADV_POPULATE_READ)
            && advise(region, offset, HUGE_PAGE_SIZE, libc::MADV_COLLAPSE);
        if !made {
            break;
        }
        *count = DONE;
        ahead += 1;
    }
    ahead
}

/// The first block from `from` on that is still worth a try.
fn next_open(attempts: &[u8], from: usize) -> Option<usize> {
    let rest = attempts.get(from..)?;
    rest.iter().position(|count| *count < DONE).map(|offset| from + offset)
}

/// The first block from `from` on that is in use. The position of the file, which `lseek` moves, means nothing to anybody.
fn next_used(region: &Region, from: usize) -> Option<usize> {
    let file = region.file_offset()?;
    let start = file.start().checked_add(from as u64 * HUGE_PAGE_SIZE)?;
    let data = lseek(file.file(), i64::try_from(start).ok()?, Whence::SeekData).ok()?;
    let offset = u64::try_from(data).ok()?.checked_sub(file.start())?;
    usize::try_from(offset / HUGE_PAGE_SIZE).ok()
}

/// Advises the kernel on `len` bytes at `offset` of a region; whether it took the advice.
fn advise(region: &Region, offset: u64, len: u64, advice: libc::c_int) -> bool {
    let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else { return false };
    if offset.checked_add(len).is_none_or(|end| end as u64 > region.len()) {
        return false;
    }
    #[expect(clippy::disallowed_methods, reason = "advice to the kernel writes nothing")]
    let start = NonNull::new(region.as_ptr());
    // SAFETY: the range lies within the mapping that `region` owns (checked above); neither populating nor collapsing changes
    // its contents or its life.
    start.is_some_and(|start| unsafe { libc::madvise(start.add(offset).as_ptr().cast(), len, advice) } == 0)
}
