//! The version data of VFIO_USER_VERSION: JSON, read as hostile.

use serde::{Deserialize, Serialize};

use super::error::Fault;
use super::{MAX_DATA, wire};

/// What we send: no capability that the peer might lack (section VFIO_USER_VERSION, table of capabilities).
#[derive(Serialize)]
struct Offer {
    capabilities: Offered,
}

#[derive(Serialize)]
struct Offered {
    max_msg_fds: u32,
    max_data_xfer_size: usize,
}

/// What we read; unknown names are ignored, as the specification lets both sides add some.
#[derive(Deserialize)]
struct Received {
    #[serde(default)]
    capabilities: Capabilities,
}

/// The peer's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Capabilities {
    /// Most data bytes that the peer takes in one access.
    pub max_data_xfer_size: u64,
    /// Most descriptors that the peer takes with one message.
    pub max_msg_fds: u64,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { max_data_xfer_size: 1 << 20, max_msg_fds: 1 }
    }
}

/// Version data that announces our limits, with its terminating NUL.
pub(super) fn offer() -> Vec<u8> {
    let offer = Offer { capabilities: Offered { max_msg_fds: 1, max_data_xfer_size: MAX_DATA } };
    let mut data = serde_json::to_vec(&offer).unwrap_or_default();
    data.push(0);
    data
}

/// Reads version data, given without its NUL; empty data means all defaults.
pub(super) fn parse(data: &[u8]) -> Result<Capabilities, Fault> {
    if data.is_empty() {
        return Ok(Capabilities::default());
    }
    let received: Received =
        serde_json::from_slice(data).map_err(|error| Fault::Capabilities(error.to_string()))?;
    let capabilities = received.capabilities;
    if capabilities.max_data_xfer_size == 0 {
        return Err(wire_value("max_data_xfer_size", 0));
    }
    Ok(capabilities)
}

fn wire_value(field: &'static str, value: u64) -> Fault {
    Fault::Message(super::error::DecodeError::Value { field, value })
}

/// The version payload that we send: our version, or the lower minor of the two.
pub(super) fn version(minor: u16) -> wire::Version {
    wire::Version { major: super::VERSION.0, minor: minor.min(super::VERSION.1) }
}
