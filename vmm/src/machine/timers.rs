//! Deadlines of the machine's devices. The host keeps one timer, for the earliest.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::host::Host;
use super::sync::lock;

/// Who wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// The PM timer's overflow.
    Pm,
    /// An interrupt of the real-time clock.
    Rtc,
}

/// The deadlines, in time of [`Host::monotonic`].
pub(super) struct Timers {
    host: Arc<dyn Host>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    deadlines: [Option<Duration>; 2],
    /// What the host was told, unless it has passed.
    told: Option<Duration>,
}

impl Timers {
    pub(super) fn new(host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self { host, state: Mutex::default() })
    }

    /// Replaces a deadline. The lock is held while the host is told, so that it hears last what holds last.
    pub(super) fn set(&self, timer: Timer, deadline: Option<Duration>) {
        let mut state = lock(&self.state);
        if let Some(entry) = state.deadlines.get_mut(timer as usize) {
            *entry = deadline;
        }
        self.tell(&mut state);
    }

    /// The host's timer has run out: it has to be told anew, even what it was told before.
    pub(super) fn expired(&self) {
        lock(&self.state).told = None;
    }

    fn tell(&self, state: &mut State) {
        let earliest = state.deadlines.iter().flatten().min().copied();
        if state.told != earliest {
            state.told = earliest;
            self.host.set_timer(earliest);
        }
    }
}
