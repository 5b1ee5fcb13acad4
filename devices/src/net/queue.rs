//! A pair of queues on its thread: packets out of the guest, packets into it, and for the first pair the control queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use bulkhead_ipc::memory::{Direction, LentVector};
use bulkhead_ipc::tap::{VNET_HEADER, attach_tap_queue, set_tap_offloads};
use bulkhead_ipc::vhost_user::backend::{Chain, QueueWorker, Segment, Vring, VringError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tracing::{info, warn};
use vm_memory::{Bytes, GuestAddress};

use super::config::{self, MERGEABLE};
use super::control::{self, Command};
use super::filter::LOOKS_AT;
use super::inbox::{Inbox, Input};
use super::outbox::Outbox;
use super::port::{LARGEST, Output, Pieces, Port, SMALLEST, send_to_tap};
use super::{Peer, Shared};
use crate::idle::{self, Idle};

/// Tags of the epoll; a ring's is its index.
const WAKE: u64 = u64::MAX;
const PORT: u64 = u64::MAX - 1;
/// Events handled together.
const EVENTS: usize = 8;
/// Most packets of a direction before the other, and the control thread, get their turn.
const BATCH: u32 = 256;
/// Most packets of the guest whose buffers are given back together.
const TOGETHER: usize = 64;
/// Bytes of a packet that are copied before it is judged and sent.
const BEGINNING: usize = VNET_HEADER + LOOKS_AT;
/// Most pieces of a packet that the kernel takes at once, with one for the beginning (IOV_MAX).
const PIECES: usize = 1023;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u32 = 10;

/// What became of a packet for the guest.
enum Placed {
    Done,
    /// It can never be placed.
    Dropped,
    /// The guest has not enough buffers now.
    Starved,
}

/// A pair of queues.
pub struct Pair {
    shared: Arc<Shared>,
    number: u16,
    port: Port,
    arrivals: Option<Receiver<Peer>>,
    epoll: Option<Epoll>,
    receive: Option<Vring>,
    transmit: Option<Vring>,
    control: Option<Vring>,
    inbox: Inbox,
    outbox: Outbox,
    /// Number of the way out.
    way: u64,
    /// A ring has run: no predecessor works any more.
    begun: bool,
    /// Something may be there to be read.
    readable: bool,
    /// The port has no room; its event brings us back.
    full: bool,
    /// The epoll waits for room.
    waits_for_room: bool,
    /// The guest has no buffer for the packet in the inbox.
    starved: bool,
    /// The epoll does not wait for packets: each that comes would wake this thread, which can do nothing with it.
    deaf: bool,
    /// A packet has come while the guest had no buffer.
    in_vain: bool,
    /// The packet in the inbox has had its share of the limit.
    paid_in: bool,
    /// So has the one that the port had no room for.
    paid_out: bool,
    /// A limit lets the next packet through at this moment.
    resume: Option<Instant>,
    more: bool,
    idle: Option<Idle>,
    chain: Chain,
    first: Chain,
    done: Vec<(u16, u32)>,
    lent: Option<LentVector>,
    pieces: Pieces,
}

/// Copies what lies in `segments` from `skip` bytes on; says whether all of `bytes` was there.
fn gather(ring: &Vring, segments: &[Segment], skip: usize, bytes: &mut [u8]) -> Result<bool, VringError> {
    let outside = |_| VringError::Request("a packet does not lie in guest memory");
    let (mut skip, mut done) = (skip as u64, 0usize);
    for segment in segments {
        let len = u64::from(segment.len);
        if skip >= len {
            skip = skip.saturating_sub(len);
            continue;
        }
        let room = bytes.len().saturating_sub(done);
        let part = usize::try_from(len.saturating_sub(skip)).unwrap_or(usize::MAX).min(room);
        let Some(place) = bytes.get_mut(done..done.saturating_add(part)) else { break };
        let address = GuestAddress(segment.address.saturating_add(skip));
        ring.ram().memory().read_slice(place, address).map_err(outside)?;
        (skip, done) = (0, done.saturating_add(part));
        if done == bytes.len() {
            break;
        }
    }
    Ok(done == bytes.len())
}

/// Copies `bytes` to `segments` from `skip` bytes on, as far as there is room.
fn scatter(ring: &Vring, segments: &[Segment], skip: u32, mut bytes: &[u8]) -> Result<(), VringError> {
    let outside = |_| VringError::Request("a receive buffer does not lie in guest memory");
    let mut skip = skip;
    for segment in segments {
        if skip >= segment.len {
            skip = skip.saturating_sub(segment.len);
            continue;
        }
        let room = usize::try_from(segment.len.saturating_sub(skip)).unwrap_or(usize::MAX);
        let (part, rest) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
        let address = GuestAddress(segment.address.saturating_add(skip.into()));
        ring.ram().memory().write_slice(part, address).map_err(outside)?;
        (bytes, skip) = (rest, 0);
        if bytes.is_empty() {
            break;
        }
    }
    Ok(())
}

/// The part of header and packet that begins at `offset`, as the two slices it lies in.
fn part<'a>(header: &'a [u8], body: &'a [u8], offset: usize, len: usize) -> (&'a [u8], &'a [u8]) {
    let head = header.get(offset.min(header.len())..).unwrap_or_default();
    let head = head.get(..len.min(head.len())).unwrap_or_default();
    let start = offset.saturating_sub(header.len());
    let end = start.saturating_add(len.saturating_sub(head.len())).min(body.len());
    (head, body.get(start..end).unwrap_or_default())
}

