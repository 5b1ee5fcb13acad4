//! When to try what may be in vain: looking at a ring before sleeping, and moving data without the kernel's help.
//!
//! A driver that has its answer often has its next request within microseconds, while going to sleep and being woken costs more than that on
//! both sides. So a queue that has just worked looks at its ring for up to [`NEXT`] before it asks to be kicked and sleeps. While
//! requests are under way a disk looks for up to [`END`], for the end of one, too, for a driver that does the same. The two know
//! nothing of each other: a disk that is too slow to be waited for tells nothing about the driver, which has its next
//! request at once when it is told of an end, and would have to wake a queue that no longer looks.
//!
//! A look that was in vain makes the next 1, 3, 7 … 63 sleeps of its kind go without one; a single success forgets that. In the long run a
//! queue whose driver or disk is slower wastes no more than one look in 64 sleeps; one without work sleeps. With a single CPU
//! there is nothing to wait for: the driver cannot run meanwhile.

use std::hint::spin_loop;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::unistd::Pid;

/// The longest look for a request when none is under way.
const NEXT: Duration = Duration::from_micros(32);
/// The longest look while some are: about what it costs to go to sleep and be woken by the disk.
const END: Duration = Duration::from_micros(40);
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
    next: Look,
    end: Look,
}

impl Idle {
    /// For a thread that may run on the CPUs that it may run on now.
    pub fn new() -> Self {
        let alone = sched_getaffinity(Pid::from_raw(0)).map_or(true, |cpus| {
            (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu) == Ok(true)).count() == 1
        });
        let look = |longest| Look {
            longest: if alone { Duration::ZERO } else { longest },
            backoff: Backoff::default(),
        };
        Self { next: look(NEXT), end: look(END) }
    }

    /// Looks for the next request until it is there, or until it is better to sleep (false).
    pub fn look_for_next(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.next.look(ready)
    }

    /// The same for a thread that waits at an epoll, whose events count, too: how many have come, which is 0 for a request. `None`: it is
    /// better to sleep.
    ///
    /// # Errors
    ///
    /// Those of [`arrived`].
    pub fn look_for_next_or_events(
        &mut self,
        epoll: &Epoll,
        events: &mut [EpollEvent],
        mut ready: impl FnMut() -> bool,
    ) -> io::Result<Option<usize>> {
        let mut count = Ok(0);
        let comes = self.look_for_next(|| {
            ready() || {
                count = arrived(epoll, events, EpollTimeout::ZERO);
                !matches!(count, Ok(0))
            }
        });
        Ok(comes.then_some(count?))
    }

    /// Looks while requests are under way, for the next or for the end of one.
    pub fn look_for_end(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.end.look(ready)
    }
}

/// The number of events that have come within the time.
///
/// # Errors
///
/// Those of `epoll_wait(2)`; a signal is none.
pub fn arrived(epoll: &Epoll, events: &mut [EpollEvent], timeout: EpollTimeout) -> io::Result<usize> {
    match epoll.wait(events, timeout) {
        Err(Errno::EINTR) => Ok(0),
        count => Ok(count?),
    }
}

/// Looks of one kind.
#[derive(Debug)]
struct Look {
    longest: Duration,
    backoff: Backoff,
}

impl Look {
    fn look(&mut self, mut ready: impl FnMut() -> bool) -> bool {
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

    fn idle() -> Idle {
        let look = |longest| Look { longest, backoff: Backoff::default() };
        Idle { next: look(NEXT), end: look(END) }
    }

    #[test]
    fn a_look_ends_when_there_is_something_or_in_time() {
        let mut idle = idle();
        let mut looks = 0;
        assert!(idle.look_for_next(|| {
            looks += 1;
            looks == 5
        }));
        assert!(!idle.look_for_next(|| false));
        // Not the next time.
        assert!(!idle.look_for_next(|| true));
        assert!(idle.look_for_next(|| true));
    }

    #[test]
    fn a_disk_that_is_slow_tells_nothing_about_the_driver() {
        let mut idle = idle();
        for _ in 0..10 {
            assert!(!idle.look_for_end(|| false));
            assert!(idle.look_for_next(|| true));
        }
    }
}
