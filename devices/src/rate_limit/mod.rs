//! Token buckets: how many operations and bytes a device may move.
//!
//! A [`Bucket`] fills at a steady rate up to a capacity, the burst. A [`RateLimit`] is one bucket for operations and one for bytes, and a
//! request needs both. The caller names the moment (CLOCK_MONOTONIC), so nothing here makes a system call, allocates or locks, and a
//! test owns the clock.
//!
//! What is larger than the burst could never be had at once. It is let through when the bucket is full and leaves a debt
//! behind, which later requests wait for: the rate holds on average whatever the sizes are.
//!
//! | file | what |
//! | --- | --- |
//! | `limit` | the limit of a device, which its threads share |
//! | `group` | a limit that several devices share |

mod group;
mod limit;

use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::Rates;
pub use group::Group;
pub use limit::Limit;
use serde::{Deserialize, Serialize};

const NANOSECONDS: u128 = 1_000_000_000;

/// What a bucket is made from. A rate of 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Tokens a second: bytes or operations.
    pub rate: u64,
    /// Tokens that may be used at once after a pause. 0: a tenth of a second's.
    pub burst: u64,
}

/// The limits of a device or of one direction of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    /// Bytes.
    pub bandwidth: Rate,
    /// Requests or packets.
    pub operations: Rate,
}

impl RateLimits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.rate == 0 && self.operations.rate == 0
    }
}

impl From<Rates> for RateLimits {
    fn from(Rates { bps, bps_burst, iops, iops_burst }: Rates) -> Self {
        Self {
            bandwidth: Rate { rate: bps, burst: bps_burst },
            operations: Rate { rate: iops, burst: iops_burst },
        }
    }
}

/// A token bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: u64,
    capacity: u64,
    /// Tokens that are there, in units of 1/10⁹ token, so that nothing is lost by rounding; negative after a large request.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full bucket; `None` without a limit.
    pub fn new(rate: Rate, now: Instant) -> Option<Self> {
        let capacity = match rate {
            Rate { rate: 0, .. } => return None,
            Rate { rate, burst: 0 } => rate.div_ceil(10),
            Rate { burst, .. } => burst,
        };
        Some(Self { rate: rate.rate, capacity, level: scaled(capacity), filled: now })
    }

    /// Adds what came since the last time. A moment before that one changes nothing.
    fn fill(&mut self, now: Instant) {
        let Some(elapsed) = now.checked_duration_since(self.filled) else { return };
        let came = elapsed.as_nanos().saturating_mul(u128::from(self.rate));
        self.level =
            self.level.saturating_add(i128::try_from(came).unwrap_or(i128::MAX)).min(scaled(self.capacity));
        self.filled = now;
    }

    /// What must be there for `tokens` to be had.
    fn needed(&self, tokens: u64) -> i128 {
        scaled(tokens.min(self.capacity))
    }

    /// How long until `tokens` can be taken; zero: now. Nothing can always be taken.
    pub fn time_until(&mut self, tokens: u64, now: Instant) -> Duration {
        self.fill(now);
        if tokens == 0 {
            return Duration::ZERO;
        }
        let missing = self.needed(tokens).saturating_sub(self.level);
        let nanoseconds = u128::try_from(missing).unwrap_or(0).div_ceil(u128::from(self.rate.max(1)));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(scaled(tokens));
    }

    /// Takes `tokens` if they are there.
    pub fn try_take(&mut self, tokens: u64, now: Instant) -> bool {
        let there = self.time_until(tokens, now).is_zero();
        if there {
            self.take(tokens);
        }
        there
    }
}

fn scaled(tokens: u64) -> i128 {
    i128::try_from(u128::from(tokens).saturating_mul(NANOSECONDS)).unwrap_or(i128::MAX)
}

/// Limits for operations and bytes together.
#[derive(Clone, Debug)]
pub struct RateLimit {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimit {
    /// Both buckets full.
    pub fn new(limits: RateLimits, now: Instant) -> Self {
        Self {
            bandwidth: Bucket::new(limits.bandwidth, now),
            operations: Bucket::new(limits.operations, now),
        }
    }

    /// Whether nothing is limited: then there is no need to look at the clock.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }

    /// Takes one operation of `bytes` from both buckets, or nothing from either.
    ///
    /// # Errors
    /// How long until it can be taken, if nobody else takes before.
    pub fn try_take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        self.try_take_many(1, bytes, now)
    }

