//! Counters of a device's queues, in memory that its process shares with the supervisor.
//!
//! The supervisor makes the memory (a sealed memfd) once for each device and gives it to every process that serves it, so counts go on
//! when a process is replaced. Each queue has a block of its own and one writer, its worker, which stores plain words without
//! ordering: no lock, no shared cache line, no system call. The supervisor only loads. What a hostile process writes there are
//! wrong numbers and no more.
//!
//! [`Meter`] is the writer's end, held by a running ring; [`MetricsFile`] the supervisor's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::words::{self, Words, WordsError};

/// Queues that are counted; others are not.
pub const QUEUES: usize = 64;
/// Words of a queue's block: eight cache lines.
const WORDS: usize = 64;
/// Words in all.
const LENGTH: usize = QUEUES * WORDS;
/// Buckets of the latency histogram. Bucket *n* counts requests that took less than 2^n microseconds and not less than half of that;
/// the last one has no upper bound.
pub const BUCKETS: usize = 24;

/// What is counted, by its place in the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
enum Word {
    Requests,
    ToDriver,
    FromDriver,
    Errors,
    InFlight,
    Interrupts,
    Suppressed,
    /// Nanoseconds of all requests together.
    Latency,
    /// The first bucket.
    Histogram,
}

/// The counters of a device, all queues together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Requests finished.
    pub requests: u64,
    /// Bytes that went to the driver: read from a disk, received.
    pub bytes_to_driver: u64,
    /// Bytes that came from the driver: written to a disk, sent.
    pub bytes_from_driver: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Requests taken and not finished when it was looked last.
    pub in_flight: u64,
    /// Times the driver was interrupted.
    pub interrupts: u64,
    /// Times it did not want to be.
    pub interrupts_suppressed: u64,
    /// Nanoseconds from the taking of a request to its end, of all requests together.
    pub latency_ns: u64,
    /// Requests by their time: the number *n* of those below 2^n µs and not below half of that.
    pub histogram: Vec<u64>,
}

impl Counters {
    fn add(&mut self, block: impl Fn(usize) -> u64) {
        let word = |word: Word| block(word as usize);
        let add = |to: &mut u64, value: u64| *to = to.wrapping_add(value);
        add(&mut self.requests, word(Word::Requests));
        add(&mut self.bytes_to_driver, word(Word::ToDriver));
        add(&mut self.bytes_from_driver, word(Word::FromDriver));
        add(&mut self.errors, word(Word::Errors));
        add(&mut self.in_flight, word(Word::InFlight));
        add(&mut self.interrupts, word(Word::Interrupts));
        add(&mut self.interrupts_suppressed, word(Word::Suppressed));
        add(&mut self.latency_ns, word(Word::Latency));
        self.histogram.resize(BUCKETS, 0);
        for (index, to) in self.histogram.iter_mut().enumerate() {
            add(to, block((Word::Histogram as usize).wrapping_add(index)));
        }
    }
}

/// The supervisor's end.
#[derive(Debug)]
pub struct MetricsFile {
    file: OwnedFd,
    page: Words,
}

impl MetricsFile {
    /// Makes the memory, all counts zero, of a size that nobody can change.
    ///
    /// # Errors
    /// The host refuses memory or a descriptor.
    pub fn create() -> Result<Self, WordsError> {
        let file = words::create(c"metrics", LENGTH)?;
        let page = Words::map(file.as_fd(), LENGTH, false)?;
        Ok(Self { file, page })
    }

    /// What the device's process says now. Pages that no queue has touched cost no memory.
    #[must_use]
    pub fn read(&self, queues: usize) -> Counters {
        let mut counters = Counters::default();
        for queue in 0..queues.min(QUEUES) {
            counters.add(|word| self.page.load(index(queue, word)));
        }
        counters
    }
}

impl AsFd for MetricsFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const fn index(queue: usize, word: usize) -> usize {
    queue.wrapping_mul(WORDS).wrapping_add(word)
}

/// The device's end, before its queues are there.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Option<Arc<Words>>);

impl Metrics {
    /// Maps the memory that came with the start message. To be called before the process is sealed.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn map(file: &OwnedFd) -> Result<Self, WordsError> {
        let page = Words::map(file.as_fd(), LENGTH, true)?;
        Ok(Self(Some(Arc::new(page))))
    }

    /// Nobody counts.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }
}

/// What the worker does just now: the clock is read once for a run of the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Taking,
    Finishing,
}

/// The counters of one running queue, for its worker alone.
#[derive(Debug)]
pub struct Meter {
    page: Arc<Words>,
    queue: usize,
    start: Instant,
    /// The time since `start` when the clock was read last, in ns.
    now: u64,
    doing: Doing,
    /// When each request was taken and with how many bytes of the driver, by its head.
    taken: Vec<(u64, u32)>,
    in_flight: u64,
}

impl Meter {
    /// Counts for a queue of `size` entries; none where nobody counts.
    #[must_use]
    pub fn new(metrics: &Metrics, queue: u16, size: u16) -> Option<Self> {
        let (page, queue) = (metrics.0.clone()?, usize::from(queue));
        let meter = Self {
            page,
            queue,
            start: Instant::now(),
            now: 0,
            doing: Doing::Nothing,
            taken: vec![(0, 0); size.into()],
            in_flight: 0,
        };
        (queue < QUEUES).then(|| {
            meter.set(Word::InFlight as usize, 0);
            meter
        })
    }

