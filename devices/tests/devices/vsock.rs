//! A vsock in its jail, between a guest that speaks packets and peers on Unix sockets.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, ToDevice, VsockConfig};
use bulkhead_ipc::connector::Connector;
use bulkhead_ipc::jail::Enforcement;
use nix::sys::socket::{Shutdown, shutdown};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{BUFFERS, Driver, Random};
use crate::supervised::{LIMIT, Supervised};

const CID: u64 = 3;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// Where packets of the guest are written, and where its buffers lie.
const OUT: u64 = BUFFERS;
const IN: u64 = BUFFERS + (1 << 20);
const IN_SIZE: u64 = 4096;
const WINDOW: u32 = 128 << 10;

/// A packet from the device.
#[derive(Clone, Debug, PartialEq)]
struct Packet {
    operation: u16,
    guest_port: u32,
    host_port: u32,
    flags: u32,
    window: u32,
    forwarded: u32,
    data: Vec<u8>,
}

/// The guest's side: rings, and what every connection has received.
struct Guest {
    driver: Driver,
    buffers: HashMap<u16, u64>,
    received: HashMap<(u32, u32), u32>,
    early: VecDeque<Packet>,
}

fn header(operation: u16, ports: (u32, u32), flags: u32, len: usize, forwarded: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    [CID, 2].iter().for_each(|cid| bytes.extend(cid.to_le_bytes()));
    [ports.0, ports.1, len as u32].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
    [1, operation].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
    [flags, WINDOW, forwarded].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
    bytes
}

impl Guest {
    fn new(driver: Driver) -> Self {
        let mut guest =
            Self { driver, buffers: HashMap::new(), received: HashMap::new(), early: VecDeque::new() };
        (0..64).for_each(|index| guest.post(IN + index * IN_SIZE));
        guest
    }

    fn post(&mut self, address: u64) {
        let Driver { ram, queues, .. } = &mut self.driver;
        // Header and data apart, as Linux had it for long.
        let head = queues[0].submit(ram, &[(address, 44, true), (address + 44, IN_SIZE as u32 - 44, true)]);
        self.buffers.insert(head, address);
        queues[0].kick();
    }

    fn send(&mut self, operation: u16, ports: (u32, u32), flags: u32, data: &[u8]) {
        let forwarded = self.received.get(&ports).copied().unwrap_or(0);
        let bytes = [header(operation, ports, flags, data.len(), forwarded), data.to_vec()].concat();
        self.send_raw(&bytes);
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        self.driver.put(OUT, bytes);
        // Cut where nobody expects it.
        let cut = bytes.len().min(7) as u32;
        let rest = bytes.len() as u32 - cut;
        let buffers = [(OUT, cut, false), (OUT + u64::from(cut), rest.max(1), false)];
        self.driver.run(1, &buffers[..if rest == 0 { 1 } else { 2 }]);
    }

    fn next(&mut self) -> Packet {
        let (head, len) = self.driver.queues[0].wait(&self.driver.ram);
        let address = self.buffers.remove(&head).unwrap();
        let bytes = self.driver.get(address, len as usize);
        self.post(address);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!(u64::from(bytes[8]), CID);
        let packet = Packet {
            operation: u16_at(30),
            guest_port: u32_at(20),
            host_port: u32_at(16),
            flags: u32_at(32),
            window: u32_at(36),
            forwarded: u32_at(40),
            data: bytes[44..].to_vec(),
        };
        assert_eq!(u32_at(24) as usize, packet.data.len());
        let ports = (packet.guest_port, packet.host_port);
        let received = self.received.entry(ports).or_default();
        *received = received.wrapping_add(packet.data.len() as u32);
        packet
    }

