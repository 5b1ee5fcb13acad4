//! Kills of devices whose requests leave a trace outside the rings: a balloon, persistent memory.
//!
//! Contains unsafe code: a system call that tells what of a file is not written back.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{BalloonConfig, DeviceConfig, FdIndex, PmemConfig};

use crate::driver::{BUFFERS, Driver, Random};
use crate::storm::{OTHER_KILLS, Victim, check_pause};

const PAGE: u64 = 4096;

/// Pages of a batch, and batches.
const PAGES: u64 = 32;
const BATCHES: u64 = 48;
/// Where the guest's pages lie that a balloon may get.
const FIRST: u64 = 48 << 20;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Whose a batch of pages is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Whose {
    Guest,
    Giving,
    Host,
    Taking,
}

struct Pages {
    whose: Vec<Whose>,
    /// What the guest has written into each.
    versions: Vec<u64>,
    flying: HashMap<(usize, u16), usize>,
    rounds: u64,
}

impl Pages {
    fn page(batch: usize, page: u64) -> u64 {
        FIRST + (batch as u64 * PAGES + page) * PAGE
    }

    fn word(batch: usize, page: u64, version: u64) -> [u8; 8] {
        (version << 32 | (batch as u64) << 16 | page | 1 << 63).to_le_bytes()
    }

    fn fill(&mut self, driver: &Driver, batch: usize) {
        self.versions[batch] += 1;
        (0..PAGES).for_each(|page| {
            let word = Self::word(batch, page, self.versions[batch]);
            driver.put(Self::page(batch, page), &word);
            driver.put(Self::page(batch, page) + PAGE - 8, &word);
        });
        self.whose[batch] = Whose::Guest;
    }

    fn check(&self, driver: &Driver, batch: usize) {
        for page in 0..PAGES {
            let word = Self::word(batch, page, self.versions[batch]);
            for at in [Self::page(batch, page), Self::page(batch, page) + PAGE - 8] {
                assert!(
                    driver.get(at, 8) == word,
                    "a page of the guest's, {page} of batch {batch}, was given away"
                );
            }
        }
    }

    fn submit(&mut self, driver: &mut Driver, random: &mut Random) {
        for batch in 0..self.whose.len() {
            let (queue, whose) = match self.whose[batch] {
                Whose::Guest => (INFLATE, Whose::Giving),
                Whose::Host => (DEFLATE, Whose::Taking),
                _ => continue,
            };
            if random.below(3) > 0 || self.flying.len() >= 16 {
                continue;
            }
            if whose == Whose::Giving {
                self.check(driver, batch);
            }
            let numbers = (0..PAGES).map(|page| u32::try_from(Self::page(batch, page) / PAGE).unwrap());
            let at = BUFFERS + batch as u64 * PAGE;
            driver.put(at, &numbers.flat_map(u32::to_le_bytes).collect::<Vec<_>>());
            let head = driver.queues[queue].submit(&driver.ram, &[(at, PAGES as u32 * 4, false)]);
            driver.queues[queue].kick();
            self.flying.insert((queue, head), batch);
            self.whose[batch] = whose;
        }
    }

    fn done(&mut self, driver: &Driver, queue: usize, head: u16) {
        let batch = self.flying.remove(&(queue, head)).expect("finished twice, or never asked for");
        self.rounds += 1;
        match self.whose[batch] {
            Whose::Giving => {
                let empty = (0..PAGES).all(|page| driver.get(Self::page(batch, page), 8) == [0; 8]);
                assert!(empty, "what was given is not the host's");
                self.whose[batch] = Whose::Host;
            }
            Whose::Taking => self.fill(driver, batch),
            other => panic!("a batch that is {other:?}"),
        }
    }

    fn collect(&mut self, driver: &mut Driver) {
        let ram = driver.ram.clone();
        for queue in [INFLATE, DEFLATE] {
            while let Some((head, _)) = driver.queues[queue].finished(&ram) {
                self.done(driver, queue, head);
            }
        }
    }
}