    fn set(&self, word: usize, value: u64) {
        self.page.store(index(self.queue, word), value);
    }

    /// This thread is the only writer, so a load and a store are enough.
    fn add(&self, word: usize, value: u64) {
        let place = index(self.queue, word);
        self.page.store(place, self.page.load(place).wrapping_add(value));
    }

    fn clock(&mut self, doing: Doing) {
        if self.doing != doing {
            self.doing = doing;
            self.now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        }
    }

    /// A request was taken, with so many bytes of the driver.
    pub fn taken(&mut self, head: u16, from_driver: u32) {
        self.clock(Doing::Taking);
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = (self.now, from_driver);
        }
        self.in_flight = self.in_flight.wrapping_add(1);
        self.set(Word::InFlight as usize, self.in_flight);
        self.add(Word::FromDriver as usize, from_driver.into());
    }

    /// It was put back: it counts when it is taken again.
    pub fn put_back(&mut self, head: u16) {
        let from_driver = self.taken.get(usize::from(head)).map_or(0, |(_, bytes)| *bytes);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.set(Word::InFlight as usize, self.in_flight);
        self.add(Word::FromDriver as usize, u64::from(from_driver).wrapping_neg());
    }

    /// A request has come to its end, with so many bytes for the driver.
    pub fn finished(&mut self, head: u16, to_driver: u32) {
        self.clock(Doing::Finishing);
        let took = self.taken.get(usize::from(head)).map_or(0, |(taken, _)| self.now.saturating_sub(*taken));
        self.in_flight = self.in_flight.saturating_sub(1);
        self.set(Word::InFlight as usize, self.in_flight);
        self.add(Word::Requests as usize, 1);
        self.add(Word::ToDriver as usize, to_driver.into());
        self.add(Word::Latency as usize, took);
        self.add((Word::Histogram as usize).wrapping_add(bucket(took)), 1);
    }

    /// A request has failed.
    pub fn failed(&self) {
        self.add(Word::Errors as usize, 1);
    }

    /// The driver was interrupted after a run of requests, or did not want to be.
    pub fn signalled(&mut self, wanted: bool) {
        self.doing = Doing::Nothing;
        let word = if wanted { Word::Interrupts } else { Word::Suppressed };
        self.add(word as usize, 1);
    }

    /// There is no further request.
    pub fn idle(&mut self) {
        self.doing = Doing::Nothing;
    }
}

/// The bucket of a time in nanoseconds.
fn bucket(nanoseconds: u64) -> usize {
    let micros = nanoseconds / 1000;
    let bits = u64::BITS.saturating_sub(micros.leading_zeros());
    usize::try_from(bits).unwrap_or(BUCKETS).min(BUCKETS.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> (MetricsFile, Metrics) {
        let file = MetricsFile::create().unwrap();
        let copy = file.file.try_clone().unwrap();
        (file, Metrics::map(&copy).unwrap())
    }

    #[test]
    fn counts_are_seen_on_the_other_side_and_go_on_in_a_successor() {
        let (file, metrics) = both();
        for round in 1..=3_u64 {
            // A process dies with a request in flight.
            let mut meter = Meter::new(&metrics, 5, 16).unwrap();
            meter.taken(3, 100);
            meter.taken(4, 10);
            meter.finished(3, 1000);
            meter.failed();
            meter.signalled(true);
            meter.signalled(false);
            let counters = file.read(QUEUES);
            assert_eq!(counters.requests, round);
            assert_eq!((counters.bytes_from_driver, counters.bytes_to_driver), (110 * round, 1000 * round));
            assert_eq!((counters.errors, counters.in_flight), (round, 1));
            assert_eq!((counters.interrupts, counters.interrupts_suppressed), (round, round));
            assert_eq!(counters.histogram.iter().sum::<u64>(), round);
        }
        assert_eq!(
            file.read(5),
            Counters { histogram: vec![0; BUCKETS], ..Counters::default() },
            "queue 5 is the sixth"
        );
    }

    #[test]
    fn what_is_put_back_is_not_counted_twice() {
        let (file, metrics) = both();
        let mut meter = Meter::new(&metrics, 0, 16).unwrap();
        meter.taken(1, 7);
        meter.put_back(1);
        meter.taken(1, 7);
        meter.finished(1, 0);
        let counters = file.read(1);
        assert_eq!((counters.requests, counters.bytes_from_driver, counters.in_flight), (1, 7, 0));
    }

    #[test]
    fn buckets_double() {
        assert_eq!([0, 999, 1000, 1999, 2000, 1_000_000].map(bucket), [0, 0, 1, 1, 2, 10]);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_memory_keeps_its_size_and_queues_beyond_it_are_not_counted() {
        let (file, metrics) = both();
        assert!(nix::unistd::ftruncate(&file.file, 0).is_err());
        assert!(Meter::new(&metrics, 64, 16).is_none());
        assert!(Meter::new(&metrics, 63, 16).is_some());
        assert!(Meter::new(&Metrics::none(), 0, 16).is_none());
    }

    #[test]
    fn any_number_may_stand_there() {
        let (file, metrics) = both();
        let page = metrics.0.unwrap();
        (0..QUEUES * WORDS).for_each(|word| page.store(word, u64::MAX));
        assert_eq!(file.read(QUEUES).requests, 0_u64.wrapping_sub(QUEUES as u64));
    }
}