impl Pair {
    pub(super) fn new(
        shared: Arc<Shared>,
        number: u16,
        port: Port,
        (inbox, outbox): (Inbox, Outbox),
        arrivals: Option<Receiver<Peer>>,
    ) -> Self {
        let way = shared.settings.way;
        Self {
            shared,
            number,
            port,
            arrivals,
            epoll: None,
            receive: None,
            transmit: None,
            control: None,
            inbox,
            outbox,
            way,
            begun: false,
            readable: true,
            full: false,
            waits_for_room: false,
            starved: false,
            deaf: false,
            in_vain: false,
            paid_in: false,
            paid_out: false,
            resume: None,
            more: false,
            idle: None,
            chain: Chain::new(),
            first: Chain::new(),
            done: Vec::new(),
            lent: None,
            pieces: Pieces::default(),
        }
    }

    /// Takes a packet's share of the limit of its direction, seen from guest memory. False: not now, and `resume` says when. The
    /// earliest such moment counts.
    fn pay(&mut self, direction: Direction, len: usize) -> bool {
        let Some(limit) = self.shared.limit(direction) else { return true };
        let Err(wait) = limit.try_take(len as u64) else { return true };
        let now = Instant::now();
        let at = now.checked_add(wait).unwrap_or(now);
        self.resume = Some(self.resume.map_or(at, |before| before.min(at)));
        false
    }

    fn watch(&mut self) -> io::Result<()> {
        let (Some(epoll), Some(fd)) = (&self.epoll, self.port.fd()) else { return Ok(()) };
        let mut flags = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        flags.set(EpollFlags::EPOLLIN, !self.deaf);
        flags.set(EpollFlags::EPOLLOUT, self.full || !self.outbox.is_empty());
        self.waits_for_room = flags.contains(EpollFlags::EPOLLOUT);
        match epoll.modify(fd, &mut EpollEvent::new(flags, PORT)) {
            Err(Errno::ENOENT) => Ok(epoll.add(fd, EpollEvent::new(flags, PORT))?),
            result => Ok(result?),
        }
    }

    fn replace_peer(&mut self, peer: Option<OwnedFd>) {
        if let (Some(epoll), Some(fd)) = (&self.epoll, self.port.fd()) {
            let _ = epoll.delete(fd);
        }
        if let Port::Stream(place) | Port::Datagrams(place) = &mut self.port {
            *place = peer;
        }
        if self.begun {
            self.inbox.restart(self.way);
            self.outbox.restart(self.way);
        }
        (self.full, self.paid_in, self.paid_out, self.readable) = (false, false, false, true);
        (self.starved, self.deaf) = (false, false);
    }

    fn lose_peer(&mut self) {
        info!("the peer has gone: packets are dropped until there is another");
        self.port.hang_up();
        self.replace_peer(None);
    }

    /// Sends the packet in `self.chain`.
    fn send(&mut self, ring: &Vring) -> Result<Output, VringError> {
        let total = usize::try_from(self.chain.readable_bytes()).unwrap_or(usize::MAX);
        let len = total.saturating_sub(VNET_HEADER);
        if !(SMALLEST..=LARGEST).contains(&len) || !self.shared.link.load(Ordering::Relaxed) {
            self.shared.metrics.dropped_out.fetch_add(1, Ordering::Relaxed);
            return Ok(Output::Dropped);
        }
        if !self.paid_out && !self.pay(Direction::Read, len) {
            return Ok(Output::Full);
        }
        self.paid_out = true;
        let mut beginning = [0; BEGINNING];
        let Some(beginning) = beginning.get_mut(..total.min(BEGINNING)) else { return Ok(Output::Dropped) };
        gather(ring, self.chain.readable(), 0, beginning)?;
        let filter = &self.shared.settings.filter;
        let leaves = filter.is_off() || filter.leaves(beginning.get(VNET_HEADER..).unwrap_or_default());
        let output = if leaves { self.pass_on(ring, beginning, len)? } else { Output::Dropped };
        match output {
            Output::Sent => self.shared.metrics.sent(len),
            Output::Dropped | Output::Lost => {
                self.shared.metrics.dropped_out.fetch_add(1, Ordering::Relaxed);
            }
            Output::Full => {}
        }
        self.paid_out = output == Output::Full;
        Ok(output)
    }

