//! Connections to the sockets of named ports.

use std::io;
use std::os::fd::AsFd;

use bulkhead_ipc::channel::message::ToDevice;
use nix::errno::Errno;

use super::{Environment, EventLoop};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::PORTS;
use crate::supervisor::poller::Source;
use crate::supervisor::process::{Process, State};
use crate::supervisor::resources::{Listener, Resources};

impl Environment {
    /// Watches the sockets of the ports.
    pub(super) fn watch_ports(&self, resources: &Resources) -> io::Result<()> {
        for (number, port) in (0u16..).zip(resources.ports.iter().flat_map(|ports| &ports.ports)) {
            if let Some(listener) = &port.stream.listener {
                self.poller.add(listener, Source::PortListener(number))?;
            }
        }
        Ok(())
    }
}

impl EventLoop<'_> {
    /// Somebody connects to the socket of a port, and takes the place of whoever was there.
    pub(super) fn port_connected(&mut self, number: u16) {
        let ports = self.resources.ports.as_ref();
        let port = ports.and_then(|ports| ports.ports.get(usize::from(number)));
        let listener = port.and_then(|port| port.stream.listener.as_ref());
        let accepted = listener.map_or(Err(Errno::EAGAIN), Listener::accept);
        let Some(connection) = self.accepted(accepted) else { return };
        self.port_peers.retain(|(port, _)| *port != number);
        self.port_peers.push((number, connection));
        if let Err(reason) = self.attach_port(number) {
            self.say(LogLevel::Warn, &format!("{PORTS}: cannot take the new connection: {reason}"));
        }
    }

    fn attach_port(&self, number: u16) -> Result<(), String> {
        let peer = self.port_peers.iter().find(|(port, _)| *port == number);
        let alive = |process: &&Process| process.id == PORTS && process.state != State::Ended;
        // One that has ended is followed by one that gets it with its start.
        let (Some((_, peer)), Some(process)) = (peer, self.processes.iter().find(alive)) else {
            return Ok(());
        };
        let message = ToDevice::AttachPort(number);
        process.channel.send(&message, &[peer.as_fd()]).map_err(|error| error.to_string())
    }

    /// A process that was started anew gets the peers that its predecessor had.
    pub(super) fn attach_ports_again(&self) {
        for (number, _) in &self.port_peers {
            let _noticed_by_the_peer = self.attach_port(*number);
        }
    }
}
