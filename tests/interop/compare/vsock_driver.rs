//! A driver of a vsock without a guest: rings, packets and credit as Linux 6.1 has them (drivers virtio_vsock and
//! virtio_transport_common), the same for every back end. It sleeps until its interrupts.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vhost_user::frontend::{
    Frontend, Limits, MemoryRegion, RingAddresses, SUPPORTED_PROTOCOL_FEATURES,
};
use bulkhead_ipc::vhost_user::message::VHOST_USER_F_PROTOCOL_FEATURES;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::{Bytes, GuestAddress};

use crate::traffic::text;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Guest RAM, and where the buffers of both directions lie; below are the rings.
const RAM: u64 = 64 << 20;
const IN: u64 = 16 << 20;
const OUT: u64 = 32 << 20;
/// Entries of a ring, two for each packet: header and data.
const SIZE: u16 = 256;
const PACKETS: u16 = SIZE / 2;
/// Bytes of a header, of a buffer to receive, and of a packet that is sent, at most.
const HEADER: u32 = 44;
const PAGE: u32 = 4096;
pub const LARGEST: u32 = 64 << 10;
/// Bytes that a connection keeps.
const WINDOW: u32 = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(10);

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
const RESET: u16 = 3;
pub const DATA: u16 = 5;
const UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A queue; the packet of slot `n` has the descriptors `2n` and `2n + 1`.
struct Ring {
    base: u64,
    kick: EventFd,
    call: EventFd,
    available: u16,
    /// Up to here the device was told.
    kicked: u16,
    used: u16,
    event_idx: bool,
}

impl Ring {
    fn new(index: u16) -> Self {
        let eventfd =
            || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        let base = 0x10_0000 + u64::from(index) * 0x1_0000;
        Self { base, kick: eventfd(), call: eventfd(), available: 0, kicked: 0, used: 0, event_idx: true }
    }

    fn addresses(&self) -> RingAddresses {
        let base = self.base;
        RingAddresses { descriptors: base, available: base + 0x4000, used: base + 0x8000 }
    }

