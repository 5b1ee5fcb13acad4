//! All connections: found by their ports, by their socket's events, or because it is their turn.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use super::stream::{State, Stream};

/// Most connections at a time.
pub const MAX_STREAMS: usize = 1024;
/// Host ports from here on are given to connections that the host begins.
const FIRST_PORT: u32 = 1 << 30;

/// The connections.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Option<Stream>>,
    free: Vec<usize>,
    /// By guest port and host port.
    ports: BTreeMap<(u32, u32), usize>,
    ready: VecDeque<usize>,
    serial: u32,
    next_port: u32,
    /// No connection is given up before this.
    deadline: Option<Instant>,
}

impl Table {
    /// An empty table. Host ports are given from a place that follows from `seed`, so that those of a predecessor are not
    /// given again at once.
    pub fn new(seed: u32) -> Self {
        Self { next_port: seed & (FIRST_PORT - 1), ..Self::default() }
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Adds a connection; `None`: there are too many.
    pub fn insert(&mut self, mut stream: Stream) -> Option<usize> {
        self.serial = self.serial.wrapping_add(1);
        stream.serial = self.serial;
        if let Some(deadline) = stream.deadline {
            self.note(deadline);
        }
        if let Some(slot) = self.free.pop() {
            *self.slots.get_mut(slot)? = Some(stream);
            return Some(slot);
        }
        let slot = self.slots.len();
        if slot >= MAX_STREAMS {
            return None;
        }
        self.slots.push(Some(stream));
        Some(slot)
    }

    /// The connection of a slot.
    pub fn get(&mut self, slot: usize) -> Option<&mut Stream> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// The slot of a connection by its ports.
    pub fn find(&self, guest_port: u32, host_port: u32) -> Option<usize> {
        self.ports.get(&(guest_port, host_port)).copied()
    }

    /// A connection is to be found by its ports from now on.
    pub fn bind(&mut self, slot: usize) {
        if let Some(stream) = self.slots.get(slot).and_then(Option::as_ref) {
            self.ports.insert((stream.guest_port, stream.host_port), slot);
        }
    }

    /// It is not found by its ports any more.
    pub fn unbind(&mut self, slot: usize) {
        if let Some(stream) = self.slots.get(slot).and_then(Option::as_ref)
            && self.ports.get(&(stream.guest_port, stream.host_port)) == Some(&slot)
        {
            self.ports.remove(&(stream.guest_port, stream.host_port));
        }
    }

    /// A host port that no connection to this port of the guest has.
    pub fn new_port(&mut self, guest_port: u32) -> u32 {
        loop {
            // Never VMADDR_PORT_ANY; more ports than connections, so that it ends.
            let port = FIRST_PORT | self.next_port;
            self.next_port = self.next_port.wrapping_add(1) & (FIRST_PORT - 1);
            if self.find(guest_port, port).is_none() {
                return port;
            }
        }
    }

    /// Takes a connection away.
    pub fn remove(&mut self, slot: usize) -> Option<Stream> {
        self.unbind(slot);
        let stream = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(stream)
    }

    /// The event data of a connection's socket.
    pub fn token(&mut self, slot: usize) -> u64 {
        let serial = self.get(slot).map_or(0, |stream| stream.serial);
        u64::from(serial) << 32 | slot as u64
    }

    /// The slot that event data mean; `None`: that connection has ended.
    pub fn by_token(&mut self, token: u64) -> Option<usize> {
        let slot = usize::try_from(token & 0xFFFF_FFFF).ok()?;
        (self.get(slot)?.serial == u32::try_from(token >> 32).ok()?).then_some(slot)
    }

    /// The oldest connection that waits for the connector's answer about a port.
    pub fn connecting(&self, port: u32) -> Option<usize> {
        let waits = |stream: &Stream| stream.state == State::Connecting && stream.host_port == port;
        let waiting = self.slots.iter().enumerate();
        let waiting =
            waiting.filter_map(|(slot, stream)| stream.as_ref().filter(|it| waits(it)).map(|it| (slot, it)));
        waiting.min_by_key(|(_, stream)| stream.serial).map(|(slot, _)| slot)
    }

    /// A connection has something for the guest; it gets its turn after those that wait.
    pub fn wake(&mut self, slot: usize) {
        if let Some(stream) = self.get(slot)
            && !std::mem::replace(&mut stream.queued, true)
        {
            self.ready.push_back(slot);
        }
    }

    /// Puts the connection back whose turn it was.
    pub fn wake_first(&mut self, slot: usize) {
        if let Some(stream) = self.get(slot)
            && !std::mem::replace(&mut stream.queued, true)
        {
            self.ready.push_front(slot);
        }
    }

    /// Whose turn it is.
    pub fn next_ready(&mut self) -> Option<usize> {
        loop {
            let slot = self.ready.pop_front()?;
            // The place may have passed to another, that is not or no longer in the queue.
            if self.get(slot).is_some_and(|stream| std::mem::take(&mut stream.queued)) {
                return Some(slot);
            }
        }
    }

    /// Whether a connection has something for the guest.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    fn note(&mut self, deadline: Instant) {
        self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    /// Gives a connection a deadline, or takes it away.
    pub fn set_deadline(&mut self, slot: usize, deadline: Option<Instant>) {
        if let Some(stream) = self.get(slot) {
            stream.deadline = deadline;
        }
        if let Some(deadline) = deadline {
            self.note(deadline);
        }
    }

    /// When somebody must be given up, at the earliest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The connections whose time is over.
    pub fn expired(&mut self, now: Instant) -> Vec<usize> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        let (mut late, mut next) = (Vec::new(), None::<Instant>);
        for (slot, stream) in self.slots.iter().enumerate() {
            match stream.as_ref().and_then(|stream| stream.deadline) {
                Some(deadline) if deadline <= now => late.push(slot),
                Some(deadline) => next = Some(next.map_or(deadline, |earlier| earlier.min(deadline))),
                None => {}
            }
        }
        self.deadline = next;
        late
    }

