//! A driver that feeds each device a hundred thousand chains, of which many are malformed, or change while the device looks.
//!
//! Guest memory is filled with bytes of 128 and above; what the driver posts for reading has smaller ones. So a device that
//! reads what was not posted shows it in its disk or its output, and one that writes what was not posted changes memory that
//! is compared with what it should be. `BULKHEAD_SEED` and `BULKHEAD_CHAINS` choose another run.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{
    BlkConfig, BlkOptions, ConsoleConfig, DeviceConfig, FdIndex, RngConfig, ToDevice, UartConfig,
};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vfio_user::{Client, Fault};
use bulkhead_ipc::vhost_user::frontend::{Frontend, Limits, RingAddresses};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{
    Driver, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, Queue, Random, SIZE, WRITE, header, put_descriptor,
};
use crate::supervised::Supervised;

/// Guest RAM, bytes.
const RAM: u64 = 8 << 20;
/// Indirect tables, one for each of sixty-four chains of a round.
const TABLES: u64 = 0x20_0000;
const TABLE: u64 = 0x400;
/// Areas with what is posted; the rest of each slot is guard.
const SLOTS: u64 = 0x40_0000;
const SLOT: u64 = 0x1_0000;
const POSTED: Range<u64> = 0x2000..0xE000;
const COUNT: u64 = 24;
/// Longest length that a descriptor is changed to.
const FLIPPED: u64 = 0x4000;
/// The end of RAM, which may be posted too.
const TAIL: u64 = 0x8000;
/// The disk, bytes.
const DISK: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

type Entry = (u64, u32, u16, u16);

/// What a round does besides its chains.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trick {
    None,
    /// Another thread rewrites descriptors.
    Flips,
    /// The used ring lies on the available ring or on the descriptors.
    Overlap,
    /// The available index jumps.
    Jump,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    Loop,
    HeadOutside,
    NextOutside,
    Empty,
    Outside,
    AcrossTheEnd,
    Overflow,
    Huge,
    ReadableAfterWritable,
    WritableHeader,
    IndirectInIndirect,
    IndirectWithNext,
    IndirectLength,
    IndirectOutside,
    IndirectLoop,
}

impl Flaw {
    /// It is one of an indirect table.
    fn needs_table(self) -> bool {
        matches!(
            self,
            Self::IndirectInIndirect
                | Self::IndirectWithNext
                | Self::IndirectLength
                | Self::IndirectOutside
                | Self::IndirectLoop
        )
    }
}

const FLAWS: [Flaw; 15] = [
    Flaw::Loop,
    Flaw::HeadOutside,
    Flaw::NextOutside,
    Flaw::Empty,
    Flaw::Outside,
    Flaw::AcrossTheEnd,
    Flaw::Overflow,
    Flaw::Huge,
    Flaw::ReadableAfterWritable,
    Flaw::WritableHeader,
    Flaw::IndirectInIndirect,
    Flaw::IndirectWithNext,
    Flaw::IndirectLength,
    Flaw::IndirectOutside,
    Flaw::IndirectLoop,
];

/// What one round has posted.
#[derive(Default)]
struct Round {
    /// Heads offered, each with the bytes that the device may write.
    heads: Vec<(u16, u64)>,
    next_descriptor: u16,
    flawed: bool,
    /// A chain cannot be followed; else a device may have served it without the part that is wrong.
    torn: bool,
}