    /// The next packet of this kind for these ports; others are kept.
    fn expect(&mut self, operation: u16, ports: (u32, u32)) -> Packet {
        let is_it =
            |packet: &Packet| packet.operation == operation && (packet.guest_port, packet.host_port) == ports;
        if let Some(at) = self.early.iter().position(is_it) {
            return self.early.remove(at).unwrap();
        }
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            let packet = self.next();
            if is_it(&packet) {
                return packet;
            }
            self.early.push_back(packet);
        }
        panic!("no packet {operation} for {ports:?}, only {:?}", self.early);
    }

    fn expect_data(&mut self, ports: (u32, u32), expected: &[u8]) {
        let mut heard = Vec::new();
        while heard.len() < expected.len() {
            heard.extend(self.expect(DATA, ports).data);
            if self.received[&ports] % (WINDOW / 2) < 4096 {
                self.send(UPDATE, ports, 0, &[]);
            }
        }
        assert!(heard == expected, "{} bytes differ", heard.len());
    }
}

/// A device, its guest and its connector.
struct Rig {
    device: Supervised,
    guest: Guest,
    folder: TempDir,
    door: OwnedFd,
    _connector: JoinHandle<()>,
}

fn start_device(door: &OwnedFd) -> Supervised {
    let config = DeviceConfig::Vsock(VsockConfig { guest_cid: CID as u32, connector: FdIndex(1) });
    Supervised::start("vsock", config, &[door], Enforcement::Standalone)
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        let (connector, door) = Connector::new(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let connector = thread::spawn(move || connector.run(&listener).unwrap());
        let mut device = start_device(&door);
        let guest = Guest::new(device.driver(3));
        Self { device, guest, folder, door, _connector: connector }
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }

    /// The guest connects to a port where a test listens.
    fn connect(&mut self, listener: &UnixListener, ports: (u32, u32)) -> UnixStream {
        self.guest.send(REQUEST, ports, 0, &[]);
        self.guest.expect(RESPONSE, ports);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// The host connects to a port of the guest, which accepts; returns the host's port, too.
    fn call(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = self.dial(port);
        let request = self.guest.next();
        assert_eq!((request.operation, request.guest_port), (REQUEST, port));
        self.guest.send(RESPONSE, (port, request.host_port), 0, &[]);
        let expected = format!("OK {}\n", request.host_port);
        assert_eq!(exactly(&mut stream, expected.len()), expected.as_bytes());
        (stream, request.host_port)
    }

    fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.folder.path().join("v")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // In two pieces.
        stream.write_all(b"CONN").unwrap();
        sleep(Duration::from_millis(5));
        stream.write_all(format!("ECT {port}\n").as_bytes()).unwrap();
        stream
    }
}

fn exactly(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.below(256) as u8).collect()
}

#[test]
fn both_sides_connect_and_bytes_go_both_ways() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut peer = rig.connect(&listener, (1000, 52));
    rig.guest.send(DATA, (1000, 52), 0, b"hello host");
    assert_eq!(exactly(&mut peer, 10), b"hello host");
    peer.write_all(b"hello guest").unwrap();
    rig.guest.expect_data((1000, 52), b"hello guest");

    let (mut caller, host_port) = rig.call(7);
    assert!(host_port >= 1 << 30);
    caller.write_all(b"who is there").unwrap();
    rig.guest.expect_data((7, host_port), b"who is there");
    rig.guest.send(DATA, (7, host_port), 0, b"me");
    assert_eq!(exactly(&mut caller, 2), b"me");
    rig.guest.driver.queues[1].rests(&rig.guest.driver.ram);
    rig.device.stop();
}

