//! Packets to the guest.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::vhost_user::backend::{Vring, VringError};

use super::packet::{HEADER, Header, Operation};
use super::stream::{FAREWELL, State};
use super::worker::{BATCH, Worker};
use crate::segments::{part, scatter};

/// Turns of connections before the guest gets its turn to send.
const TURNS: u32 = 64;
/// Most bytes of one connection in its turn.
const QUANTUM: u32 = 64 << 10;

/// What became of a connection's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// It has nothing more to say.
    Done,
    /// It has.
    Again,
    /// The guest has no buffer.
    NoBuffer,
}

impl Worker {
    /// Sends the guest what there is, as long as it has buffers, within bounds.
    pub(super) fn send_packets(&mut self) {
        let Some(mut ring) = self.rx.take() else { return };
        ring.disable_kicks();
        let mut budget = TURNS;
        loop {
            match self.turn_of_one(&mut ring) {
                Ok(Some(Turn::NoBuffer)) => {
                    if ring.enable_kicks() {
                        ring.disable_kicks();
                        continue;
                    }
                    break;
                }
                Ok(Some(Turn::Done | Turn::Again)) => {}
                Ok(None) => break,
                Err(error) => {
                    ring.fail(&error);
                    break;
                }
            }
            budget = budget.saturating_sub(1);
            if budget == 0 {
                self.more |= self.table.has_ready() || !self.replies.is_empty();
                break;
            }
        }
        ring.signal();
        // What kept the guest's packets from being taken may have gone.
        self.more |= self.stuck && self.replies.is_empty();
        self.rx = Some(ring);
    }

    fn turn_of_one(&mut self, ring: &mut Vring) -> Result<Option<Turn>, VringError> {
        if let Some(reply) = self.replies.front().copied() {
            if !self.put(ring, &reply)? {
                return Ok(Some(Turn::NoBuffer));
            }
            self.replies.pop_front();
            return Ok(Some(Turn::Done));
        }
        let Some(slot) = self.table.next_ready() else { return Ok(None) };
        let turn = self.serve(slot, ring)?;
        match turn {
            Turn::Done => {}
            Turn::Again => self.table.wake(slot),
            Turn::NoBuffer => self.table.wake_first(slot),
        }
        Ok(Some(turn))
    }

    /// Puts a packet without data into a buffer. False: there is none.
    fn put(&mut self, ring: &mut Vring, header: &Header) -> Result<bool, VringError> {
        loop {
            if !ring.next(&mut self.chain) {
                return Ok(false);
            }
            if self.chain.writable_bytes() >= HEADER {
                scatter(self.chain.writable(), &header.bytes(), ring.ram())?;
                ring.finish(self.chain.head(), HEADER);
                return Ok(true);
            }
            ring.finish(self.chain.head(), 0);
        }
    }

    fn serve(&mut self, slot: usize, ring: &mut Vring) -> Result<Turn, VringError> {
        let guest_cid = self.guest_cid;
        let Some(stream) = self.table.get(slot) else { return Ok(Turn::Done) };
        if let Some(operation) = stream.control() {
            let header = stream.packet(guest_cid, operation, 0);
            if !self.put(ring, &header)? {
                return Ok(Turn::NoBuffer);
            }
            let Some(stream) = self.table.get(slot) else { return Ok(Turn::Done) };
            stream.told(operation);
            if operation == Operation::CreditRequest {
                return Ok(Turn::Done);
            }
            if stream.is_told_all() {
                stream.state = State::Closing;
                self.close_socket(slot);
                self.table.set_deadline(slot, Some(Instant::now() + FAREWELL));
            }
            return Ok(Turn::Again);
        }
        if !stream.host_speaks() || !stream.readable {
            return Ok(Turn::Done);
        }
        if stream.credit() == 0 {
            return Ok(if stream.starve() { Turn::Again } else { Turn::Done });
        }
        self.data_to_guest(slot, ring)
    }

    /// Fills some buffers with what the host says.
    fn data_to_guest(&mut self, slot: usize, ring: &mut Vring) -> Result<Turn, VringError> {
        let Some(stream) = self.table.get(slot) else { return Ok(Turn::Done) };
        let most = stream.credit().min(QUANTUM);
        self.vector.restart(ring.ram(), Direction::Write);
        let (mut taken, mut room) = (0, 0u32);
        let wanted = stream.appetite.clamp(1, BATCH);
        while taken < wanted && room < most {
            let Some(chain) = self.chains.get_mut(taken) else { break };
            if !ring.next(chain) {
                break;
            }
            taken = taken.saturating_add(1);
            for segment in part(chain.writable(), HEADER, most.saturating_sub(room)) {
                self.vector.push(segment.address, u64::from(segment.len))?;
                room = room.saturating_add(segment.len);
            }
        }
        if taken == 0 {
            return Ok(Turn::NoBuffer);
        }
        let received = match &stream.socket {
            _ if room == 0 => Err(io::ErrorKind::Interrupted.into()),
            Some(socket) => self.vector.receive_from(socket.as_fd()),
            None => Ok(0),
        };
        self.vector.complete(0);
        let count = received.as_ref().map_or(0, |count| u32::try_from(*count).unwrap_or(0));
        self.deliver(slot, ring, taken, (count, room))?;
        let Some(stream) = self.table.get(slot) else { return Ok(Turn::Done) };
        match received {
            Ok(0) => {
                stream.host_done();
                Ok(Turn::Again)
            }
            Ok(_) => Ok(Turn::Again),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.readable = false;
                Ok(if stream.control().is_some() { Turn::Again } else { Turn::Done })
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Turn::Again),
            Err(_) => {
                self.break_off(slot);
                Ok(Turn::Done)
            }
        }
    }

    /// Finishes the buffers that were filled, and puts the others back.
    fn deliver(
        &mut self,
        slot: usize,
        ring: &mut Vring,
        taken: usize,
        (count, room): (u32, u32),
    ) -> Result<(), VringError> {
        let Some(stream) = self.table.get(slot) else { return Ok(()) };
        let (mut left, mut most, mut used) = (count, room, 0usize);
        for chain in self.chains.iter().take(taken) {
            let own = chain.writable_bytes().saturating_sub(HEADER).min(most);
            if own == 0 {
                // Too short to be of any use.
                ring.finish(chain.head(), 0);
                used = used.saturating_add(1);
                continue;
            }
            most = most.saturating_sub(own);
            let len = own.min(left);
            if len == 0 {
                break;
            }
            left = left.saturating_sub(len);
            let header = stream.packet(self.guest_cid, Operation::Data, len);
            stream.told(Operation::Data);
            stream.sent(len);
            scatter(chain.writable(), &header.bytes(), ring.ram())?;
            ring.finish(chain.head(), HEADER.saturating_add(len));
            used = used.saturating_add(1);
        }
        for chain in self.chains.iter().take(taken).skip(used).rev() {
            ring.put_back(chain.head());
        }
        stream.appetite = if count == room { taken.saturating_mul(2) } else { used.max(1) };
        Ok(())
    }
}