    fn pass_on(&mut self, ring: &Vring, beginning: &[u8], len: usize) -> Result<Output, VringError> {
        let segments = self.chain.readable();
        let Port::Tap(tap) = &self.port else {
            let head = beginning.get(VNET_HEADER..).unwrap_or_default();
            let mut failed = None;
            let output = self.port.send(&mut self.outbox, len, |place| {
                let Some((start, rest)) = place.split_at_mut_checked(head.len()) else { return false };
                start.copy_from_slice(head);
                match gather(ring, segments, beginning.len(), rest) {
                    Ok(all) => all,
                    Err(error) => {
                        failed = Some(error);
                        false
                    }
                }
            });
            return failed.filter(|_| output != Output::Lost).map_or(Ok(output), Err);
        };
        if segments.len() > PIECES {
            return Ok(Output::Dropped);
        }
        let lent = self.lent.get_or_insert_with(|| ring.ram().lend_vector(Direction::Read));
        lent.restart(ring.ram(), Direction::Read);
        let mut skip = beginning.len() as u64;
        for segment in segments {
            let (len, skipped) = (u64::from(segment.len), skip.min(segment.len.into()));
            skip = skip.saturating_sub(skipped);
            if len > skipped {
                lent.push(segment.address.saturating_add(skipped), len.saturating_sub(skipped))?;
            }
        }
        let output = send_to_tap(tap, beginning, lent, &mut self.pieces);
        lent.complete(0);
        Ok(output)
    }

    /// Guest to port. Says whether there may be more.
    fn transmit(&mut self) -> bool {
        let Some(mut ring) = self.transmit.take() else { return false };
        let more = self.transmit_from(&mut ring);
        if !self.port.flush(&mut self.outbox) {
            self.lose_peer();
        }
        ring.signal();
        self.transmit = Some(ring);
        more
    }

    fn transmit_from(&mut self, ring: &mut Vring) -> bool {
        let mut budget = BATCH;
        self.done.clear();
        ring.disable_kicks();
        while budget > 0 && ring.next(&mut self.chain) {
            budget = budget.saturating_sub(1);
            let head = self.chain.head();
            match self.send(ring) {
                Ok(Output::Full) => {
                    ring.put_back(head);
                    ring.finish_together(&self.done);
                    // A limit names its moment; without one it is the port that has no room.
                    self.full = self.resume.is_none();
                    return false;
                }
                Ok(output) => {
                    self.done.push((head, 0));
                    if output == Output::Lost {
                        self.lose_peer();
                    }
                }
                Err(error) => {
                    ring.fail(&error);
                    ring.finish(head, 0);
                    return false;
                }
            }
            if self.done.len() >= TOGETHER {
                ring.finish_together(&self.done);
                self.done.clear();
            }
        }
        ring.finish_together(&self.done);
        self.done.clear();
        budget == 0
    }

    /// Before this thread sleeps: the guest's next packet may come at once, and without a kick, or that of the port.
    fn look(&mut self) -> io::Result<()> {
        let (Some(ring), Some(idle), Some(epoll)) = (&mut self.transmit, &mut self.idle, &self.epoll) else {
            return Ok(());
        };
        let mut events = [EpollEvent::empty(); EVENTS];
        let found = idle.look_for_next_or_events(epoll, &mut events, || ring.has_requests())?;
        self.more = found.is_some() || ring.enable_kicks();
        events.iter().take(found.unwrap_or(0)).for_each(|event| self.note(event));
        Ok(())
    }

