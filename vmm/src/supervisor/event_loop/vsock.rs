//! Connections of the vsock: its process can neither accept nor make one.

use std::io;

use nix::errno::Errno;

use super::{Environment, EventLoop};
use crate::supervisor::api::EventKind;
use crate::supervisor::poller::Source;
use crate::supervisor::process::{Process, State};
use crate::supervisor::resources::{Resources, Vsock};

impl Environment {
    /// Watches the vsock's socket and connector, which may be watched already.
    pub(super) fn watch_vsock(&self, resources: &Resources) -> io::Result<()> {
        let Some(vsock) = &resources.vsock else { return Ok(()) };
        self.forget_vsock(vsock);
        self.poller.add(&vsock.connector, Source::Connector)?;
        self.poller.add(&vsock.listener, Source::VsockListener)
    }

    /// Watches neither any longer.
    pub(super) fn forget_vsock(&self, vsock: &Vsock) {
        self.poller.remove(&vsock.connector);
        self.poller.remove(&vsock.listener);
    }
}

impl EventLoop<'_> {
    /// Somebody has connected to the vsock's socket.
    pub(super) fn vsock_connection(&mut self) {
        let accepted = self.resources.vsock.as_ref().map_or(Err(Errno::EAGAIN), Vsock::accept);
        let _none = self.accepted(accepted);
    }

    /// The vsock's process asks for connections.
    pub(super) fn connector(&mut self) {
        let Some(vsock) = &self.resources.vsock else { return };
        if let Err(error) = vsock.connector.serve() {
            // The supervisor holds the other end, too: it is nonsense, not the end.
            let text = format!("{} sent nonsense to its connector: {error}", vsock.id);
            let of_vsock = |process: &Process| process.id == vsock.id && process.state != State::Ended;
            if let Some(index) = self.processes.iter().position(of_vsock) {
                self.condemn(index, EventKind::Failure, &text);
            }
        }
    }
}
