//! The back end of a device: connecting to it, starting and stopping queues, putting another in its place.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use bulkhead_ipc::memory::{Direction, GuestRam};
use bulkhead_ipc::vhost_user::frontend::{
    BackendRequests, Frontend, FrontendError, InflightMemory, Limits, MemoryRegion, Problem,
    SUPPORTED_PROTOCOL_FEATURES,
};
use bulkhead_ipc::vhost_user::message::{
    FrontendReq, VHOST_USER_F_PROTOCOL_FEATURES, VhostUserProtocolFeatures,
};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::device::{Settings, State, VirtioPci};
use super::events::{RequestBudget, Token};
use super::failure::VirtioError;
use super::features::{VERSION_1, visible};
use super::queues::Queue;
use super::status;

/// The connection to a back end.
#[derive(Debug)]
pub(super) struct Link {
    pub frontend: Frontend,
    pub requests: Option<BackendRequests>,
    pub budget: RequestBudget,
}

/// A back end with which the session is open: the first part of connecting a device, which needs nothing of the machine yet.
#[derive(Debug)]
pub struct Backend {
    pub(super) link: Link,
}

impl Backend {
    /// Opens the session with the back end behind `stream`, within the limit that `settings` gives to the start.
    ///
    /// # Errors
    /// The back end does not answer as it should, or no modern driver can use it.
    pub fn open(settings: &Settings, stream: UnixStream) -> Result<Self, VirtioError> {
        let starting = Limits { exchange: settings.start_limit, ..settings.limits };
        let mut link = Link::open(Frontend::new(&settings.id, stream, starting), starting.exchange)?;
        link.frontend.set_limits(settings.limits);
        Ok(Self { link })
    }
}

/// Who owns the memory in which requests in flight are noted.
pub trait InflightSource: Send + Sync {
    /// Memory for `queues` queues of `queue_size` entries, for a back end that has INFLIGHT_SHMFD; `None`: do without.
    ///
    /// # Errors
    /// The back end's, where it is asked.
    fn allocate(
        &self,
        frontend: &mut Frontend,
        queues: u16,
        queue_size: u16,
    ) -> Result<Option<InflightMemory>, FrontendError>;
}

/// The back end allocates the memory, as vhost-user has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct FromBackend;

impl InflightSource for FromBackend {
    fn allocate(
        &self,
        frontend: &mut Frontend,
        queues: u16,
        queue_size: u16,
    ) -> Result<Option<InflightMemory>, FrontendError> {
        frontend.get_inflight(queues, queue_size)
    }
}

impl Link {
    /// Negotiates with a back end, all within `limit`, and checks that a modern driver can use it.
    pub fn open(mut frontend: Frontend, limit: Duration) -> Result<Self, VirtioError> {
        let requests = frontend.within(limit, |frontend| {
            frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES)?;
            if frontend.offered_features() & VERSION_1 == 0 {
                return Err(VirtioError::Legacy);
            }
            let channel = frontend.has(VhostUserProtocolFeatures::BACKEND_REQ);
            Ok(if channel { Some(frontend.open_backend_requests()?) } else { None })
        })?;
        Ok(Self { frontend, requests, budget: RequestBudget::default() })
    }
}

/// Where a back end that died had arrived at least: what it did not return, its successor starts again.
fn used_index(ram: &GuestRam, queue: &Queue) -> u16 {
    fence(Ordering::SeqCst);
    queue
        .ring
        .used
        .checked_add(2)
        .and_then(|address| ram.view(address, 2, Direction::Read).ok())
        .and_then(|view| view.load::<u16>(0, Ordering::Acquire).ok())
        .map_or(queue.base, u16::from_le)
}

impl VirtioPci {
    /// Waits for the events of the link, too, and takes it.
    pub(super) fn adopt(&self, state: &mut State, link: Link) -> Result<(), VirtioError> {
        let hang_up = EpollEvent::new(EpollFlags::EPOLLRDHUP, Token::Socket.into());
        self.epoll().add(link.frontend.as_fd(), hang_up).map_err(std::io::Error::from)?;
        if let Some(requests) = &link.requests {
            self.epoll().add(requests.as_fd(), Self::next_request()).map_err(std::io::Error::from)?;
        }
        state.link = Some(link);
        Ok(())
    }

    /// Closes the connection to the back end. Says whether there was one.
    pub(super) fn disconnect(&self, state: &mut State) -> bool {
        self.close_requests(state);
        let Some(link) = state.link.take() else { return false };
        let _ = self.epoll().delete(link.frontend.as_fd());
        for queue in &mut state.queues {
            queue.running = false;
        }
        true
    }

