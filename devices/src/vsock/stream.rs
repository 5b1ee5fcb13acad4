//! One connection: who may still speak, what waits, and the credit of both sides (virtio 1.2, 5.10.6.3).

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use super::packet::{HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};

/// Bytes that are kept for a host that does not read, for each connection that begins beside so many others at most, and beside more.
const WINDOWS: [(usize, u32); 2] = [(8, 1 << 20), (64, 256 << 10)];
const NARROW_WINDOW: u32 = 32 << 10;
/// An update is due when so much of the window, one part in so many, was passed on since the guest was told.
const UPDATE_PART: u32 = 4;

/// For the host to say which port it wants; for the guest, or the host, to answer a connection.
pub const GREETING: Duration = Duration::from_secs(10);
pub const ANSWER: Duration = Duration::from_secs(20);
/// For the guest to acknowledge the end of a connection, after which it is reset.
pub const FAREWELL: Duration = Duration::from_secs(10);
/// For the host to take what the guest said last.
pub const LAST_WORDS: Duration = Duration::from_secs(30);

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host has connected and not said which port it wants.
    Greeting,
    /// The guest is asked.
    Requested,
    /// The guest has asked, and the connector is at it.
    Connecting,
    /// Both know of it.
    Open,
    /// The host has gone, the guest was told.
    Closing,
    /// The guest has gone; what it said last is on its way to the host.
    Draining,
}

/// A connection.
#[derive(Debug)]
pub struct Stream {
    /// How far it is.
    pub state: State,
    /// Port of the guest's end.
    pub guest_port: u32,
    /// Port of the host's end.
    pub host_port: u32,
    /// The host's end.
    pub socket: Option<OwnedFd>,
    /// Names this connection among those that had its place before.
    pub serial: u32,
    /// It waits for its turn.
    pub queued: bool,
    /// When it is given up.
    pub deadline: Option<Instant>,
    /// The socket may have something to read.
    pub readable: bool,
    /// Buffers of the guest that are tried at once.
    pub appetite: usize,
    /// Bytes of the guest that the host has not taken.
    buffered: VecDeque<u8>,
    /// The socket may have room.
    writable: bool,
    window: u32,
    /// Bytes from the guest, those of them that were passed on, and what the guest was told of that; modulo 2^32.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes to the guest, and what it says of itself.
    sent: u32,
    peer_window: u32,
    peer_forwarded: u32,
    /// SHUTDOWN flags of the guest; of the host, and those of them that the guest was told.
    guest_shut: u32,
    host_shut: u32,
    told_shut: u32,
    opening: Option<Operation>,
    credit_update: bool,
    /// The guest has no room: it is to be asked for more, or was asked.
    credit_request: bool,
    credit_asked: bool,
}

impl Stream {
    /// A connection between these ports of guest and host, beside `others`, that is given up at the deadline.
    pub fn new(
        state: State,
        (guest_port, host_port): (u32, u32),
        deadline: Option<Instant>,
        others: usize,
    ) -> Self {
        Self {
            state,
            guest_port,
            host_port,
            socket: None,
            serial: 0,
            queued: false,
            deadline,
            readable: false,
            appetite: 1,
            buffered: VecDeque::new(),
            writable: true,
            window: WINDOWS
                .iter()
                .find(|(most, _)| others < *most)
                .map_or(NARROW_WINDOW, |(_, window)| *window),
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_window: 0,
            peer_forwarded: 0,
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            opening: None,
            credit_update: false,
            credit_request: false,
            credit_asked: false,
        }
    }

    /// The packet that opens the connection for the guest is to be sent.
    pub fn open_with(&mut self, operation: Operation) {
        self.opening = Some(operation);
    }

