//! Processes are killed over and over while they work: no request is lost, none fails, nothing is corrupted.
//!
//! A disk has 32 requests in flight, and beside them a journal: data, flush, commit record, each only after the one before it
//! was finished. Whenever the process is dead, the image is looked at: it never has a record without its data.
//! `BULKHEAD_PAUSE_MS` sets how long the longest pause may be; without it pauses are only told, for a busy machine proves nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{ConsoleConfig, DeviceConfig, FdIndex, RngConfig};
use bulkhead_ipc::jail::Enforcement;

use bulkhead_ipc::vhost_user::frontend::{Frontend, InflightMemory, Limits};

use crate::driver::{BUFFERS, Driver, EVENT_IDX, Random, SIZE, header};
use crate::supervised::{Supervised, blk};

const BLOCK: usize = 4096;
/// Blocks of the disk.
const BLOCKS: u64 = 4096;
/// Most blocks in one request.
const MOST: u64 = 16;
const DEPTH: u64 = 32;
const KILLS: u32 = 200;
/// Of each other device.
pub const OTHER_KILLS: u32 = 50;
/// The journal's data blocks, and the block of its commit record, behind the others.
const JOURNAL: u64 = 8;
const RECORD: u64 = BLOCKS + JOURNAL;
/// The journal's slot of memory for requests.
const JOURNAL_SLOT: u64 = DEPTH;
const HEADERS: u64 = 0xf0_0000;
const STATUS: u64 = 0xe0_0000;

pub fn check_pause(longest: Duration) {
    if let Ok(limit) = std::env::var("BULKHEAD_PAUSE_MS") {
        let limit = Duration::from_millis(limit.parse().unwrap());
        assert!(longest <= limit, "a pause of {longest:.1?}, not at most {limit:?}");
    }
}

/// What a block holds after its `version`th write.
fn contents(block: u64, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let seed = (block << 32 | u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BLOCK as u64 / 8).flat_map(|word| seed.wrapping_add(word).to_le_bytes()).collect()
}

/// Request types of virtio-blk (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
}

struct Request {
    slot: u64,
    first: u64,
    count: u64,
    kind: Kind,
    since: Instant,
}

/// A pause and its parts: until the process was reaped, until the successor was ready, until its first answer.
#[derive(Clone, Copy, Default)]
struct Pause {
    reaped: Duration,
    ready: Duration,
    answered: Duration,
}

impl Pause {
    fn all(&self) -> Duration {
        self.reaped + self.ready + self.answered
    }
}

/// What the journal does next, for its transaction of this number.
#[derive(Clone, Copy)]
enum Step {
    Data,
    Flush,
    Record,
}

struct Storm {
    disk: OwnedFd,
    process: Supervised,
    driver: Driver,
    memory: InflightMemory,
    random: Random,
    versions: Vec<u32>,
    busy: Vec<bool>,
    free: Vec<u64>,
    flying: HashMap<u16, Request>,
    finished: u64,
    transaction: u32,
    step: Step,
    /// When the last process began, and the longest that a request took under one process.
    began: Instant,
    slowest: Duration,
}

impl Storm {
    fn new(disk: OwnedFd) -> Self {
        let mut process = Self::start_process(&disk);
        let mut driver = Driver::unstarted(process.stream.take().unwrap(), 1);
        driver.set_up(EVENT_IDX, u64::MAX);
        let memory = driver.frontend.get_inflight(1, SIZE).unwrap().unwrap();
        driver.start(Some(&memory));
        Self {
            disk,
            process,
            driver,
            memory,
            random: Random(0x1234_5678_9abc_def1),
            versions: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            free: (0..DEPTH).collect(),
            flying: HashMap::new(),
            finished: 0,
            transaction: 1,
            step: Step::Data,
            began: Instant::now(),
            slowest: Duration::ZERO,
        }
    }

    fn start_process(disk: &OwnedFd) -> Supervised {
        let process = Supervised::start("blk", blk(1), &[disk], Enforcement::Supervised);
        process.forget_log();
        process
    }

    /// Puts a request into the ring; what a write writes is in memory already.
    fn start(&mut self, request: Request) {
        let Request { slot, first, count, kind, .. } = request;
        let sector = if kind == Kind::Flush { 0 } else { first * BLOCK as u64 / 512 };
        self.driver.put(HEADERS + slot * 16, &header(kind as u32, sector));
        self.driver.put(STATUS + slot, &[0xff]);
        let mut buffers = vec![(HEADERS + slot * 16, 16, false)];
        if kind != Kind::Flush {
            buffers.push((Self::data(slot), (count as usize * BLOCK) as u32, kind == Kind::Read));
        }
        buffers.push((STATUS + slot, 1, true));
        let head = self.driver.queues[0].submit(&self.driver.ram, &buffers);
        self.flying.insert(head, request);
    }