#[test]
fn what_nobody_listens_for_or_knows_is_reset() {
    let mut rig = Rig::new();
    rig.guest.send(REQUEST, (1, 99), 0, &[]);
    rig.guest.expect(RESET, (1, 99));
    rig.guest.send(DATA, (2, 99), 0, b"?");
    rig.guest.expect(RESET, (2, 99));
    // Another type, another host, more bytes than there are, an unknown operation: the device goes on.
    let listener = rig.listen(52);
    let _peer = rig.connect(&listener, (3, 52));
    for (at, value) in [(28, 2), (8, 9), (24, 77), (30, 9)] {
        let mut bytes = header(DATA, (3, 52), 0, 0, 0);
        bytes[at] = value;
        rig.guest.send_raw(&bytes);
        rig.guest.next();
    }
    // The guest refuses: the host sees the end.
    let mut caller = rig.dial(8);
    let request = rig.guest.expect_request(8);
    rig.guest.send(RESET, (8, request.host_port), 0, &[]);
    assert_eq!(caller.read(&mut [0]).unwrap(), 0);
    for line in [&b"GET / HTTP/1.0\n"[..], &[b'x'; 40]] {
        let mut caller = UnixStream::connect(rig.folder.path().join("v")).unwrap();
        caller.set_read_timeout(Some(LIMIT)).unwrap();
        caller.write_all(line).unwrap();
        assert!(matches!(caller.read(&mut [0]), Ok(0) | Err(_)), "not accepted");
    }
    rig.device.stop();
}

impl Guest {
    fn expect_request(&mut self, port: u32) -> Packet {
        loop {
            let packet = self.next();
            if packet.operation == REQUEST && packet.guest_port == port {
                return packet;
            }
        }
    }
}

#[test]
fn a_direction_ends_by_itself() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    // The host says its last and goes on to listen.
    let mut peer = rig.connect(&listener, (1, 52));
    peer.write_all(b"last").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    rig.guest.expect_data((1, 52), b"last");
    assert_eq!(rig.guest.expect(SHUTDOWN, (1, 52)).flags, 2);
    rig.guest.send(DATA, (1, 52), 0, b"go on");
    assert_eq!(exactly(&mut peer, 5), b"go on");
    // The guest closes: acknowledged by a reset, and the host sees the end.
    rig.guest.send(SHUTDOWN, (1, 52), 3, &[]);
    rig.guest.expect(RESET, (1, 52));
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);

    // The guest says its last and goes on to listen.
    let mut peer = rig.connect(&listener, (2, 52));
    rig.guest.send(DATA, (2, 52), 0, b"last");
    rig.guest.send(SHUTDOWN, (2, 52), 2, &[]);
    let mut all = Vec::new();
    peer.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    peer.write_all(b"answer").unwrap();
    rig.guest.expect_data((2, 52), b"answer");
    // The host closes: the guest is told both.
    drop(peer);
    while rig.guest.expect(SHUTDOWN, (2, 52)).flags != 3 {}
    rig.guest.send(RESET, (2, 52), 0, &[]);
    rig.device.stop();
}

#[test]
fn what_the_guest_said_last_is_not_lost_when_it_closes() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut peer = rig.connect(&listener, (1, 52));
    let bytes = pattern(240 << 10, 1);
    bytes.chunks(60 << 10).for_each(|piece| rig.guest.send(DATA, (1, 52), 0, piece));
    rig.guest.send(SHUTDOWN, (1, 52), 3, &[]);
    rig.guest.expect(RESET, (1, 52));
    let mut all = Vec::new();
    peer.read_to_end(&mut all).unwrap();
    assert!(all == bytes, "{} bytes", all.len());
    rig.device.stop();
}

#[test]
fn credit_is_kept_by_the_device_and_demanded_of_the_guest() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut peer = rig.connect(&listener, (1, 52));
    // The device sends no more than the guest has room for.
    peer.set_nonblocking(true).unwrap();
    let mut pushed = 0;
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        match peer.write(&[b'x'; 4096]) {
            Ok(count) => pushed += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    let mut heard = 0;
    while heard < WINDOW as usize {
        heard += rig.guest.expect(DATA, (1, 52)).data.len();
    }
    assert_eq!(heard, WINDOW as usize);
    assert_eq!(rig.guest.expect(CREDIT_REQUEST, (1, 52)).data.len(), 0, "it asks for room");
    assert!(pushed > heard);
    rig.guest.send(UPDATE, (1, 52), 0, &[]);
    rig.guest.expect(DATA, (1, 52));

    // A guest that sends more than it was allowed to is cut off; the host does not read, and that is all that is kept.
    let other = rig.connect(&listener, (2, 52));
    let mut sent = 0;
    while rig.guest.early.iter().all(|packet| packet.operation != RESET) {
        rig.guest.send(DATA, (2, 52), 0, &[b'y'; 60 << 10]);
        sent += 60 << 10;
        assert!(sent < 2 << 20, "no end");
        while let Some((head, len)) = rig.guest.driver.queues[0].finished(&rig.guest.driver.ram) {
            let address = rig.guest.buffers.remove(&head).unwrap();
            let bytes = rig.guest.driver.get(address, len as usize);
            rig.guest.post(address);
            if bytes[30] == RESET as u8 {
                rig.guest.early.push_back(Packet {
                    operation: RESET,
                    guest_port: 2,
                    host_port: 52,
                    flags: 0,
                    window: 0,
                    forwarded: 0,
                    data: Vec::new(),
                });
            }
        }
    }
    drop(other);
    rig.device.stop();
}

