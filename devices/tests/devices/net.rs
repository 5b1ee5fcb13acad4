//! The network card: packets both ways, drivers that break their rings, restarts, limits, filters, and a real tap.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{
    DeviceConfig, FdIndex, NET_KEPT, NetBackend, NetConfig, NetLimits, ToDevice,
};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::vhost_user::frontend::BackendRequest;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{BUFFERS, Driver, PROGRAM, RAM, Service, WRITE};
use crate::supervised::{LIMIT, Supervised};

const HEADER: u32 = 12;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// Where packets of the guest lie, and commands.
const OUT: u64 = BUFFERS + (16 << 20);
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// A card whose stream ends here.
struct Rig {
    service: Service,
    listener: UnixListener,
}

impl Rig {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wire");
        let listener = UnixListener::bind(&path).unwrap();
        let arguments = ["--stream".to_owned(), path.to_str().unwrap().to_owned()];
        Self { service: Service::start("net", directory, &arguments), listener }
    }

    fn connect(&self) -> (Driver, UnixStream) {
        let driver = Driver::new(self.service.connect(), 3);
        (driver, self.listener.accept().unwrap().0)
    }
}

fn packet(len: usize, fill: u8) -> Vec<u8> {
    let mut packet = vec![fill; len];
    packet[..6].fill(0xff);
    packet[6..12].copy_from_slice(&MAC);
    packet
}

fn send(wire: &mut UnixStream, packet: &[u8]) {
    let length = u32::try_from(packet.len()).unwrap().to_be_bytes();
    wire.write_all(&[&length[..], packet].concat()).unwrap();
}

fn receive(wire: &mut UnixStream) -> Vec<u8> {
    wire.set_read_timeout(Some(LIMIT)).unwrap();
    let mut length = [0; 4];
    wire.read_exact(&mut length).unwrap();
    let mut packet = vec![0; u32::from_be_bytes(length) as usize];
    wire.read_exact(&mut packet).unwrap();
    packet
}

/// Sends a packet as the guest, its header and the rest in two buffers.
fn transmit(driver: &mut Driver, packet: &[u8]) {
    driver.put(OUT, &[0; HEADER as usize]);
    driver.put(OUT + 64, packet);
    let len = u32::try_from(packet.len()).unwrap();
    driver.run(TRANSMIT, &[(OUT, HEADER, false), (OUT + 64, len, false)]);
}

/// Posts `count` buffers of `len` bytes.
fn post(driver: &mut Driver, count: u64, len: u32) {
    for number in 0..count {
        let address = BUFFERS + number * 0x1_0000;
        driver.queues[RECEIVE].submit(&driver.ram, &[(address, len, true)]);
    }
    driver.queues[RECEIVE].kick();
}

/// The next packet for the guest, out of as many buffers as it says.
fn arrived(driver: &mut Driver, room: u64, first: u64) -> Vec<u8> {
    let (_, len) = driver.queues[RECEIVE].wait(&driver.ram);
    let mut bytes = driver.get(BUFFERS + first * 0x1_0000, len as usize);
    let buffers = u64::from(u16::from_le_bytes([bytes[10], bytes[11]]));
    for number in 1..buffers {
        // All of a packet is there at once.
        let (_, len) = driver.queues[RECEIVE].finished(&driver.ram).expect("a part of a packet is missing");
        assert!(u64::from(len) <= room);
        bytes.extend(driver.get(BUFFERS + (first + number) * 0x1_0000, len as usize));
    }
    bytes.split_off(HEADER as usize)
}

#[test]
fn packets_go_both_ways_in_one_buffer_and_in_many() {
    let rig = Rig::start();
    let (mut driver, mut wire) = rig.connect();
    for len in [14, 60, 1514, 65_000] {
        transmit(&mut driver, &packet(len, 7));
        assert_eq!(receive(&mut wire), packet(len, 7), "{len}");
        driver.queues[TRANSMIT].rests(&driver.ram);
    }
    post(&mut driver, 60, 1500);
    let mut first = 0;
    for len in [14usize, 1488, 1489, 40_000] {
        send(&mut wire, &packet(len, 9));
        assert!(arrived(&mut driver, 1500, first) == packet(len, 9), "{len}");
        first += (len as u64 + 12).div_ceil(1500);
    }
}