    /// Starts the journal's next step.
    fn journal(&mut self) {
        let number = self.transaction;
        let (kind, first) = match self.step {
            Step::Data => (Kind::Write, BLOCKS + u64::from(number) % JOURNAL),
            Step::Flush => (Kind::Flush, 0),
            Step::Record => (Kind::Write, RECORD),
        };
        if kind == Kind::Write {
            self.driver.put(Self::data(JOURNAL_SLOT), &contents(first, number));
        }
        self.start(Request { slot: JOURNAL_SLOT, first, count: 1, kind, since: Instant::now() });
    }

    /// With the process dead: what the image says of the journal.
    fn check_journal(&self) {
        let disk = File::from(self.disk.try_clone().unwrap());
        let block = |block: u64| {
            let mut bytes = vec![0; BLOCK];
            disk.read_exact_at(&mut bytes, block * BLOCK as u64).unwrap();
            bytes
        };
        let record = block(RECORD);
        let recorded = [self.transaction, self.transaction - 1];
        let number = recorded.into_iter().find(|number| record == contents(RECORD, *number));
        let number = number.expect("a record that was finished is not on the disk");
        let data = BLOCKS + u64::from(number) % JOURNAL;
        assert!(number == 0 || block(data) == contents(data, number), "record {number} came before its data");
    }

    fn data(slot: u64) -> u64 {
        BUFFERS + slot * MOST * BLOCK as u64
    }

    /// Starts as many requests as there are free slots.
    fn submit(&mut self) {
        if !self.flying.values().any(|request| request.slot == JOURNAL_SLOT) {
            self.journal();
        }
        while let Some(slot) = self.free.pop() {
            let count = 1 + self.random.below(MOST);
            let first = self.random.below(BLOCKS - count);
            let range = first as usize..(first + count) as usize;
            if self.busy[range.clone()].iter().any(|busy| *busy) {
                self.free.push(slot);
                continue;
            }
            self.busy[range.clone()].fill(true);
            let kind = if self.random.below(2) == 0 { Kind::Write } else { Kind::Read };
            if kind == Kind::Write {
                self.versions[range.clone()].iter_mut().for_each(|version| *version += 1);
                let versions = (first..).zip(&self.versions[range]);
                let data: Vec<u8> = versions.flat_map(|(block, version)| contents(block, *version)).collect();
                self.driver.put(Self::data(slot), &data);
            }
            self.start(Request { slot, first, count, kind, since: Instant::now() });
        }
        self.driver.queues[0].kick();
    }

