//! The front end: what drives a device that lives in another process. It takes every reply as hostile input.
//!
//! One method for each request. A request either succeeds, or fails with an error that names device, request,
//! field and value. An error that leaves the connection's state unknown breaks the front end: later calls fail at
//! once instead of waiting for another deadline.
//!
//! Addresses sent are guest-physical, as "user addresses" too, so that no host virtual address leaves the process.
//!
//! - `error`: what can be wrong;
//! - `negotiation`: features, owner, queue and memory slot numbers;
//! - [`memory`]: the memory table; `log`: the dirty log;
//! - [`queue`] has the vrings;
//! - `config`: configuration space, status, reset;
//! - [`inflight`]: the memory in which a back end notes what it works on;
//! - [`backend_requests`]: what the back end sends of its own accord.

pub mod backend_requests;
mod config;
mod error;
pub mod inflight;
mod log;
pub mod memory;
mod negotiation;
pub mod queue;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::connection::{Connection, ConnectionError, Kind, Message};
use super::deadline::Deadline;
use super::message::{FrontendReq, VhostUserProtocolFeatures};

pub use backend_requests::{BackendRequest, BackendRequests};
pub use error::{FrontendError, Problem};
pub use inflight::InflightMemory;
pub use memory::MemoryRegion;
pub use negotiation::SUPPORTED_PROTOCOL_FEATURES;
pub use queue::RingAddresses;

/// How long the front end waits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For one exchange, from the request's first byte to the reply's last.
    pub exchange: Duration,
    /// For GET_VRING_BASE, during which the back end finishes the requests that it works on.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { exchange: Duration::from_secs(5), stop: Duration::from_secs(15) }
    }
}

/// The front end's end of a vhost-user connection.
#[derive(Debug)]
pub struct Frontend {
    device: Arc<str>,
    connection: Connection,
    limits: Limits,
    /// Deadline of the operation that the exchanges belong to, see [`Frontend::within`].
    operation: Option<Deadline>,
    broken: bool,
    /// Virtio features that the back end offers, all of them.
    offered: u64,
    /// Negotiated protocol features.
    protocol: VhostUserProtocolFeatures,
    queues: u16,
    memory_slots: u64,
    /// Virtio features set last.
    features: Option<u64>,
    /// What the back end has mapped.
    table: Vec<memory::Mapped>,
}

impl AsFd for Frontend {
    /// The socket. Between two exchanges a peer has nothing to say: end of file or hang-up is all to poll for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Frontend {
    /// Takes a connected socket; nothing is sent before [`Frontend::negotiate`].
    /// `device` is the device's id, for error messages.
    pub fn new(device: &str, stream: UnixStream, limits: Limits) -> Self {
        Self {
            device: device.into(),
            connection: stream.into(),
            limits,
            operation: None,
            broken: false,
            offered: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            queues: 1,
            memory_slots: 0,
            features: None,
            table: Vec::new(),
        }
    }

    /// Changes the limits of later exchanges: a process that is still starting may take longer than one that runs.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// The device's id.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Virtio features that the back end offers, vhost-user's own bits (26 and 30) included; 0 before the negotiation.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Negotiated protocol features.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// Whether a protocol feature is negotiated.
    pub fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// How many queues the back end has at most; 1 where it cannot tell.
    pub fn max_queues(&self) -> u16 {
        self.queues
    }

    /// Whether an earlier error has made the connection unusable.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Runs several exchanges under one deadline, `limit` from now, on top of the one that each has.
    /// So a peer that takes nearly the limit for each of fifty messages costs one limit and not fifty.
    pub fn within<R>(&mut self, limit: Duration, exchanges: impl FnOnce(&mut Self) -> R) -> R {
        let deadline = self.deadline(limit);
        let outer = self.operation.replace(deadline);
        let result = exchanges(self);
        self.operation = outer;
        result
    }

    /// Puts all exchanges up to the next call under one deadline, `limit` from now; `None`: none but each one's own.
    pub fn bound(&mut self, limit: Option<Duration>) {
        self.operation = limit.map(Deadline::after);
    }