#[test]
fn packets_that_come_together_arrive_in_order_also_at_a_host_that_reads_late() {
    const SLOTS: u64 = OUT + (4 << 20);
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut peers = [rig.connect(&listener, (1, 52)), rig.connect(&listener, (2, 52))];
    let mut expected = [Vec::new(), Vec::new()];
    // More than a socket takes, and another connection's packets in between.
    for number in 0..200 {
        let other = number % 7 == 6;
        let data = pattern(if other { 64 } else { 5000 }, number + 1);
        let ports = (1 + u32::from(other), 52);
        let bytes = [header(DATA, ports, 0, data.len(), 0), data.clone()].concat();
        let Driver { ram, queues, .. } = &mut rig.guest.driver;
        ram.memory().write_slice(&bytes, GuestAddress(SLOTS + number * 8192)).unwrap();
        queues[1].submit(ram, &[(SLOTS + number * 8192, bytes.len() as u32, false)]);
        expected[usize::from(other)].extend(data);
    }
    rig.guest.driver.queues[1].kick();
    for _ in 0..200 {
        let Driver { ram, queues, .. } = &mut rig.guest.driver;
        queues[1].wait(ram);
    }
    for (peer, expected) in peers.iter_mut().zip(&expected) {
        assert!(exactly(peer, expected.len()) == *expected);
    }
    rig.device.stop();
}

#[test]
fn hundreds_of_connections_share_the_device() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut peers: Vec<UnixStream> = (0..300).map(|port| rig.connect(&listener, (port, 52))).collect();
    for (port, peer) in (0..).zip(&mut peers) {
        peer.write_all(&pattern(3000, u64::from(port) + 1)).unwrap();
        rig.guest.send(DATA, (port, 52), 0, &pattern(2000, u64::from(port) + 1000));
    }
    for (port, peer) in (0..).zip(&mut peers) {
        rig.guest.expect_data((port, 52), &pattern(3000, u64::from(port) + 1));
        assert_eq!(exactly(peer, 2000), pattern(2000, u64::from(port) + 1000));
    }
    // One that the host never empties does not hold the others up.
    let full = &peers[0];
    full.set_nonblocking(true).unwrap();
    for _ in 0..4 {
        rig.guest.send(DATA, (0, 52), 0, &[0; 60 << 10]);
    }
    rig.guest.send(DATA, (1, 52), 0, b"quick");
    assert_eq!(exactly(&mut peers[1], 5), b"quick");
    shutdown(std::os::fd::AsRawFd::as_raw_fd(&peers[2]), Shutdown::Both).unwrap();
    rig.device.stop();
}

