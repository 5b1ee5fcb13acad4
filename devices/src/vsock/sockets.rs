//! Connections that come and go on the host.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::connector::Answer;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};
use tracing::{debug, warn};

use super::packet::Operation;
use super::stream::{ANSWER, GREETING, State, Stream};
use super::worker::Worker;

/// Answers of the connector handled before the rings get their turn.
const ANSWERS: usize = 16;
/// Longest line that asks for a port, bytes.
const LINE: usize = 32;

impl Worker {
    /// Reads what the connector has.
    pub(super) fn answers(&mut self) {
        for _ in 0..ANSWERS {
            match self.connector.recv::<Answer>(Some(Duration::ZERO)) {
                Ok((answer, descriptors)) => self.answer(answer, descriptors),
                Err(ChannelError::Deadline) => return,
                Err(ChannelError::PeerClosed) => {
                    if let Ok(epoll) = self.epoll() {
                        let _ = epoll.delete(&self.connector);
                    }
                    return;
                }
                Err(error) => warn!(%error, "a connection is lost"),
            }
        }
    }

    fn answer(&mut self, answer: Answer, mut descriptors: Vec<OwnedFd>) {
        match (answer, descriptors.pop()) {
            (Answer::Accepted, Some(socket)) => self.greeting(socket),
            (Answer::Connected { port }, Some(socket)) => {
                // The guest may have given up meanwhile.
                let Some(slot) = self.table.connecting(port) else { return };
                if self.watch(slot, socket).is_err() {
                    return self.break_off(slot);
                }
                if let Some(stream) = self.table.get(slot) {
                    stream.state = State::Open;
                    stream.open_with(Operation::Response);
                }
                self.table.set_deadline(slot, None);
                self.table.wake(slot);
            }
            (Answer::Refused { port, errno }, _) => {
                debug!(port, errno = %Errno::from_raw(errno), "nobody listens where the guest wants to connect");
                if let Some(slot) = self.table.connecting(port) {
                    self.break_off(slot);
                }
            }
            (Answer::Accepted | Answer::Connected { .. }, None) => {
                warn!("a connection came without its descriptor");
            }
        }
    }

    /// Somebody has connected on the host, and is to say where to.
    fn greeting(&mut self, socket: OwnedFd) {
        let deadline = Some(Instant::now() + GREETING);
        let stream = Stream::new(State::Greeting, (0, 0), deadline, self.table.len());
        let Some(slot) = self.table.insert(stream) else {
            warn!("there are too many connections: one of the host is closed");
            return;
        };
        if self.watch(slot, socket).is_err() {
            self.remove(slot);
        }
    }

    /// The event of a connection's socket. It is edge-triggered: the connection notes what was reported.
    fn event_of(&mut self, slot: usize) -> EpollEvent {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        EpollEvent::new(flags, self.table.token(slot))
    }

    /// What was reported of a connection's socket and was of no use is reported again.
    pub(super) fn watch_again(&mut self, slot: usize) -> io::Result<()> {
        let mut event = self.event_of(slot);
        let epoll = self.epoll.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        match self.table.get(slot).and_then(|stream| stream.socket.as_ref()) {
            Some(socket) => Ok(epoll.modify(socket, &mut event)?),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Gives a connection its socket.
    fn watch(&mut self, slot: usize, socket: OwnedFd) -> io::Result<()> {
        let event = self.event_of(slot);
        self.epoll()?.add(&socket, event)?;
        if let Some(stream) = self.table.get(slot) {
            stream.socket = Some(socket);
        }
        Ok(())
    }

    /// Closes the socket of a connection.
    pub(super) fn close_socket(&mut self, slot: usize) {
        let socket = self.table.get(slot).and_then(|stream| stream.socket.take());
        if let (Some(socket), Ok(epoll)) = (socket, self.epoll()) {
            // Others may hold the same open file, and epoll would go on to report that one.
            let _ = epoll.delete(&socket);
        }
    }

    /// Forgets a connection, and closes its socket.
    pub(super) fn remove(&mut self, slot: usize) -> Option<Stream> {
        self.close_socket(slot);
        self.table.remove(slot)
    }

    /// Something happened on a socket.
    pub(super) fn socket_event(&mut self, slot: usize, flags: EpollFlags) {
        let Some(stream) = self.table.get(slot) else { return };
        let left = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        match stream.state {
            State::Greeting => return self.read_greeting(slot),
            // Its end is found when the guest has answered.
            State::Requested | State::Connecting | State::Closing => return,
            State::Open | State::Draining => {}
        }
        stream.readable |= flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP) || left;
        if flags.contains(EpollFlags::EPOLLOUT) {
            stream.unblocked();
        }
        if left {
            stream.host_left();
        } else {
            stream.flush();
        }
        if stream.state == State::Open {
            self.table.wake(slot);
        } else if stream.is_flushed() {
            self.remove(slot);
        }
    }

    /// Reads the line that asks for a port, when all of it is there.
    fn read_greeting(&mut self, slot: usize) {
        let Some(socket) = self.table.get(slot).and_then(|stream| stream.socket.as_ref()) else { return };
        let mut line = [0; LINE];
        // What follows the line is the guest's.
        let count = match recv(socket.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return drop(self.remove(slot)),
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => return drop(self.remove(slot)),
        };
        let said = line.get(..count).unwrap_or_default();
        let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
            if count == LINE {
                debug!("a connection of the host does not ask for a port");
                self.remove(slot);
            }
            return;
        };
        let port = said.get(..end).and_then(wanted_port);
        let consumed = line.get_mut(..end.saturating_add(1)).unwrap_or_default();
        let taken = recv(socket.as_raw_fd(), consumed, MsgFlags::MSG_DONTWAIT);
        let (Some(port), Ok(_)) = (port, taken) else {
            debug!("a connection of the host does not ask for a port");
            self.remove(slot);
            return;
        };
        let host_port = self.table.new_port(port);
        if let Some(stream) = self.table.get(slot) {
            (stream.guest_port, stream.host_port) = (port, host_port);
            stream.state = State::Requested;
            stream.open_with(Operation::Request);
        }
        self.table.bind(slot);
        self.table.set_deadline(slot, Some(Instant::now() + ANSWER));
        self.table.wake(slot);
    }

    /// The time of a connection is over.
    pub(super) fn expire(&mut self, slot: usize) {
        self.table.set_deadline(slot, None);
        let Some(stream) = self.table.get(slot) else { return };
        match stream.state {
            State::Greeting | State::Draining => drop(self.remove(slot)),
            State::Requested | State::Connecting | State::Closing => self.break_off(slot),
            State::Open => {}
        }
    }
}

/// Reads `CONNECT 1234`.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.trim_end_matches('\r').split_once(' ')?;
    word.eq_ignore_ascii_case("connect").then(|| port.trim().parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_asked_for_in_one_line() {
        assert_eq!(wanted_port(b"CONNECT 52"), Some(52));
        assert_eq!(wanted_port(b"connect 4294967295\r"), Some(u32::MAX));
        for line in
            ["", "CONNECT", "CONNECT x", "CONNECT 4294967296", "CONNECT -1", "GET / HTTP/1.1", "CONNECT 1 2"]
        {
            assert_eq!(wanted_port(line.as_bytes()), None, "{line}");
        }
    }
}
