//! What can go wrong on a vfio-user connection, in sentences for a person.

use std::time::Duration;

use super::wire::Command;

/// A message that does not follow the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the field needs.
    #[error("field {field} is cut off: {needed} bytes needed, {got} there")]
    Short {
        /// Name of the field in the specification.
        field: &'static str,
        /// Bytes needed, counted from the start of the payload.
        needed: usize,
        /// Bytes there.
        got: usize,
    },
    /// A field has a value that the specification or this subset does not allow.
    #[error("field {field} has the value {value:#x}, which is not allowed here")]
    Value {
        /// Name of the field in the specification.
        field: &'static str,
        /// The value received.
        value: u64,
    },
}

/// What broke a connection; [`ClientError`] and [`ServerError`] add where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The peer closed its end.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer did not answer, or did not take what was sent, in time.
    #[error("no progress within {0:?}")]
    Deadline(Duration),
    /// A system call on the socket failed.
    #[error("{call}: {error}")]
    Socket {
        /// Name of the system call.
        call: &'static str,
        /// What it returned.
        error: nix::errno::Errno,
    },
    /// A message that does not follow the specification.
    #[error(transparent)]
    Message(#[from] DecodeError),
    /// Well-formed, but not what this exchange allows.
    #[error("field {field}: expected {expected:#x}, received {received:#x}")]
    Unexpected {
        /// Name of the field in the specification.
        field: &'static str,
        /// Value that the exchange calls for.
        expected: u64,
        /// Value received.
        received: u64,
    },
    /// Version data that is not the JSON that the specification describes.
    #[error("field version data: {0}")]
    Capabilities(String),
    /// Descriptors came where none belong, or not as many as the command needs.
    #[error("{received} descriptors came with the message, {expected} belong to it")]
    Descriptors {
        /// Descriptors that belong to the message.
        expected: usize,
        /// Descriptors received.
        received: usize,
    },
    /// A descriptor of the wrong kind, size or sealing.
    #[error("the descriptor is not usable: {0}")]
    Descriptor(&'static str),
    /// The peer answered with an error.
    #[error("the peer refused with errno {0}")]
    Refused(u32),
    /// The caller asked for more than one message can carry.
    #[error("an access of {0} bytes is larger than a message can carry")]
    TooLong(usize),
}

/// A client's connection has failed. It stays failed: every later call returns the same error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("device {device}: {command:?}: {fault}")]
pub struct ClientError {
    /// The device, as given to [`Client::connect`](super::Client::connect).
    pub device: String,
    /// The command during which it failed.
    pub command: Command,
    /// Why.
    pub fault: Fault,
}

/// A server's connection has failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("vfio-user client: {}: {fault}", match command { Some(command) => format!("{command:?}"), None => String::from("header") })]
pub struct ServerError {
    /// The command that was being read or answered, when it got that far.
    pub command: Option<Command>,
    /// Why.
    pub fault: Fault,
}

/// A device model's refusal of one access; the client receives it as an errno and the connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No such region or interrupt, or outside of it: EINVAL.
    #[error("no such region, interrupt or offset")]
    OutOfRange,
    /// The device does not have the function asked for: ENOTSUP.
    #[error("not supported by this device")]
    NotSupported,
}

impl AccessError {
    /// The errno that goes into the reply's *Error* field.
    pub fn errno(self) -> u32 {
        match self {
            Self::OutOfRange => nix::errno::Errno::EINVAL as u32,
            Self::NotSupported => nix::errno::Errno::ENOTSUP as u32,
        }
    }
}
