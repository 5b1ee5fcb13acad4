//! When to try what may be in vain: looking at a ring before sleeping, and moving data without the kernel's help.
//!
//! A driver that has its answer often has its next request within microseconds, while going to sleep and being woken costs more than that on
//! both sides. So a queue that has just worked looks at its ring for up to [`LONGEST`] before it asks to be kicked and sleeps. A
//! look that was in vain makes the next 1, 3, 7 … 63 sleeps go without one; a single success forgets that. In the long run a queue whose driver is
//! slower wastes no more than 32 µs in 64 sleeps; one without work sleeps. With a single CPU there is nothing to wait for: the
//! driver cannot run meanwhile.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// The longest look at a ring.
pub const LONGEST: Duration = Duration::from_micros(32);
/// Most chances that are left out after a failure.
const MOST_SKIPPED: u32 = 63;
/// Looks between two looks at the clock.
const LOOKS: u32 = 16;

/// Leaves out more and more chances of something that keeps failing, and none after a success.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    skip: u32,
    left: u32,
}

impl Backoff {
    /// Whether to try now.
    pub fn due(&mut self) -> bool {
        let due = self.left == 0;
        self.left = self.left.saturating_sub(1);
        due
    }

    /// It was worth it.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// It was in vain.
    pub fn failed(&mut self) {
        self.skip = self.skip.saturating_mul(2).saturating_add(1).min(MOST_SKIPPED);
        self.left = self.skip;
    }
}

/// What a queue does before it sleeps.
#[derive(Debug)]
pub struct Idle {
    longest: Duration,
    backoff: Backoff,
}

impl Idle {
    /// For a thread that may run on the CPUs that it may run on now.
    pub fn new() -> Self {
        let alone = sched_getaffinity(Pid::from_raw(0)).map_or(true, |cpus| {
            (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu) == Ok(true)).count() == 1
        });
        Self { longest: if alone { Duration::ZERO } else { LONGEST }, backoff: Backoff::default() }
    }

    /// Looks whether there is something to do until there is, or until it is better to sleep (false).
    pub fn look(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        if self.longest.is_zero() || !self.backoff.due() {
            return false;
        }
        let begin = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if ready() {
                    self.backoff.succeeded();
                    return true;
                }
                spin_loop();
            }
            if begin.elapsed() >= self.longest {
                self.backoff.failed();
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tries(backoff: &mut Backoff, chances: u32, works: bool) -> u32 {
        let mut tries = 0;
        for _ in 0..chances {
            if backoff.due() {
                tries += 1;
                if works { backoff.succeeded() } else { backoff.failed() }
            }
        }
        tries
    }

    #[test]
    fn what_works_is_always_tried_and_what_fails_seldom() {
        let mut backoff = Backoff::default();
        assert_eq!(tries(&mut backoff, 100, true), 100);
        assert!((100..=110).contains(&tries(&mut backoff, 6400, false)));
        // One success, and all is as before.
        while !backoff.due() {}
        backoff.succeeded();
        assert_eq!(tries(&mut backoff, 10, true), 10);
    }

    #[test]
    fn a_look_ends_when_there_is_something_or_in_time() {
        let mut idle = Idle { longest: LONGEST, backoff: Backoff::default() };
        let mut looks = 0;
        assert!(idle.look(|| {
            looks += 1;
            looks == 5
        }));
        assert!(!idle.look(|| false));
        // Not the next time.
        assert!(!idle.look(|| true));
        assert!(idle.look(|| true));
    }
}