    /// Takes `operations` and `bytes`, or nothing.
    ///
    /// # Errors
    /// As [`Self::try_take`].
    pub fn try_take_many(&mut self, operations: u64, bytes: u64, now: Instant) -> Result<(), Duration> {
        let wait = self.time_until(operations, bytes, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.operations, operations)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        Ok(())
    }

    /// How long until `operations` and `bytes` can be taken; zero: now.
    pub fn time_until(&mut self, operations: u64, bytes: u64, now: Instant) -> Duration {
        let wait = |bucket: &mut Option<Bucket>, tokens| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.time_until(tokens, now))
        };
        wait(&mut self.bandwidth, bytes).max(wait(&mut self.operations, operations))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bandwidth(rate: u64, burst: u64) -> RateLimits {
        RateLimits { bandwidth: Rate { rate, burst }, ..RateLimits::default() }
    }

    #[test]
    fn without_limits_everything_is_let_through() {
        let now = Instant::now();
        let mut limit = RateLimit::new(RateLimits::default(), now);
        assert!(limit.is_unlimited());
        assert_eq!(limit.try_take_many(u64::MAX, u64::MAX, now), Ok(()));
    }

    #[test]
    fn a_burst_is_there_at_once_and_then_the_rate_holds() {
        let now = Instant::now();
        let mut limit = RateLimit::new(bandwidth(1000, 300), now);
        assert_eq!(limit.try_take(300, now), Ok(()));
        assert_eq!(limit.try_take(100, now), Err(Duration::from_millis(100)));
        assert_eq!(limit.try_take(100, now + Duration::from_millis(99)), Err(Duration::from_millis(1)));
        assert_eq!(limit.try_take(100, now + Duration::from_millis(100)), Ok(()));
        // A pause of any length saves up no more than the burst.
        let later = now + Duration::from_secs(1000);
        assert_eq!(limit.try_take(300, later), Ok(()));
        assert_eq!(limit.try_take(1, later), Err(Duration::from_millis(1)));
    }

    #[test]
    fn what_the_operations_refuse_costs_no_bytes() {
        let now = Instant::now();
        let operations = Rate { rate: 10, burst: 1 };
        let mut limit = RateLimit::new(RateLimits { operations, ..bandwidth(1000, 1000) }, now);
        assert_eq!(limit.try_take(400, now), Ok(()));
        assert_eq!(limit.try_take(400, now), Err(Duration::from_millis(100)));
        assert_eq!(limit.time_until(0, 600, now), Duration::ZERO);
    }

    #[test]
    fn more_than_the_burst_is_let_through_and_paid_for_later() {
        let now = Instant::now();
        let mut limit = RateLimit::new(bandwidth(1000, 100), now);
        assert_eq!(limit.try_take(1100, now), Ok(()));
        assert_eq!(limit.try_take(1, now), Err(Duration::from_millis(1001)));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let now = Instant::now();
        let mut limit = RateLimit::new(bandwidth(u64::MAX, u64::MAX), now);
        let later = now + Duration::from_secs(1 << 32);
        for moment in [now, later, now] {
            let _ = limit.try_take(u64::MAX, moment);
            let _ = limit.time_until(u64::MAX, u64::MAX, moment);
        }
        let mut slow = RateLimit::new(bandwidth(1, 1), now);
        assert_eq!(slow.try_take(u64::MAX, now), Ok(()));
        assert!(slow.time_until(1, 1, now) > Duration::from_secs(1 << 32));
    }

    proptest! {
        /// Whatever is asked for, and whenever: over the whole time no more was had than the burst, the rate's due, and one request.
        #[test]
        fn the_rate_is_never_exceeded_and_waiting_as_told_always_helps(
            rate in 1u64..1_000_000,
            burst in 0u64..10_000,
            requests in proptest::collection::vec((1u64..20_000, 0u64..2_000_000), 1..60),
        ) {
            let begin = Instant::now();
            let mut now = begin;
            let mut limit = RateLimit::new(bandwidth(rate, burst), begin);
            let (mut total, mut largest) = (0u128, 0u128);
            for (bytes, pause) in requests {
                now += Duration::from_nanos(pause);
                if let Err(wait) = limit.try_take(bytes, now) {
                    now += wait;
                    prop_assert_eq!(limit.try_take(bytes, now), Ok(()));
                }
                total += u128::from(bytes);
                largest = largest.max(u128::from(bytes));
                let burst = if burst == 0 { rate.div_ceil(10) } else { burst };
                let due = (now - begin).as_nanos() * u128::from(rate) / NANOSECONDS;
                prop_assert!(total <= u128::from(burst) + due + largest + 1);
            }
        }
    }
}
