//! A bound on how much one process may write into the log.
//!
//! A hostile process must not fill a disk or hide others' messages: each has a token bucket for lines and one for
//! bytes. What exceeds them is counted and reported once there is room again.

use std::time::{Duration, Instant};

/// Tokens that come back with time, up to a burst.
#[derive(Debug)]
struct Bucket {
    tokens: u64,
    burst: u64,
    per_second: u64,
    since: Instant,
}

impl Bucket {
    const fn new(burst: u64, per_second: u64, now: Instant) -> Self {
        Self { tokens: burst, burst, per_second, since: now }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since);
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let gained = micros.saturating_mul(self.per_second) / 1_000_000;
        if gained > 0 {
            self.tokens = self.tokens.saturating_add(gained).min(self.burst);
            // Only the time that became whole tokens is used up.
            let used = gained.saturating_mul(1_000_000) / self.per_second.max(1);
            self.since = self.since.checked_add(Duration::from_micros(used)).unwrap_or(now);
        }
    }
}

/// What becomes of a line.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is written; before it, a note that this many lines were dropped (when not zero).
    Write {
        /// Lines dropped since the last one that was written.
        dropped_before: u64,
    },
    /// It is dropped and counted.
    Drop,
}

/// The limit of one process.
#[derive(Debug)]
pub struct Limiter {
    lines: Bucket,
    bytes: Bucket,
    dropped: u64,
}

impl Limiter {
    /// 200 lines at once and 50 a second, 64 KiB at once and 8 KiB a second.
    pub const fn new(now: Instant) -> Self {
        Self { lines: Bucket::new(200, 50, now), bytes: Bucket::new(64 << 10, 8 << 10, now), dropped: 0 }
    }

    /// Decides about a line of `length` bytes that arrived at `now`.
    pub fn check(&mut self, length: usize, now: Instant) -> Verdict {
        self.lines.refill(now);
        self.bytes.refill(now);
        let length = length as u64;
        if self.lines.tokens == 0 || self.bytes.tokens < length {
            self.dropped = self.dropped.saturating_add(1);
            return Verdict::Drop;
        }
        self.lines.tokens -= 1;
        self.bytes.tokens -= length;
        Verdict::Write { dropped_before: std::mem::take(&mut self.dropped) }
    }

    /// Lines dropped and not yet reported; reports them.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let written = (0..1000).filter(|_| limiter.check(10, start) != Verdict::Drop).count();
        assert_eq!(written, 200);
        assert_eq!(
            limiter.check(10, start + Duration::from_millis(20)),
            Verdict::Write { dropped_before: 800 }
        );
        assert_eq!(limiter.check(10, start + Duration::from_millis(20)), Verdict::Drop);
        assert_eq!(limiter.take_dropped(), 1);
        assert_eq!(limiter.take_dropped(), 0);
    }

    #[test]
    fn a_second_brings_fifty_lines() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        assert!((0..1000).any(|_| limiter.check(1, start) == Verdict::Drop));
        assert_eq!(limiter.check(1, start), Verdict::Drop);
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| limiter.check(1, later) != Verdict::Drop).count(), 50);
    }

    #[test]
    fn long_lines_are_bounded_by_their_bytes() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let written = (0..200).filter(|_| limiter.check(1024, start) != Verdict::Drop).count();
        assert_eq!(written, 64);
    }

    #[test]
    fn many_small_steps_of_time_add_up() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        assert!((0..1000).any(|_| limiter.check(1, start) == Verdict::Drop));
        assert_eq!(limiter.check(1, start), Verdict::Drop);
        let written = (1..=1000)
            .filter(|step| limiter.check(1, start + Duration::from_millis(*step)) != Verdict::Drop)
            .count();
        assert_eq!(written, 50);
    }
}
