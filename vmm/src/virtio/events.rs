//! What the core's event loop waits for: one epoll descriptor for each device, [`VirtioPci::as_fd`], which holds
//!
//! - the call eventfds of the queues, as long as MSI-X is off;
//! - the front end's socket, for its hang-up;
//! - the back-end channel;
//! - the eventfd by which a back end says that a ring is beyond repair.
//!
//! A vCPU may hold the device's lock while it waits for a back end that hangs. The event loop does not wait with it,
//! since other devices need it, nor does it spin: what it polls is an outer epoll descriptor in which the real one is
//! registered for one event at a time. While the lock is taken the outer one stays quiet, and whoever releases the lock arms it again.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use bulkhead_ipc::vhost_user::connection::ConnectionError;
use bulkhead_ipc::vhost_user::frontend::BackendRequest;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::device::{State, VirtioPci};
use super::failure::VirtioError;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A queue's call eventfd.
    Queue(u16),
    /// The front end's socket.
    Socket,
    /// The back-end channel.
    Requests,
    /// The error eventfd of all rings.
    RingError,
}

const SOCKET: u64 = 1 << 16;
const REQUESTS: u64 = 2 << 16;
const RING_ERROR: u64 = 3 << 16;

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        match token {
            Token::Queue(queue) => queue.into(),
            Token::Socket => SOCKET,
            Token::Requests => REQUESTS,
            Token::RingError => RING_ERROR,
        }
    }
}

impl Token {
    fn from_data(data: u64) -> Option<Self> {
        match data {
            SOCKET => Some(Self::Socket),
            REQUESTS => Some(Self::Requests),
            RING_ERROR => Some(Self::RingError),
            _ => u16::try_from(data).ok().map(Self::Queue),
        }
    }
}

/// How much a back end may say of its own accord, and how long it may be waited for because of that: whoever waits serves
/// other devices as well.
#[derive(Debug)]
pub(super) struct RequestBudget {
    /// When the current period began.
    since: Instant,
    spent: u32,
    waited: Duration,
}

/// How long a budget has to last.
const PERIOD: Duration = Duration::from_secs(10);
/// Requests in a period.
const MOST_REQUESTS: u32 = 2000;
/// Waiting in a period, all requests together.
const WAITING: Duration = Duration::from_secs(2);

impl Default for RequestBudget {
    fn default() -> Self {
        Self { since: Instant::now(), spent: 0, waited: Duration::ZERO }
    }
}

impl RequestBudget {
    /// Takes one request; says whether there was one left.
    fn spend(&mut self) -> bool {
        if self.since.elapsed() >= PERIOD {
            *self = Self::default();
        }
        self.spent = self.spent.saturating_add(1);
        self.spent <= MOST_REQUESTS && self.waited < WAITING
    }

    /// It was waited for that long.
    fn waited(&mut self, time: Duration) {
        self.waited = self.waited.saturating_add(time);
    }
}

/// The two epoll descriptors.
pub(super) struct Events {
    /// Polled by the core's event loop: readable when `inner` is and the event loop has not been told yet.
    outer: Epoll,
    /// Where everything is registered.
    inner: Arc<Epoll>,
    /// The event loop found the lock taken.
    missed: AtomicBool,
}

impl Events {
    pub fn new() -> nix::Result<Self> {
        let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let inner = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        outer.add(inner.0.as_fd(), Self::once())?;
        Ok(Self { outer, inner, missed: AtomicBool::new(false) })
    }

    fn once() -> EpollEvent {
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 0)
    }

    /// Where to register.
    pub fn inner(&self) -> &Arc<Epoll> {
        &self.inner
    }

    /// The numbers of the descriptors.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.outer.0.as_fd(), self.inner.0.as_fd()].map(|epoll| epoll.as_raw_fd())
    }

    fn arm(&self) {
        if let Err(error) = self.outer.modify(self.inner.0.as_fd(), &mut Self::once()) {
            tracing::error!(%error, "a device's events are lost");
        }
    }
}

