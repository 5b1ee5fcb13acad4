//! What can be wrong with a back end.

use std::sync::Arc;

use thiserror::Error;

use crate::vhost_user::connection::ConnectionError;
use crate::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

/// A request to a back end failed.
#[derive(Debug, Error)]
#[error("device {device}: {request:?}: {problem}")]
pub struct FrontendError {
    /// The device's id.
    pub device: Arc<str>,
    /// The request that failed.
    pub request: FrontendReq,
    /// What is wrong.
    pub problem: Problem,
}

/// Why a request failed.
#[derive(Debug, Error)]
pub enum Problem {
    /// The message could not be sent, or no reply received.
    #[error("{0}")]
    Connection(ConnectionError),
    /// A field of the reply is not as the protocol wants it.
    #[error("{field} of the reply is {value:#x}, expected {expected}")]
    Reply {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would have been right.
        expected: String,
    },
    /// The back end answered with an error code.
    #[error("refused by the device process with code {0:#x}")]
    Refused(u64),
    /// The request needs a protocol feature that is not negotiated.
    #[error("needs the protocol feature {0:?}, which is not negotiated")]
    NotNegotiated(VhostUserProtocolFeatures),
    /// The back end offers no protocol features at all, or lacks a needed one.
    #[error("the device process does not offer {0}")]
    Missing(&'static str),
    /// A parameter is out of the protocol's range; nothing was sent.
    #[error("{field} is {value:#x}, which the protocol or the device process cannot take")]
    Parameter {
        /// The parameter.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A resource for the request could not be created here.
    #[error("{what}: {error}")]
    Local {
        /// What failed.
        what: &'static str,
        /// The error.
        error: std::io::Error,
    },
    /// An earlier error made the connection unusable.
    #[error("the connection was given up after an earlier error")]
    Broken,
}
