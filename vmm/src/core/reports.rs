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
    waiting: Mutex<VecDeque<FromCore>>,
    event: EventFd,
}

impl Reports {
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { waiting: Mutex::default(), event })
    }

    /// Ends the machine. The event loop reports it and the process exits.
    pub(super) fn end(&self, reason: MachineEnd) {
        // The end goes first: nothing that comes before it could still matter.
        self.lock().push_front(FromCore::Ended(reason));
        self.wake();
    }

    /// A device process missed a deadline, died or sent nonsense.
    pub(super) fn device_failed(&self, id: &str, reason: String) {
        let mut waiting = self.lock();
        if waiting.len() < MAX_WAITING {
            waiting.push_back(FromCore::DeviceFailed { id: id.to_owned(), reason });
        }
        drop(waiting);
        self.wake();
    }

    /// The next report, if any.
    pub(super) fn next(&self) -> Option<FromCore> {
        // Taken back before the queue is looked at, so that a report that comes meanwhile wakes again.
        let _ = self.event.read();
        self.lock().pop_front()
    }

    fn wake(&self) {
        // It fails when the counter is full: then it is signalled already.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<FromCore>> {
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