    /// What the guest says of its room. True: there is some again, which was waited for.
    pub fn peer_credit(&mut self, header: &Header) -> bool {
        (self.peer_window, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        if self.credit() == 0 {
            return false;
        }
        let waited = self.credit_request || self.credit_asked;
        (self.credit_request, self.credit_asked) = (false, false);
        waited
    }

    /// Bytes that the guest has room for.
    pub fn credit(&self) -> u32 {
        self.peer_window.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// The guest's room is used up: asks for more, once. True: it is to be asked.
    pub fn starve(&mut self) -> bool {
        self.credit_request = !self.credit_asked;
        self.credit_request
    }

    /// `count` bytes went to the guest.
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The guest sends `len` bytes. False: it had no credit for them, or said that it would send no more.
    pub fn receive(&mut self, len: u32) -> bool {
        let kept = self.received.wrapping_sub(self.forwarded);
        if self.guest_shut & SHUTDOWN_SEND != 0 || kept.saturating_add(len) > self.window {
            return false;
        }
        self.received = self.received.wrapping_add(len);
        true
    }

    /// `count` bytes of the guest have left this process, or are dropped. True: the guest is to be told.
    pub fn pass(&mut self, count: usize) -> bool {
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(count).unwrap_or(0));
        let part = self.window.checked_div(UPDATE_PART).unwrap_or(0);
        self.credit_update |= self.forwarded.wrapping_sub(self.told) >= part;
        self.credit_update
    }

    /// The guest asks for our room.
    pub fn ask_credit(&mut self) {
        self.credit_update = true;
    }

    /// Whether bytes of the guest may go straight to the socket: none wait before them.
    pub fn is_clear(&self) -> bool {
        self.writable && self.buffered.is_empty()
    }

    /// Whether anything of the guest waits for the host.
    pub fn is_flushed(&self) -> bool {
        self.buffered.is_empty()
    }

    /// Whether the host takes anything any more.
    pub fn host_listens(&self) -> bool {
        self.host_shut & SHUTDOWN_RECEIVE == 0 && self.socket.is_some()
    }

    /// Whether anything that the host says is to be read.
    pub fn host_speaks(&self) -> bool {
        let open = self.state == State::Open && self.opening.is_none();
        open && (self.host_shut & SHUTDOWN_SEND) | (self.guest_shut & SHUTDOWN_RECEIVE) == 0
    }

    /// Keeps bytes for the host.
    pub fn keep(&mut self, bytes: &[u8]) {
        self.buffered.extend(bytes);
    }

    /// The socket took less than it was given.
    pub fn blocked(&mut self) {
        self.writable = false;
    }

    /// The socket has room again.
    pub fn unblocked(&mut self) {
        self.writable = true;
    }

    /// Writes what waits as far as the host takes it. True: the guest is to be told something.
    pub fn flush(&mut self) -> bool {
        let mut tell = false;
        while self.writable && !self.buffered.is_empty() {
            let Some(socket) = &self.socket else { break };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(socket.as_raw_fd(), self.buffered.as_slices().0, flags) {
                Ok(count) => {
                    self.buffered.drain(..count.min(self.buffered.len()));
                    tell |= self.pass(count);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.writable = false,
                Err(_) => {
                    self.host_left();
                    return true;
                }
            }
        }
        if self.buffered.is_empty() {
            self.buffered.shrink_to(0);
            if self.guest_shut & SHUTDOWN_SEND != 0 {
                self.shut_socket(Shutdown::Write);
            }
        }
        tell
    }

    /// Tells the host that the guest has accepted, and the port that the guest sees. False: it is not there any more.
    pub fn greet(&self) -> bool {
        let line = format!("OK {}\n", self.host_port);
        let Some(socket) = &self.socket else { return false };
        // A socket that nothing was written to has room.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(socket.as_raw_fd(), line.as_bytes(), flags) == Ok(line.len())
    }

    fn shut_socket(&self, how: Shutdown) {
        if let Some(socket) = &self.socket {
            // A peer that has gone is noticed elsewhere.
            let _ = shutdown(socket.as_raw_fd(), how);
        }
    }

    /// Nobody on the host reads what the guest says: what waits is dropped, and the guest told.
    pub fn host_left(&mut self) {
        let waiting = self.buffered.len();
        self.buffered = VecDeque::new();
        self.pass(waiting);
        self.host_shut |= SHUTDOWN_RECEIVE;
    }

    /// The host will say no more.
    pub fn host_done(&mut self) {
        self.host_shut |= SHUTDOWN_SEND;
    }

    /// The guest ends one direction or both. True: it has ended both.
    pub fn guest_shuts(&mut self, flags: u32) -> bool {
        let new = flags & SHUTDOWN_BOTH & !self.guest_shut;
        self.guest_shut |= new;
        if new & SHUTDOWN_RECEIVE != 0 {
            self.shut_socket(Shutdown::Read);
        }
        if new & SHUTDOWN_SEND != 0 && self.buffered.is_empty() {
            self.shut_socket(Shutdown::Write);
        }
        self.guest_shut == SHUTDOWN_BOTH
    }

    /// Whether the guest has said that it will send no more.
    pub fn guest_done(&self) -> bool {
        self.guest_shut & SHUTDOWN_SEND != 0
    }

    /// Whether the guest knows that the host neither reads nor writes.
    pub fn is_told_all(&self) -> bool {
        self.told_shut == SHUTDOWN_BOTH
    }

    /// The next thing to tell the guest apart from data.
    pub fn control(&self) -> Option<Operation> {
        match self.state {
            State::Requested => self.opening,
            State::Open if self.opening.is_some() => self.opening,
            State::Open if self.host_shut != self.told_shut => Some(Operation::Shutdown),
            State::Open if self.credit_update => Some(Operation::CreditUpdate),
            State::Open if self.credit_request => Some(Operation::CreditRequest),
            _ => None,
        }
    }

    /// A packet with `len` bytes for the guest; it says all that there is to say of our room.
    pub fn packet(&self, guest_cid: u64, operation: Operation, len: u32) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            kind: STREAM,
            operation,
            flags: if operation == Operation::Shutdown { self.host_shut } else { 0 },
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        }
    }

    /// A packet went to the guest.
    pub fn told(&mut self, operation: Operation) {
        self.told = self.forwarded;
        self.credit_update = false;
        match operation {
            Operation::Request | Operation::Response => self.opening = None,
            Operation::Shutdown => self.told_shut = self.host_shut,
            Operation::CreditRequest => (self.credit_request, self.credit_asked) = (false, true),
            _ => {}
        }
    }
}
