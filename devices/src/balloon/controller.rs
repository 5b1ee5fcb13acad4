//! What the control channel asks of a balloon, and what it shares with the queues for that.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{F_PAGE_REPORTING, F_STATS_VQ};

/// How long a guest may take to say how it uses its memory; the control channel waits meanwhile.
const STATISTICS_LIMIT: Duration = Duration::from_millis(300);

/// What device, queues and controller share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Size that the balloon is to have, pages of 4 KiB.
    pub target: AtomicU32,
    /// Size that it has.
    pub actual: AtomicU32,
    /// Features that the driver accepted.
    pub features: AtomicU64,
    /// New statistics are wanted.
    pub wanted: AtomicBool,
    statistics: Mutex<Statistics>,
    arrived: Condvar,
}

/// What the guest said last of its memory: tag and value (5.5.6.4).
#[derive(Debug, Default)]
struct Statistics {
    values: Vec<(u16, u64)>,
    /// Increases when they come.
    count: u64,
}

impl Shared {
    pub(super) fn new(target: u32, actual: u32) -> Self {
        Self { target: target.into(), actual: actual.into(), ..Self::default() }
    }

    /// Queues are numbered without gaps: where statistics come, and where free pages do.
    pub(super) fn statistics_queue(&self) -> Option<u16> {
        (self.features.load(Ordering::Relaxed) & F_STATS_VQ != 0).then_some(2)
    }

    pub(super) fn reporting_queue(&self) -> Option<u16> {
        let number = if self.statistics_queue().is_some() { 3 } else { 2 };
        (self.features.load(Ordering::Relaxed) & F_PAGE_REPORTING != 0).then_some(number)
    }

    /// Statistics have come.
    pub(super) fn store(&self, values: Vec<(u16, u64)>) {
        let mut statistics = self.statistics.lock().unwrap_or_else(PoisonError::into_inner);
        statistics.values = values;
        statistics.count = statistics.count.wrapping_add(1);
        self.arrived.notify_all();
    }
}

/// What a balloon is asked.
#[derive(Clone, Debug)]
pub struct Controller {
    shared: Arc<Shared>,
}

impl Controller {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The balloon is to have so many pages. Tell the front end afterwards that the configuration has changed.
    pub fn set_target(&self, pages: u32) {
        self.shared.target.store(pages, Ordering::Relaxed);
    }

    /// The pages that it is to have, and has.
    pub fn size(&self) -> (u32, u32) {
        (self.shared.target.load(Ordering::Relaxed), self.shared.actual.load(Ordering::Relaxed))
    }

    /// Asks the guest how it uses its memory and waits a moment; what it said last if it does not answer. `wake` makes the
    /// queues' thread look at what is wanted.
    pub fn statistics(&self, wake: impl FnOnce()) -> Vec<(u16, u64)> {
        let statistics = self.shared.statistics.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.statistics_queue().is_none() {
            return Vec::new();
        }
        let before = statistics.count;
        self.shared.wanted.store(true, Ordering::Release);
        wake();
        let waited =
            self.shared.arrived.wait_timeout_while(statistics, STATISTICS_LIMIT, |now| now.count == before);
        waited.unwrap_or_else(PoisonError::into_inner).0.values.clone()
    }
}