impl Rig {
    /// Kills the device in the midst of what it does and starts another; returns the pause until its rings run. The guest is told by
    /// the event, in a buffer that waits for it.
    fn replace(&mut self, event: u64) -> Duration {
        let start = Instant::now();
        self.device.kill();
        let mut device = start_device(&self.door);
        let mut driver = Driver::unstarted(device.stream.take().unwrap(), 0);
        std::mem::swap(&mut driver.ram, &mut self.guest.driver.ram);
        std::mem::swap(&mut driver.queues, &mut self.guest.driver.queues);
        // What it had placed in the guest before its death is seen before the successor's event.
        while let Some((head, _)) = driver.queues[0].finished(&driver.ram) {
            let address = self.guest.buffers.remove(&head).unwrap();
            let again = driver.queues[0]
                .submit(&driver.ram, &[(address, 44, true), (address + 44, IN_SIZE as u32 - 44, true)]);
            self.guest.buffers.insert(again, address);
        }
        while driver.queues[1].finished(&driver.ram).is_some() {}
        driver.set_up(crate::driver::EVENT_IDX | crate::driver::INDIRECT_DESC, u64::MAX);
        self.guest.driver = driver;
        self.guest.driver.put(event, &[0xFF; 4]);
        let Driver { ram, queues, .. } = &mut self.guest.driver;
        queues[2].submit(ram, &[(event, 4, true)]);
        self.guest.driver.start(None);
        let pause = start.elapsed();
        let (_, len) = self.guest.driver.queues[2].wait(&self.guest.driver.ram);
        assert_eq!((len, self.guest.driver.get(event, 4)), (4, vec![0; 4]), "transport reset");
        self.device = device;
        self.guest.received.clear();
        self.guest.early.clear();
        pause
    }
}

#[test]
fn a_storm_of_kills_ends_streams_on_both_sides_and_the_next_begin() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut random = Random(0x3c6e_f372_fe94_f82b);
    let (mut longest, mut bytes) = (Duration::ZERO, 0);
    for round in 0..crate::storm::OTHER_KILLS {
        let ports = [(1000 + round * 2, 52), (1001 + round * 2, 52)];
        let mut peers = ports.map(|ports| rig.connect(&listener, ports));
        let (mut caller, host_port) = rig.call(7);
        // What arrives is whole, both ways.
        let piece = pattern(1 + random.below(3000) as usize, u64::from(round) + 1);
        bytes += piece.len() * 4;
        caller.write_all(&piece).unwrap();
        rig.guest.expect_data((7, host_port), &piece);
        for (peer, ports) in peers.iter_mut().zip(ports) {
            rig.guest.send(DATA, ports, 0, &piece);
            assert!(exactly(peer, piece.len()) == piece, "from the guest");
        }
        // It dies with streams in both directions.
        peers[0].write_all(&piece).unwrap();
        sleep(Duration::from_micros(random.below(1000)));
        let event = BUFFERS + (8 << 20);
        longest = longest.max(rig.replace(event));
        for peer in peers.iter_mut().chain([&mut caller]) {
            let mut rest = Vec::new();
            let end = peer.read_to_end(&mut rest);
            assert!(end.is_ok() || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
            assert!(rest.is_empty(), "bytes that nobody sent");
        }
        rig.guest.send(DATA, ports[0], 0, b"?");
        rig.guest.expect(RESET, ports[0]);
    }
    println!(
        "vsock: {} kills with three streams each, {bytes} bytes before them: pause at most {longest:.1?}",
        crate::storm::OTHER_KILLS
    );
    crate::storm::check_pause(longest);
    let mut peer = rig.connect(&listener, (2, 52));
    rig.guest.send(DATA, (2, 52), 0, b"again");
    assert_eq!(exactly(&mut peer, 5), b"again");
    rig.device.stop();
}

#[test]
fn a_successor_tells_the_guest_that_its_connections_are_gone() {
    let mut rig = Rig::new();
    let listener = rig.listen(52);
    let mut peer = rig.connect(&listener, (1, 52));
    rig.replace(BUFFERS + (8 << 20));
    assert!(matches!(peer.read(&mut [0]), Ok(0) | Err(_)), "the host sees the end");
    rig.guest.send(DATA, (1, 52), 0, b"?");
    rig.guest.expect(RESET, (1, 52));
    let mut peer = rig.connect(&listener, (2, 52));
    rig.guest.send(DATA, (2, 52), 0, b"again");
    assert_eq!(exactly(&mut peer, 5), b"again");
    rig.device.channel.send(&ToDevice::Ping, &[]).unwrap();
    rig.device.stop();
}