    /// Every slot that has a connection.
    pub fn slots(&self) -> Vec<usize> {
        self.slots.iter().enumerate().filter_map(|(slot, stream)| stream.as_ref().map(|_| slot)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn open(table: &mut Table, guest_port: u32, host_port: u32) -> usize {
        let stream = Stream::new(State::Open, (guest_port, host_port), None, table.len());
        let slot = table.insert(stream).unwrap();
        table.bind(slot);
        slot
    }

    #[test]
    fn a_place_that_was_given_up_does_not_answer_for_its_former_owner() {
        let mut table = Table::new(7);
        let slot = open(&mut table, 1, 2);
        let token = table.token(slot);
        table.wake(slot);
        assert_eq!(table.by_token(token), Some(slot));
        table.remove(slot).unwrap();
        assert_eq!((table.find(1, 2), table.by_token(token), table.len()), (None, None, 0));
        assert_eq!(open(&mut table, 3, 4), slot);
        assert_eq!((table.by_token(token), table.next_ready()), (None, None));
    }

    #[test]
    fn turns_go_round_and_nobody_has_two() {
        let mut table = Table::new(0);
        let slots = [open(&mut table, 1, 1), open(&mut table, 2, 1), open(&mut table, 3, 1)];
        slots.iter().chain(&slots).for_each(|slot| table.wake(*slot));
        assert_eq!(table.next_ready(), Some(slots[0]));
        table.wake(slots[0]);
        let order: Vec<usize> = std::iter::from_fn(|| table.next_ready()).collect();
        assert_eq!(order, [slots[1], slots[2], slots[0]]);
    }

    #[test]
    fn there_is_a_bound_and_ports_are_not_given_twice() {
        let mut table = Table::new(u32::MAX >> 2);
        let first = table.new_port(9);
        open(&mut table, 9, first);
        assert_eq!((first, table.new_port(9)), (u32::MAX >> 1, FIRST_PORT));
        for port in 1..MAX_STREAMS {
            open(&mut table, u32::try_from(port).unwrap(), 1);
        }
        assert!(table.insert(Stream::new(State::Open, (0, 0), None, 0)).is_none());
    }

    #[test]
    fn who_is_late_is_found_once() {
        let mut table = Table::new(0);
        let (now, slot, other) = (Instant::now(), open(&mut table, 1, 1), open(&mut table, 2, 1));
        table.set_deadline(slot, Some(now));
        table.set_deadline(other, Some(now + Duration::from_secs(5)));
        assert_eq!(table.expired(now), [slot]);
        table.set_deadline(slot, None);
        assert_eq!(table.deadline(), Some(now + Duration::from_secs(5)));
        assert!(table.expired(now + Duration::from_secs(1)).is_empty());
    }
}
