//! What the guest has said and nobody has taken yet.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tracing::{info, warn};

/// Bytes kept while nobody reads.
pub const HISTORY: usize = 64 * 1024;

/// Bytes that the guest may be promised at once: there is room for them whoever comes or goes meanwhile.
pub const BURST: usize = 16 * 1024;

/// Bytes kept for a reader that is slow; then the guest waits.
pub const CAPACITY: usize = HISTORY + BURST;

/// How long the guest waits for a reader that takes nothing.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// Memory that an idle stream holds, bytes.
const IDLE: usize = 4096;

/// Who takes the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reader {
    /// Nobody.
    #[default]
    Absent,
    /// Somebody.
    Present,
    /// Somebody who has taken nothing since then, although there is no more room.
    Stalled(Instant),
    /// Somebody who has had the time and is not waited for.
    GivenUp,
}

/// The bytes between the guest and its reader.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
    reader: Reader,
    /// Bytes dropped and not reported yet.
    dropped: u64,
}

impl Backlog {
    /// Another reader takes the bytes from now on, or none.
    pub fn set_reader(&mut self, present: bool) {
        self.reader = if present { Reader::Present } else { Reader::Absent };
        self.trim();
        if present {
            self.report();
        }
    }

    /// Whether the guest waits for the reader where it must.
    fn is_waited_for(&self) -> bool {
        matches!(self.reader, Reader::Present | Reader::Stalled(_))
    }

    /// Bytes that [`Self::push`] takes now without dropping what a present reader could still read.
    pub fn room(&self) -> usize {
        if self.is_waited_for() { CAPACITY.saturating_sub(self.bytes.len()) } else { BURST }
    }

    /// The guest says something. What there is no room for drops the oldest.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.trim();
    }

    /// The oldest bytes, as many as lie together in memory; empty when nothing waits.
    pub fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The reader has taken the oldest `count` bytes.
    pub fn take(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
        if self.bytes.is_empty() {
            self.bytes.shrink_to(IDLE);
        }
        if self.reader != Reader::Absent {
            self.reader = Reader::Present;
            self.report();
        }
    }

    /// All bytes that wait.
    pub fn take_all(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes).into()
    }

    /// The reader would take nothing at `now`.
    pub fn refused(&mut self, now: Instant) {
        if self.reader == Reader::Present && self.room() == 0 {
            self.reader = Reader::Stalled(now);
        }
    }

    /// When the guest will have waited long enough, if it waits.
    pub fn deadline(&self) -> Option<Instant> {
        match self.reader {
            Reader::Stalled(since) => since.checked_add(PATIENCE),
            _ => None,
        }
    }

    /// Gives the reader up if its time is over at `now`.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            warn!(seconds = PATIENCE.as_secs(), "nobody reads the output; the oldest is dropped from now on");
            self.reader = Reader::GivenUp;
            self.trim();
        }
    }

    /// Says how much was dropped, once.
    pub fn report(&mut self) {
        if self.dropped > 0 {
            info!(bytes = self.dropped, "output was dropped because nobody read it");
            self.dropped = 0;
        }
    }

    fn trim(&mut self) {
        let limit = if self.is_waited_for() { CAPACITY } else { HISTORY };
        let excess = self.bytes.len().saturating_sub(limit);
        if excess > 0 {
            self.bytes.drain(..excess);
            self.dropped = self.dropped.saturating_add(excess as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Backlog {
        let mut backlog = Backlog::default();
        backlog.set_reader(true);
        backlog.push(&vec![b'a'; CAPACITY]);
        backlog
    }

    #[test]
    fn the_newest_is_kept_for_nobody() {
        let mut backlog = Backlog::default();
        backlog.push(b"lost");
        (0..HISTORY / 1024).for_each(|_| backlog.push(&[b'x'; 1024]));
        assert_eq!((backlog.len(), backlog.dropped, backlog.room()), (HISTORY, 4, BURST));
        backlog.set_reader(true);
        assert!(backlog.front().iter().all(|byte| *byte == b'x'));
        assert_eq!(backlog.dropped, 0, "reported");
        assert!(backlog.room() >= BURST, "what was promised while nobody was there still fits");
    }

    #[test]
    fn a_reader_without_progress_is_given_up_after_the_bound_and_no_earlier() {
        let mut backlog = filled();
        let now = Instant::now();
        assert_eq!((backlog.room(), backlog.deadline()), (0, None));
        backlog.refused(now);
        backlog.refused(now + PATIENCE);
        assert_eq!(backlog.deadline(), Some(now + PATIENCE), "the first refusal counts");
        backlog.expire(now + PATIENCE / 2);
        assert_eq!(backlog.room(), 0);
        backlog.expire(now + PATIENCE);
        assert_eq!((backlog.room(), backlog.deadline()), (BURST, None));
        assert_eq!(backlog.dropped, BURST as u64);
        backlog.push(b"b");
        assert_eq!((backlog.len(), backlog.dropped), (HISTORY, BURST as u64 + 1));
    }

    #[test]
    fn a_reader_that_reads_again_is_waited_for_again() {
        let mut backlog = filled();
        let now = Instant::now();
        backlog.refused(now);
        backlog.take(1);
        assert_eq!((backlog.room(), backlog.deadline()), (1, None), "a slow one is not stuck");
        backlog.push(b"b");
        backlog.refused(now);
        backlog.expire(now + PATIENCE);
        backlog.take(1);
        assert_eq!((backlog.room(), backlog.dropped), (BURST + 1, 0));
    }

    #[test]
    fn a_slow_reader_with_room_left_has_no_deadline() {
        let mut backlog = Backlog::default();
        backlog.set_reader(true);
        backlog.push(b"a");
        backlog.refused(Instant::now());
        assert_eq!(backlog.deadline(), None);
    }

    #[test]
    fn an_idle_stream_gives_its_memory_back() {
        let mut backlog = filled();
        backlog.take(CAPACITY);
        assert!(backlog.bytes.capacity() <= 2 * IDLE);
    }
}