/// The state, locked. The fields are dropped in this order: first the lock is released, then the event loop called if it
/// found it taken.
pub(super) struct Locked<'a> {
    guard: MutexGuard<'a, State>,
    _call: CallEventLoop<'a>,
}

struct CallEventLoop<'a>(&'a Events);

impl Drop for CallEventLoop<'_> {
    fn drop(&mut self) {
        // Pairs with the fence in `on_event`: either that sees the lock released or this sees the flag.
        fence(Ordering::SeqCst);
        if self.0.missed.load(Ordering::Relaxed) && self.0.missed.swap(false, Ordering::Relaxed) {
            self.0.arm();
        }
    }
}

impl<'a> Locked<'a> {
    pub fn new(guard: MutexGuard<'a, State>, events: &'a Events) -> Self {
        Self { guard, _call: CallEventLoop(events) }
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.guard
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.guard
    }
}

impl AsFd for VirtioPci {
    /// The descriptor to poll for input; when it is readable, call [`VirtioPci::on_event`]. The same for the device's whole life.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.outer.0.as_fd()
    }
}

impl VirtioPci {
    /// Handles what is there to handle, a bounded amount. Waits neither for a vCPU that uses the device nor for the back end.
    /// True: the back end has asked something; [`VirtioPci::serve_request`] is due, on a thread that may wait for it.
    pub fn on_event(&self) -> bool {
        // Takes the one shot: quiet from here to `arm`.
        let _ = self.events.outer.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO);
        let state = self.try_state().or_else(|| {
            self.events.missed.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.try_state()
        });
        let Some(mut state) = state else { return false };
        let asked = self.handle_events(&mut state);
        drop(state);
        self.events.arm();
        asked
    }

    fn handle_events(&self, state: &mut State) -> bool {
        // Under the lock: what is reported is still registered when it is handled.
        let mut events = [EpollEvent::empty(); 16];
        let count = self.epoll().wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let mut asked = false;
        for event in events.iter().take(count) {
            match Token::from_data(event.data()) {
                Some(Token::Queue(queue)) => state.interrupts.queue_polled(queue),
                Some(Token::Socket) => self.fail(state, VirtioError::HungUp),
                Some(Token::Requests) => asked = true,
                Some(Token::RingError) if self.ring_error.take() => self.fail(state, VirtioError::Ring),
                Some(Token::RingError) | None => {}
            }
        }
        asked
    }

    /// Serves one request of the back end; waits for it, up to the deadlines, and then hears of the next.
    pub fn serve_request(&self) {
        let mut state = self.state();
        self.backend_request(&mut state);
        if let Some(requests) = state.link.as_ref().and_then(|link| link.requests.as_ref()) {
            let _ = self.epoll().modify(requests.as_fd(), &mut Self::next_request());
        }
    }

    /// What to wait for on the back-end channel: one request, and no other until it is served.
    pub(super) fn next_request() -> EpollEvent {
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, Token::Requests.into())
    }

    fn backend_request(&self, state: &mut State) {
        let Some(link) = state.link.as_mut() else { return };
        let Some(requests) = link.requests.as_mut() else { return };
        if !link.budget.spend() {
            return self.fail(state, VirtioError::Flood);
        }
        match requests.receive() {
            Ok(BackendRequest::ConfigChange) => self.config_changed(state),
            Ok(BackendRequest::Refused { request }) => {
                self.complain(state, &format_args!("the device process sent unexpected request {request}"));
            }
            // It has nothing more to say; whether it is gone the other socket tells.
            Err(ConnectionError::Closed) => self.close_requests(state),
            Err(error) => self.fail(state, VirtioError::Requests(error)),
        }
    }

    /// Reads the changed configuration.
    fn config_changed(&self, state: &mut State) {
        let start = Instant::now();
        match self.bounded(state, |state| self.refresh_config(state, true)) {
            Ok(()) => {
                if let Some(link) = &mut state.link {
                    link.budget.waited(start.elapsed());
                }
            }
            Err(error) => self.fail(state, error.into()),
        }
    }
}