#[test]
fn a_storm_of_kills_takes_no_page_from_a_guest_that_has_it_back() {
    let config =
        BalloonConfig { target: 1 << 16, actual: 0, deflate_on_oom: true, free_page_reporting: true };
    let mut victim = Victim::new("balloon", DeviceConfig::Balloon(config), &[], 4);
    let mut pages = Pages {
        whose: vec![Whose::Guest; BATCHES as usize],
        versions: vec![0; BATCHES as usize],
        flying: HashMap::new(),
        rounds: 0,
    };
    (0..BATCHES as usize).for_each(|batch| pages.fill(&victim.driver, batch));
    let mut random = Random(0x5151_7373_9191_1717);
    let mut longest = Duration::ZERO;
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        loop {
            pages.submit(&mut victim.driver, &mut random);
            if Instant::now() >= end {
                break;
            }
            pages.collect(&mut victim.driver);
        }
        longest = longest.max(victim.kill(|driver, queue, (head, _)| pages.done(driver, queue, head)));
    }
    let end = Instant::now() + Duration::from_secs(10);
    while !pages.flying.is_empty() {
        pages.collect(&mut victim.driver);
        assert!(Instant::now() < end, "{} requests are never finished", pages.flying.len());
    }
    for batch in (0..BATCHES as usize).filter(|batch| pages.whose[*batch] == Whose::Guest) {
        pages.check(&victim.driver, batch);
    }
    println!("balloon: {OTHER_KILLS} kills under {} requests: pause at most {longest:.1?}", pages.rounds);
    check_pause(longest);
    victim.process.stop();
}

/// Pages of a file in the page cache that are not on the disk; `None`: this kernel does not tell.
fn not_written_back(file: &File) -> Option<u64> {
    const CACHESTAT: i64 = 451;
    let range = [0_u64; 2];
    let mut found = [0_u64; 5];
    // SAFETY: the kernel reads a range (offset, length; 0: all) and fills a structure of five 64-bit words, both live.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0) };
    (result == 0).then(|| found[1] + found[2])
}

#[test]
fn a_storm_of_kills_acknowledges_no_flush_that_was_not_made() {
    const SIZE: u64 = 4 << 20;
    const ANSWER: u64 = BUFFERS + PAGE;
    // Not in /tmp, which may be memory.
    let path = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let written = path.reopen().unwrap();
    written.set_len(SIZE).unwrap();
    let file: OwnedFd = File::open(path.path()).unwrap().into();
    let resources = [&file];
    let config = PmemConfig { file: FdIndex(1), address: 1 << 32, size: SIZE };
    let mut victim = Victim::new("pmem", DeviceConfig::Pmem(config), &resources, 1);
    let mut random = Random(0x2468_1357_fdb9_eca8);
    let (mut longest, mut flushes, mut seen_dirty) = (Duration::ZERO, 0_u64, 0_u64);
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        // What the guest stores, and its flush; the last one is under way when the process dies.
        loop {
            (0..8).for_each(|_| {
                written.write_all_at(&random.0.to_le_bytes(), random.below(SIZE / PAGE) * PAGE).unwrap();
            });
            seen_dirty += not_written_back(&written).unwrap_or(1);
            victim.driver.put(BUFFERS, &0_u32.to_le_bytes());
            victim.driver.put(ANSWER, &[9; 4]);
            victim.driver.queues[0].submit(&victim.driver.ram, &[(BUFFERS, 4, false), (ANSWER, 4, true)]);
            victim.driver.queues[0].kick();
            flushes += 1;
            let last = Instant::now() >= end;
            if last {
                std::thread::sleep(Duration::from_micros(random.below(300)));
                let mut back = false;
                longest = longest.max(victim.kill(|_, _, _| back = true));
                if back {
                    check_flush(&victim.driver, ANSWER, &written);
                    break;
                }
            }
            let ram = victim.driver.ram.clone();
            victim.driver.queues[0].wait(&ram);
            check_flush(&victim.driver, ANSWER, &written);
            if last {
                break;
            }
        }
    }
    assert!(seen_dirty > 0, "there was never anything to flush");
    println!("pmem: {OTHER_KILLS} kills under {flushes} flushes: pause at most {longest:.1?}");
    check_pause(longest);
    victim.process.stop();
}

fn check_flush(driver: &Driver, answer: u64, file: &File) {
    assert_eq!(driver.get(answer, 4), [0; 4], "a flush failed");
    assert!(
        not_written_back(file).is_none_or(|pages| pages == 0),
        "a flush that was not made is acknowledged"
    );
}