    /// Closes the back-end channel.
    pub(super) fn close_requests(&self, state: &mut State) {
        if let Some(requests) = state.link.as_mut().and_then(|link| link.requests.take()) {
            let _ = self.epoll().delete(requests.as_fd());
        }
    }

    /// Starts or stops queues as the registers say: they run between DRIVER_OK and reset, while the function is bus
    /// master and the machine is not paused.
    pub(super) fn reconcile(&self, state: &mut State) {
        let run = state.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
            && state.bus_master
            && !state.paused;
        let result = if run { self.start(state) } else { self.stop(state) };
        if let Err(error) = result {
            self.fail(state, error.into());
        }
    }

    /// Starts the enabled queues that do not run yet.
    fn start(&self, state: &mut State) -> Result<(), FrontendError> {
        if !state.queues.iter().any(|queue| queue.enabled && !queue.running) {
            return Ok(());
        }
        let first = !state.queues.iter().any(|queue| queue.running);
        let Some(mut link) = state.link.take() else { return Ok(()) };
        let limit = self.settings.limits.exchange;
        let result = link.frontend.within(limit, |frontend| {
            if first {
                self.prepare(state, frontend)?;
            }
            for index in 0..state.queues.len() {
                self.start_queue(state, index, frontend)?;
            }
            if frontend.has(VhostUserProtocolFeatures::STATUS) {
                frontend.set_status(state.status)?;
            }
            Ok(())
        });
        state.link = Some(link);
        result
    }

