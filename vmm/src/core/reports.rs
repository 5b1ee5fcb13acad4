//! What any thread of the core has to tell the supervisor: the main thread sends it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_ipc::channel::message::{FromCore, MachineEnd};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::virtio::{Observer, VirtioError};

/// Reports that wait at the most: a device that fails over and over must not fill memory.
const MAX_WAITING: usize = 64;

/// A queue with an eventfd that tells the main thread to look.
pub(super) struct Reports {
    waiting: Mutex<Waiting>,
    event: EventFd,
}

#[derive(Default)]
struct Waiting {
    /// The first one counts: what a guest does after it has powered off changes nothing.
    end: Option<MachineEnd>,
    reports: VecDeque<FromCore>,
    /// Not more than there are slots and CPUs: to be ejected again, each must be plugged in again.
    ejected: VecDeque<Ejected>,
}

/// What the guest let go of.
#[derive(Clone, Copy)]
pub(super) enum Ejected {
    /// The function in a PCI slot.
    Slot(u8),
    /// A CPU, by its index.
    Cpu(u16),
}

impl Reports {
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { waiting: Mutex::default(), event })
    }

    /// Ends the machine. The event loop reports it and the process exits.
    pub(super) fn end(&self, reason: MachineEnd) {
        self.lock().end.get_or_insert(reason);
        self.wake();
    }

    /// A device process missed a deadline, died or sent nonsense.
    pub(super) fn device_failed(&self, id: &str, reason: String) {
        let mut waiting = self.lock();
        if waiting.reports.len() < MAX_WAITING {
            waiting.reports.push_back(FromCore::DeviceFailed { id: id.to_owned(), reason });
        }
        drop(waiting);
        self.wake();
    }

    /// The guest let go of something: what belongs to it can go.
    pub(super) fn ejected(&self, what: Ejected) {
        self.lock().ejected.push_back(what);
        self.wake();
    }

    /// The next thing that the guest let go of.
    pub(super) fn next_ejected(&self) -> Option<Ejected> {
        self.lock().ejected.pop_front()
    }

    /// Tells the supervisor something that it waits for.
    pub(super) fn tell(&self, report: FromCore) {
        self.lock().reports.push_back(report);
        self.wake();
    }

    /// Takes the wake-up back; to be called before the queues are looked at, so that what comes meanwhile wakes again.
    pub(super) fn acknowledge(&self) {
        let _ = self.event.read();
    }

    /// The next report, if any. The machine's end comes before all others: none of them could still matter.
    pub(super) fn next(&self) -> Option<FromCore> {
        let mut waiting = self.lock();
        if let Some(end) = &waiting.end {
            return Some(FromCore::Ended(end.clone()));
        }
        waiting.reports.pop_front()
    }

    fn wake(&self) {
        // It fails when the counter is full: then it is signalled already.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Reports {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Observer for Reports {
    fn backend_failed(&self, device: &str, error: &VirtioError) {
        self.device_failed(device, error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts_and_comes_first() {
        let reports = Reports::new().unwrap();
        reports.device_failed("disk0", "late".into());
        reports.end(MachineEnd::PowerOff);
        for _ in 0..100_000 {
            reports.end(MachineEnd::Reset);
        }
        assert_eq!(reports.next(), Some(FromCore::Ended(MachineEnd::PowerOff)));
        assert!(reports.lock().reports.len() == 1, "a guest that repeats itself fills no memory");
    }

    #[test]
    fn devices_that_fail_over_and_over_fill_no_memory() {
        let reports = Reports::new().unwrap();
        for _ in 0..1000 {
            reports.device_failed("disk0", "late".into());
        }
        let count = std::iter::from_fn(|| reports.next()).count();
        assert_eq!(count, MAX_WAITING);
    }
}
