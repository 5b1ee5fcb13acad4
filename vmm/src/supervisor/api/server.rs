//! The machine's end of the API: clients come and go, and none of them can make the supervisor wait.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::geteuid;
use thiserror::Error;

use super::{EventEntry, Request, Response, packet, socket_name};
use crate::supervisor::history::History;
use crate::supervisor::poller::{Poller, Source};

/// The most clients at one time.
const MAX_CLIENTS: usize = 32;
/// How long a client may be connected without asking anything.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// Why the API cannot be offered.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The name is taken.
    #[error(
        "name: a machine named '{0}' runs already: choose another name, or end it with `bulkhead stop {0}`"
    )]
    NameInUse(String),
    /// Anything else.
    #[error("cannot listen for `bulkhead ps` and `bulkhead stop`: {0}")]
    Io(#[from] io::Error),
}

/// A console session of a client.
#[derive(Debug)]
pub struct Attachment {
    /// The device.
    pub device: String,
    /// A copy of the stream that the device has: a restarted machine gets it again.
    pub stream: OwnedFd,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    /// When it is disconnected unless it asked something; `None` afterwards.
    deadline: Option<Instant>,
    attachment: Option<Attachment>,
    /// Wants to hear of each event.
    follows: bool,
}

/// The listening socket and its clients. All that may not ask are disconnected at once.
#[derive(Debug)]
pub struct Server {
    listener: OwnedFd,
    clients: BTreeMap<u16, Client>,
    next: u16,
}

impl Server {
    /// Takes the name of the machine; it is free again when this process ends, however it ends.
    pub fn bind(machine: &str) -> Result<Self, ServerError> {
        let listener = packet::listen_on(&socket_name(geteuid().as_raw(), machine)).map_err(|error| {
            match error.kind() {
                io::ErrorKind::AddrInUse => ServerError::NameInUse(machine.to_owned()),
                _ => error.into(),
            }
        })?;
        Ok(Self { listener, clients: BTreeMap::new(), next: 0 })
    }