    /// What has happened to the port.
    fn note(&mut self, event: &EpollEvent) {
        if event.data() != PORT {
            return;
        }
        let flags = event.events();
        self.in_vain |= self.starved && flags == EpollFlags::EPOLLIN;
        self.readable |=
            flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP);
        if flags.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            self.full = false;
        }
    }

    /// Port to guest. Says whether there may be more.
    fn receive(&mut self) -> bool {
        let Some(mut ring) = self.receive.take() else { return false };
        let more = self.receive_to(&mut ring);
        ring.signal();
        self.receive = Some(ring);
        more
    }

    fn receive_to(&mut self, ring: &mut Vring) -> bool {
        self.starved = false;
        for _ in 0..BATCH {
            if !self.readable {
                return false;
            }
            match self.inbox.receive(&self.port) {
                Input::Packet => {}
                Input::Nothing => {
                    self.readable = false;
                    return false;
                }
                Input::Lost => {
                    self.lose_peer();
                    return false;
                }
            }
            let (_, body) = self.inbox.packet();
            let len = body.len();
            let wanted = len >= SMALLEST
                && self.shared.link.load(Ordering::Relaxed)
                && self.shared.settings.filter.enters(body);
            if wanted && !self.paid_in && !self.pay(Direction::Write, len) {
                return false;
            }
            self.paid_in = true;
            match if wanted { self.place(ring) } else { Placed::Dropped } {
                Placed::Done => {
                    self.shared.metrics.received(len);
                }
                Placed::Dropped => {
                    self.shared.metrics.dropped_in.fetch_add(1, Ordering::Relaxed);
                }
                Placed::Starved if ring.enable_kicks() => continue,
                Placed::Starved => {
                    self.starved = true;
                    return false;
                }
            }
            self.inbox.consume();
            self.paid_in = false;
        }
        true
    }

    /// Writes the packet in the inbox into the guest's buffers, one or several of them.
    fn place(&mut self, ring: &mut Vring) -> Placed {
        let (header, body) = self.inbox.packet();
        let total = body.len().saturating_add(VNET_HEADER);
        let mergeable = self.shared.features.load(Ordering::Relaxed) & MERGEABLE != 0;
        let mut offset = 0;
        self.done.clear();
        let outcome = loop {
            if offset >= total {
                break Ok(Placed::Done);
            }
            let chain = if self.done.is_empty() { &mut self.first } else { &mut self.chain };
            if self.done.len() >= usize::from(ring.size()) || !mergeable && !self.done.is_empty() {
                break Ok(Placed::Dropped);
            }
            if !ring.next(chain) {
                break Ok(Placed::Starved);
            }
            let room = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX);
            if room < VNET_HEADER {
                self.done.push((chain.head(), 0));
                break Err(VringError::Request("a receive buffer has no room for a header"));
            }
            let len = room.min(total.saturating_sub(offset));
            let (head, rest) = part(header, body, offset, len);
            self.done.push((chain.head(), u32::try_from(len).unwrap_or(u32::MAX)));
            let skip = u32::try_from(head.len()).unwrap_or(0);
            let written = scatter(ring, chain.writable(), 0, head)
                .and_then(|()| scatter(ring, chain.writable(), skip, rest));
            if let Err(error) = written {
                break Err(error);
            }
            offset = offset.saturating_add(len);
        };
        let buffers = u16::try_from(self.done.len()).unwrap_or(u16::MAX).to_le_bytes();
        let outcome = outcome.and_then(|placed| match placed {
            Placed::Done => scatter(ring, self.first.writable(), NUM_BUFFERS, &buffers).map(|()| placed),
            other => Ok(other),
        });
        match outcome {
            Ok(Placed::Done) => {
                self.inbox.give(ring.used_index());
                ring.finish_together(&self.done);
                Placed::Done
            }
            Ok(other) => {
                self.done.iter().rev().for_each(|(head, _)| ring.put_back(*head));
                other
            }
            Err(error) => {
                ring.fail(&error);
                self.done.iter().for_each(|(head, _)| ring.finish(*head, 0));
                Placed::Starved
            }
        }
    }

    fn serve_control(&mut self) {
        let Some(mut ring) = self.control.take() else { return };
        ring.disable_kicks();
        loop {
            while ring.next(&mut self.chain) {
                let answered = self.command(&ring);
                let head = self.chain.head();
                match answered {
                    Ok(()) => ring.finish(head, 1),
                    Err(error) => {
                        ring.fail(&error);
                        ring.finish(head, 0);
                    }
                }
            }
            ring.signal();
            if !ring.enable_kicks() {
                break;
            }
            ring.disable_kicks();
        }
        self.control = Some(ring);
    }

    fn command(&self, ring: &Vring) -> Result<(), VringError> {
        if self.chain.writable_bytes() == 0 {
            return Err(VringError::Request("a command has no room for an answer"));
        }
        let mut bytes = [0; control::MOST];
        let len = usize::try_from(self.chain.readable_bytes()).unwrap_or(usize::MAX);
        let command = match bytes.get_mut(..len) {
            Some(bytes) => {
                gather(ring, self.chain.readable(), 0, bytes)?;
                control::parse(bytes)
            }
            None => Command::Bad,
        };
        let answer = if self.execute(command) { control::OK } else { control::ERR };
        scatter(ring, self.chain.writable(), 0, &[answer])
    }

    fn execute(&self, command: Command) -> bool {
        let shared = &self.shared;
        match command {
            Command::Filter => true,
            Command::Address(mac) => {
                let free = shared.settings.filter.mac.is_none();
                if free {
                    shared.set_mac(mac);
                }
                free
            }
            Command::Announced => {
                shared.announce.store(false, Ordering::Relaxed);
                true
            }
            Command::Pairs(pairs) => {
                let possible = (1..=shared.settings.pairs).contains(&pairs);
                if possible {
                    shared.use_pairs(pairs);
                }
                possible
            }
            Command::Offloads(bits) => {
                let accepted = shared.features.load(Ordering::Relaxed);
                let offloads = config::tap_offloads(bits);
                let Some(tap) = shared.taps.first().filter(|_| bits & !accepted == 0) else { return false };
                set_tap_offloads(tap.as_fd(), offloads).is_ok()
            }
            Command::Bad => false,
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        while let Some(peer) = self.arrivals.as_ref().and_then(|arrivals| arrivals.try_recv().ok()) {
            if std::mem::replace(&mut self.way, peer.way) == peer.way {
                continue;
            }
            self.replace_peer(Some(peer.socket));
            self.watch()?;
        }
        self.resume = None;
        self.serve_control();
        self.more = !self.full && self.transmit();
        // The limit's moment brings us back to the guest's packets.
        let held_back = self.full || self.resume.is_some();
        self.more |= self.receive();
        let deaf = self.starved && (self.deaf || std::mem::take(&mut self.in_vain));
        let waits = self.full || !self.outbox.is_empty();
        if std::mem::replace(&mut self.deaf, deaf) != deaf || self.waits_for_room != waits {
            self.watch()?;
        }
        if !self.more && !held_back {
            self.look()?;
        }
        Ok(())
    }

    fn slot(&mut self, index: u16) -> Option<&mut Option<Vring>> {
        let receive = self.number.saturating_mul(2);
        if self.shared.is_control(index) {
            Some(&mut self.control)
        } else if index == receive {
            Some(&mut self.receive)
        } else if index == receive.saturating_add(1) {
            Some(&mut self.transmit)
        } else {
            None
        }
    }

    /// Without a control queue the front end says by starting queues which pairs are in use.
    fn attach(&self, index: u16, attach: bool) {
        let own = index == self.number.saturating_mul(2) && self.shared.settings.pairs > 1;
        if own
            && !self.shared.has_control_queue()
            && let Port::Tap(tap) = &self.port
            && let Err(error) = attach_tap_queue(tap.as_fd(), attach)
        {
            warn!(%error, pair = self.number, "a queue of the tap cannot be switched");
        }
    }
}

