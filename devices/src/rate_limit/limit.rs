//! The limit of a device or of one direction of it, which all its queues share: one of its own, one of its group, or both.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::group::Group;
use super::{RateLimit, RateLimits};

/// The limit. Its lock is held for a few additions, and only a device with a limit has one.
#[derive(Debug)]
pub struct Limit {
    own: Mutex<RateLimit>,
    group: Option<Arc<Group>>,
}

impl Limit {
    /// `None`: no limit.
    pub fn new(limits: RateLimits, group: Option<Arc<Group>>) -> Option<Self> {
        let limited = !limits.is_unlimited() || group.is_some();
        limited.then(|| Self { own: Mutex::new(RateLimit::new(limits, Instant::now())), group })
    }

    /// Takes a request or packet of `bytes`.
    ///
    /// # Errors
    /// How long until it can be taken.
    pub fn try_take(&self, bytes: u64) -> Result<(), Duration> {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let wait = own.time_until(1, bytes, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        if let Some(group) = &self.group {
            group.try_take(bytes)?;
        }
        own.try_take(bytes, now)
    }
}
