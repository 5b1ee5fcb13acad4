//! Kills of devices whose requests leave a trace outside the rings: a network card, a balloon, persistent memory.
//!
//! Contains unsafe code: a system call that tells what of a file is not written back.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{
    BalloonConfig, DeviceConfig, FdIndex, NetBackend, NetConfig, NetLimits, PmemConfig,
};

use crate::driver::{BUFFERS, Driver, Random};
use crate::storm::{OTHER_KILLS, Victim, check_pause};

const PAGE: u64 = 4096;

/// Bytes of a frame.
const FRAME: usize = 1000;
/// Of `struct virtio_net_hdr_v1`.
const HEADER: u64 = 12;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Frames in flight, and buffers that wait for one.
const DEPTH: u64 = 32;
/// Where buffers for frames to the guest lie; those from it lie before.
const IN: u64 = BUFFERS + DEPTH * PAGE;

/// What a frame of this number looks like.
fn frame(number: u64) -> Vec<u8> {
    let seed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (0..FRAME as u64 / 8).flat_map(|word| seed.wrapping_add(word).to_le_bytes());
    let mut bytes: Vec<u8> = words.collect();
    bytes[..14].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    bytes[14..22].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn number_of(bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[14..22].try_into().unwrap());
    assert!(bytes == frame(number), "a corrupted frame");
    number
}

/// Both ends of a network card's frames.
struct Frames {
    wire: UnixDatagram,
    /// Frames that the guest has sent, those of them that came back, and the next that the wire is to show.
    sent: u64,
    back: u64,
    next: u64,
    twice: u64,
    /// Frames for the guest: sent, the next that it may see, and those that were lost.
    given: u64,
    may_come: u64,
    lost: u64,
    posted: HashMap<u16, u64>,
    free: Vec<u64>,
}

impl Frames {
    fn done(&mut self, driver: &Driver, queue: usize, (head, len): (u16, u32)) {
        if queue == TRANSMIT {
            self.back += 1;
            return;
        }
        let address = self.posted.remove(&head).expect("a buffer comes back twice");
        let number = number_of(&driver.get(address, len as usize)[HEADER as usize..]);
        assert!(number >= self.may_come, "frame {number} came twice, or after its time");
        self.lost += number - self.may_come;
        self.may_come = number + 1;
        self.free.push(address);
    }

    fn look_at_wire(&mut self) {
        let mut bytes = [0; 2 * FRAME];
        while let Ok(len) = self.wire.recv(&mut bytes) {
            match number_of(&bytes[..len]) {
                number if number == self.next => self.next += 1,
                number if number < self.next => self.twice += 1,
                number => panic!("frame {number} instead of {}: one is lost", self.next),
            }
        }
    }

    /// Keeps both directions busy.
    fn turn(&mut self, driver: &mut Driver, more: bool) {
        while more && self.sent - self.back < DEPTH {
            let at = BUFFERS + self.sent % DEPTH * PAGE;
            driver.put(at, &[&[0; HEADER as usize][..], &frame(self.sent)].concat());
            driver.queues[TRANSMIT].submit(&driver.ram, &[(at, HEADER as u32 + FRAME as u32, false)]);
            self.sent += 1;
        }
        while let Some(address) = self.free.pop() {
            let head = driver.queues[RECEIVE].submit(&driver.ram, &[(address, PAGE as u32, true)]);
            self.posted.insert(head, address);
        }
        [RECEIVE, TRANSMIT].iter().for_each(|queue| driver.queues[*queue].kick());
        while more && self.wire.send(&frame(self.given)).is_ok() {
            self.given += 1;
        }
        self.look_at_wire();
        let ram = driver.ram.clone();
        for queue in [RECEIVE, TRANSMIT] {
            while let Some(finished) = driver.queues[queue].finished(&ram) {
                self.done(driver, queue, finished);
            }
        }
    }
}

#[test]
fn a_storm_of_kills_costs_frames_and_corrupts_none() {
    let (wire, theirs) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    let theirs: OwnedFd = theirs.into();
    let resources = [&theirs];
    let config = NetConfig {
        backend: NetBackend::Datagrams(Some(FdIndex(1))),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        receive: NetLimits::default(),
        transmit: NetLimits::default(),
        mac_filter: false,
        ip_filter: Vec::new(),
        link: true,
        successor: false,
        group: None,
    };
    let mut victim = Victim::new("net", DeviceConfig::Net(config), &resources, 3);
    let mut frames = Frames {
        wire,
        sent: 0,
        back: 0,
        next: 0,
        twice: 0,
        given: 0,
        may_come: 0,
        lost: 0,
        posted: HashMap::new(),
        free: (0..DEPTH).map(|slot| IN + slot * PAGE).collect(),
    };
    let mut random = Random(0x0bad_cafe_1234_5678);
    let mut longest = Duration::ZERO;
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        loop {
            frames.turn(&mut victim.driver, true);
            if Instant::now() >= end {
                break;
            }
        }
        longest = longest.max(victim.kill(|driver, queue, done| frames.done(driver, queue, done)));
    }
    // Every frame of the guest arrives, and what is given to the card when nobody dies.
    let end = Instant::now() + Duration::from_secs(20);
    while frames.next < frames.sent || frames.back < frames.sent {
        frames.turn(&mut victim.driver, false);
        assert!(Instant::now() < end, "{} of {} frames", frames.next, frames.sent);
    }
    // Frames come in order: when one arrives that was given now, it is known which of the others were lost.
    let before = frames.given;
    while frames.may_come < before + 100 {
        frames.turn(&mut victim.driver, frames.given < before + 100);
        assert!(Instant::now() < end, "the guest hears nothing more");
    }
    let lost = frames.lost;
    println!(
        "net: {OTHER_KILLS} kills under {} frames from the guest, none lost, {} came twice, and {before} to it, {lost} lost: pause at most {longest:.1?}",
        frames.sent, frames.twice
    );
    check_pause(longest);
    // What a death may cost: what the process had in hand.
    assert!(lost <= u64::from(OTHER_KILLS) * 2, "{lost} frames lost");
    victim.process.stop();
}

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