    /// Makes the packet of a slot available: its header at `address`, `len` bytes at `data`.
    fn offer(&mut self, ram: &GuestRam, slot: u16, address: u64, (data, len): (u64, u32), writes: u16) {
        let head = slot * 2;
        let memory = ram.memory();
        let more = if len > 0 { NEXT } else { 0 };
        for (index, entry) in
            [(head, (address, HEADER, writes | more, head + 1)), (head + 1, (data, len, writes, 0))]
        {
            let (address, len, flags, next) = entry;
            let low = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
            let at = self.base + u64::from(index) * 16;
            memory.write_obj(address.to_le(), GuestAddress(at)).unwrap();
            memory.write_obj(low.to_le(), GuestAddress(at + 8)).unwrap();
        }
        let place = self.base + 0x4004 + u64::from(self.available % SIZE) * 2;
        memory.write_obj(head, GuestAddress(place)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.store(self.available, GuestAddress(self.base + 0x4002), Ordering::Release).unwrap();
    }

    /// Tells the device of what is new, if it wants to hear of it.
    fn tell(&mut self, ram: &GuestRam) {
        fence(Ordering::SeqCst);
        let (new, old) = (self.available, self.kicked);
        let word =
            |at: u64| ram.memory().load::<u16>(GuestAddress(self.base + at), Ordering::Acquire).unwrap();
        let wanted = if self.event_idx {
            let event = word(0x8004 + u64::from(SIZE) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            new != old && word(0x8000) & 1 == 0
        };
        self.kicked = new;
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// The slot of the next packet that the device is done with.
    fn finished(&mut self, ram: &GuestRam) -> Option<u16> {
        let memory = ram.memory();
        let used: u16 = memory.load(GuestAddress(self.base + 0x8002), Ordering::Acquire).unwrap();
        if used == self.used {
            return None;
        }
        let entry = self.base + 0x8004 + u64::from(self.used % SIZE) * 8;
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some(u16::try_from(head / 2).unwrap())
    }

    /// Asks for an interrupt at the next packet.
    fn arm(&self, ram: &GuestRam) {
        let place = GuestAddress(self.base + 0x4004 + u64::from(SIZE) * 2);
        ram.memory().store(self.used, place, Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
    }

    fn has_news(&self, ram: &GuestRam) -> bool {
        let used: u16 = ram.memory().load(GuestAddress(self.base + 0x8002), Ordering::Acquire).unwrap();
        used != self.used
    }
}

/// Ports of guest and host.
pub type Ports = (u32, u32);

/// The header of a packet from the device, as far as it matters.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub operation: u16,
    pub ports: Ports,
    pub len: u32,
}

/// A connection as the guest sees it.
#[derive(Clone, Copy, Debug, Default)]
struct Credit {
    sent: u32,
    peer_window: u32,
    peer_forwarded: u32,
    received: u32,
    told: u32,
}

/// A driver of all three queues.
pub struct Driver {
    // Its end is the end of the connection.
    _frontend: Frontend,
    ram: GuestRam,
    rings: [Ring; 3],
    cid: u64,
    free: Vec<u16>,
    /// By the ports of guest and host.
    credits: HashMap<Ports, Credit>,
    /// The device is to be told of buffers to receive.
    posted: bool,
}

impl Driver {
    pub fn new(socket: &Path, cid: u64) -> Result<Self, String> {
        let mut frontend =
            Frontend::new("vsock", UnixStream::connect(socket).map_err(text)?, Limits::default());
        let ram = GuestRam::create(RAM).map_err(text)?;
        frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).map_err(text)?;
        let event_idx = frontend.offered_features() & EVENT_IDX;
        frontend.set_features(VERSION_1 | event_idx | VHOST_USER_F_PROTOCOL_FEATURES).map_err(text)?;
        let regions: Vec<_> = ram.regions().map(MemoryRegion::from).collect();
        frontend.set_memory(&regions).map_err(text)?;
        let mut rings = [0, 1, 2].map(Ring::new);
        // Pages that nobody has touched would be paid for by the first to run.
        ram.memory().write_slice(&vec![0x5A; 48 << 20], GuestAddress(IN)).map_err(text)?;
        let mut driver = Self {
            ram,
            rings: std::mem::replace(&mut rings, [0, 1, 2].map(Ring::new)),
            cid,
            free: (0..PACKETS).collect(),
            credits: HashMap::new(),
            posted: false,
            _frontend: frontend,
        };
        driver.rings.iter_mut().for_each(|ring| ring.event_idx = event_idx != 0);
        (0..PACKETS).for_each(|slot| driver.post(slot));
        for (index, ring) in (0..).zip(&driver.rings) {
            let frontend = &mut driver._frontend;
            let mut start = || {
                frontend.set_vring_num(index, SIZE)?;
                frontend.set_vring_base(index, 0)?;
                frontend.set_vring_addr(index, &ring.addresses(), None)?;
                frontend.set_vring_call(index, Some(ring.call.as_fd()))?;
                frontend.set_vring_kick(index, ring.kick.as_fd())?;
                frontend.set_vring_enable(index, true)
            };
            start().map_err(text)?;
        }
        driver.rings[0].tell(&driver.ram);
        Ok(driver)
    }

    fn post(&mut self, slot: u16) {
        let address = IN + u64::from(slot) * 2 * u64::from(PAGE);
        self.rings[0].offer(&self.ram, slot, address, (address + u64::from(PAGE), PAGE), WRITE);
        self.posted = true;
    }

    /// Another connection.
    pub fn begin(&mut self, ports: Ports) {
        self.credits.insert(ports, Credit::default());
    }

    /// Ends a connection.
    pub fn end(&mut self, ports: Ports) {
        self.send(ports, RESET, 0);
        self.flush();
        self.credits.remove(&ports);
    }

    /// Bytes that may be sent now.
    pub fn credit(&self, ports: Ports) -> u32 {
        let room = |it: &Credit| it.peer_window.saturating_sub(it.sent.wrapping_sub(it.peer_forwarded));
        self.credits.get(&ports).map_or(0, room)
    }

    /// Sends a packet with `len` bytes of anything. False: no slot is free.
    pub fn send(&mut self, ports: Ports, operation: u16, len: u32) -> bool {
        let Some(credit) = self.credits.get_mut(&ports) else { return false };
        let Some(slot) = self.free.pop() else { return false };
        let mut header = [0; HEADER as usize];
        header[..8].copy_from_slice(&self.cid.to_le_bytes());
        header[8] = 2;
        for (at, field) in [
            (16, ports.0),
            (20, ports.1),
            (24, len),
            (28, 1 | u32::from(operation) << 16),
            (36, WINDOW),
            (40, credit.received),
        ] {
            header[at..at + 4].copy_from_slice(&field.to_le_bytes());
        }
        (credit.sent, credit.told) = (credit.sent.wrapping_add(len), credit.received);
        let address = OUT + u64::from(slot) * (u64::from(LARGEST) + u64::from(PAGE));
        self.ram.memory().write_slice(&header, GuestAddress(address)).unwrap();
        self.rings[1].offer(&self.ram, slot, address, (address + u64::from(PAGE), len), 0);
        true
    }

    /// Tells the device of all that was sent and given.
    pub fn flush(&mut self) {
        self.rings[1].tell(&self.ram);
        if std::mem::take(&mut self.posted) {
            self.rings[0].tell(&self.ram);
        }
    }

    /// The next packet, credit counted and the buffer given back.
    pub fn receive(&mut self) -> Option<Packet> {
        while let Some(slot) = self.rings[1].finished(&self.ram) {
            self.free.push(slot);
        }
        let slot = self.rings[0].finished(&self.ram)?;
        let mut header = [0; HEADER as usize];
        let address = GuestAddress(IN + u64::from(slot) * 2 * u64::from(PAGE));
        self.ram.memory().read_slice(&mut header, address).unwrap();
        self.post(slot);
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let operation = u16::from_le_bytes([header[30], header[31]]);
        let packet = Packet { operation, ports: (word(20), word(16)), len: word(24) };
        let Some(credit) = self.credits.get_mut(&packet.ports) else { return Some(packet) };
        (credit.peer_window, credit.peer_forwarded) = (word(36), word(40));
        if packet.operation == DATA {
            credit.received = credit.received.wrapping_add(packet.len);
        }
        // As Linux: when what the device may believe to be free becomes less than a large packet.
        let due = WINDOW - credit.received.wrapping_sub(credit.told) < LARGEST;
        if due || packet.operation == CREDIT_REQUEST {
            self.send(packet.ports, UPDATE, 0);
        }
        Some(packet)
    }

    /// Sleeps until something is received, or something that was sent is done with.
    pub fn sleep(&mut self) -> Result<(), String> {
        self.flush();
        self.rings[..2].iter().for_each(|ring| ring.arm(&self.ram));
        if self.rings[..2].iter().any(|ring| ring.has_news(&self.ram)) {
            return Ok(());
        }
        let mut fds =
            [0, 1].map(|index: usize| PollFd::new(self.rings[index].call.as_fd(), PollFlags::POLLIN));
        let count = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).map_err(text)?;
        let rang = fds.map(|fd| fd.any().unwrap_or(false));
        for (ring, rang) in self.rings.iter().zip(rang) {
            if rang {
                let _ = ring.call.read();
            }
        }
        if count == 0 { Err("the device is silent".to_owned()) } else { Ok(()) }
    }

    /// Waits for a packet of this kind; others that come before are only counted.
    pub fn expect(&mut self, operation: u16) -> Result<Packet, String> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match self.receive() {
                Some(packet) if packet.operation == operation => return Ok(packet),
                Some(packet) if packet.operation == RESET && self.credits.contains_key(&packet.ports) => {
                    return Err("the connection was reset".to_owned());
                }
                Some(_) => {}
                None => self.sleep()?,
            }
        }
        Err(format!("no packet {operation} came"))
    }
}