    /// Takes a request that has come back, and compares what it read.
    fn take(&mut self, head: u16) {
        let Request { slot, first, count, kind, since } =
            self.flying.remove(&head).expect("finished twice, or never asked for");
        assert_eq!(self.driver.get(STATUS + slot, 1), [0], "an error in the guest");
        if since > self.began {
            self.slowest = self.slowest.max(since.elapsed());
        }
        if slot == JOURNAL_SLOT {
            self.step = match self.step {
                Step::Data => Step::Flush,
                Step::Flush => Step::Record,
                Step::Record => {
                    self.transaction += 1;
                    Step::Data
                }
            };
            return;
        }
        let range = first as usize..(first + count) as usize;
        if kind == Kind::Read {
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

    /// Kills the process and starts another; returns how many requests were in flight and the pause until the first of
    /// them came back.
    fn kill(&mut self) -> (usize, Pause) {
        self.submit();
        self.began = Instant::now();
        let start = Instant::now();
        self.process.kill();
        let reaped = start.elapsed();
        self.check_journal();
        // What this test looks at meanwhile is no part of the pause.
        let start = Instant::now();
        self.process = Self::start_process(&self.disk);
        let ready = start.elapsed();
        let ram = self.driver.ram.clone();
        // What the dead process had finished counts as before.
        while let Some((head, _)) = self.driver.queues[0].finished(&ram) {
            self.take(head);
        }
        let flying = self.flying.len();
        let stream = self.process.stream.take().unwrap();
        self.driver.frontend = Frontend::new("storm", stream, Limits::default());
        self.driver.set_up(EVENT_IDX, u64::MAX);
        self.driver.start(Some(&self.memory));
        self.driver.queues[0].kick();
        if flying > 0 {
            let (head, _) = self.driver.queues[0].wait(&ram);
            self.take(head);
        }
        self.began = Instant::now();
        (flying, Pause { reaped, ready, answered: start.elapsed().saturating_sub(ready) })
    }
}

#[test]
fn a_storm_of_kills_loses_and_corrupts_nothing() {
    let disk = tempfile::tempfile().unwrap();
    disk.set_len((RECORD + 1) * BLOCK as u64).unwrap();
    let mut storm = Storm::new(disk.into());
    let mut pauses = Vec::new();
    let mut flying = 0;
    for _ in 0..KILLS {
        let micros = 500 + storm.random.below(16_000);
        storm.work(Duration::from_micros(micros));
        let (count, pause) = storm.kill();
        flying += count;
        pauses.push(pause);
    }
    let ram = storm.driver.ram.clone();
    while !storm.flying.is_empty() {
        let (head, _) = storm.driver.queues[0].wait(&ram);
        storm.take(head);
    }
    assert!(storm.driver.queues[0].finished(&ram).is_none());
    let longest = pauses.iter().max_by_key(|pause| pause.all()).copied().unwrap_or_default();
    let Pause { reaped, ready, answered } = longest;
    let longest = longest.all();
    let mean = pauses.iter().map(Pause::all).sum::<Duration>() / KILLS;
    println!(
        "disk: {KILLS} kills under {} requests, {flying} in flight, {} transactions: pause {mean:.1?}, at most {longest:.1?} ({reaped:.1?} + {ready:.1?} + {answered:.1?}); a request without a kill took at most {:.1?}",
        storm.finished, storm.transaction, storm.slowest
    );
    check_pause(longest);
    assert!(storm.transaction > KILLS / 4, "the journal stood still: {} transactions", storm.transaction);
    assert!(flying > KILLS as usize * 4, "too few were in flight to show anything: {flying}");
    let mut disk = vec![0; (RECORD + 1) as usize * BLOCK];
    File::from(storm.disk).read_exact_at(&mut disk, 0).unwrap();
    for (block, (found, version)) in disk.chunks(BLOCK).zip(&storm.versions).enumerate() {
        assert!(found == contents(block as u64, *version), "block {block} on the disk");
    }
}

/// A device that is killed and started anew with the same resources.
pub struct Victim<'a> {
    kind: &'static str,
    config: DeviceConfig,
    resources: &'a [&'a OwnedFd],
    /// The directory that it shares.
    directory: Option<&'a OwnedFd>,
    pub process: Supervised,
    pub driver: Driver,
}

impl<'a> Victim<'a> {
    pub fn new(kind: &'static str, config: DeviceConfig, resources: &'a [&'a OwnedFd], queues: u16) -> Self {
        Self::sharing(None, kind, config, resources, queues)
    }

    pub fn sharing(
        directory: Option<&'a OwnedFd>,
        kind: &'static str,
        config: DeviceConfig,
        resources: &'a [&'a OwnedFd],
        queues: u16,
    ) -> Self {
        let mut process = Supervised::start_sharing(directory, kind, config.clone(), resources);
        let driver = process.driver(queues);
        Self { kind, config, resources, directory, process, driver }
    }

    /// Kills the process; `take` gets what it had finished, with the queue. Returns the pause until the successor's rings run.
    pub fn kill(&mut self, mut take: impl FnMut(&Driver, usize, (u16, u32))) -> Duration {
        let start = Instant::now();
        self.process.kill();
        let ram = self.driver.ram.clone();
        for queue in 0..self.driver.queues.len() {
            while let Some(finished) = self.driver.queues[queue].finished(&ram) {
                take(&self.driver, queue, finished);
            }
        }
        let (directory, config) = (self.directory, self.config.clone());
        self.process = Supervised::start_sharing(directory, self.kind, config, self.resources);
        let stream = self.process.stream.take().unwrap();
        self.driver.frontend = Frontend::new("storm", stream, Limits::default());
        self.driver.set_up(EVENT_IDX, u64::MAX);
        self.driver.start(None);
        self.driver.queues.iter().for_each(crate::driver::Queue::kick);
        start.elapsed()
    }
}