#[test]
fn a_packet_waits_for_buffers_and_none_is_used_for_a_part_of_it() {
    let rig = Rig::start();
    let (mut driver, mut wire) = rig.connect();
    post(&mut driver, 2, 1000);
    send(&mut wire, &packet(3500, 1));
    send(&mut wire, &packet(100, 2));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.queues[RECEIVE].finished(&driver.ram), None);
    // Stopped and started again, it knows which buffers are free.
    assert_eq!([0, 1, 2].map(|queue| driver.frontend.get_vring_base(queue).unwrap()), [0; 3]);
    driver.start(None);
    for number in 2..8 {
        driver.queues[RECEIVE].submit(&driver.ram, &[(BUFFERS + number * 0x1_0000, 1000, true)]);
    }
    driver.queues[RECEIVE].kick();
    assert!(arrived(&mut driver, 1000, 0) == packet(3500, 1));
    assert!(arrived(&mut driver, 1000, 4) == packet(100, 2));
}

#[test]
fn packets_that_come_while_the_guest_has_no_buffer_are_heard_of_later() {
    let rig = Rig::start();
    let (mut driver, mut wire) = rig.connect();
    for round in 0..3_u8 {
        for fill in 1..=3 {
            send(&mut wire, &packet(60, round * 10 + fill));
            // Apart, so that each would wake the card.
            std::thread::sleep(Duration::from_millis(10));
        }
        post(&mut driver, 4, 2000);
        for first in 0..3 {
            assert_eq!(arrived(&mut driver, 2000, first), packet(60, round * 10 + first as u8 + 1));
        }
        // The card waits for packets again.
        send(&mut wire, &packet(60, 99));
        assert_eq!(arrived(&mut driver, 2000, 3), packet(60, 99));
    }
}

#[test]
fn packets_that_can_be_none_are_dropped_and_the_queue_goes_on() {
    let rig = Rig::start();
    let (mut driver, mut wire) = rig.connect();
    driver.put(OUT, &[0; 200]);
    // Too short for a header, for Ethernet; too long; buffers that the device could write.
    driver.run(TRANSMIT, &[(OUT, 5, false)]);
    driver.run(TRANSMIT, &[(OUT, HEADER + 13, false)]);
    driver.run(TRANSMIT, &[(OUT, 70_000, false)]);
    driver.run(TRANSMIT, &[(OUT, 200, true)]);
    transmit(&mut driver, &packet(64, 3));
    assert_eq!(receive(&mut wire), packet(64, 3));
    send(&mut wire, &[1; 13]);
    send(&mut wire, &[]);
    post(&mut driver, 1, 2000);
    send(&mut wire, &packet(64, 4));
    assert_eq!(arrived(&mut driver, 2000, 0), packet(64, 4));
}

#[test]
fn drivers_that_break_their_rings_harm_nobody_else() {
    let outside = RAM + 4096;
    type Breaks = fn(&mut Driver, u64);
    let breaks: [(&str, usize, Breaks); 6] = [
        ("transmit outside memory", TRANSMIT, |driver, outside| {
            driver.queues[TRANSMIT].submit(&driver.ram, &[(outside, 100, false)]);
        }),
        ("half outside memory", TRANSMIT, |driver, outside| {
            driver.queues[TRANSMIT].submit(&driver.ram, &[(OUT, 200, false), (outside, 500, false)]);
        }),
        ("loop", TRANSMIT, |driver, _| {
            driver.queues[TRANSMIT].descriptor(&driver.ram, 0, (OUT, 16, 1, 0));
            driver.queues[TRANSMIT].offer(&driver.ram, 0);
        }),
        ("receive outside memory", RECEIVE, |driver, outside| {
            driver.queues[RECEIVE].submit(&driver.ram, &[(outside, 2000, true)]);
        }),
        ("receive without room", RECEIVE, |driver, _| {
            driver.queues[RECEIVE].descriptor(&driver.ram, 0, (OUT, 11, WRITE, 0));
            driver.queues[RECEIVE].offer(&driver.ram, 0);
        }),
        ("a command without an answer", CONTROL, |driver, _| {
            driver.queues[CONTROL].submit(&driver.ram, &[(OUT, 3, false)]);
        }),
    ];
    for (name, queue, break_it) in breaks {
        let mut rig = Rig::start();
        let (mut driver, mut wire) = rig.connect();
        break_it(&mut driver, outside);
        driver.queues[queue].kick();
        send(&mut wire, &packet(100, 1));
        let end = Instant::now() + LIMIT;
        while driver.queues[queue].error.read().is_err() {
            assert!(Instant::now() < end, "{name}: the ring was not found broken");
            std::thread::sleep(Duration::from_millis(1));
        }
        // The other direction goes on.
        if queue == RECEIVE {
            transmit(&mut driver, &packet(64, 3));
            assert_eq!(receive(&mut wire), packet(64, 3), "{name}");
        }
        assert!(driver.frontend.get_vring_base(0).is_ok(), "{name}: the device does not answer");
        assert!(rig.service.is_alive(), "{name}: the process died");
    }
}

fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    driver.put(OUT, bytes);
    driver.put(OUT + 8192, &[0xee]);
    let len = u32::try_from(bytes.len()).unwrap();
    assert_eq!(driver.run(CONTROL, &[(OUT, len, false), (OUT + 8192, 1, true)]), 1);
    driver.get(OUT + 8192, 1)[0]
}

#[test]
fn commands_are_answered() {
    let rig = Rig::start();
    let (mut driver, _wire) = rig.connect();
    assert_eq!(command(&mut driver, &[0, 0, 1]), 0, "promiscuous");
    assert_eq!(command(&mut driver, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0, "empty tables");
    assert_eq!(command(&mut driver, &[2, 0, 7, 0]), 0, "a VLAN");
    assert_eq!(command(&mut driver, &[1, 1, 2, 0, 0, 0, 0, 9]), 0, "an address");
    let mut mac = [0; 6];
    driver.frontend.get_config(0, &mut mac).unwrap();
    assert_eq!(mac, [2, 0, 0, 0, 0, 9]);
    assert_eq!(command(&mut driver, &[1, 1, 1, 0, 0, 0, 0, 9]), 1, "a group's address");
    assert_eq!(command(&mut driver, &[4, 0, 2, 0]), 1, "more pairs than there are");
    assert_eq!(command(&mut driver, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 1, "offloads without a tap");
    assert_eq!(command(&mut driver, &[9, 9]), 1);
    assert_eq!(command(&mut driver, &[0; 5000]), 1);
}

/// Memory that outlives a process.
pub fn memory() -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(NET_KEPT).unwrap();
    file.into()
}

pub fn config() -> NetConfig {
    NetConfig {
        backend: NetBackend::Stream(Some(FdIndex(1))),
        mac: MAC,
        mtu: None,
        receive: NetLimits::default(),
        transmit: NetLimits::default(),
        mac_filter: false,
        ip_filter: Vec::new(),
        link: true,
        successor: false,
        kept: None,
        way: 1,
        group: None,
    }
}

/// In its jail, under its policies.
fn jailed(config: NetConfig) -> (Supervised, Driver, UnixStream) {
    let (wire, theirs) = UnixStream::pair().unwrap();
    let end = OwnedFd::from(theirs);
    let mut device = Supervised::start("net", DeviceConfig::Net(config), &[&end], Enforcement::Standalone);
    let driver = device.driver(3);
    (device, driver, wire)
}

#[test]
fn the_cable_can_be_pulled_out_and_the_driver_is_told() {
    let (device, mut driver, mut wire) = jailed(config());
    let mut requests = driver.frontend.open_backend_requests().unwrap();
    let status = |driver: &mut Driver| {
        let mut bytes = [0; 2];
        driver.frontend.get_config(6, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    };
    assert_eq!(status(&mut driver), 1);
    transmit(&mut driver, &packet(64, 1));
    receive(&mut wire);
    for up in [false, true] {
        device.channel.send(&ToDevice::Link { up }, &[]).unwrap();
        let end = Instant::now() + LIMIT;
        while status(&mut driver) != u16::from(up) {
            assert!(Instant::now() < end);
        }
        assert_eq!(requests.receive().unwrap(), BackendRequest::ConfigChange);
        assert_eq!(status(&mut driver), u16::from(up));
        transmit(&mut driver, &packet(64, 2));
        if up {
            assert_eq!(receive(&mut wire), packet(64, 2), "what was sent without a link is gone");
        }
    }
    device.stop();
}

#[test]
fn a_stream_goes_on_in_the_middle_of_a_packet_with_a_successor() {
    let (mut wire, theirs) = UnixStream::pair().unwrap();
    let end = OwnedFd::from(theirs);
    let kept = memory();
    let start = |successor| {
        let config = NetConfig { successor, kept: Some(FdIndex(2)), ..config() };
        Supervised::start("net", DeviceConfig::Net(config), &[&end, &kept], Enforcement::Standalone)
    };
    let mut first = start(false);
    let mut driver = first.driver(3);
    post(&mut driver, 4, 2000);
    send(&mut wire, &packet(500, 1));
    assert_eq!(arrived(&mut driver, 2000, 0), packet(500, 1));
    let bytes = [&500u32.to_be_bytes()[..], &packet(500, 2)].concat();
    wire.write_all(&bytes[..300]).unwrap();
    // It has read them when it has sent this.
    transmit(&mut driver, &packet(64, 3));
    receive(&mut wire);
    // Made ready while the first one works.
    let mut second = start(true);
    driver.frontend.get_vring_base(0).unwrap();
    first.stop();

    let queues = std::mem::take(&mut driver.queues);
    let ram = driver.ram.clone();
    let mut driver = Driver::unstarted(second.stream.take().unwrap(), 0);
    (driver.ram, driver.queues) = (ram, queues);
    driver.set_up(crate::driver::EVENT_IDX, u64::MAX);
    let mut status = [0; 2];
    driver.frontend.get_config(6, &mut status).unwrap();
    assert_eq!(status, [3, 0], "the driver is to announce itself");
    driver.start(None);
    wire.write_all(&bytes[300..]).unwrap();
    assert_eq!(arrived(&mut driver, 2000, 1), packet(500, 2));
    assert_eq!(command(&mut driver, &[3, 0]), 0);
    driver.frontend.get_config(6, &mut status).unwrap();
    assert_eq!(status, [1, 0]);
    second.stop();
}

#[test]
fn a_peer_that_sends_what_is_no_packet_is_left_for_good() {
    let (device, mut driver, mut wire) = jailed(config());
    post(&mut driver, 1, 2000);
    wire.write_all(&[0xff; 4]).unwrap();
    wire.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(wire.read(&mut [0; 1]).unwrap(), 0, "it is not told, although others hold the socket, too");
    device.stop();
}

#[test]
fn a_peer_that_goes_makes_room_for_another() {
    let (device, mut driver, wire) = jailed(config());
    drop(wire);
    transmit(&mut driver, &packet(64, 1));
    let (mut wire, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    device.channel.send(&ToDevice::AttachWay(2), &[std::os::fd::AsFd::as_fd(&theirs)]).unwrap();
    post(&mut driver, 1, 2000);
    send(&mut wire, &packet(64, 2));
    assert_eq!(arrived(&mut driver, 2000, 0), packet(64, 2));
    transmit(&mut driver, &packet(64, 3));
    assert_eq!(receive(&mut wire), packet(64, 3));
    device.stop();
}

#[test]
fn filters_let_own_packets_through_alone() {
    let address: IpAddr = "10.0.0.1".parse().unwrap();
    let (device, mut driver, mut wire) =
        jailed(NetConfig { mac_filter: true, ip_filter: vec![address], ..config() });
    let from = |mac: [u8; 6], ip: [u8; 4]| {
        let mut bytes = packet(64, 0);
        bytes[6..12].copy_from_slice(&mac);
        bytes[12..14].copy_from_slice(&[8, 0]);
        bytes[26..30].copy_from_slice(&ip);
        bytes
    };
    transmit(&mut driver, &from([2; 6], [10, 0, 0, 1]));
    transmit(&mut driver, &from(MAC, [10, 0, 0, 2]));
    transmit(&mut driver, &from(MAC, [10, 0, 0, 1]));
    assert_eq!(receive(&mut wire), from(MAC, [10, 0, 0, 1]));
    post(&mut driver, 1, 2000);
    let mut foreign = packet(64, 1);
    foreign[..6].fill(2);
    send(&mut wire, &foreign);
    send(&mut wire, &packet(64, 2));
    assert_eq!(arrived(&mut driver, 2000, 0), packet(64, 2));
    assert_eq!(command(&mut driver, &[1, 1, 2, 0, 0, 0, 0, 9]), 1, "the address stays");
    device.stop();
}

#[test]
fn limits_hold_each_way() {
    let limits = NetLimits { packets: 1000, packets_burst: 10, ..NetLimits::default() };
    let bytes = NetLimits { bytes: 200_000, bytes_burst: 2000, ..NetLimits::default() };
    let (device, mut driver, mut wire) = jailed(NetConfig { transmit: limits, receive: bytes, ..config() });
    let start = Instant::now();
    driver.put(OUT, &[0; 64]);
    for _ in 0..200 {
        driver.queues[TRANSMIT].submit(&driver.ram, &[(OUT, 64, false)]);
    }
    driver.queues[TRANSMIT].kick();
    (0..200).for_each(|_| drop(receive(&mut wire)));
    let took = start.elapsed().as_secs_f64();
    assert!((0.185..0.5).contains(&took), "200 packets at 1000 a second took {took} s");
    post(&mut driver, 40, 2000);
    let start = Instant::now();
    (0..40).for_each(|_| send(&mut wire, &packet(1000, 1)));
    for _ in 0..40 {
        driver.queues[RECEIVE].wait(&driver.ram);
    }
    let took = start.elapsed().as_secs_f64();
    assert!((0.185..0.5).contains(&took), "40000 bytes at 200000 a second took {took} s");
    device.stop();
}

/// Whether a test cannot be run here, for want of rights or programs; it is said aloud then.
pub fn skipped(test: &str, programs: &[&str]) -> bool {
    let root = nix::unistd::geteuid().is_root() && std::fs::File::open("/dev/net/tun").is_ok();
    let lacks = |program: &&&str| Command::new(program).arg("--version").output().is_err();
    let why = match programs.iter().find(lacks) {
        _ if !root => "root and /dev/net/tun are needed".to_owned(),
        Some(program) => format!("{program} is not installed"),
        None => return false,
    };
    // Past the capture of tests that succeed.
    let _told = writeln!(std::io::stderr(), "skipped: {test}: {why}");
    true
}

#[test]
fn a_tap_of_the_kernel_answers() {
    if skipped("a_tap_of_the_kernel_answers", &[]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let script = format!(
        "{PROGRAM} net --socket-path {} --tap t0 --num-queues 2 --mtu 1400 & \
         until ip link show t0 >/dev/null 2>&1; do sleep 0.05; done; ip addr add 10.9.0.1/24 dev t0; wait",
        socket.display()
    );
    let mut child = Command::new("unshare").args(["-n", "sh", "-c", &script]).spawn().unwrap();
    let mut driver = Driver::new(crate::driver::connect(&socket), 5);
    let mut config = [0; 12];
    driver.frontend.get_config(0, &mut config).unwrap();
    assert_eq!(config[8..], [2, 0, 0x78, 5], "two pairs, an MTU of 1400");
    post(&mut driver, 100, 2000);
    let mut request = packet(42, 0);
    request[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request[22..28].copy_from_slice(&MAC);
    request[28..32].copy_from_slice(&[10, 9, 0, 2]);
    request[38..42].copy_from_slice(&[10, 9, 0, 1]);
    let end = Instant::now() + LIMIT;
    'answered: loop {
        assert!(Instant::now() < end, "no answer");
        transmit(&mut driver, &request);
        std::thread::sleep(Duration::from_millis(5));
        while let Some((head, len)) = driver.queues[RECEIVE].finished(&driver.ram) {
            let address: u64 = driver
                .ram
                .memory()
                .read_obj(GuestAddress(driver.queues[RECEIVE].base + u64::from(head) * 16))
                .unwrap();
            let bytes = driver.get(address, len as usize);
            let reply = &bytes[12..];
            if reply[12..14] == [8, 6] && reply[21] == 2 && reply[28..32] == [10, 9, 0, 1] {
                assert_eq!(reply[..6], MAC);
                break 'answered;
            }
        }
    }
    // Queues of the tap come and go as the driver says; with MQ the control queue is the last.
    let queue = &mut driver.queues[4];
    driver.ram.memory().write_slice(&[4, 0, 2, 0], GuestAddress(OUT)).unwrap();
    queue.submit(&driver.ram, &[(OUT, 4, false), (OUT + 64, 1, true)]);
    queue.kick();
    assert_eq!(queue.wait(&driver.ram).1, 1);
    assert_eq!(driver.get(OUT + 64, 1), [0]);
    // The service ends with its only front end.
    drop(driver);
    assert!(child.wait().unwrap().success());
}