    /// What a back end must know before its first queue: features, memory, requests in flight.
    fn prepare(&self, state: &mut State, frontend: &mut Frontend) -> Result<(), FrontendError> {
        // With bit 30, rings start disabled.
        frontend.set_features(state.features.accepted() | VHOST_USER_F_PROTOCOL_FEATURES)?;
        if frontend.has(VhostUserProtocolFeatures::STATUS) {
            frontend.set_status(state.status & !status::DRIVER_OK)?;
            let answer = frontend.get_status()?;
            if answer & status::FEATURES_OK == 0 {
                return Err(FrontendError {
                    device: self.device.clone(),
                    request: FrontendReq::GET_STATUS,
                    problem: Problem::Refused(answer.into()),
                });
            }
        }
        let regions: Vec<_> = self.ram.regions().map(MemoryRegion::from).collect();
        frontend.set_memory(&regions)?;
        if frontend.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            self.prepare_inflight(state, frontend)?;
        }
        Ok(())
    }

    /// Gives the back end the memory for requests in flight. One that cannot set up fresh memory is served without; one that
    /// refuses the memory of its predecessor would lose what is in flight, and is not.
    fn prepare_inflight(&self, state: &mut State, frontend: &mut Frontend) -> Result<(), FrontendError> {
        let fresh = state.inflight.is_none();
        if fresh {
            let queues = u16::try_from(state.queues.len()).unwrap_or(u16::MAX);
            let size = self.settings.queue_size;
            state.inflight = self.settings.inflight.allocate(frontend, queues, size)?;
        }
        let Some(memory) = &state.inflight else { return Ok(()) };
        match frontend.set_inflight(memory) {
            Err(error) if fresh && matches!(error.problem, Problem::Refused(_)) => {
                state.inflight = None;
                self.complain(state, &error);
                Ok(())
            }
            result => result,
        }
    }

    fn start_queue(
        &self,
        state: &mut State,
        index: usize,
        frontend: &mut Frontend,
    ) -> Result<(), FrontendError> {
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        let (Some(queue), Some(kick)) = (state.queues.get_mut(index), self.kicks.get(index)) else {
            return Ok(());
        };
        if !queue.enabled || queue.running {
            return Ok(());
        }
        frontend.set_vring_num(number, queue.size)?;
        frontend.set_vring_base(number, queue.base)?;
        frontend.set_vring_addr(number, &queue.ring, None)?;
        frontend.set_vring_err(number, self.ring_error.as_fd())?;
        frontend.set_vring_call(number, state.interrupts.queue_event(number).map(AsFd::as_fd))?;
        frontend.set_vring_kick(number, kick.as_fd())?;
        queue.running = true;
        frontend.set_vring_enable(number, true)?;
        // A notification from before the start may have been taken by nobody or by a predecessor.
        kick.signal();
        Ok(())
    }

    /// Stops the queues that run and waits until the back end is done with what it works on.
    pub(super) fn stop(&self, state: &mut State) -> Result<(), FrontendError> {
        let Some(link) = state.link.as_mut() else { return Ok(()) };
        let queues = &mut state.queues;
        link.frontend.within(self.settings.limits.stop, |frontend| {
            for (number, queue) in (0u16..).zip(queues.iter_mut()) {
                if queue.running {
                    queue.base = frontend.get_vring_base(number)?;
                    queue.running = false;
                }
            }
            Ok(())
        })
    }

    /// Device reset (section 2.4): stops the queues, and everything is as at the start.
    pub(super) fn reset_device(&self, state: &mut State) {
        let touched = state.status & status::DRIVER_OK != 0;
        if let Err(error) = self.stop(state) {
            self.fail(state, error.into());
        }
        if touched && let Err(error) = Self::reset_backend(state) {
            self.fail(state, error.into());
        }
        state.status = 0;
        state.queue_select = 0;
        state.features.reset();
        state.inflight = None;
        state.interrupts.reset();
        for queue in &mut state.queues {
            queue.reset();
        }
        for kick in &self.kicks {
            kick.take();
        }
    }

    fn reset_backend(state: &mut State) -> Result<(), FrontendError> {
        let Some(link) = state.link.as_mut() else { return Ok(()) };
        if link.frontend.has(VhostUserProtocolFeatures::STATUS) {
            link.frontend.set_status(0)
        } else if link.frontend.has(VhostUserProtocolFeatures::RESET_DEVICE) {
            link.frontend.reset_device()
        } else {
            Ok(())
        }
    }

    /// Lets the back end go, as after a failure but without a word about it. If it still works, it finishes first.
    pub fn disconnect_backend(&self) {
        let mut state = self.state();
        let _ = self.bounded(&mut state, |state| self.stop(state));
        self.disconnect(&mut state);
    }

    /// Puts another back end in the place of one that failed, or that still works: the driver's features, memory,
    /// rings and the requests in flight are replayed to it, and the guest notices nothing but a pause. A predecessor that
    /// failed must be dead by now: the core cannot keep it from serving rings that it has mapped.
    ///
    /// # Errors
    /// The new back end does not answer as it should or lacks something that the driver uses; then the device is
    /// without a back end, as after a failure.
    pub fn replace_backend(&self, stream: UnixStream) -> Result<(), VirtioError> {
        self.disconnect_backend();
        // Without the lock: a vCPU that uses the device meanwhile does not wait.
        let frontend = Frontend::new(&self.device, stream, self.settings.limits);
        let link = Link::open(frontend, self.settings.patience)?;
        let mut state = self.state();
        let offered = link.frontend.offered_features();
        if state.status & status::FEATURES_OK != 0 {
            let lost = state.features.accepted() & !visible(offered);
            if lost != 0 {
                return Err(VirtioError::FeaturesLost(lost));
            }
        }
        let queues = u16::try_from(state.queues.len()).unwrap_or(u16::MAX);
        if link.frontend.has(VhostUserProtocolFeatures::MQ) && link.frontend.max_queues() < queues {
            return Err(VirtioError::Queues { got: link.frontend.max_queues(), needed: queues });
        }
        state.features.set_offered(offered);
        // What the predecessor said last is not about this one.
        self.ring_error.take();
        self.adopt(&mut state, link)?;
        self.bounded(&mut state, |state| self.replay(state))?;
        match state.link {
            Some(_) => Ok(()),
            None => Err(VirtioError::HungUp),
        }
    }

    /// Brings a successor to where its predecessor was.
    fn replay(&self, state: &mut State) -> Result<(), FrontendError> {
        self.refresh_config(state, state.status & status::DRIVER_OK != 0)?;
        for queue in state.queues.iter_mut().filter(|queue| queue.enabled) {
            queue.base = used_index(&self.ram, queue);
        }
        // One that was given up is brought back: a driver that has not reset it goes on where it was.
        state.status &= !status::NEEDS_RESET;
        self.reconcile(state);
        for (number, _) in (0u16..).zip(&state.queues).filter(|(_, queue)| queue.running) {
            // The predecessor may have used buffers and died before it interrupted.
            state.interrupts.queue_used(number);
        }
        Ok(())
    }

    /// Stops the queues until [`VirtioPci::resume`]; when it returns, the back end touches guest memory no more.
    ///
    /// # Errors
    /// The back end did not stop in time; it is given up, and may still write.
    pub fn pause(&self) -> Result<(), VirtioError> {
        let mut state = self.state();
        state.paused = true;
        let state = &mut *state;
        self.stop(state).map_err(|error| {
            let error = VirtioError::from(error);
            self.fail_with(state, &error);
            error
        })
    }

    /// Lets the queues run again.
    pub fn resume(&self) {
        let mut state = self.state();
        state.paused = false;
        self.reconcile(&mut state);
    }
}
