//! Named ports: the host's side of each, and what their process leaves to its successor.

use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::stream::{forget, typed};
use super::{ResourceError, Stream};
use crate::supervisor::config::{PORTS, PortSpec};

/// Bytes that the file of [`Ports::state`] may grow to: the facts, and the backlog of each port.
pub const PORTS_STATE: u64 = 2 << 20;

/// A named port.
#[derive(Debug)]
pub struct Port {
    /// Its name in the guest.
    pub name: String,
    /// It is a console there.
    pub console: bool,
    /// The host's side.
    pub stream: Stream,
}

/// All of them.
#[derive(Debug)]
pub struct Ports {
    /// The ports; the first is port 1.
    pub ports: Vec<Port>,
    /// What their process leaves to its successor.
    pub state: File,
    /// What came for the guest and it has not got.
    pub typed: File,
}

impl Ports {
    /// Opens the host's side of each; `None`: there are none.
    pub fn open(specs: &[PortSpec]) -> Result<Option<Self>, ResourceError> {
        if specs.is_empty() {
            return Ok(None);
        }
        let mut ports = Vec::with_capacity(specs.len());
        for PortSpec { name, target, console } in specs {
            if let Some(stream) = Stream::open("port", target)? {
                ports.push(Port { name: name.clone(), console: *console, stream });
            }
        }
        let state = memfd_create(c"ports", MFdFlags::MFD_CLOEXEC);
        let state =
            state.map_err(|errno| ResourceError::Host { what: PORTS.to_owned(), reason: errno.into() })?;
        let typed = typed(ports.len() as u64);
        let typed = typed.map_err(|reason| ResourceError::Host { what: PORTS.to_owned(), reason })?;
        Ok(Some(Self { ports, state: state.into(), typed }))
    }

    /// Forgets what a guest was told: the machine starts anew.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn reset(&self) -> std::io::Result<()> {
        self.state.set_len(0)?;
        forget(&self.typed)
    }
}