#[test]
fn a_storm_of_kills_leaves_no_entropy_request_without_its_bytes() {
    const ROOM: u64 = 4096;
    let source: OwnedFd = File::open("/dev/urandom").unwrap().into();
    let resources = [&source];
    let config = DeviceConfig::Rng(RngConfig { source: FdIndex(1), limit: None });
    let mut victim = Victim::new("rng", config, &resources, 1);
    let mut random = Random(0x1357_9bdf_0246_8ace);
    let (mut flying, mut finished, mut longest) = (HashMap::new(), 0_u64, Duration::ZERO);
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        // Once at least: requests are in flight when it dies.
        loop {
            while (flying.len() as u64) < DEPTH {
                let slot = (0..DEPTH).find(|slot| flying.values().all(|(other, _)| other != slot)).unwrap();
                let length = 16 + random.below(ROOM - 16);
                victim.driver.put(BUFFERS + slot * ROOM, &vec![0; ROOM as usize]);
                let buffers = [(BUFFERS + slot * ROOM, length as u32, true)];
                let head = victim.driver.queues[0].submit(&victim.driver.ram, &buffers);
                flying.insert(head, (slot, length));
            }
            victim.driver.queues[0].kick();
            if Instant::now() >= end {
                break;
            }
            let ram = victim.driver.ram.clone();
            while let Some(done) = victim.driver.queues[0].finished(&ram) {
                filled(&victim.driver, &mut flying, done);
                finished += 1;
            }
        }
        let pause = victim.kill(|driver, _, done| {
            filled(driver, &mut flying, done);
            finished += 1;
        });
        longest = longest.max(pause);
    }
    let ram = victim.driver.ram.clone();
    while !flying.is_empty() {
        let done = victim.driver.queues[0].wait(&ram);
        filled(&victim.driver, &mut flying, done);
    }
    println!("rng: {OTHER_KILLS} kills under {finished} requests: pause at most {longest:.1?}");
    check_pause(longest);
}

/// A request for entropy came back: its bytes are there, and none behind them.
fn filled(driver: &Driver, flying: &mut HashMap<u16, (u64, u64)>, (head, written): (u16, u32)) {
    let (slot, length) = flying.remove(&head).expect("finished twice, or never asked for");
    assert_eq!(u64::from(written), length);
    let bytes = driver.get(BUFFERS + slot * 4096, 4096);
    let (random, rest) = bytes.split_at(length as usize);
    assert!(random.windows(8).all(|bytes| bytes != [0; 8]), "bytes are missing");
    assert!(rest.iter().all(|byte| *byte == 0), "bytes behind the buffer");
}

#[test]
fn a_storm_of_kills_takes_nothing_from_what_a_console_prints() {
    const LINE: usize = 16;
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let read = std::thread::spawn(move || {
        let mut all = Vec::new();
        File::from(reader).read_to_end(&mut all).map(|_| all)
    });
    let resources = [&writer];
    let config = ConsoleConfig { input: None, output: Some(FdIndex(1)), size: None, typed: None };
    let mut victim = Victim::new("console", DeviceConfig::Console(config), &resources, 2);
    let mut random = Random(0x0f1e_2d3c_4b5a_6978);
    let (mut said, mut back, mut longest) = (0_u64, 0_u64, Duration::ZERO);
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        loop {
            while said - back < DEPTH {
                let at = BUFFERS + said % DEPTH * LINE as u64;
                victim.driver.put(at, format!("{said:0width$}\n", width = LINE - 1).as_bytes());
                victim.driver.queues[1].submit(&victim.driver.ram, &[(at, LINE as u32, false)]);
                said += 1;
            }
            victim.driver.queues[1].kick();
            if Instant::now() >= end {
                break;
            }
            let ram = victim.driver.ram.clone();
            while victim.driver.queues[1].finished(&ram).is_some() {
                back += 1;
            }
        }
        longest = longest.max(victim.kill(|_, _, _| back += 1));
    }
    let ram = victim.driver.ram.clone();
    while back < said {
        victim.driver.queues[1].wait(&ram);
        back += 1;
    }
    victim.process.stop();
    drop(writer);
    let printed = String::from_utf8(read.join().unwrap().unwrap()).unwrap();
    let (mut next, mut twice) = (0_u64, 0_u64);
    // A process may die in the middle of a line, which comes again then.
    for line in printed.lines() {
        match line.get(line.len().saturating_sub(LINE - 1)..).and_then(|line| line.parse::<u64>().ok()) {
            Some(number) if number == next => next += 1,
            Some(number) if number < next => twice += 1,
            other => panic!("after {next} lines came '{line}' ({other:?})"),
        }
    }
    assert_eq!(next, said, "lines are missing at the end");
    println!(
        "console: {OTHER_KILLS} kills under {said} lines, {twice} came twice: pause at most {longest:.1?}"
    );
    check_pause(longest);
}