    fn deadline(&self, limit: Duration) -> Deadline {
        let limit = match self.operation.and_then(|operation| operation.remaining()) {
            Some(left) => limit.min(left),
            None => limit,
        };
        Deadline::after(limit)
    }

    fn error(&self, request: FrontendReq, problem: Problem) -> FrontendError {
        FrontendError { device: Arc::clone(&self.device), request, problem }
    }

    /// An error after which the connection is not used any more.
    fn broken(&mut self, request: FrontendReq, problem: Problem) -> FrontendError {
        self.broken = true;
        self.error(request, problem)
    }

    /// An error about a field of a reply.
    fn bad_reply(
        &mut self,
        request: FrontendReq,
        field: &'static str,
        value: u64,
        expected: impl Into<String>,
    ) -> FrontendError {
        let expected = expected.into();
        self.broken(request, Problem::Reply { field, value, expected })
    }

    fn need(&self, request: FrontendReq, feature: VhostUserProtocolFeatures) -> Result<(), FrontendError> {
        if self.protocol.contains(feature) {
            Ok(())
        } else {
            Err(self.error(request, Problem::NotNegotiated(feature)))
        }
    }

    fn transmit(
        &mut self,
        request: FrontendReq,
        kind: Kind,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        if self.broken {
            return Err(self.error(request, Problem::Broken));
        }
        self.connection
            .send(request.into(), kind, payload, descriptors, deadline)
            .map_err(|error| self.broken(request, Problem::Connection(error)))
    }

    /// Receives the reply to `request`. `descriptors`: how many may come with it.
    fn reply(
        &mut self,
        request: FrontendReq,
        descriptors: usize,
        deadline: Deadline,
    ) -> Result<Message, FrontendError> {
        let message = self
            .connection
            .receive(deadline)
            .map_err(|error| self.broken(request, Problem::Connection(error)))?;
        let code = u32::from(request);
        if message.request != code {
            let expected = format!("{code} ({request:?})");
            return Err(self.bad_reply(request, "request code", message.request.into(), expected));
        }
        if message.kind != Kind::Reply {
            return Err(self.bad_reply(request, "REPLY flag", 0, "1"));
        }
        if message.descriptors.len() > descriptors {
            let count = message.descriptors.len() as u64;
            return Err(self.bad_reply(request, "number of descriptors", count, descriptors.to_string()));
        }
        Ok(message)
    }

    /// Sends a request that has no reply of its own, and waits for its acknowledgement where REPLY_ACK is negotiated.
    fn command(
        &mut self,
        request: FrontendReq,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        let deadline = self.deadline(self.limits.exchange);
        if !self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            return self.transmit(request, Kind::Request, payload, descriptors, deadline);
        }
        let kind = Kind::RequestNeedingReply;
        self.transmit(request, kind, payload, descriptors, deadline)?;
        let message = self.reply(request, 0, deadline)?;
        match self.u64_payload(request, &message)? {
            0 => Ok(()),
            code => Err(self.error(request, Problem::Refused(code))),
        }
    }

    /// Sends a request and receives the reply that it always has.
    fn query(
        &mut self,
        request: FrontendReq,
        payload: &[u8],
        descriptors: usize,
        limit: Duration,
    ) -> Result<Message, FrontendError> {
        let deadline = self.deadline(limit);
        self.transmit(request, Kind::Request, payload, &[], deadline)?;
        self.reply(request, descriptors, deadline)
    }

    fn query_u64(&mut self, request: FrontendReq) -> Result<u64, FrontendError> {
        let message = self.query(request, &[], 0, self.limits.exchange)?;
        self.u64_payload(request, &message)
    }

    fn u64_payload(&mut self, request: FrontendReq, message: &Message) -> Result<u64, FrontendError> {
        match <[u8; 8]>::try_from(message.payload.as_slice()) {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => {
                let size = message.payload.len() as u64;
                Err(self.bad_reply(request, "size", size, "8"))
            }
        }
    }

    /// Gives the socket back, for a hand-over to another front end.
    pub fn into_socket(self) -> OwnedFd {
        self.connection.into()
    }
}

impl From<ConnectionError> for Problem {
    fn from(error: ConnectionError) -> Self {
        Self::Connection(error)
    }
}

#[cfg(test)]
mod tests;
