//! The streams of network cards: passt that ends, and another machine that comes and goes.
//!
//! A device process that ends, in order or not, leaves its stream to its successor in memory that outlives it: nobody at the other end
//! hears of it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::ToDevice;

use super::EventLoop;
use crate::supervisor::api::{EventKind, Response};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::nearest::hint;
use crate::supervisor::poller::Source;
use crate::supervisor::resources::nic::{Nic, NicError};

/// From the end of a stream until it is made anew, and between attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// When streams are made anew, by the ids of their cards.
pub(super) type Cables = Vec<(String, Instant)>;

impl EventLoop<'_> {
    /// When a stream is to be made anew.
    pub(super) fn cable_deadline(&self) -> Option<Instant> {
        self.cables.iter().map(|(_, at)| *at).min()
    }

    /// Watches the streams and listening sockets of all cards.
    pub(super) fn watch_cables(&mut self) {
        self.unwatch_cables();
        for (number, nic) in (0u16..).zip(&self.resources.nics) {
            let poller = &self.environment.poller;
            let stream = nic.end().map(|end| poller.add_hang_up(end, Source::CableEnd(number)));
            let listener = nic.stream().and_then(|stream| stream.listener.as_ref());
            let listener = listener.map(|listener| poller.add(listener, Source::CableListener(number)));
            if let Some(Err(error)) = stream.into_iter().chain(listener).find(Result::is_err) {
                let text = format!("{}: its stream cannot be watched: {error}", nic.config.id);
                self.environment.log.say(LogLevel::Warn, &text);
            }
        }
    }

    /// Forgets them: before one is closed, or gets another number.
    pub(super) fn unwatch_cables(&self) {
        for nic in &self.resources.nics {
            if let Some(end) = nic.end() {
                self.environment.poller.remove(end);
            }
            if let Some(listener) = nic.stream().and_then(|stream| stream.listener.as_ref()) {
                self.environment.poller.remove(listener);
            }
        }
    }

    /// The other end of a stream has gone.
    pub(super) fn cable_ended(&mut self, number: u16) {
        self.unwatch_cables();
        let Some(nic) = self.resources.nics.get_mut(usize::from(number)) else { return };
        let (id, why) = (nic.config.id.clone(), nic.disconnect());
        if nic.reconnects() {
            self.cables.push((id.clone(), Instant::now() + PAUSE));
        }
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        let text = format!("{id}: the other end of its stream has gone{why}");
        self.say(LogLevel::Warn, &text);
        self.note_cable(EventKind::Disconnected, &id, Some(text));
        self.watch_cables();
    }

    /// Another machine connects.
    pub(super) fn cable_connected(&mut self, number: u16) {
        let number = usize::from(number);
        let listener = self.resources.nics.get(number).and_then(Nic::stream);
        let Some(listener) = listener.and_then(|stream| stream.listener.as_ref()) else { return };
        let accepted = listener.accept();
        let Some(peer) = self.accepted(accepted) else { return };
        self.unwatch_cables();
        if let Some(nic) = self.resources.nics.get_mut(number) {
            nic.connected(peer);
        }
        self.watch_cables();
        self.hand_over_cable(number);
    }

    fn hand_over_cable(&mut self, number: usize) {
        let Some(nic) = self.resources.nics.get(number) else { return };
        let Some(end) = nic.end() else { return };
        let id = &nic.config.id;
        // One that has ended gets it with its start.
        let message = ToDevice::AttachWay(nic.way_number);
        let text = match self.hand_over_as(&message, id, end.as_fd()) {
            Ok(()) => format!("{id}: connected"),
            Err(reason) => format!("{id}: connected, but {reason}"),
        };
        let id = id.clone();
        self.say(LogLevel::Info, &text);
        self.note_cable(EventKind::Connected, &id, None);
    }

    fn note_cable(&mut self, kind: EventKind, id: &str, reason: Option<String>) {
        let index = self.processes.iter().position(|process| process.id == id);
        self.note(kind, index, |entry| (entry.pid, entry.reason) = (None, reason));
    }

    /// A successor that was made ready earlier gets the stream of today; it knows it by its number if it has it.
    pub(super) fn hand_over_cable_again(&self, id: &str) {
        let nic = self.resources.nics.iter().find(|nic| nic.config.id == id);
        if let Some((nic, end)) = nic.and_then(|nic| Some((nic, nic.end()?))) {
            // One that has ended gets it with its start.
            let _gone = self.hand_over_as(&ToDevice::AttachWay(nic.way_number), id, end);
        }
    }

    /// Makes streams anew that are due.
    pub(super) fn reconnect_cables(&mut self, now: Instant) {
        if self.cable_deadline().is_none_or(|at| at > now) {
            return;
        }
        let (due, later) = std::mem::take(&mut self.cables).into_iter().partition(|(_, at)| *at <= now);
        self.cables = later;
        let due: Cables = due;
        for (id, _) in due {
            self.unwatch_cables();
            let number = self.resources.nics.iter().position(|nic| nic.config.id == id);
            let nic = number.and_then(|number| self.resources.nics.get_mut(number));
            let result = nic.map(Nic::reconnect);
            self.watch_cables();
            match (result, number) {
                (Some(Ok(())), Some(number)) => self.hand_over_cable(number),
                (Some(Err(error)), _) => self.cable_fails(id, now, &error),
                _ => {}
            }
        }
    }

    fn cable_fails(&mut self, id: String, now: Instant, error: &NicError) {
        // Another machine may take its time; that passt does not start is worth a word.
        let level = if matches!(error, NicError::Socket { .. }) { LogLevel::Debug } else { LogLevel::Warn };
        self.say(level, &error.to_string());
        self.cables.push((id, now + PAUSE));
    }

    /// A user plugs a cable in, or pulls it out.
    pub(super) fn link(&mut self, device: &str, up: bool) -> Result<Response, String> {
        let names: Vec<String> = self.resources.nics.iter().map(|nic| nic.config.id.clone()).collect();
        let Some(nic) = self.resources.nics.iter_mut().find(|nic| nic.config.id == device) else {
            let name = device.escape_debug().to_string();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let hint = if names.is_empty() { "it has none".to_owned() } else { hint(&name, &names) };
            return Err(format!("this machine has no network card '{name}': {hint}"));
        };
        nic.config.link = up;
        self.tell(device, &ToDevice::Link { up });
        self.say(LogLevel::Info, &format!("{device}: the link is {}", if up { "up" } else { "down" }));
        Ok(Response::Done)
    }
}
