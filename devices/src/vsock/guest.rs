//! Packets from the guest.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use bulkhead_ipc::connector::Connect;
use bulkhead_ipc::memory::{Direction, LentVector, MemoryError};
use bulkhead_ipc::vhost_user::backend::{Chain, Vring, VringError};
use tracing::debug;

use super::packet::{HEADER, HOST_CID, Header, Operation, STREAM};
use super::stream::{ANSWER, LAST_WORDS, State, Stream};
use super::worker::Worker;
use crate::segments::{gather, part};

/// Packets taken before the guest gets its turn to receive.
const PACKETS: u32 = 128;
/// Resets that may wait for a buffer of the guest; with more of them, nothing is taken from it.
const REPLIES: usize = 256;
/// Bytes of the guest that are copied at once, where they cannot go straight to the socket.
const PIECE: usize = 4096;

/// Packets whose bytes go to a socket together, and most bytes of them.
const TOGETHER: usize = 32;
const TOGETHER_BYTES: u32 = 256 << 10;
/// Most pieces of guest memory with a packet more; the kernel takes 1024 (IOV_MAX).
const TOGETHER_PIECES: usize = 512;

/// Packets of one connection that were taken from the guest and are not passed on yet; empty but while packets are taken. The bytes are in
/// the worker's vector.
#[derive(Debug, Default)]
pub(super) struct Held {
    slot: usize,
    /// With the bytes of each. What is behind `count` is for the next.
    packets: Vec<(Chain, u32)>,
    count: usize,
    bytes: u32,
}

