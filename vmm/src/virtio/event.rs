//! Eventfds: queue notifications, interrupts, ring errors.
//!
//! A device process holds the same open file: it can make it blocking, empty it or fill it between any two of our calls.
//! Neither a vCPU nor the event loop may wait for it then, so the descriptor's own O_NONBLOCK is not relied upon.
//!
//! Contains unsafe code: the eventfd type that KVM's crates want cannot lend its descriptor safely, and `preadv2` has no
//! safe wrapper.

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

    /// Signals it. With a full counter it is signalled already; a write would wait if the device process has made the
    /// eventfd blocking. (One that fills it just between our two calls can still make us wait, until the next signal
    /// that pauses or ends the vCPU; our own device processes cannot, since their policies let no descriptor become blocking.)
    pub(super) fn signal(&self) {
        if self.polls(PollFlags::POLLOUT) {
            let _ = self.0.write(1);
        }
    }

    /// Takes the signal back; says whether there was one. Never waits.
    pub(super) fn take(&self) -> bool {
        let mut counter = [0_u8; 8];
        let buffer = libc::iovec { iov_base: counter.as_mut_ptr().cast(), iov_len: counter.len() };
        // SAFETY: one live buffer of eight bytes, its length beside it, into which the kernel writes no more than that.
        let read = unsafe { libc::preadv2(self.0.as_raw_fd(), &raw const buffer, 1, -1, libc::RWF_NOWAIT) };
        read == 8
    }

    /// Whether it is signalled; leaves it so.
    pub(super) fn is_signalled(&self) -> bool {
        self.polls(PollFlags::POLLIN)
    }

    fn polls(&self, events: PollFlags) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), events)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd owns this descriptor and stays alive, and so open, as long as the borrow of self does.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    #[test]
    fn a_device_that_makes_its_eventfd_blocking_makes_nobody_wait() {
        let (done, finished) = mpsc::channel();
        std::thread::spawn(move || {
            let event = Event::new().unwrap();
            event.signal();
            assert!(event.is_signalled() && event.take() && !event.is_signalled());
            fcntl(event.as_fd(), FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            assert!(!event.take(), "nothing to take");
            event.eventfd().write(u64::MAX - 1).unwrap();
            event.signal();
            assert!(event.take());
            done.send(()).unwrap();
        });
        finished.recv_timeout(Duration::from_secs(10)).expect("it waits, or an assertion failed");
    }
}
