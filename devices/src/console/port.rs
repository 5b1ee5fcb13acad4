//! The two queues of a port: bytes from the guest to its peer, and from the peer to the guest.

use bulkhead_ipc::vhost_user::backend::{Chain, Vring, VringError};
use vm_memory::{Bytes, GuestAddress};

use crate::stream::Peer;

/// Most requests of a queue before the control thread gets its turn.
const BATCH: u32 = 64;
/// Bytes taken from the guest at once.
const PIECE: usize = 1024;
/// Bytes of the guest that are collected before they are written.
const TOGETHER: usize = 4096;

/// A port, served by a worker.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) peer: Peer,
    receive: Chain,
    transmit: Chain,
    /// Of the request in `transmit`: segment, and bytes of it already taken.
    sending: Option<(usize, u32)>,
    /// Where [`Self::sending`] begins in the next request: it was taken before.
    resume: Option<(usize, u32)>,
    /// Requests that are taken and may not be written yet: they are not finished before, so that a successor would write
    /// them again.
    taken: Vec<u16>,
}

impl Port {
    pub(super) fn new(peer: Peer) -> Self {
        let (receive, transmit) = (Chain::new(), Chain::new());
        Self { peer, receive, transmit, sending: None, resume: None, taken: Vec::new() }
    }

    /// A request of the guest waits for the peer.
    pub(super) fn waits(&self) -> bool {
        self.sending.is_some()
    }

    /// Gives up the request that waits for the peer: what the peer has no room for now is lost; the ring must not wait for it.
    pub(super) fn give_up(&mut self, ring: &mut Vring) {
        if self.sending.take().is_some() {
            ring.finish(self.transmit.head(), 0);
            ring.signal();
        }
    }

    /// Puts the request that waits for the peer back into the ring; whoever takes it goes on where it stands.
    pub(super) fn put_back(&mut self, ring: &mut Vring) {
        if let Some(place) = self.sending.take() {
            ring.put_back(self.transmit.head());
            self.resume = Some(place);
        }
    }

    /// Where the next request of the guest was left, if its beginning was taken.
    pub(super) fn place(&self) -> Option<(usize, u32)> {
        self.sending.or(self.resume)
    }

    /// Of the next request of the guest so much was taken before.
    pub(super) fn set_place(&mut self, place: Option<(usize, u32)>) {
        self.resume = place;
    }

    /// Nobody is at the host's end: what the guest says is lost. True: there is more.
    pub(super) fn discard(&mut self, ring: &mut Vring) -> bool {
        if self.sending.take().is_some() {
            ring.finish(self.transmit.head(), 0);
        }
        self.resume = None;
        discard(&mut self.transmit, ring)
    }

    /// Writes what was taken, as far as the peer takes it, and finishes the requests. What it has no room for waits here.
    fn flush(&mut self, ring: &mut Vring) {
        self.peer.flush();
        self.taken.drain(..).for_each(|head| ring.finish(head, 0));
    }

    /// Guest to peer. True: there is more.
    pub(super) fn transmit(&mut self, ring: &mut Vring) -> bool {
        let mut budget = BATCH;
        ring.disable_kicks();
        loop {
            while self.sending.is_some() || ring.next(&mut self.transmit) {
                match self.send(ring) {
                    Ok(true) => {
                        self.taken.push(self.transmit.head());
                        if self.peer.waiting() >= TOGETHER {
                            self.flush(ring);
                        }
                    }
                    Ok(false) => {
                        // No room: an event of the peer, or its patience, brings us back.
                        self.flush(ring);
                        ring.signal();
                        return false;
                    }
                    Err(error) => {
                        self.flush(ring);
                        ring.fail(&error);
                        ring.finish(self.transmit.head(), 0);
                    }
                }
                self.sending = None;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    self.flush(ring);
                    ring.signal();
                    return true;
                }
            }
            self.flush(ring);
            ring.signal();
            if !ring.enable_kicks() {
                return false;
            }
            ring.disable_kicks();
        }
    }

    /// Takes what is left of the request in `transmit`. False: the peer has no room for all of it.
    fn send(&mut self, ring: &Vring) -> Result<bool, VringError> {
        let mut piece = [0; PIECE];
        let (mut index, mut taken) = self.sending.or(self.resume.take()).unwrap_or((0, 0));
        while let Some(segment) = self.transmit.readable().get(index) {
            let left = segment.len.saturating_sub(taken);
            if left == 0 {
                (index, taken) = (index.saturating_add(1), 0);
                continue;
            }
            let len = usize::try_from(left).unwrap_or(PIECE).min(PIECE).min(self.peer.room());
            self.sending = Some((index, taken));
            if len == 0 {
                self.peer.flush();
                if self.peer.room() == 0 {
                    return Ok(false);
                }
                continue;
            }
            let Some(bytes) = piece.get_mut(..len) else { return Ok(true) };
            let address = segment.address.saturating_add(u64::from(taken));
            let outside = |_| VringError::Request("a console's output does not lie in guest memory");
            ring.ram().memory().read_slice(bytes, GuestAddress(address)).map_err(outside)?;
            self.peer.say(bytes);
            if self.peer.waiting() >= TOGETHER {
                self.peer.flush();
            }
            taken = taken.saturating_add(u32::try_from(len).unwrap_or(left));
        }
        Ok(true)
    }

    /// Peer to guest, as long as there are bytes and buffers. True: there is more.
    pub(super) fn receive(&mut self, ring: &mut Vring) -> bool {
        let mut budget = BATCH;
        while !self.peer.input(0, PIECE, Some(ring.used_index())).is_empty() {
            if !ring.next(&mut self.receive) {
                // The guest has no buffer: it kicks when it has one.
                if ring.enable_kicks() {
                    continue;
                }
                break;
            }
            let head = self.receive.head();
            let Some(segment) = self.receive.writable().first() else {
                ring.finish(head, 0);
                // Nothing is finished but not shown when bytes are given.
                ring.publish();
                continue;
            };
            let used = ring.used_index();
            let most = usize::try_from(segment.len).unwrap_or(PIECE).min(PIECE);
            let bytes = self.peer.input(0, most, Some(used));
            let count = bytes.len();
            if ring.ram().memory().write_slice(bytes, GuestAddress(segment.address)).is_err() {
                ring.fail(&VringError::Request("a console's buffer does not lie in guest memory"));
                ring.finish(head, 0);
                break;
            }
            self.peer.give(count, used, || {
                ring.finish(head, u32::try_from(count).unwrap_or(0));
                ring.publish();
            });
            budget = budget.saturating_sub(1);
            if budget == 0 {
                ring.signal();
                return true;
            }
        }
        ring.signal();
        false
    }
}

/// Finishes what the driver says without a look at it. True: there is more.
pub(super) fn discard(chain: &mut Chain, ring: &mut Vring) -> bool {
    for _ in 0..BATCH {
        if !ring.next(chain) {
            ring.signal();
            return ring.enable_kicks();
        }
        ring.finish(chain.head(), 0);
    }
    ring.signal();
    true
}
