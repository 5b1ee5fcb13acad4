//! The message loop: which message is for whom, and which answer is due.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use thiserror::Error;
use tracing::{debug, warn};

use super::device::VirtioDevice;
use super::inflight::{InflightArea, InflightError};
use super::memory_table::MemoryTable;
use super::rings::QueueState;
use super::session::LogSource;
use super::vring::VringError;
use super::worker::{EnterThread, WorkerError, WorkerHandle};
use crate::memory::MemoryError;
use crate::metrics::Metrics;
use crate::vhost_user::connection::{Connection, ConnectionError, Kind, Message};
use crate::vhost_user::deadline::Deadline;
use crate::vhost_user::message::{
    BackendReq, FrontendReq, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VhostUserProtocolFeatures,
};

/// VIRTIO_F_INDIRECT_DESC.
pub(super) const RING_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub(super) const RING_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

/// Protocol features served for every device; INFLIGHT_SHMFD comes to them for some.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// A message that has begun must be complete after this; so must one that we send.
const MESSAGE_LIMIT: Duration = Duration::from_secs(5);
/// How long a message to the front end's back-end channel may take.
const BACKEND_REQUEST_LIMIT: Duration = Duration::from_millis(500);

/// Why the daemon cannot serve this connection any longer.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The connection ended, or its framing is lost.
    #[error("front end: {0}")]
    Connection(#[from] ConnectionError),
    /// A worker ended.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// [`Daemon::serve_message`] without a connection.
    #[error("no front end is connected")]
    NotConnected,
}

/// Why a message is refused.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("request {0} is not served")]
    Unsupported(u32),
    #[error("the payload of {0} bytes does not fit the request")]
    Payload(usize),
    #[error("{0} descriptors do not fit the request")]
    Descriptors(usize),
    #[error("the device has no queue {0}")]
    NoQueue(u32),
    #[error("{what} {value:#x} is not acceptable")]
    Value { what: &'static str, value: u64 },
    #[error("{0}")]
    State(&'static str),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Vring(#[from] VringError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// What a handled message wants to be answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// Nothing of its own: an acknowledgement if asked for.
    Done,
    /// A reply with this payload.
    Reply(Vec<u8>),
    /// A reply with a descriptor.
    ReplyWith(Vec<u8>, OwnedFd),
}

impl Answer {
    pub(super) fn u64(value: u64) -> Self {
        Self::Reply(value.to_ne_bytes().to_vec())
    }
}

/// The daemon: a device, its workers, and what the front end has set up.
pub struct Daemon {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) workers: Vec<WorkerHandle>,
    connection: Option<Connection>,
    backend_channel: Option<Connection>,
    /// Virtio features that the front end set.
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) memory: MemoryTable,
    pub(super) log: Option<LogSource>,
    pub(super) inflight: Option<InflightArea>,
    pub(super) status: u8,
    pub(super) metrics: Metrics,
    pub(super) queues: Vec<QueueState>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("device", &self.device.name()).finish_non_exhaustive()
    }
}

impl Daemon {
    /// Starts the device's workers. On return each has run `enter` on its own thread.
    ///
    /// # Errors
    /// A worker could not be set up.
    pub fn new(mut device: Box<dyn VirtioDevice>, enter: &EnterThread) -> Result<Self, WorkerError> {
        let mut workers = Vec::new();
        for (index, worker) in device.workers().into_iter().enumerate() {
            let name = format!("{}-{index}", device.name());
            workers.push(WorkerHandle::spawn(&name, worker, enter.clone())?);
        }
        let queues = (0..device.queues()).map(|_| QueueState::default()).collect();
        Ok(Self {
            device,
            workers,
            connection: None,
            backend_channel: None,
            features: 0,
            protocol_features: 0,
            memory: MemoryTable::new(),
            log: None,
            inflight: None,
            status: 0,
            metrics: Metrics::none(),
            queues,
        })
    }

    /// Counts into this memory, from the next start of a ring on.
    pub fn set_metrics(&mut self, metrics: Metrics) {
        self.metrics = metrics;
    }

    /// Descriptors that the workers keep open for the life of the daemon, for the seal's check.
    pub fn worker_descriptors(&self) -> Vec<RawFd> {
        self.workers.iter().flat_map(|worker| worker.descriptors().iter().copied()).collect()
    }

