//! The back-end channel: what a back end sends of its own accord, of which a change of the configuration space is all that we negotiate.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{Frontend, FrontendError, Problem};
use crate::vhost_user::connection::{Connection, ConnectionError, Kind};
use crate::vhost_user::deadline::Deadline;
use crate::vhost_user::message::{BackendReq, FrontendReq, VhostUserProtocolFeatures};

/// A message is read when its first byte is there; the rest has to be there too, save for scheduling.
const MESSAGE_LIMIT: Duration = Duration::from_millis(100);

/// A request of the back end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendRequest {
    /// CONFIG_CHANGE_MSG: the configuration space differs from what GET_CONFIG returned before.
    ConfigChange,
    /// Something that is not negotiated; it was refused.
    Refused {
        /// Request code.
        request: u32,
    },
}

/// The front end's end of the back-end channel.
#[derive(Debug)]
pub struct BackendRequests {
    pub(super) device: Arc<str>,
    pub(super) connection: Connection,
}

impl AsFd for BackendRequests {
    /// The socket, readable when there is a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Frontend {
    /// SET_BACKEND_REQ_FD: opens the back-end channel.
    ///
    /// # Errors
    /// [`Problem::NotNegotiated`] without BACKEND_REQ, [`Problem::Local`] without descriptors for a socket pair.
    pub fn open_backend_requests(&mut self) -> Result<BackendRequests, FrontendError> {
        let request = FrontendReq::SET_BACKEND_REQ_FD;
        self.need(request, VhostUserProtocolFeatures::BACKEND_REQ)?;
        let (ours, theirs) = Connection::pair().map_err(|error| {
            let what = "creating the back-end channel";
            self.error(request, Problem::Local { what, error })
        })?;
        self.command(request, &[], &[theirs.as_fd()])?;
        Ok(BackendRequests { device: Arc::clone(&self.device), connection: ours })
    }
}

impl BackendRequests {
    /// The device's id.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Receives one request, when the socket is readable, and answers it where an answer is asked for.
    ///
    /// The answer does not wait until the request has been acted upon: a back end that is asked for its
    /// configuration space must not be waiting for this answer.
    ///
    /// # Errors
    /// A message that is torn, late or has a reply flag or descriptors: close the channel.
    pub fn receive(&mut self) -> Result<BackendRequest, ConnectionError> {
        let message = self.connection.receive(Deadline::after(MESSAGE_LIMIT))?;
        let change = u32::from(BackendReq::CONFIG_CHANGE_MSG);
        let well_formed = message.payload.is_empty() && message.descriptors.is_empty();
        let outcome = if message.request == change && well_formed {
            BackendRequest::ConfigChange
        } else {
            BackendRequest::Refused { request: message.request }
        };
        match message.kind {
            Kind::Request => {}
            Kind::RequestNeedingReply => {
                let code = u64::from(outcome != BackendRequest::ConfigChange);
                self.connection.send(
                    message.request,
                    Kind::Reply,
                    &code.to_le_bytes(),
                    &[],
                    Deadline::after(MESSAGE_LIMIT),
                )?;
            }
            // We never ask anything on this channel.
            Kind::Reply => return Err(ConnectionError::Flags(0x5)),
        }
        Ok(outcome)
    }
}
