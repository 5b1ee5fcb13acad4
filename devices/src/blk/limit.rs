//! The rate limit of a disk, which all its queues share.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::BlkRates;

use crate::rate_limit::{Rate, RateLimit, RateLimits};

/// The limit. Its lock is held for a few additions, and only a disk with a limit has one.
#[derive(Debug)]
pub struct Limit(Mutex<RateLimit>);

impl Limit {
    /// `None`: no limit.
    pub fn new(rates: BlkRates) -> Option<Self> {
        let BlkRates { bps, bps_burst, iops, iops_burst } = rates;
        let bandwidth = Rate { rate: bps, burst: bps_burst };
        let operations = Rate { rate: iops, burst: iops_burst };
        let limit = RateLimit::new(RateLimits { bandwidth, operations }, Instant::now());
        (!limit.is_unlimited()).then(|| Self(Mutex::new(limit)))
    }

    /// Takes a request of `bytes`.
    ///
    /// # Errors
    /// How long until it can be taken.
    pub fn try_take(&self, bytes: u64) -> Result<(), Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).try_take(bytes, Instant::now())
    }
}
