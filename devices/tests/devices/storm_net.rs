//! Kills of a network card's process: at each kind of way out no packet is lost, and none comes to the guest twice.
//!
//! Contains unsafe code: a raw socket of the kernel's side of a tap.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, NetBackend, NetConfig};
use bulkhead_ipc::tap::Tap;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socket};

use crate::driver::{BUFFERS, Driver, Random};
use crate::net::{config, memory, skipped};
use crate::storm::{OTHER_KILLS, Victim, check_pause};

/// Room for a frame in the guest.
const ROOM: u64 = 4096;
/// Bytes of a frame.
const FRAME: usize = 1000;
/// Of `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;
/// Frames in flight, and buffers that wait for one.
pub const DEPTH: u64 = 32;
/// Where buffers for frames to the guest lie; those from it lie before.
const IN: u64 = BUFFERS + DEPTH * ROOM;
/// An Ethernet type for experiments.
const TYPE: [u8; 2] = [0x88, 0xb5];
/// Frames on their way to the guest at the most: a tap drops what it has no room for.
const AHEAD: u64 = 100;

/// What a frame of this number looks like.
fn frame(number: u64) -> Vec<u8> {
    let seed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (0..FRAME as u64 / 8).flat_map(|word| seed.wrapping_add(word).to_le_bytes());
    let mut bytes: Vec<u8> = words.collect();
    bytes[..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1]);
    bytes[12..14].copy_from_slice(&TYPE);
    bytes[14..22].copy_from_slice(&number.to_le_bytes());
    // A tap's frame that ends like the mark of the room for it.
    bytes[FRAME - 3..].fill(0xA5);
    bytes
}

/// The number of a frame of ours.
fn number_of(bytes: &[u8]) -> Option<u64> {
    (bytes[12..14] == TYPE).then(|| {
        let number = u64::from_le_bytes(bytes[14..22].try_into().unwrap());
        assert!(bytes == frame(number), "a corrupted frame");
        number
    })
}

/// The far end of a network card.
enum Wire {
    Datagrams(UnixDatagram),
    Stream {
        stream: UnixStream,
        sending: Vec<u8>,
        received: Vec<u8>,
    },
    /// The kernel's side of a tap, as a raw socket.
    Tap(OwnedFd),
}

impl Wire {
    fn stream(stream: UnixStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        Self::Stream { stream, sending: Vec::new(), received: Vec::new() }
    }

    /// Sends what is left of earlier frames; whether that is all.
    fn flush(&mut self) -> bool {
        let Self::Stream { stream, sending, .. } = self else { return true };
        while !sending.is_empty() {
            match stream.write(sending) {
                Ok(count) => drop(sending.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) => panic!("the stream has ended: {error}"),
            }
        }
        true
    }

    /// Sends a frame, if there is room.
    fn send(&mut self, frame: &[u8]) -> bool {
        if !self.flush() {
            return false;
        }
        match self {
            Self::Datagrams(socket) => socket.send(frame).is_ok(),
            Self::Stream { sending, .. } => {
                sending.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
                sending.extend(frame);
                self.flush();
                true
            }
            Self::Tap(socket) => send(socket.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT).is_ok(),
        }
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 16];
        match self {
            Self::Datagrams(socket) => {
                let count = socket.recv(&mut bytes).ok()?;
                bytes.truncate(count);
            }
            Self::Tap(socket) => {
                let count = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
                bytes.truncate(count);
            }
            Self::Stream { stream, received, .. } => {
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    received.extend(&bytes[..count]);
                }
                let length = u32::from_be_bytes(*received.first_chunk()?) as usize;
                let end = 4 + length;
                assert!(length == FRAME, "the stream is torn: a frame of {length} bytes");
                received.get(..end)?;
                bytes = received.drain(..end).skip(4).collect();
            }
        }
        Some(bytes)
    }
}

/// Both ends of a network card's frames.
struct Frames {
    wire: Wire,
    /// Frames that the guest has sent, those of them that came back, and the next that the wire is to show.
    sent: u64,
    back: u64,
    next: u64,
    twice: u64,
    /// Frames for the guest: sent, and seen by it.
    given: u64,
    seen: u64,
    posted: HashMap<u16, u64>,
    free: Vec<u64>,
}

impl Frames {
    fn new(wire: Wire) -> Self {
        let free = (0..DEPTH).map(|slot| IN + slot * ROOM).collect();
        let posted = HashMap::new();
        Self { wire, sent: 0, back: 0, next: 0, twice: 0, given: 0, seen: 0, posted, free }
    }

    fn done(&mut self, driver: &Driver, queue: usize, (head, len): (u16, u32)) {
        if queue == TRANSMIT {
            self.back += 1;
            return;
        }
        let address = self.posted.remove(&head).expect("a buffer comes back twice");
        self.free.push(address);
        if let Some(number) = number_of(&driver.get(address, len as usize)[HEADER..]) {
            assert_eq!(number, self.seen, "of {} frames for the guest", self.given);
            self.seen += 1;
        }
    }

