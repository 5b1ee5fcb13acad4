//! The thread of a vsock: one epoll for the rings' notifications, the connector and every socket.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::memory::{Direction, GuestRam, LentVector};
use bulkhead_ipc::vhost_user::backend::{Chain, QueueWorker, Vring};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tracing::info;

use super::guest::Held;
use super::packet::Header;
use super::table::Table;
use super::{EVENT, RX, Shared, TX};
use crate::idle::{self, Idle};
use crate::segments;

/// Event data: the wake-up, the connector, and the rings; below are sockets.
const WAKE: u64 = u64::MAX;
const CONNECTOR: u64 = u64::MAX - 1;
const FIRST_RING: u64 = u64::MAX - 16;
/// Events handled before the rings get their turn.
const EVENTS: usize = 64;
/// Buffers of the guest that one connection fills in its turn.
pub(super) const BATCH: usize = 16;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// The state of the thread.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) guest_cid: u64,
    pub(super) connector: Channel,
    shared: Arc<Shared>,
    resets: u32,
    pub(super) epoll: Option<Epoll>,
    pub(super) rx: Option<Vring>,
    pub(super) tx: Option<Vring>,
    event: Option<Vring>,
    pub(super) table: Table,
    /// Resets for connections that are not in the table.
    pub(super) replies: VecDeque<Header>,
    /// The packet from the guest.
    pub(super) chain: Chain,
    /// Buffers of the guest that are filled together.
    pub(super) chains: Vec<Chain>,
    pub(super) vector: LentVector,
    /// Packets of the guest whose bytes go to a socket together.
    pub(super) held: Held,
    /// The connector is watched, so this process serves.
    serves: bool,
    /// No ring has run since the start, or since the driver forgot everything.
    fresh: bool,
    /// The guest is to be told that its connections are gone.
    transport_reset: bool,
    /// There is more to do than was done.
    pub(super) more: bool,
    /// The guest sends and gives no buffer for the answers.
    pub(super) stuck: bool,
    pub(super) idle: Option<Idle>,
}

impl Worker {
    pub(super) fn new(guest_cid: u64, connector: Channel, shared: Arc<Shared>, seed: u32) -> Self {
        Self {
            guest_cid,
            connector,
            shared,
            resets: 0,
            epoll: None,
            rx: None,
            tx: None,
            event: None,
            table: Table::new(seed),
            replies: VecDeque::new(),
            chain: Chain::new(),
            chains: vec![Chain::new(); BATCH],
            vector: GuestRam::empty().lend_vector(Direction::Read),
            held: Held::default(),
            serves: false,
            fresh: true,
            transport_reset: false,
            more: false,
            stuck: false,
            idle: None,
        }
    }

    pub(super) fn epoll(&self) -> io::Result<&Epoll> {
        self.epoll.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn ring(&mut self, index: u16) -> Option<&mut Option<Vring>> {
        match index {
            RX => Some(&mut self.rx),
            TX => Some(&mut self.tx),
            EVENT => Some(&mut self.event),
            _ => None,
        }
    }

    /// The driver has forgotten every connection: so does the host.
    fn forget(&mut self) {
        let resets = self.shared.resets.load(Ordering::Acquire);
        if self.resets == resets {
            return;
        }
        self.resets = resets;
        for slot in self.table.slots() {
            self.remove(slot);
        }
        self.replies.clear();
        (self.fresh, self.transport_reset) = (true, false);
    }

    /// Tells the guest that its connections are gone, when it has given a buffer for events.
    fn tell_reset(&mut self) {
        let Some(ring) = self.event.as_mut().filter(|_| self.transport_reset) else { return };
        while !ring.next(&mut self.chain) {
            if !ring.enable_kicks() {
                return;
            }
        }
        let event = TRANSPORT_RESET.to_le_bytes();
        match segments::scatter(self.chain.writable(), &event, ring.ram()) {
            Ok(()) => {
                ring.finish(self.chain.head(), 4);
                self.transport_reset = false;
                info!("the guest is told that its connections were reset");
            }
            Err(error) => ring.fail(&error.into()),
        }
        ring.signal();
    }

    fn handle(&mut self, event: &EpollEvent) {
        match event.data() {
            CONNECTOR => self.answers(),
            // What is new in the rings is found below, in any case.
            FIRST_RING..=WAKE => {}
            token => {
                if let Some(slot) = self.table.by_token(token) {
                    self.socket_event(slot, event.events());
                }
            }
        }
    }

    /// Before this thread sleeps: the guest's next packet may come at once, and without a kick, or that of a socket. The number of
    /// events, if some have come.
    fn look(&mut self, events: &mut [EpollEvent]) -> io::Result<usize> {
        let (Some(ring), Some(idle)) = (&mut self.tx, &mut self.idle) else { return Ok(0) };
        let Some(epoll) = self.epoll.as_ref().filter(|_| !self.more && !self.stuck) else { return Ok(0) };
        let found = idle.look_for_next_or_events(epoll, events, || ring.has_requests())?;
        self.more = found.is_some() || ring.enable_kicks();
        Ok(found.unwrap_or(0))
    }

    fn timeout(&self) -> EpollTimeout {
        if self.more {
            return EpollTimeout::ZERO;
        }
        // A guest that stands still is not hurried.
        match self.table.deadline().filter(|_| self.rx.is_some()) {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
                EpollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX))
            }
            None => EpollTimeout::NONE,
        }
    }
}

impl QueueWorker for Worker {
    fn prepare(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(wake, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, WAKE))?;
        let mut descriptors = vec![epoll.0.as_fd().as_raw_fd()];
        let wake = wake.try_clone_to_owned()?;
        descriptors.push(wake.as_raw_fd());
        // Workers are prepared once.
        let _ = self.shared.wake.set(wake);
        self.epoll = Some(epoll);
        self.idle = Some(Idle::new());
        Ok(descriptors)
    }

    fn start(&mut self, ring: Vring) -> io::Result<()> {
        self.forget();
        let index = ring.index();
        if self.fresh && ring.next_available() != 0 {
            // Somebody else has served this ring: the guest may have connections of which nothing is known here.
            self.transport_reset = true;
        }
        self.fresh &= index != EVENT;
        let token = FIRST_RING.saturating_add(u64::from(index));
        self.epoll()?.add(ring.kick(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token))?;
        if !self.serves {
            self.epoll()?.add(&self.connector, EpollEvent::new(EpollFlags::EPOLLIN, CONNECTOR))?;
            self.serves = true;
        }
        match self.ring(index) {
            Some(place) => *place = Some(ring),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
        self.more = true;
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<Vring> {
        let ring = self.ring(index)?.take()?;
        if let Some(epoll) = &self.epoll {
            let _ = epoll.delete(ring.kick());
        }
        self.vector.restart(&GuestRam::empty(), Direction::Read);
        Some(ring)
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.look(&mut events)? {
            0 => idle::arrived(self.epoll()?, &mut events, self.timeout())?,
            count => count,
        };
        self.more = count == EVENTS;
        self.forget();
        for event in events.iter().take(count) {
            self.handle(event);
        }
        if self.rx.is_some() {
            for slot in self.table.expired(Instant::now()) {
                self.expire(slot);
            }
        }
        self.tell_reset();
        self.take_packets();
        self.send_packets();
        Ok(())
    }

    fn waits_for_host(&self) -> bool {
        self.stuck
    }
}