impl Worker {
    /// Takes packets from the guest, within bounds.
    pub(super) fn take_packets(&mut self) {
        let Some(mut ring) = self.tx.take() else { return };
        let mut budget = PACKETS;
        ring.disable_kicks();
        loop {
            self.stuck = self.replies.len() >= REPLIES;
            if self.stuck || budget == 0 {
                self.more |= !self.stuck;
                break;
            }
            if !ring.next(&mut self.chain) {
                break;
            }
            budget = budget.saturating_sub(1);
            match self.packet(&mut ring) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => ring.fail(&error),
            }
            // In the order in which they came.
            self.pass_on(&mut ring);
            ring.finish(self.chain.head(), 0);
        }
        self.pass_on(&mut ring);
        ring.signal();
        self.tx = Some(ring);
    }

    /// One packet, in `chain`. True: it is held.
    fn packet(&mut self, ring: &mut Vring) -> Result<bool, VringError> {
        let room = self.chain.readable_bytes().checked_sub(HEADER);
        let room = room.ok_or(VringError::Request("a vsock packet without a whole header"))?;
        let mut bytes = [0; HEADER as usize];
        gather(self.chain.readable(), 0, &mut bytes, ring.ram())?;
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest_cid {
            // A driver that does not know its own name, before or after a migration perhaps: nobody can be answered.
            debug!(cid = header.src_cid, "a packet from another context id");
            return Ok(false);
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            self.refuse(&header);
            return Ok(false);
        }
        let slot = self.table.find(header.src_port, header.dst_port);
        let is_data = header.operation == Operation::Data && header.len <= room;
        if !is_data || slot != Some(self.held.slot) {
            self.pass_on(ring);
        }
        let Some(slot) = slot else {
            match header.operation {
                Operation::Request => self.requested(&header),
                _ => self.refuse(&header),
            }
            return Ok(false);
        };
        if self.table.get(slot).is_some_and(|stream| stream.peer_credit(&header)) {
            self.table.wake(slot);
        }
        match header.operation {
            Operation::Request => {
                // The guest has forgotten the former connection.
                self.remove(slot);
                self.requested(&header);
            }
            Operation::Response => self.accepted_by_guest(slot, &header),
            Operation::Reset => self.reset_by_guest(slot),
            Operation::Shutdown => self.shut_by_guest(slot, &header),
            Operation::Data if header.len > room => self.break_off(slot),
            Operation::Data => return self.data(slot, &header, ring),
            Operation::CreditUpdate => {}
            Operation::CreditRequest => {
                if let Some(stream) = self.table.get(slot) {
                    stream.ask_credit();
                }
                self.table.wake(slot);
            }
            Operation::Unknown(_) => self.break_off(slot),
        }
        Ok(false)
    }

    /// Answers a packet that belongs to nothing by a reset. A reset is not answered.
    pub(super) fn refuse(&mut self, header: &Header) {
        if header.operation == Operation::Reset {
            return;
        }
        self.replies.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            len: 0,
            kind: header.kind,
            operation: Operation::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    /// Ends a connection at once, for both sides.
    pub(super) fn break_off(&mut self, slot: usize) {
        if let Some(stream) = self.remove(slot) {
            self.replies.push_back(stream.packet(self.guest_cid, Operation::Reset, 0));
        }
    }

    /// The guest wants to connect: whether somebody listens is known outside.
    fn requested(&mut self, header: &Header) {
        let (ports, deadline) = ((header.src_port, header.dst_port), Some(Instant::now() + ANSWER));
        let stream = Stream::new(State::Connecting, ports, deadline, self.table.len());
        let Some(slot) = self.table.insert(stream) else { return self.refuse(header) };
        self.table.bind(slot);
        if let Some(stream) = self.table.get(slot) {
            stream.peer_credit(header);
        }
        if self.connector.send(&Connect { port: header.dst_port }, &[]).is_err() {
            self.break_off(slot);
        }
    }

    /// The guest accepts a connection that the host began.
    fn accepted_by_guest(&mut self, slot: usize, header: &Header) {
        let Some(stream) = self.table.get(slot) else { return };
        if stream.state != State::Requested {
            return self.break_off(slot);
        }
        debug!(port = header.src_port, "the guest accepts a connection");
        stream.state = State::Open;
        if !stream.greet() || self.watch_again(slot).is_err() {
            return self.break_off(slot);
        }
        self.table.set_deadline(slot, None);
        self.table.wake(slot);
    }

    fn reset_by_guest(&mut self, slot: usize) {
        let Some(stream) = self.table.get(slot) else { return };
        if stream.guest_done() && !stream.is_flushed() {
            return self.drain(slot);
        }
        self.remove(slot);
    }

    /// What the guest said goes on to the host, but the connection is over for it.
    fn drain(&mut self, slot: usize) {
        self.table.unbind(slot);
        if let Some(stream) = self.table.get(slot) {
            stream.state = State::Draining;
        }
        self.table.set_deadline(slot, Some(Instant::now() + LAST_WORDS));
    }

    fn shut_by_guest(&mut self, slot: usize, header: &Header) {
        let Some(stream) = self.table.get(slot) else { return };
        if !matches!(stream.state, State::Open | State::Closing) {
            return self.break_off(slot);
        }
        let state = stream.state;
        if stream.guest_shuts(header.flags) || state == State::Closing {
            // Both directions have ended: a reset acknowledges that.
            let last = stream.packet(self.guest_cid, Operation::Reset, 0);
            let flushed = stream.is_flushed() || !stream.host_listens();
            self.replies.push_back(last);
            if flushed { drop(self.remove(slot)) } else { self.drain(slot) }
        }
    }

    /// Bytes of the guest. True: they are held.
    fn data(&mut self, slot: usize, header: &Header, ring: &mut Vring) -> Result<bool, VringError> {
        let len = header.len;
        let pieces = self.vector.iovecs().len().saturating_add(self.chain.readable().len());
        let bytes = self.held.bytes.saturating_add(len);
        if self.held.count >= TOGETHER || bytes > TOGETHER_BYTES || pieces > TOGETHER_PIECES {
            self.pass_on(ring);
        }
        let Some(stream) = self.table.get(slot) else { return Ok(false) };
        if !matches!(stream.state, State::Open | State::Closing) || !stream.receive(len) {
            self.pass_on(ring);
            self.break_off(slot);
            return Ok(false);
        }
        if !stream.host_listens() || !stream.is_clear() || len == 0 {
            let gone = if stream.host_listens() { 0 } else { len };
            let mut tell = stream.pass(usize::try_from(gone).unwrap_or(0));
            tell |= stream.control().is_some();
            keep(stream, &self.chain, (gone, len), ring)?;
            if tell {
                self.table.wake(slot);
            }
            return Ok(false);
        }
        if self.held.count == 0 {
            self.vector.restart(ring.ram(), Direction::Read);
        }
        if let Err(error) = lend(&mut self.vector, &self.chain, len) {
            // What of it was lent already must not go with the others.
            self.vector.restart(ring.ram(), Direction::Read);
            for (chain, len) in self.held.packets.iter().take(self.held.count) {
                lend(&mut self.vector, chain, *len)?;
            }
            self.pass_on(ring);
            return Err(error.into());
        }
        self.held.push(slot, &mut self.chain, len);
        Ok(true)
    }

    /// Sends the socket what is held, keeps what it does not take, and gives the guest its buffers back.
    fn pass_on(&mut self, ring: &mut Vring) {
        let (count, bytes) = (std::mem::take(&mut self.held.count), std::mem::take(&mut self.held.bytes));
        if count == 0 {
            return;
        }
        let stream = self.table.get(self.held.slot);
        let sent = match stream.and_then(|stream| stream.socket.as_ref()) {
            Some(socket) => self.vector.send_to(socket.as_fd()),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        self.vector.complete(0);
        if let Some(stream) = self.table.get(self.held.slot) {
            let mut gone = 0;
            match sent {
                Ok(count) => gone = u32::try_from(count).unwrap_or(bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => stream.host_left(),
            }
            if gone < bytes {
                stream.blocked();
            }
            if !stream.host_listens() {
                gone = bytes;
            }
            let mut tell = stream.pass(usize::try_from(gone).unwrap_or(0));
            tell |= stream.control().is_some();
            for (chain, len) in self.held.packets.iter().take(count) {
                let own = gone.min(*len);
                gone = gone.saturating_sub(own);
                if let Err(error) = keep(stream, chain, (own, *len), ring) {
                    ring.fail(&error);
                }
            }
            if tell {
                self.table.wake(self.held.slot);
            }
        }
        self.held.packets.iter().take(count).for_each(|(chain, _)| ring.finish(chain.head(), 0));
    }
}

impl Held {
    /// Takes a packet over; `chain` becomes another.
    fn push(&mut self, slot: usize, chain: &mut Chain, len: u32) {
        self.slot = slot;
        if self.packets.len() <= self.count {
            self.packets.push((Chain::new(), 0));
        }
        if let Some((place, bytes)) = self.packets.get_mut(self.count) {
            std::mem::swap(place, chain);
            *bytes = len;
        }
        self.count = self.count.saturating_add(1);
        self.bytes = self.bytes.saturating_add(len);
    }
}

/// Lends the bytes of a packet to the vector.
fn lend(vector: &mut LentVector, chain: &Chain, len: u32) -> Result<(), MemoryError> {
    part(chain.readable(), HEADER, len)
        .try_for_each(|segment| vector.push(segment.address, u64::from(segment.len)))
}

/// Keeps the bytes of a packet that did not go to the socket: those from `gone` on, of `len`.
fn keep(stream: &mut Stream, chain: &Chain, (gone, len): (u32, u32), ring: &Vring) -> Result<(), VringError> {
    let (mut gone, mut piece) = (gone, [0; PIECE]);
    while gone < len {
        let count = usize::try_from(len.saturating_sub(gone)).unwrap_or(PIECE).min(PIECE);
        let bytes = piece.get_mut(..count).unwrap_or_default();
        gather(chain.readable(), HEADER.saturating_add(gone), bytes, ring.ram())?;
        stream.keep(bytes);
        gone = gone.saturating_add(u32::try_from(count).unwrap_or(len));
    }
    Ok(())
}