    /// Makes every worker look at what its device has for it.
    pub fn wake_workers(&self) {
        self.workers.iter().for_each(WorkerHandle::wake);
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// Begins to serve a front end; an earlier one is let go.
    ///
    /// # Errors
    /// A worker has ended.
    pub fn connect(&mut self, connection: Connection) -> Result<(), DaemonError> {
        self.disconnect()?;
        self.connection = Some(connection);
        Ok(())
    }

    /// The socket: when it is readable, call [`Self::serve_message`].
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// Stops every ring and forgets all that the front end set up.
    ///
    /// # Errors
    /// A worker has ended.
    pub fn disconnect(&mut self) -> Result<(), DaemonError> {
        self.connection = None;
        self.backend_channel = None;
        self.stop_all()?;
        self.queues.iter_mut().for_each(|queue| *queue = QueueState::default());
        self.features = 0;
        self.protocol_features = 0;
        self.memory = MemoryTable::new();
        self.log = None;
        self.inflight = None;
        self.status = 0;
        self.device.reset();
        Ok(())
    }

    /// Serves the connection until it ends.
    ///
    /// # Errors
    /// Why it ended: [`ConnectionError::Closed`] is the ordinary end.
    pub fn run(&mut self, connection: Connection) -> Result<(), DaemonError> {
        self.connect(connection)?;
        loop {
            if let Err(error) = self.serve_message() {
                self.disconnect()?;
                return Err(error);
            }
        }
    }

    /// Receives one message, acts on it and answers.
    ///
    /// # Errors
    /// The connection ended or cannot be used further, or a worker has ended. A message that is merely bad is no error.
    pub fn serve_message(&mut self) -> Result<(), DaemonError> {
        let connection = self.connection.as_ref().ok_or(DaemonError::NotConnected)?;
        let Message { request, kind, payload, descriptors } = connection.receive_next(MESSAGE_LIMIT)?;
        if kind == Kind::Reply {
            warn!(request, "the front end sent a reply to nothing");
            return Ok(());
        }
        // The mode of acknowledgement is that of before the message: SET_PROTOCOL_FEATURES itself may change it.
        let acknowledge = kind == Kind::RequestNeedingReply && self.has(VhostUserProtocolFeatures::REPLY_ACK);
        let code = FrontendReq::try_from(request);
        debug!(?code, request, bytes = payload.len(), descriptors = descriptors.len(), "message");
        let answer = match code {
            Ok(code) => self.handle(code, &payload, descriptors),
            Err(_) => Err(Refusal::Unsupported(request)),
        };
        let answer = match answer {
            Ok(Answer::Done) if acknowledge => Some(Answer::u64(0)),
            Ok(Answer::Done) => None,
            Ok(answer) => Some(answer),
            Err(Refusal::Worker(WorkerError::Gone)) => return Err(WorkerError::Gone.into()),
            Err(refusal) => {
                warn!(request, ?code, %refusal, "a message of the front end was refused");
                let due = acknowledge || code.is_ok_and(is_answered);
                due.then(|| refused(code.ok()))
            }
        };
        self.answer(request, answer)
    }

    fn answer(&self, request: u32, answer: Option<Answer>) -> Result<(), DaemonError> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let deadline = Deadline::after(MESSAGE_LIMIT);
        match answer {
            None | Some(Answer::Done) => {}
            Some(Answer::Reply(payload)) => {
                connection.send(request, Kind::Reply, &payload, &[], deadline)?;
            }
            Some(Answer::ReplyWith(payload, fd)) => {
                connection.send(request, Kind::Reply, &payload, &[fd.as_fd()], deadline)?;
            }
        }
        Ok(())
    }

