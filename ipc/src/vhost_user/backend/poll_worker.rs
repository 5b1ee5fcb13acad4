//! A worker for devices that move little data: one epoll for the kicks of its queues and for the device's own descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::device::QueueWorker;
use super::vring::Vring;
use super::worker::HostCall;

/// Tag of the wake-up; a ring's tag is its index.
const WAKE: u64 = u64::MAX;
/// Tag of the device's own descriptors.
const DEVICE: u64 = u64::MAX - 1;

/// When a simple device wants to be called again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// When something happens.
    Event,
    /// At once, after the control thread had its turn: there is more to do.
    Soon,
    /// When something happens, and at the latest after this many milliseconds.
    Within(u16),
}

/// What a simple device does when something happened.
pub trait QueueHandler: Send {
    /// Sets up what must exist before the thread's seccomp filter. `epoll` may be given the device's own descriptors with
    /// [`own_event`]; returns the descriptors that the handler keeps open.
    ///
    /// # Errors
    /// The worker cannot run.
    fn prepare(&mut self, epoll: &Epoll) -> io::Result<Vec<RawFd>> {
        let _ = epoll;
        Ok(Vec::new())
    }

    /// Serves what can be served, within bounds: rings were kicked or started, own descriptors are ready, the control
    /// thread called, or the time asked for is over. `rings` is indexed by queue; rings that do not run are `None`.
    ///
    /// # Errors
    /// The device cannot go on; the process ends.
    fn serve(&mut self, rings: &mut [Option<Vring>], epoll: &Epoll) -> io::Result<Next>;

    /// As [`QueueWorker::waits_for_host`].
    fn waits_for_host(&self) -> bool {
        false
    }

    /// As [`QueueWorker::set_host_call`].
    fn set_host_call(&mut self, _call: HostCall) {}

    /// A ring is about to be taken away: finish what was taken from it, or put it back.
    fn release(&mut self, ring: &mut Vring) {
        let _ = ring;
    }
}

/// An epoll event for a descriptor of the device itself.
pub fn own_event(flags: EpollFlags) -> EpollEvent {
    EpollEvent::new(flags, DEVICE)
}

/// Serves all queues of a simple device on one thread.
pub struct PollWorker<H> {
    handler: H,
    rings: Vec<Option<Vring>>,
    epoll: Option<Epoll>,
    next: Next,
}

impl<H: QueueHandler> PollWorker<H> {
    /// A worker for queues 0 to `queues` − 1.
    pub fn new(handler: H, queues: u16) -> Self {
        Self { handler, rings: (0..queues).map(|_| None).collect(), epoll: None, next: Next::Event }
    }

    fn epoll(&self) -> io::Result<&Epoll> {
        self.epoll.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn serve(&mut self) -> io::Result<()> {
        let epoll = self.epoll.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        self.next = self.handler.serve(&mut self.rings, epoll)?;
        Ok(())
    }
}

impl<H: QueueHandler> QueueWorker for PollWorker<H> {
    fn prepare(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(wake, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, WAKE))?;
        let mut descriptors = self.handler.prepare(&epoll)?;
        descriptors.push(epoll.0.as_fd().as_raw_fd());
        self.epoll = Some(epoll);
        Ok(descriptors)
    }

    fn start(&mut self, ring: Vring) -> io::Result<()> {
        let index = usize::from(ring.index());
        // Edge-triggered: the descriptor is never read, so that it does not matter whether reading it would block.
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, u64::from(ring.index()));
        self.epoll()?.add(ring.kick(), event)?;
        match self.rings.get_mut(index) {
            Some(slot) => *slot = Some(ring),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
        self.serve()
    }

    fn stop(&mut self, index: u16) -> Option<Vring> {
        let mut ring = self.rings.get_mut(usize::from(index))?.take()?;
        if let Some(epoll) = &self.epoll {
            let _ = epoll.delete(ring.kick());
        }
        self.handler.release(&mut ring);
        Some(ring)
    }

    fn set_host_call(&mut self, call: HostCall) {
        self.handler.set_host_call(call);
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 8];
        let timeout = match self.next {
            Next::Event => EpollTimeout::NONE,
            Next::Soon => EpollTimeout::ZERO,
            Next::Within(milliseconds) => milliseconds.into(),
        };
        match self.epoll()?.wait(&mut events, timeout) {
            Ok(_) => self.serve(),
            Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn waits_for_host(&self) -> bool {
        self.handler.waits_for_host()
    }
}
