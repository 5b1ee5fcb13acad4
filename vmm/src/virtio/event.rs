//! Eventfds: queue notifications, interrupts, ring errors.
//!
//! Contains unsafe code: the eventfd type that KVM's crates want cannot lend its descriptor safely.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// A new one that is not signalled.
    pub(super) fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// As KVM's crates take it.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }

    /// Signals it. It fails only when the counter is full: then it is signalled already.
    pub(super) fn signal(&self) {
        let _ = self.0.write(1);
    }

    /// Takes the signal back; says whether there was one.
    pub(super) fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// Whether it is signalled; leaves it so.
    pub(super) fn is_signalled(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd owns this descriptor and stays alive, and so open, as long as the borrow of self does.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