    fn handle(
        &mut self,
        request: FrontendReq,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        match request {
            FrontendReq::GET_FEATURES => Ok(Answer::u64(self.offered())),
            FrontendReq::SET_FEATURES => self.set_features(number(payload)?),
            FrontendReq::GET_PROTOCOL_FEATURES => Ok(Answer::u64(self.protocol_offered())),
            FrontendReq::SET_PROTOCOL_FEATURES => self.set_protocol_features(number(payload)?),
            FrontendReq::SET_OWNER | FrontendReq::RESET_OWNER => Ok(Answer::Done),
            FrontendReq::GET_QUEUE_NUM => Ok(Answer::u64(u64::from(self.device.queues()))),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Answer::u64(crate::memory::MAX_REGIONS as u64)),
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(payload, descriptors),
            FrontendReq::ADD_MEM_REG => self.add_mem_reg(payload, descriptors),
            FrontendReq::REM_MEM_REG => self.rem_mem_reg(payload),
            FrontendReq::SET_LOG_BASE => self.set_log_base(payload, descriptors),
            // An eventfd that tells when the log changes: our log is shared memory that the front end looks at itself.
            FrontendReq::SET_LOG_FD => Ok(Answer::Done),
            FrontendReq::SET_VRING_NUM => self.set_vring_num(payload),
            FrontendReq::SET_VRING_ADDR => self.set_vring_addr(payload),
            FrontendReq::SET_VRING_BASE => self.set_vring_base(payload),
            FrontendReq::GET_VRING_BASE => self.get_vring_base(payload),
            FrontendReq::SET_VRING_KICK => self.set_vring_kick(payload, descriptors),
            FrontendReq::SET_VRING_CALL => self.set_vring_call(payload, descriptors),
            FrontendReq::SET_VRING_ERR => self.set_vring_err(payload, descriptors),
            FrontendReq::SET_VRING_ENABLE => self.set_vring_enable(payload),
            FrontendReq::SET_BACKEND_REQ_FD => {
                self.backend_channel = Some(Connection::from(only(descriptors)?));
                Ok(Answer::Done)
            }
            FrontendReq::GET_CONFIG => self.get_config(payload),
            FrontendReq::SET_CONFIG => self.set_config(payload),
            FrontendReq::GET_INFLIGHT_FD => self.get_inflight(payload),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight(payload, descriptors),
            FrontendReq::RESET_DEVICE => self.reset_device(),
            FrontendReq::SET_STATUS => self.set_status(number(payload)?),
            FrontendReq::GET_STATUS => Ok(Answer::u64(u64::from(self.status))),
            other => Err(Refusal::Unsupported(other as u32)),
        }
    }

    /// Whether a protocol feature was negotiated.
    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() == feature.bits()
    }

    /// Virtio feature bits offered.
    pub(super) fn offered(&self) -> u64 {
        self.device.features()
            | VERSION_1
            | RING_EVENT_IDX
            | RING_INDIRECT_DESC
            | VHOST_USER_F_PROTOCOL_FEATURES
            | VHOST_F_LOG_ALL
    }

    fn protocol_offered(&self) -> u64 {
        let mut offered = PROTOCOL_FEATURES;
        offered.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, self.device.tracks_inflight());
        offered.bits()
    }

    fn set_protocol_features(&mut self, wanted: u64) -> Result<Answer, Refusal> {
        if wanted & !self.protocol_offered() != 0 {
            return Err(Refusal::Value { what: "protocol features", value: wanted });
        }
        self.protocol_features = wanted;
        Ok(Answer::Done)
    }

    fn set_features(&mut self, wanted: u64) -> Result<Answer, Refusal> {
        if wanted & !self.offered() != 0 {
            return Err(Refusal::Value { what: "features", value: wanted });
        }
        let changed = self.features ^ wanted;
        if changed & !VHOST_F_LOG_ALL == 0 {
            self.features = wanted;
            self.apply_log()?;
            return Ok(Answer::Done);
        }
        self.with_rings_stopped(|daemon| {
            daemon.features = wanted;
            let own = RING_EVENT_IDX
                | RING_INDIRECT_DESC
                | VERSION_1
                | VHOST_USER_F_PROTOCOL_FEATURES
                | VHOST_F_LOG_ALL;
            daemon.device.accept_features(wanted & !own);
            daemon.apply_log()
        })?;
        if wanted & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            // Without the feature there is no SET_VRING_ENABLE: rings are enabled from the start.
            for index in 0..self.queues.len() {
                self.enable(index)?;
            }
        }
        Ok(Answer::Done)
    }

    /// Tells the front end that the configuration space has changed, if it can be told.
    pub fn config_changed(&mut self) {
        if !self.has(VhostUserProtocolFeatures::BACKEND_REQ) || !self.has(VhostUserProtocolFeatures::CONFIG) {
            return;
        }
        let Some(channel) = &self.backend_channel else { return };
        let deadline = Deadline::after(BACKEND_REQUEST_LIMIT);
        let request = u32::from(BackendReq::CONFIG_CHANGE_MSG);
        if let Err(error) = channel.send(request, Kind::Request, &[], &[], deadline) {
            warn!(%error, "the front end cannot be told that the configuration changed");
            self.backend_channel = None;
        }
    }
}

/// Requests that are answered whether or not an acknowledgement is asked for.
fn is_answered(request: FrontendReq) -> bool {
    matches!(
        request,
        FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::GET_STATUS
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::GET_SHARED_OBJECT
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::CHECK_DEVICE_STATE
    )
}

/// The answer to a refused message: for GET_CONFIG an empty payload, as specified; else a u64 that is not zero.
fn refused(request: Option<FrontendReq>) -> Answer {
    match request {
        Some(FrontendReq::GET_CONFIG) => Answer::Reply(Vec::new()),
        _ => Answer::u64(1),
    }
}

/// A payload that is one u64.
pub(super) fn number(payload: &[u8]) -> Result<u64, Refusal> {
    payload.try_into().map(u64::from_ne_bytes).map_err(|_| Refusal::Payload(payload.len()))
}

/// The one descriptor of a message.
pub(super) fn only(descriptors: Vec<OwnedFd>) -> Result<OwnedFd, Refusal> {
    let count = descriptors.len();
    match <[OwnedFd; 1]>::try_from(descriptors) {
        Ok([fd]) => Ok(fd),
        Err(_) => Err(Refusal::Descriptors(count)),
    }
}

/// [`EnterThread`] for tests and for a daemon that runs without a jail.
pub fn no_jail() -> EnterThread {
    std::sync::Arc::new(|| -> io::Result<()> { Ok(()) })
}