struct Mill {
    kind: &'static str,
    driver: Driver,
    random: Random,
    /// Guest memory as it should be, but for what devices may have written.
    expected: Vec<u8>,
    writable: Vec<Range<u64>>,
    chains: u64,
    broken: u64,
    finished: u64,
    /// Descriptors will change: a buffer begins where the longest one fits, and no table becomes a buffer.
    flips: bool,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seed(default: u64) -> Random {
    let seed = number("BULKHEAD_SEED").unwrap_or(default);
    println!("seed {seed}");
    Random(seed)
}

fn chains() -> u64 {
    number("BULKHEAD_CHAINS").unwrap_or(100_000)
}

impl Mill {
    fn new(kind: &'static str, process: &mut Supervised, queues: u16) -> Self {
        let frontend = Frontend::new(kind, process.stream.take().unwrap(), Limits::default());
        let ram = GuestRam::create(RAM).unwrap();
        let mut driver = Driver { frontend, ram, queues: (0..queues).map(Queue::new).collect() };
        driver.set_up(EVENT_IDX | INDIRECT_DESC, u64::MAX);
        let mut expected: Vec<u8> = (0..RAM).map(|at| 0x80 | (at ^ at >> 8) as u8).collect();
        // A descriptor that is half overwritten may point at the lowest addresses: nothing to protect there.
        expected[..0x1_0000].fill(0);
        expected[0x10_0000..0x30_0000].fill(0);
        expected[(RAM - TAIL) as usize..].fill(b'p');
        for slot in 0..COUNT {
            let posted = &mut expected[(SLOTS + slot * SLOT + POSTED.start) as usize..];
            posted[..(POSTED.end - POSTED.start) as usize].fill_with(|| b'p');
        }
        driver.put(0, &expected);
        let random = seed(0x0bad_c0de_0bad_c0de ^ kind.len() as u64);
        let mut mill = Self {
            kind,
            driver,
            random,
            expected,
            writable: Vec::new(),
            chains: 0,
            broken: 0,
            finished: 0,
            flips: false,
        };
        for queue in 0..usize::from(queues) {
            mill.set_up(queue, Trick::None);
        }
        mill
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.random.below(count) == 0
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.driver.put(address, bytes);
        self.expected[address as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn descriptor(&mut self, table: u64, index: u16, entry: Entry) {
        let at = table + u64::from(index) * 16;
        put_descriptor(&self.driver.ram, at, entry);
        let now = self.driver.get(at, 16);
        self.expected[at as usize..][..16].copy_from_slice(&now);
    }

    /// A queue with empty rings, from the beginning.
    fn set_up(&mut self, queue: usize, trick: Trick) {
        let (base, index) = (self.driver.queues[queue].base, self.driver.queues[queue].index);
        self.put(base, &vec![0; 0x9000]);
        let mut addresses = self.driver.queues[queue].addresses();
        if trick == Trick::Overlap {
            // Such that neither a descriptor's length nor the low half of its address is an index times 65536: that would post all
            // of memory.
            let onto = self.random.below(0x60) * 16 + [4, 12][self.random.below(2) as usize];
            addresses.used = base + if self.one_in(2) { onto } else { 0x4000 + onto };
        }
        let RingAddresses { used, .. } = addresses;
        self.writable.push(used..used + 6 + 8 * u64::from(SIZE));
        let Driver { frontend, queues, .. } = &mut self.driver;
        let queue = &mut queues[queue];
        (queue.next_available, queue.last_used) = (0, 0);
        while queue.error.read().is_ok() {}
        frontend.set_vring_num(index, SIZE).unwrap();
        frontend.set_vring_base(index, 0).unwrap();
        frontend.set_vring_addr(index, &addresses, None).unwrap();
        frontend.set_vring_err(index, queue.error.as_fd()).unwrap();
        frontend.set_vring_call(index, Some(queue.call.as_fd())).unwrap();
        frontend.set_vring_kick(index, queue.kick.as_fd()).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    /// A place in a posted area for `len` bytes.
    fn place(&mut self, len: u64) -> u64 {
        let slot = self.random.below(COUNT);
        let end = if self.flips { POSTED.end - FLIPPED } else { POSTED.end };
        SLOTS + slot * SLOT + POSTED.start + self.random.below(end - POSTED.start - len)
    }

    fn readable(&mut self, bytes: &[u8]) -> Entry {
        let at = self.place(bytes.len() as u64);
        self.put(at, bytes);
        (at, bytes.len() as u32, 0, 0)
    }

    fn writable(&mut self, len: u64) -> Entry {
        let at = self.place(len);
        self.writable.push(at..at + len);
        (at, len as u32, WRITE, 0)
    }

    /// The segments of a request that the device can serve, if only with an error.
    fn request(&mut self, queue: usize) -> Vec<Entry> {
        let mut segments = Vec::new();
        let pieces = 1 + self.random.below(4);
        match (self.kind, queue) {
            ("blk", _) => {
                let kind = [0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 99][self.random.below(11) as usize];
                let sector =
                    if self.one_in(8) { self.random.below(1 << 60) } else { self.random.below(2100) };
                // Addresses of sectors have no high bits either: a request never reads its own header as data, but a stale one may.
                let mut bytes = header(kind, sector & 0x7f7f_7f7f_7f7f_7f7f);
                if kind > 8 {
                    bytes.extend(
                        [self.random.below(2000), self.random.below(64)].map(u64::to_le_bytes).concat(),
                    );
                    bytes.iter_mut().for_each(|byte| *byte &= 0x7f);
                }
                segments.push(self.readable(&bytes));
                for _ in 0..pieces * u64::from(kind < 2) {
                    let len = if self.one_in(8) { 1 + self.random.below(1500) } else { 512 };
                    let letter = b'A' + self.random.below(26) as u8;
                    segments.push(match kind {
                        0 => self.writable(len),
                        _ => self.readable(&vec![letter; len as usize]),
                    });
                }
                let id = u64::from(kind == 8) * 20;
                segments.push(self.writable(1 + id));
            }
            ("console", 1) => {
                for _ in 0..pieces {
                    let text = vec![b'a' + self.random.below(26) as u8; 1 + self.random.below(64) as usize];
                    segments.push(self.readable(&text));
                }
            }
            _ => {
                for _ in 0..pieces {
                    let len = 1 + self.random.below(200);
                    segments.push(self.writable(len));
                }
            }
        }
        segments
    }

    /// Offers one chain, sound or not.
    fn offer(&mut self, queue: usize, round: &mut Round, flaw: Option<Flaw>) {
        let mut segments = self.request(queue);
        let outside = RAM + (self.random.below(1 << 40) & !0xfff);
        let victim = self.random.below(segments.len() as u64) as usize;
        match flaw {
            Some(Flaw::Empty) => segments[victim].1 = 0,
            Some(Flaw::Outside) => segments[victim].0 = outside,
            Some(Flaw::AcrossTheEnd | Flaw::Huge) => {
                // What of it is memory, the device may use before it finds the end.
                let most = u32::MAX - self.random.below(1 << 20) as u32;
                let (inside, len) = if flaw == Some(Flaw::Huge) { (TAIL, most) } else { (8, 16) };
                (segments[victim].0, segments[victim].1) = (RAM - inside, len);
                self.writable.push(RAM - inside..RAM);
            }
            Some(Flaw::Overflow) => segments[victim].0 = u64::MAX - u64::from(segments[victim].1) / 2,
            Some(Flaw::ReadableAfterWritable) => {
                segments.push(self.writable(8));
                let late = self.readable(b"late");
                segments.push(late);
            }
            Some(Flaw::WritableHeader) => segments.iter_mut().for_each(|segment| segment.2 ^= WRITE),
            _ => {}
        }
        let bytes = segments.iter().filter(|segment| segment.2 & WRITE != 0).map(|it| u64::from(it.1)).sum();
        let base = self.driver.queues[queue].base;
        let table = TABLES + (round.heads.len() as u64 + 64 * queue as u64) * TABLE;
        let indirect = !self.flips && (self.one_in(3) || flaw.is_some_and(Flaw::needs_table));
        let (target, first) = if indirect { (table, 0) } else { (base, round.next_descriptor) };
        let last = segments.len() as u16 - 1;
        for (index, (address, len, flags, _)) in (0..).zip(segments) {
            let next = match flaw {
                Some(Flaw::Loop | Flaw::IndirectLoop) if index == last => first,
                Some(Flaw::NextOutside) if index == last => SIZE + self.random.below(1000) as u16,
                _ if index == last => 0,
                _ => first + index + 1,
            };
            let more = index < last || next != 0 || matches!(flaw, Some(Flaw::Loop | Flaw::IndirectLoop));
            let flags = flags | if more { NEXT } else { 0 };
            self.descriptor(target, first + index, (address, len, flags, next));
        }
        let mut head = round.next_descriptor;
        round.next_descriptor += if indirect { 1 } else { last + 1 };
        if indirect {
            let len = 16 * (u32::from(last) + 1);
            let entry = match flaw {
                Some(Flaw::IndirectInIndirect) => {
                    self.descriptor(table, 0, (table, 16, INDIRECT, 0));
                    (table, len, INDIRECT, 0)
                }
                Some(Flaw::IndirectWithNext) => (table, len, INDIRECT | NEXT, head),
                Some(Flaw::IndirectLength) => {
                    (table, [0, 8, 17, u32::MAX][self.random.below(4) as usize], INDIRECT, 0)
                }
                Some(Flaw::IndirectOutside) => (outside, len, INDIRECT, 0),
                _ => (table, len, INDIRECT, 0),
            };
            self.descriptor(base, head, entry);
        }
        if matches!(flaw, Some(Flaw::HeadOutside)) {
            head = SIZE + self.random.below(60_000) as u16;
        }
        round.heads.push((head, bytes));
        round.flawed |= flaw.is_some();
        let whole = [Flaw::Outside, Flaw::AcrossTheEnd, Flaw::Overflow, Flaw::Huge, Flaw::WritableHeader];
        round.torn |= flaw.is_some_and(|flaw| !whole.contains(&flaw));
        let queue = &mut self.driver.queues[queue];
        let slot = base + 0x4004 + u64::from(queue.next_available % SIZE) * 2;
        queue.next_available = queue.next_available.wrapping_add(1);
        self.put(slot, &head.to_le_bytes());
        self.chains += 1;
    }

    /// One batch of chains; true if the ring is as it was before, but for its indices.
    fn round(&mut self, queue: usize, trick: Trick) -> bool {
        let mut round = Round::default();
        let count = 1 + self.random.below(40);
        let most = if trick == Trick::None { SIZE - 8 } else { SIZE / 2 - 8 };
        if trick != Trick::None {
            // No chains of earlier rounds, which a changed index would lead to.
            self.put(self.driver.queues[queue].base, &vec![0; 16 * usize::from(SIZE)]);
        }
        self.flips = trick == Trick::Flips;
        while (round.heads.len() as u64) < count && round.next_descriptor < most {
            let flaw = self.one_in(40).then(|| FLAWS[self.random.below(FLAWS.len() as u64) as usize]);
            self.offer(
                queue,
                &mut round,
                flaw.filter(|flaw| !self.flips || !(*flaw == Flaw::Huge || flaw.needs_table())),
            );
        }
        self.flips = false;
        if trick == Trick::Jump {
            let jump =
                if self.one_in(2) { self.random.below(u64::from(SIZE)) } else { self.random.below(65536) };
            let available = &mut self.driver.queues[queue].next_available;
            *available = available.wrapping_add(jump as u16);
        }
        let (base, available) = (self.driver.queues[queue].base, self.driver.queues[queue].next_available);
        // Whom to interrupt, and whether: anything, as long as the ring itself is polled.
        let event = self.random.below(65536) as u16;
        self.put(base + 0x4004 + 2 * u64::from(SIZE), &event.to_le_bytes());
        let flags = self.random.below(4) as u16;
        self.put(base + 0x4000, &[flags.to_le_bytes(), available.to_le_bytes()].concat());
        let over = AtomicBool::new(false);
        let flip = self.random.below(u64::MAX) | 1;
        let ram = self.driver.ram.clone();
        let settled = std::thread::scope(|scope| {
            if trick == Trick::Flips {
                scope.spawn(|| flips(&ram, base, Random(flip), &over));
            }
            let settled = self.settle(queue, trick);
            over.store(true, Ordering::Relaxed);
            settled
        });
        if settled && trick == Trick::None {
            self.check_used(queue, &round);
            assert!(!round.torn, "{}: a chain that cannot be followed was served", self.kind);
        }
        settled && trick == Trick::None && !round.flawed
    }

    /// Kicks and waits until all is used (true) or the ring is broken.
    fn settle(&mut self, queue: usize, trick: Trick) -> bool {
        let ram = self.driver.ram.clone();
        let queue = &mut self.driver.queues[queue];
        queue.kick();
        let end = Instant::now() + PATIENCE;
        loop {
            let used: u16 = ram.memory().load(GuestAddress(queue.base + 0x8002), Ordering::Acquire).unwrap();
            if used == queue.next_available && matches!(trick, Trick::None | Trick::Flips) {
                return true;
            }
            if queue.error.read().is_ok() {
                self.broken += 1;
                return false;
            }
            // With these two nobody can say what a device should have done.
            let late = Instant::now() > end;
            if matches!(trick, Trick::Overlap | Trick::Jump) && (late || self.random.below(200) == 0) {
                return false;
            }
            assert!(!late, "{}: a chain is neither served nor refused, seed above", self.kind);
            std::thread::yield_now();
        }
    }

    /// Each head is used once, and has no more bytes than were posted.
    fn check_used(&mut self, queue: usize, round: &Round) {
        let mut open: Vec<(u16, u64)> = round.heads.clone();
        let ram = self.driver.ram.clone();
        let queue = &mut self.driver.queues[queue];
        while let Some((head, len)) = next_used(&ram, queue) {
            let place = open.iter().position(|(offered, _)| *offered == head);
            let (_, posted) = open.swap_remove(place.expect("used, and not offered"));
            assert!(u64::from(len) <= posted, "{len} bytes where {posted} were posted");
            self.finished += 1;
        }
        assert!(open.is_empty(), "not used: {open:?}");
    }

    /// Nothing but what was posted has changed since the last time.
    fn check_memory(&mut self, lenient: bool) {
        let actual = self.driver.get(0, RAM as usize);
        if lenient {
            self.writable.push(0..0x1_0000);
            // The rings, the tables that another thread wrote to, and all that is posted.
            self.writable.push(0x10_0000..0x12_0000);
            let slots = (0..COUNT).map(|slot| SLOTS + slot * SLOT);
            self.writable.extend(slots.map(|slot| slot + POSTED.start..slot + POSTED.end));
            self.writable.push(RAM - TAIL..RAM);
        }
        for range in self.writable.drain(..) {
            let range = range.start as usize..range.end as usize;
            self.expected[range.clone()].copy_from_slice(&actual[range]);
        }
        if let Some(at) =
            (0..RAM as usize).step_by(4096).find(|at| actual[*at..][..4096] != self.expected[*at..][..4096])
        {
            let at = (at..).find(|at| actual[*at] != self.expected[*at]).unwrap();
            panic!("{}: wrote at {at:#x} what was not posted", self.kind);
        }
        for queue in 0..self.driver.queues.len() {
            // Used rings that were not set up anew.
            let used = self.driver.queues[queue].addresses().used;
            self.writable.push(used..used + 6 + 8 * u64::from(SIZE));
        }
    }

    fn run(&mut self, mut look: impl FnMut(&mut Self)) {
        let start = Instant::now();
        let mut rounds = 0u64;
        let mut lenient = false;
        while self.chains < chains() {
            let queue = self.random.below(self.driver.queues.len() as u64) as usize;
            let trick = match self.random.below(40) {
                0..3 => Trick::Flips,
                3 => Trick::Overlap,
                4 => Trick::Jump,
                _ => Trick::None,
            };
            let index = self.driver.queues[queue].index;
            if trick == Trick::Overlap {
                self.driver.frontend.get_vring_base(index).unwrap();
                self.set_up(queue, trick);
            }
            lenient |= trick != Trick::None;
            if !self.round(queue, trick) {
                self.driver.frontend.get_vring_base(index).unwrap();
                self.set_up(queue, Trick::None);
            }
            rounds += 1;
            if rounds.is_multiple_of(24) {
                self.check_memory(std::mem::take(&mut lenient));
            }
            if rounds.is_multiple_of(128) {
                look(self);
            }
        }
        // Nothing is under way any more: what is written now was not asked for.
        for queue in 0..self.driver.queues.len() {
            let index = self.driver.queues[queue].index;
            self.driver.frontend.get_vring_base(index).unwrap();
        }
        self.check_memory(lenient);
        for queue in 0..self.driver.queues.len() {
            self.set_up(queue, Trick::None);
        }
        look(self);
        println!(
            "{}: {} chains in {rounds} rounds, {} served, {} rings broken, {:.1?}",
            self.kind,
            self.chains,
            self.finished,
            self.broken,
            start.elapsed()
        );
        assert!(self.broken > self.chains / 200 && self.finished > self.chains / 4);
    }

    /// A request that makes sense, on a queue that is whole.
    fn serve(&mut self, queue: usize, segments: &[Entry]) -> u32 {
        let base = self.driver.queues[queue].base;
        let last = segments.len() - 1;
        for (index, &(address, len, flags, _)) in segments.iter().enumerate() {
            let (next, more) = if index < last { (index as u16 + 1, NEXT) } else { (0, 0) };
            self.descriptor(base, index as u16, (address, len, flags | more, next));
        }
        let queue = &mut self.driver.queues[queue];
        let slot = base + 0x4004 + u64::from(queue.next_available % SIZE) * 2;
        queue.next_available = queue.next_available.wrapping_add(1);
        let available = queue.next_available.to_le_bytes();
        self.put(slot, &[0, 0]);
        self.put(base + 0x4002, &available);
        let index = queue_index(&self.driver, base);
        assert!(self.settle(index, Trick::None), "{}: a sound request broke the ring", self.kind);
        let ram = self.driver.ram.clone();
        next_used(&ram, &mut self.driver.queues[index]).unwrap().1
    }
}

fn queue_index(driver: &Driver, base: u64) -> usize {
    driver.queues.iter().position(|queue| queue.base == base).unwrap()
}

/// The next entry of the used ring, if there is one.
fn next_used(ram: &GuestRam, queue: &mut Queue) -> Option<(u16, u32)> {
    let used: u16 = ram.memory().load(GuestAddress(queue.base + 0x8002), Ordering::Acquire).unwrap();
    if used == queue.last_used {
        return None;
    }
    let slot = queue.base + 0x8004 + u64::from(queue.last_used % SIZE) * 8;
    queue.last_used = queue.last_used.wrapping_add(1);
    let [head, len]: [u32; 2] = ram.memory().read_obj(GuestAddress(slot)).unwrap();
    Some((u16::try_from(head).unwrap(), len))
}

/// Rewrites fields of the first descriptors until it is over: what the device reads twice differs.
fn flips(ram: &GuestRam, table: u64, mut random: Random, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let at = table + random.below(64) * 16;
        let slot = SLOTS + random.below(COUNT) * SLOT + POSTED.start;
        let memory = ram.memory();
        match random.below(5) {
            0 => memory.write_obj(slot + random.below(FLIPPED), GuestAddress(at)),
            1 => memory.write_obj(RAM + random.below(1 << 40), GuestAddress(at)),
            2 => memory.write_obj(random.below(FLIPPED) as u32, GuestAddress(at + 8)),
            3 => memory.write_obj(random.below(4) as u16, GuestAddress(at + 12)),
            _ => memory.write_obj(random.below(u64::from(SIZE) + 8) as u16, GuestAddress(at + 14)),
        }
        .unwrap();
    }
}

#[test]
fn a_disk_reads_and_writes_what_was_posted_and_nothing_else() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK).unwrap();
    let image: OwnedFd = file.try_clone().unwrap().into();
    let config = DeviceConfig::Blk(BlkConfig {
        disk: FdIndex(1),
        read_only: false,
        serial: "serial".into(),
        queues: 2,
        logical_block_size: 512,
        options: BlkOptions::default(),
    });
    let mut process = Supervised::start("blk", config, &[&image], Enforcement::Standalone);
    process.forget_log();
    let mut mill = Mill::new("blk", &mut process, 2);
    mill.run(|mill| {
        use std::os::unix::fs::FileExt;
        let mut disk = vec![0; DISK as usize];
        file.read_exact_at(&mut disk, 0).unwrap();
        assert!(disk.iter().all(|byte| *byte < 0x80), "memory that was not posted is on the disk");
        for queue in 0..2 {
            let letter = b'0' + mill.random.below(10) as u8;
            let segments = loop {
                let drawn = [mill.readable(&header(1, 77)), mill.readable(&[letter; 1024]), mill.writable(1)];
                let [a, b, c] = drawn.map(|(address, ..)| address / SLOT);
                if a != b && b != c && c != a {
                    break drawn;
                }
            };
            mill.driver.put(segments[2].0, &[9]);
            assert_eq!(mill.serve(queue, &segments), 1);
            assert_eq!(mill.driver.get(segments[2].0, 1), [0]);
            let mut sectors = [0; 1024];
            file.read_exact_at(&mut sectors, 77 * 512).unwrap();
            assert_eq!(sectors, [letter; 1024]);
        }
    });
    process.stop();
}

#[test]
fn an_entropy_device_writes_what_was_posted_and_nothing_else() {
    let source = File::open("/dev/urandom").unwrap().into();
    let config = DeviceConfig::Rng(RngConfig { source: FdIndex(1), limit: None });
    let mut process = Supervised::start("rng", config, &[&source], Enforcement::Standalone);
    process.forget_log();
    let mut mill = Mill::new("rng", &mut process, 1);
    mill.run(|mill| {
        let segment = mill.writable(64);
        mill.driver.put(segment.0, &[0; 64]);
        assert_eq!(mill.serve(0, &[segment]), 64);
        assert_ne!(mill.driver.get(segment.0, 64), [0; 64]);
    });
    process.stop();
}

/// A peer that types without end, and counts the bytes shown to it that no guest posted.
fn peer(stream: UnixStream) -> Arc<AtomicU64> {
    let (mut types, mut sees) = (stream.try_clone().unwrap(), stream);
    std::thread::spawn(move || while types.write_all(&[b't'; 512]).is_ok() {});
    let wrong = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&wrong);
    std::thread::spawn(move || {
        let mut bytes = vec![0; 65536];
        while let Ok(length @ 1..) = sees.read(&mut bytes) {
            let wrong = bytes[..length].iter().filter(|byte| **byte >= 0x80).count();
            count.fetch_add(wrong as u64, Ordering::Relaxed);
        }
    });
    wrong
}

