//! What the core's event loop waits for: one epoll descriptor for each device, [`VirtioPci::as_fd`], which holds
//!
//! - the call eventfds of the queues, as long as MSI-X is off;
//! - the front end's socket, for its hang-up;
//! - the back-end channel;
//! - the eventfd by which a back end says that a ring is beyond repair.

use std::os::fd::{AsFd, BorrowedFd};

use bulkhead_ipc::vhost_user::connection::ConnectionError;
use bulkhead_ipc::vhost_user::frontend::BackendRequest;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

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

impl AsFd for VirtioPci {
    /// The descriptor to poll for input; when it is readable, call [`VirtioPci::on_event`]. The same for the device's whole life.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl VirtioPci {
    /// Handles what is there to handle, a bounded amount; does not wait for the guest, and for the back end only up to its deadlines.
    pub fn on_event(&self) {
        let mut state = self.state();
        // Under the lock: what is reported is still registered when it is handled.
        let mut events = [EpollEvent::empty(); 16];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in events.iter().take(count) {
            match Token::from_data(event.data()) {
                Some(Token::Queue(queue)) => state.interrupts.queue_polled(queue),
                Some(Token::Socket) => self.fail(&mut state, VirtioError::HungUp),
                Some(Token::Requests) => self.backend_request(&mut state),
                Some(Token::RingError) if self.ring_error.take() => self.fail(&mut state, VirtioError::Ring),
                Some(Token::RingError) | None => {}
            }
        }
    }

    fn backend_request(&self, state: &mut State) {
        let Some(requests) = state.link.as_mut().and_then(|link| link.requests.as_mut()) else { return };
        match requests.receive() {
            Ok(BackendRequest::ConfigChange) => {
                if let Err(error) = self.refresh_config(state, true) {
                    self.fail(state, error.into());
                }
            }
            Ok(BackendRequest::Refused { request }) => {
                self.complain(state, &format_args!("the device process sent unexpected request {request}"));
            }
            // It has nothing more to say; whether it is gone the other socket tells.
            Err(ConnectionError::Closed) => self.close_requests(state),
            Err(error) => self.fail(state, VirtioError::Requests(error)),
        }
    }
}