impl QueueWorker for Pair {
    fn prepare(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(wake, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, WAKE))?;
        let descriptors = vec![epoll.0.as_raw_fd()];
        self.epoll = Some(epoll);
        self.idle = Some(Idle::new());
        self.watch()?;
        Ok(descriptors)
    }

    fn start(&mut self, ring: Vring) -> io::Result<()> {
        let index = ring.index();
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, index.into());
        self.epoll.as_ref().ok_or(io::ErrorKind::NotConnected)?.add(ring.kick(), event)?;
        self.attach(index, true);
        if index == self.number.saturating_mul(2) {
            self.inbox.begin(self.way, ring.used_index());
        }
        self.outbox.begin(self.way);
        self.begun = true;
        *self.slot(index).ok_or(io::ErrorKind::InvalidInput)? = Some(ring);
        self.more = true;
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<Vring> {
        let ring = self.slot(index)?.take_if(|ring| ring.index() == index)?;
        if let Some(epoll) = &self.epoll {
            let _ = epoll.delete(ring.kick());
        }
        self.attach(index, false);
        // The memory that it was for may go.
        self.lent = None;
        Some(ring)
    }

    fn waits_for_host(&self) -> bool {
        self.full || self.resume.is_some()
    }

    fn turn(&mut self) -> io::Result<()> {
        let timeout = match self.resume {
            _ if self.more => EpollTimeout::ZERO,
            None => EpollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
                u16::try_from(left).unwrap_or(u16::MAX).into()
            }
        };
        let mut events = [EpollEvent::empty(); EVENTS];
        let epoll = self.epoll.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let count = idle::arrived(epoll, &mut events, timeout)?;
        events.iter().take(count).for_each(|event| self.note(event));
        self.serve()
    }
}