#[test]
fn a_console_reads_and_writes_what_was_posted_and_nothing_else() {
    let config = DeviceConfig::Console(ConsoleConfig { input: None, output: None, size: None, typed: None });
    let mut process = Supervised::start("console", config, &[], Enforcement::Standalone);
    process.forget_log();
    let (ours, theirs) = UnixStream::pair().unwrap();
    process.channel.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let wrong = peer(ours);
    let mut mill = Mill::new("console", &mut process, 2);
    mill.run(|mill| {
        assert_eq!(wrong.load(Ordering::Relaxed), 0, "memory that was not posted was shown");
        let segment = mill.writable(8);
        let len = mill.serve(0, &[segment]);
        assert_eq!(mill.driver.get(segment.0, len as usize), vec![b't'; len as usize]);
        let segment = mill.readable(b"shown");
        mill.serve(1, &[segment]);
    });
    process.stop();
}

#[test]
fn a_uart_survives_garbage_in_every_register() {
    let config = DeviceConfig::Uart(UartConfig { input: None, output: None, typed: None, own_file: false });
    let mut process = Supervised::start("uart", config, &[], Enforcement::Standalone);
    process.forget_log();
    let (ours, theirs) = UnixStream::pair().unwrap();
    process.channel.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let _wrong = peer(ours);
    let mut client = Client::connect(process.stream.take().unwrap().into(), "uart", PATIENCE).unwrap();
    let mut random = seed(0x1234_5678_9abc_def1);
    let begin = Instant::now();
    for _ in 0..chains() {
        let region = random.below(4) as u32;
        let offset = if random.below(8) == 0 { random.below(u64::MAX) } else { random.below(9) };
        let most = if random.below(16) == 0 { 4096 } else { 3 };
        let mut data = vec![random.below(256) as u8; random.below(most) as usize];
        let result = match random.below(8) {
            0 => client.read(region, offset, &mut data),
            1 => client.write(region, offset, &data),
            2 if random.below(64) == 0 => client.reset(),
            // Posted accesses that the device refuses would end the connection: only sound ones.
            _ => client.post(0, offset % 8, &[data.first().copied().unwrap_or(0)]),
        };
        match result.map_err(|error| error.fault) {
            Ok(()) | Err(Fault::Refused(_)) => {}
            Err(fault) => panic!("{fault:?}"),
        }
    }
    println!("uart: {} accesses, {:.1?}", chains(), begin.elapsed());
    // It works: what is sent in loopback mode arrives.
    client.reset().unwrap();
    client.write(0, 3, &[3]).unwrap();
    client.write(0, 4, &[0x10]).unwrap();
    let received = |client: &mut Client, bytes: &mut Vec<u8>| {
        let mut status = [0];
        client.read(0, 5, &mut status).unwrap();
        if status[0] & 1 != 0 {
            bytes.push(0);
            let last = bytes.len() - 1;
            client.read(0, 0, &mut bytes[last..]).unwrap();
        }
        status[0] & 1 != 0
    };
    // What was typed before.
    while received(&mut client, &mut Vec::new()) {}
    let mut bytes = Vec::new();
    let end = Instant::now() + PATIENCE;
    client.write(0, 0, b"L").unwrap();
    while bytes.is_empty() {
        assert!(Instant::now() < end);
        received(&mut client, &mut bytes);
    }
    assert_eq!(bytes, b"L");
    process.stop();
}
