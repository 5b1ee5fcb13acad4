//! Disks that share a limit, each in a jailed process of its own.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{
    BlkConfig, BlkOptions, DeviceConfig, FdIndex, GroupConfig, ImageFormat, Rates,
};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::limit_group::{GroupMemory, GroupView, Tokens, Word};

use crate::driver::{BUFFERS, Driver, header};
use crate::supervised::Supervised;

/// What was saved up for a burst is used up by then.
const WARM_UP: Duration = Duration::from_millis(250);
/// Requests under way.
const DEPTH: u64 = 32;
/// `VIRTIO_BLK_T_IN`.
const READ: u32 = 0;

fn address(lane: u64) -> u64 {
    BUFFERS + lane * 0x1_0000
}

fn descriptors(memory: &GroupMemory, place: usize) -> (OwnedFd, Vec<OwnedFd>) {
    let (roll, places) = memory.descriptors(place);
    let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    (owned(roll), places.map(owned).collect())
}

/// A disk in a place of the group, and a driver that keeps its queue full.
struct Member {
    _process: Supervised,
    driver: Driver,
    chain: [(u64, u32, bool); 3],
    ended: u64,
}

impl Member {
    fn new(memory: &GroupMemory, place: usize, rates: Rates, size: u32) -> Self {
        let image = tempfile::tempfile().unwrap();
        image.set_len(1 << 20).unwrap();
        let (image, (roll, places)) = (OwnedFd::from(image), descriptors(memory, place));
        let places_at = (3..).take(places.len()).map(FdIndex).collect();
        let own = u8::try_from(place).unwrap();
        let group = GroupConfig { rates, roll: FdIndex(2), places: places_at, own };
        let config = DeviceConfig::Blk(BlkConfig {
            disk: FdIndex(1),
            read_only: false,
            serial: "member".into(),
            queues: 1,
            logical_block_size: 512,
            options: BlkOptions {
                format: ImageFormat::Raw,
                group: Some(Box::new(group)),
                ..BlkOptions::default()
            },
        });
        let resources: Vec<&OwnedFd> = [&image, &roll].into_iter().chain(&places).collect();
        let mut process = Supervised::start("blk", config, &resources, Enforcement::Supervised);
        let mut driver = process.driver(1);
        driver.put(address(0), &header(READ, 0));
        let chain = [(address(0), 16, false), (address(1), size, true), (address(2), 1, true)];
        for _ in 0..DEPTH {
            driver.queues[0].submit(&driver.ram, &chain);
        }
        Self { _process: process, driver, chain, ended: 0 }
    }

    /// Takes what has ended and asks for as much anew.
    fn turn(&mut self) {
        let (queue, ram) = (&mut self.driver.queues[0], &self.driver.ram);
        let mut again = 0;
        while queue.finished(ram).is_some() {
            again += 1;
        }
        for _ in 0..again {
            queue.submit(ram, &self.chain);
        }
        self.ended += again;
        queue.kick();
    }
}

/// What ends each second of the members, all of whose queues are full.
fn pace(members: &mut [Member], time: Duration) -> Vec<f64> {
    let mut begin = Instant::now();
    let mut before: Option<Vec<u64>> = None;
    loop {
        for member in &mut *members {
            member.turn();
        }
        std::thread::sleep(Duration::from_micros(500));
        let ended = members.iter().map(|member| member.ended);
        match &before {
            None if begin.elapsed() >= WARM_UP => {
                before = Some(ended.collect());
                begin = Instant::now();
            }
            Some(before) if begin.elapsed() >= time => {
                let each = begin.elapsed().as_secs_f64();
                return ended.zip(before).map(|(now, before)| (now - before) as f64 / each).collect();
            }
            _ => {}
        }
    }
}

fn iops(iops: u64) -> Rates {
    Rates { iops, iops_burst: iops / 50, ..Rates::default() }
}

/// Together they have `wanted` a second, and none less than `least`. What is too much is wrong at once; what is too little may be
/// the machine's fault, which has other things to do, and is measured again.
fn assert_pace(members: &mut [Member], wanted: f64, least: f64, what: &str) {
    for attempt in 1.. {
        let got = pace(members, Duration::from_millis(600));
        let total: f64 = got.iter().sum();
        assert!(total < wanted * 1.05, "{what}: {got:?} are more than {wanted} a second");
        if total > wanted * 0.95 && got.iter().all(|got| *got > least) {
            return;
        }
        assert!(attempt < 5, "{what}: {got:?} instead of {wanted} a second, {least} at least for each");
    }
}

#[test]
fn disks_of_a_group_hold_its_limit_together_and_have_it_whole_alone() {
    let memory = GroupMemory::create().unwrap();
    let rates = iops(2000);
    let places = [(); 2].map(|()| memory.join().unwrap());
    let mut members = places.map(|place| Member::new(&memory, place, rates, 512));
    assert_pace(&mut members, 2000.0, 940.0, "two");
    // One is killed, and its successor is told of the same place.
    let [one, other] = members;
    drop(other);
    let mut members = [one, Member::new(&memory, places[1], rates, 512)];
    assert_pace(&mut members, 2000.0, 940.0, "one and a successor");
    assert_pace(&mut members[..1], 2000.0, 0.0, "one while the other does nothing");
    // A third one joins while they run.
    let third = Member::new(&memory, memory.join().unwrap(), rates, 512);
    let [one, two] = members;
    let mut members = [one, two, third];
    assert_pace(&mut members, 2000.0, 620.0, "three");
    // And turns hostile: its place is written by somebody who lies, and the others keep their thirds.
    let (roll, places) = descriptors(&memory, 2);
    let said = GroupView::map(&roll, &places, 2).unwrap();
    let [one, two, third] = members;
    drop(third);
    said.say(Tokens::Operations, Word { used: u64::MAX, full_at: u64::MAX });
    assert_pace(&mut [one, two], 2000.0 * 2.0 / 3.0, 620.0, "two beside a liar");
}

/// For `make bench`: the rows of [`crate::rates`] for groups.
pub fn measure() -> Vec<(&'static str, u64, f64)> {
    let mut rows = Vec::new();
    for (what, count, rates, size) in [
        ("two disks of a group, requests/s together", 2, iops(1000), 4096),
        ("two disks of a group, requests/s together", 2, iops(20_000), 512),
        ("one of them alone, requests/s", 1, iops(20_000), 512),
        ("two disks of a group, bytes/s together", 2, Rates { bps: 100_000_000, ..Rates::default() }, 65536),
    ] {
        let memory = GroupMemory::create().unwrap();
        let places = [(); 2].map(|()| memory.join().unwrap());
        let mut members = places.map(|place| Member::new(&memory, place, rates, size));
        let got: f64 = pace(&mut members[..count], Duration::from_millis(1200)).iter().sum();
        let each = if rates.bps == 0 { 1.0 } else { f64::from(size) };
        rows.push((what, rates.bps.max(rates.iops), got * each));
    }
    rows
}