    /// Watches the listening socket.
    pub fn register(&self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.listener, Source::Api)
    }

    /// Stops watching the listening socket.
    pub fn mute(&self, poller: &Poller) {
        poller.remove(&self.listener);
    }

    /// Accepts a client that may ask.
    ///
    /// # Errors
    /// There is none, or no descriptor for it.
    pub fn accept(&mut self, poller: &Poller) -> Result<(), Errno> {
        let socket = packet::accept(self.listener.as_fd())?;
        let permitted =
            packet::peer_uid(socket.as_fd()).is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw());
        if !permitted || self.clients.len() >= MAX_CLIENTS {
            return Ok(());
        }
        while self.clients.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        if poller.add(&socket, Source::Client(self.next)).is_ok() {
            let deadline = Instant::now().checked_add(REQUEST_DEADLINE);
            self.clients.insert(self.next, Client { socket, deadline, attachment: None, follows: false });
            self.next = self.next.wrapping_add(1);
        }
        Ok(())
    }

    /// The request of a client. One that is gone or sends nonsense is disconnected.
    pub fn receive(&mut self, id: u16, poller: &Poller) -> Option<(Request, Vec<OwnedFd>)> {
        let client = self.clients.get_mut(&id)?;
        match packet::receive(client.socket.as_fd()) {
            Ok((bytes, _)) if bytes.is_empty() => self.close(id, poller),
            Ok((bytes, fds)) => match serde_json::from_slice(&bytes) {
                Ok(request) => {
                    client.deadline = None;
                    return Some((request, fds));
                }
                Err(error) => {
                    self.respond(id, &Response::Error { message: format!("not a request: {error}") }, poller);
                    self.close(id, poller);
                }
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.close(id, poller),
        }
        None
    }

    /// Answers a client; one that does not read its answers is disconnected.
    pub fn respond(&mut self, id: u16, response: &Response, poller: &Poller) {
        let Some(client) = self.clients.get(&id) else { return };
        let bytes = serde_json::to_vec(response).unwrap_or_default();
        if packet::send(client.socket.as_fd(), &bytes, None).is_err() {
            self.close(id, poller);
        }
    }

    /// Tells a client all that has happened and, when it `follows`, what happens from here on.
    pub fn tell_all(&mut self, id: u16, history: &History, follow: bool, poller: &Poller) {
        let packets = history.packets();
        let last = packets.len().saturating_sub(1);
        for (number, events) in packets.into_iter().enumerate() {
            self.respond(id, &Response::Events { events, more: number < last }, poller);
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.follows = follow;
        }
    }

    /// Tells an event to the clients that follow.
    pub fn publish(&mut self, event: &EventEntry, poller: &Poller) {
        let follows = self.clients.iter().filter(|(_, client)| client.follows).map(|(id, _)| *id);
        for id in follows.collect::<Vec<_>>() {
            self.respond(id, &Response::Events { events: vec![event.clone()], more: false }, poller);
        }
    }

    /// Disconnects a client.
    pub fn close(&mut self, id: u16, poller: &Poller) {
        if let Some(client) = self.clients.remove(&id) {
            poller.remove(&client.socket);
        }
    }

    /// Gives a client the console of `attachment`; whoever had it before is disconnected.
    pub fn attach(&mut self, id: u16, attachment: Attachment, poller: &Poller) {
        self.detach(&attachment.device, poller);
        if let Some(client) = self.clients.get_mut(&id) {
            client.attachment = Some(attachment);
        }
    }

    /// Disconnects the client that has the console of `device`, if one has.
    pub fn detach(&mut self, device: &str, poller: &Poller) {
        let has = |client: &Client| {
            client.attachment.as_ref().is_some_and(|attachment| attachment.device == device)
        };
        let owner = self.clients.iter().find(|(_, client)| has(client)).map(|(id, _)| *id);
        if let Some(owner) = owner {
            self.close(owner, poller);
        }
    }

    /// The console that a client has.
    pub fn attachment(&self, id: u16) -> Option<&Attachment> {
        self.clients.get(&id)?.attachment.as_ref()
    }

    /// All consoles that clients have.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.clients.values().filter_map(|client| client.attachment.as_ref())
    }

    /// When the next client is to be disconnected.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.values().filter_map(|client| client.deadline).min()
    }

    /// Disconnects the clients whose deadline has passed.
    pub fn expire(&mut self, now: Instant, poller: &Poller) {
        let late = |client: &Client| client.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<u16> =
            self.clients.iter().filter(|(_, client)| late(client)).map(|(id, _)| *id).collect();
        for id in late {
            self.close(id, poller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(test: &str) -> String {
        format!("test-{test}-{}", std::process::id())
    }

    fn connect(name: &str) -> OwnedFd {
        packet::connect_to(&socket_name(geteuid().as_raw(), name)).unwrap()
    }

    #[test]
    fn one_machine_of_a_name() {
        let name = name("one");
        let server = Server::bind(&name).unwrap();
        assert!(Server::bind(&name).unwrap_err().to_string().contains("runs already"));
        drop(server);
        assert!(Server::bind(&name).is_ok());
    }

    #[test]
    fn a_request_arrives_with_its_descriptor() {
        let name = name("fd");
        let poller = Poller::new().unwrap();
        let mut server = Server::bind(&name).unwrap();
        let client = connect(&name);
        server.accept(&poller).unwrap();
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let request = br#"{"request":"attach","device":null,"size":null}"#;
        packet::send(client.as_fd(), request, Some(ours.as_fd())).unwrap();
        let (request, fds) = server.receive(0, &poller).unwrap();
        assert_eq!(request, Request::Attach { device: None, size: None });
        assert!(packet::is_stream_socket(fds.first().unwrap().as_fd()));
        assert_eq!(server.deadline(), None);
    }

    #[test]
    fn nonsense_is_answered_and_disconnected() {
        let name = name("nonsense");
        let poller = Poller::new().unwrap();
        let mut server = Server::bind(&name).unwrap();
        let client = connect(&name);
        server.accept(&poller).unwrap();
        packet::send(client.as_fd(), b"hello", None).unwrap();
        assert!(server.receive(0, &poller).is_none());
        let (answer, _) = packet::receive(client.as_fd()).unwrap();
        assert!(String::from_utf8(answer).unwrap().contains("not a request"));
        assert!(packet::receive(client.as_fd()).unwrap().0.is_empty(), "disconnected");
    }

    #[test]
    fn a_silent_client_is_disconnected_in_the_end() {
        let name = name("silent");
        let poller = Poller::new().unwrap();
        let mut server = Server::bind(&name).unwrap();
        let client = connect(&name);
        server.accept(&poller).unwrap();
        server.expire(Instant::now(), &poller);
        assert!(server.deadline().is_some());
        server.expire(Instant::now() + REQUEST_DEADLINE, &poller);
        assert_eq!(server.deadline(), None);
        assert!(packet::receive(client.as_fd()).unwrap().0.is_empty());
    }

    #[test]
    fn a_client_that_never_reads_is_disconnected_and_does_not_block() {
        let name = name("stuck");
        let poller = Poller::new().unwrap();
        let mut server = Server::bind(&name).unwrap();
        let _client = connect(&name);
        server.accept(&poller).unwrap();
        let long = Response::Error { message: "x".repeat(10_000) };
        for _ in 0..1000 {
            server.respond(0, &long, &poller);
        }
        assert!(server.clients.is_empty());
    }

    #[test]
    fn too_many_clients_are_turned_away() {
        let name = name("many");
        let poller = Poller::new().unwrap();
        let mut server = Server::bind(&name).unwrap();
        let mut clients = Vec::new();
        for _ in 0..MAX_CLIENTS + 3 {
            clients.push(connect(&name));
            server.accept(&poller).unwrap();
        }
        assert_eq!(server.clients.len(), MAX_CLIENTS);
    }
}
