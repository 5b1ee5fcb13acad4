//! What stands between the core and a vhost-user back end that is not ours: a process that passes messages on.
//!
//! Only messages pass through it, with their descriptors; queues, notifications and interrupts go directly. It has no memory of the
//! guest, and its policy no call to map any. It is there
//! - to judge what the back end says of itself before the core hears it ([`handshake`]), with a sentence for a person;
//! - to add what some back ends leave to the front end: the configuration space of fs and net, acknowledgements;
//! - so that the supervisor has a process to watch and to replace: when the back end closes its connection this process ends,
//!   and its successor begins with a new connection.

pub mod handshake;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{FromDevice, Progress, RelayConfig, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vhost_user::connection::{Connection, ConnectionError, Kind, Message};
use bulkhead_ipc::vhost_user::deadline::Deadline;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;

use handshake::{Handshake, Next, Unfit};

/// How long a message may take to arrive once it has begun, and to be taken.
const MESSAGE_LIMIT: Duration = Duration::from_secs(2);
/// How long the back end may take to say what it is. Less than the core waits, so that this process says what was missing.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);

/// Why the relay ends.
#[derive(Debug, Error)]
pub enum RelayError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The core's connection cannot be used.
    #[error("the core: {0}")]
    Core(ConnectionError),
    /// The back end's connection cannot be used.
    #[error("the back end at '{path}': {error}{after}")]
    BackEnd {
        /// Where it listens.
        path: String,
        /// What is wrong.
        error: ConnectionError,
        /// What it was asked last.
        after: String,
    },
    /// The back end takes too long.
    #[error("the back end at '{path}' does not answer {request} within {} s", ANSWER_LIMIT.as_secs())]
    Slow {
        /// Where it listens.
        path: String,
        /// What it was asked.
        request: String,
    },
    /// The back end is not what it should be.
    #[error("the back end at '{path}' {unfit}")]
    Unfit {
        /// Where it listens.
        path: String,
        /// In what way.
        unfit: Unfit,
    },
    /// A system call failed.
    #[error("poll: {0}")]
    Poll(Errno),
}

/// A relay that is set up.
pub struct Relay<'a> {
    core: Connection,
    back_end: Connection,
    path: String,
    handshake: Handshake,
    /// Until when the back end is to answer a question about itself.
    deadline: Option<Instant>,
    channel: &'a Channel,
}

/// Takes both connections. To be called before the process is sealed.
#[must_use]
pub fn open<'a>(core: OwnedFd, back_end: OwnedFd, config: &RelayConfig, channel: &'a Channel) -> Relay<'a> {
    Relay {
        core: core.into(),
        back_end: back_end.into(),
        path: config.path.clone(),
        handshake: Handshake::new(config.clone()),
        deadline: None,
        channel,
    }
}

impl Relay<'_> {
    /// Every descriptor that the process holds beyond standard input, output and error.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.core.as_fd(), self.back_end.as_fd(), self.channel.as_fd()]
    }

    /// Passes messages on until the core or the supervisor ends it. What the back end does wrong is told to the supervisor.
    ///
    /// # Errors
    /// Either connection fails, or the back end is not what it should be.
    pub fn run(mut self) -> Result<(), RelayError> {
        match self.serve() {
            Err(
                error @ (RelayError::BackEnd { .. } | RelayError::Unfit { .. } | RelayError::Slow { .. }),
            ) => {
                crate::serve::refuse(self.channel, error.to_string())?;
                Err(error)
            }
            other => other,
        }
    }

    fn serve(&mut self) -> Result<(), RelayError> {
        loop {
            let timeout = self.deadline.map_or(PollTimeout::NONE, |deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left.saturating_add(Duration::from_millis(1)))
                    .unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [self.channel.as_fd(), self.back_end.as_fd(), self.core.as_fd()]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(RelayError::Poll(errno)),
            }
            let [control, back_end, core] = fds.map(|fd| fd.any().unwrap_or(true));
            if control && !self.control()? {
                return Ok(());
            }
            if back_end {
                self.hear_back_end()?;
            }
            if core && !self.hear_core()? {
                return Ok(());
            }
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let request = self.handshake.asked().unwrap_or_default();
                return Err(RelayError::Slow { path: self.path.clone(), request });
            }
        }
    }

    /// Acts on one message of the supervisor. False: stop.
    fn control(&self) -> Result<bool, RelayError> {
        match self.channel.recv::<ToDevice>(Some(Duration::ZERO)) {
            Ok((ToDevice::Stop, _)) | Err(ChannelError::PeerClosed) => return Ok(false),
            Ok((ToDevice::Ping, _)) => self.channel.send(&FromDevice::Alive(Progress::Fine), &[])?,
            Ok((message, _)) => tracing::warn!(?message, "a control message that this device does not know"),
            Err(ChannelError::Deadline) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Takes one message of the core. False: it has gone.
    fn hear_core(&mut self) -> Result<bool, RelayError> {
        let message = match self.core.receive(Deadline::after(MESSAGE_LIMIT)) {
            Ok(message) => message,
            Err(ConnectionError::Closed) => return Ok(false),
            Err(error) => return Err(RelayError::Core(error)),
        };
        match self.handshake.request(message) {
            Next::PassOn(message) => {
                self.expect_answer();
                send(&self.back_end, &message).map_err(|error| self.failed(error))?;
            }
            Next::PassOnBoth(message, question) => {
                self.expect_answer();
                send(&self.back_end, &message).map_err(|error| self.failed(error))?;
                send(&self.back_end, &question).map_err(|error| self.failed(error))?;
            }
            Next::Answer(message) => send(&self.core, &message).map_err(RelayError::Core)?,
            Next::Nothing => {}
        }
        Ok(true)
    }

    /// The back end is to answer within the limit, if it was asked something.
    fn expect_answer(&mut self) {
        self.deadline = self.handshake.asked().and_then(|_| Instant::now().checked_add(ANSWER_LIMIT));
    }

    /// Takes one message of the back end.
    fn hear_back_end(&mut self) -> Result<(), RelayError> {
        let message =
            self.back_end.receive(Deadline::after(MESSAGE_LIMIT)).map_err(|error| self.failed(error))?;
        let unfit = |unfit| RelayError::Unfit { path: self.path.clone(), unfit };
        let message = self.handshake.reply(message).map_err(unfit)?;
        self.deadline = None;
        send(&self.core, &message).map_err(RelayError::Core)
    }

    fn failed(&self, error: ConnectionError) -> RelayError {
        let after = self
            .handshake
            .asked()
            .map_or_else(String::new, |request| format!(" instead of answering {request}"));
        RelayError::BackEnd { path: self.path.clone(), error, after }
    }
}

fn send(to: &Connection, message: &Message) -> Result<(), ConnectionError> {
    let descriptors: Vec<_> = message.descriptors.iter().map(AsFd::as_fd).collect();
    to.send(message.request, message.kind, &message.payload, &descriptors, Deadline::after(MESSAGE_LIMIT))
}

/// A reply to `request`.
fn reply(request: u32, payload: Vec<u8>) -> Message {
    Message { request, kind: Kind::Reply, payload, descriptors: Vec::new() }
}
