//! When a wait ends.

use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

/// The point in time at which a wait is given up; one deadline covers all the system calls of an exchange.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// A deadline `limit` from now. A limit too large for the clock counts as none.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now().checked_add(limit))
    }

    /// No deadline: waits until the peer does something. Only for a process that has nothing else to do.
    pub const fn never() -> Self {
        Self(None)
    }

    /// The time that is left, `None` without a deadline.
    pub fn remaining(&self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether the time is over.
    pub fn passed(&self) -> bool {
        self.remaining().is_some_and(|left| left.is_zero())
    }

    /// The time that is left as poll(2) wants it, rounded up to whole milliseconds.
    pub(crate) fn poll_timeout(&self) -> PollTimeout {
        match self.remaining() {
            None => PollTimeout::NONE,
            Some(left) => PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX),
        }
    }
}
