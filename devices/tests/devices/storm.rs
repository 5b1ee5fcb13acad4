//! The process is killed over and over while 32 requests are in flight: none is lost, none fails, nothing is corrupted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bulkhead_ipc::vhost_user::frontend::{Frontend, InflightMemory, Limits};

use crate::driver::{BUFFERS, Driver, EVENT_IDX, Random, SIZE, Service, header};

const BLOCK: usize = 4096;
/// Blocks of the disk.
const BLOCKS: u64 = 4096;
/// Most blocks in one request.
const MOST: u64 = 16;
const DEPTH: u64 = 32;
const KILLS: u32 = 50;
const HEADERS: u64 = 0xf0_0000;
const STATUS: u64 = 0xe0_0000;

/// What a block holds after its `version`th write.
fn contents(block: u64, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let seed = (block << 32 | u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BLOCK as u64 / 8).flat_map(|word| seed.wrapping_add(word).to_le_bytes()).collect()
}

struct Request {
    slot: u64,
    first: u64,
    count: u64,
    writes: bool,
}

struct Storm {
    driver: Driver,
    memory: InflightMemory,
    random: Random,
    versions: Vec<u32>,
    busy: Vec<bool>,
    free: Vec<u64>,
    flying: HashMap<u16, Request>,
    finished: u64,
}

impl Storm {
    fn new(service: &Service) -> Self {
        let mut driver = Driver::unstarted(service.connect(), 1);
        driver.set_up(EVENT_IDX, u64::MAX);
        let memory = driver.frontend.get_inflight(1, SIZE).unwrap().unwrap();
        driver.start(Some(&memory));
        Self {
            driver,
            memory,
            random: Random(0x1234_5678_9abc_def1),
            versions: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            free: (0..DEPTH).collect(),
            flying: HashMap::new(),
            finished: 0,
        }
    }

    fn data(slot: u64) -> u64 {
        BUFFERS + slot * MOST * BLOCK as u64
    }

    /// Starts as many requests as there are free slots.
    fn submit(&mut self) {
        while let Some(slot) = self.free.pop() {
            let count = 1 + self.random.below(MOST);
            let first = self.random.below(BLOCKS - count);
            let range = first as usize..(first + count) as usize;
            if self.busy[range.clone()].iter().any(|busy| *busy) {
                self.free.push(slot);
                continue;
            }
            self.busy[range.clone()].fill(true);
            let writes = self.random.below(2) == 0;
            if writes {
                self.versions[range.clone()].iter_mut().for_each(|version| *version += 1);
                let versions = (first..).zip(&self.versions[range]);
                let data: Vec<u8> = versions.flat_map(|(block, version)| contents(block, *version)).collect();
                self.driver.put(Self::data(slot), &data);
            }
            self.driver.put(HEADERS + slot * 16, &header(writes.into(), first * BLOCK as u64 / 512));
            self.driver.put(STATUS + slot, &[0xff]);
            let buffers = [
                (HEADERS + slot * 16, 16, false),
                (Self::data(slot), (count as usize * BLOCK) as u32, !writes),
                (STATUS + slot, 1, true),
            ];
            let head = self.driver.queues[0].submit(&self.driver.ram, &buffers);
            self.flying.insert(head, Request { slot, first, count, writes });
        }
        self.driver.queues[0].kick();
    }

    /// Takes a request that has come back, and compares what it read.
    fn take(&mut self, head: u16) {
        let Request { slot, first, count, writes } =
            self.flying.remove(&head).expect("finished twice, or never asked for");
        assert_eq!(self.driver.get(STATUS + slot, 1), [0], "an error in the guest");
        let range = first as usize..(first + count) as usize;
        if !writes {
            let data = self.driver.get(Self::data(slot), count as usize * BLOCK);
            for (index, found) in data.chunks(BLOCK).enumerate() {
                let block = first + index as u64;
                let version = self.versions[block as usize];
                assert!(found == contents(block, version), "block {block} is not its version {version}");
            }
        }
        self.busy[range].fill(false);
        self.free.push(slot);
        self.finished += 1;
    }

    /// Keeps the disk busy for a while.
    fn work(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.submit();
            let ram = self.driver.ram.clone();
            while let Some((head, _)) = self.driver.queues[0].finished(&ram) {
                self.take(head);
            }
        }
    }

    /// Kills the process and connects to another; returns how many requests were in flight and the pause until the first of
    /// them came back.
    fn kill(&mut self, service: &mut Service) -> (usize, Duration) {
        self.submit();
        let start = Instant::now();
        service.child.kill().unwrap();
        service.child.wait().unwrap();
        let disk = service.disk_path().to_str().unwrap().to_owned();
        let _ = std::fs::remove_file(&service.socket);
        service.child = Service::spawn("blk", &service.socket, &["--blk-file".to_owned(), disk]);
        let ram = self.driver.ram.clone();
        // What the dead process had finished counts as before.
        while let Some((head, _)) = self.driver.queues[0].finished(&ram) {
            self.take(head);
        }
        let flying = self.flying.len();
        self.driver.frontend = Frontend::new("storm", service.connect(), Limits::default());
        self.driver.set_up(EVENT_IDX, u64::MAX);
        self.driver.start(Some(&self.memory));
        self.driver.queues[0].kick();
        if flying > 0 {
            let (head, _) = self.driver.queues[0].wait(&ram);
            self.take(head);
        }
        (flying, start.elapsed())
    }
}

#[test]
fn a_storm_of_kills_loses_and_corrupts_nothing() {
    let mut service = Service::disk(BLOCKS * BLOCK as u64, &[]);
    let mut storm = Storm::new(&service);
    let mut pauses = Vec::new();
    let mut flying = 0;
    for _ in 0..KILLS {
        let micros = 500 + storm.random.below(30_000);
        storm.work(Duration::from_micros(micros));
        let (count, pause) = storm.kill(&mut service);
        flying += count;
        pauses.push(pause);
    }
    let ram = storm.driver.ram.clone();
    while !storm.flying.is_empty() {
        let (head, _) = storm.driver.queues[0].wait(&ram);
        storm.take(head);
    }
    assert!(storm.driver.queues[0].finished(&ram).is_none());
    let longest = pauses.iter().max().unwrap();
    let mean = pauses.iter().sum::<Duration>() / KILLS;
    println!(
        "{KILLS} kills under {} requests, {flying} in flight: pause {mean:.1?}, at most {longest:.1?}",
        storm.finished
    );
    assert!(flying > KILLS as usize * 4, "too few were in flight to show anything: {flying}");
    let disk = std::fs::read(service.disk_path()).unwrap();
    for (block, (found, version)) in disk.chunks(BLOCK).zip(&storm.versions).enumerate() {
        assert!(found == contents(block as u64, *version), "block {block} on the disk");
    }
}
