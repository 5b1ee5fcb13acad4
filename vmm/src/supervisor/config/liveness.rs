//! `--hang-deadline` and `--stall-deadline`: when a process that lives counts as dead.

use std::time::Duration;

const DEFAULT_HANG: u32 = 5;
/// Generous: a process that finds no time for so long is of no use to a guest, whose own drivers give up after 30 s.
const DEFAULT_STALL: u32 = 30;
/// The core may wait for a device that finishes what is in flight, up to 15 s, and must not count as dead meanwhile.
const CORE_PATIENCE: u32 = 4;
/// The longest time between two heartbeats.
const LONGEST_INTERVAL: Duration = Duration::from_secs(2);

/// How long a process may be silent, and a queue without progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// For a device process to answer a heartbeat; `None`: nobody asks.
    pub hang: Option<Duration>,
    /// For a device process that answers to go on with a queue that has requests, unless it waits for the host.
    pub stall: Option<Duration>,
}

impl Default for Liveness {
    fn default() -> Self {
        Self::new(None, None)
    }
}

impl Liveness {
    /// From what the user says, seconds; 0 turns the check off.
    pub fn new(hang: Option<u32>, stall: Option<u32>) -> Self {
        let deadline = |seconds: u32| (seconds > 0).then(|| Duration::from_secs(seconds.into()));
        Self { hang: deadline(hang.unwrap_or(DEFAULT_HANG)), stall: deadline(stall.unwrap_or(DEFAULT_STALL)) }
    }

    /// For the core to answer a heartbeat.
    pub fn core(&self) -> Option<Duration> {
        self.hang.map(|hang| hang.saturating_mul(CORE_PATIENCE))
    }

    /// The time between two heartbeats; `None`: there are none.
    pub fn interval(&self) -> Option<Duration> {
        let least = [self.hang, self.stall].into_iter().flatten().min()?;
        Some((least / 2).min(LONGEST_INTERVAL))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_are_at_least_twice_as_frequent_as_the_deadlines() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(Liveness::default().interval(), seconds(2));
        assert_eq!(Liveness::default().core(), seconds(20));
        assert_eq!(Liveness::new(Some(1), None).interval(), Some(Duration::from_millis(500)));
        assert_eq!(Liveness::new(Some(0), None).core(), None);
        assert_eq!(Liveness::new(Some(0), Some(0)).interval(), None);
    }
}