    fn look_at_wire(&mut self) {
        while let Some(bytes) = self.wire.receive() {
            match number_of(&bytes) {
                Some(number) if number == self.next => self.next += 1,
                Some(number) if number < self.next => self.twice += 1,
                Some(number) => panic!("frame {number} instead of {}: one is lost", self.next),
                None => {}
            }
        }
    }

    /// Keeps both directions busy.
    fn turn(&mut self, driver: &mut Driver, more: bool) {
        while more && self.sent - self.back < DEPTH {
            let at = BUFFERS + self.sent % DEPTH * ROOM;
            driver.put(at, &[&[0; HEADER][..], &frame(self.sent)].concat());
            driver.queues[TRANSMIT].submit(&driver.ram, &[(at, (HEADER + FRAME) as u32, false)]);
            self.sent += 1;
        }
        while let Some(address) = self.free.pop() {
            let head = driver.queues[RECEIVE].submit(&driver.ram, &[(address, ROOM as u32, true)]);
            self.posted.insert(head, address);
        }
        [RECEIVE, TRANSMIT].iter().for_each(|queue| driver.queues[*queue].kick());
        self.wire.flush();
        while more && self.given - self.seen < AHEAD && self.wire.send(&frame(self.given)) {
            self.given += 1;
        }
        self.look_at_wire();
        let ram = driver.ram.clone();
        for queue in [RECEIVE, TRANSMIT] {
            while let Some(finished) = driver.queues[queue].finished(&ram) {
                self.done(driver, queue, finished);
            }
        }
    }
}

fn card(backend: NetBackend) -> DeviceConfig {
    DeviceConfig::Net(NetConfig { backend, kept: Some(FdIndex(2)), ..config() })
}

fn storm(name: &str, wire: Wire, backend: NetBackend, end: &OwnedFd) {
    let kept = memory();
    let position = File::open(format!("/proc/self/fdinfo/{}", end.as_raw_fd())).unwrap().into();
    let resources = [end, &kept, &position];
    let resources = if matches!(wire, Wire::Tap(_)) { &resources[..] } else { &resources[..2] };
    let mut victim = Victim::new("net", card(backend), resources, 3);
    let mut frames = Frames::new(wire);
    let mut random = Random(0x0bad_cafe_1234_5678);
    let mut longest = Duration::ZERO;
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(5000));
        loop {
            frames.turn(&mut victim.driver, true);
            if Instant::now() >= end {
                break;
            }
        }
        longest = longest.max(victim.kill(|driver, queue, done| frames.done(driver, queue, done)));
    }
    let end = Instant::now() + Duration::from_secs(20);
    while frames.next < frames.sent || frames.back < frames.sent || frames.seen < frames.given {
        frames.turn(&mut victim.driver, false);
        let Frames { next, sent, seen, given, .. } = frames;
        assert!(Instant::now() < end, "{next} of {sent} frames from the guest, {seen} of {given} to it");
    }
    let Frames { sent, twice, given, .. } = frames;
    println!(
        "{name}: {OTHER_KILLS} kills under {sent} frames from the guest, {twice} of which came twice, and {given} to it, none lost: pause at most {longest:.1?}"
    );
    check_pause(longest);
    victim.process.stop();
}

#[test]
fn a_storm_of_kills_loses_no_datagram() {
    let (wire, theirs) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    storm("net", Wire::Datagrams(wire), NetBackend::Datagrams(Some(FdIndex(1))), &theirs.into());
}

#[test]
fn a_storm_of_kills_loses_no_packet_of_a_stream() {
    let (wire, theirs) = UnixStream::pair().unwrap();
    storm("net, a stream", Wire::stream(wire), NetBackend::Stream(Some(FdIndex(1))), &theirs.into());
}

/// A raw socket at an interface.
fn raw(interface: &str) -> OwnedFd {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
    // SAFETY: a structure of plain bytes, for which zeroes are values.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = u16::from_be_bytes(TYPE).to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(interface).unwrap() as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is a live structure of this length.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(result, 0);
    socket
}

#[test]
fn a_storm_of_kills_loses_no_packet_of_a_tap() {
    if skipped("a_storm_of_kills_loses_no_packet_of_a_tap", &[]) {
        return;
    }
    // Names and routes of its own, for this thread.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let tap = Tap::open("storm", 1).unwrap();
    tap.configure(None).unwrap();
    let queue: OwnedFd = tap.queues.into_iter().next().unwrap().into();
    let backend = NetBackend::Tap { queues: vec![FdIndex(1)], positions: vec![FdIndex(3)], offloads: 0 };
    storm("net, a tap", Wire::Tap(raw("storm")), backend, &queue);
}
