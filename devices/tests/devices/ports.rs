//! Named ports of a console.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, PortConfig, PortsConfig, Progress, ToDevice};
use bulkhead_ipc::jail::Enforcement;

use crate::driver::{BUFFERS, Driver, Random};
use crate::storm::{OTHER_KILLS, Victim, check_pause};
use crate::storm_typed::{byte, memory};
use crate::supervised::{LIMIT, Supervised, progress};

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Where the driver's control buffers are.
const CONTROL: u64 = 0xf0_0000;
/// More than a socket and a backlog hold.
const MUCH: usize = 1 << 20;

fn state() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

/// A device of the ports "a" and "b", of which the second is a console.
fn start(state: &OwnedFd) -> Supervised {
    let port =
        |name: &str| PortConfig { name: name.to_owned(), console: name == "b", input: None, output: None };
    let config = PortsConfig { ports: vec![port("a"), port("b")], state: Some(FdIndex(1)), typed: None };
    Supervised::start("console", DeviceConfig::Ports(config), &[state], Enforcement::Supervised)
}

fn attach(process: &Supervised, port: u16) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    process.channel.send(&ToDevice::AttachPort(port), &[theirs.as_fd()]).unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    ours
}

/// The driver says something.
fn say(driver: &mut Driver, id: u32, event: u16, value: u16) {
    let message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
    driver.put(CONTROL, &message);
    driver.run(3, &[(CONTROL, 8, false)]);
}

/// The driver hears this, and what follows it.
fn hear(driver: &mut Driver, id: u32, event: u16, value: u16) -> Vec<u8> {
    let len = driver.run(2, &[(CONTROL + 0x1000, 64, true)]);
    let message = driver.get(CONTROL + 0x1000, usize::try_from(len).unwrap());
    let expected = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
    assert_eq!(message[..8], expected);
    message[8..].to_vec()
}

/// What a driver does at its start.
fn begin(driver: &mut Driver) {
    say(driver, u32::MAX, DEVICE_READY, 1);
    hear(driver, 1, PORT_ADD, 1);
    hear(driver, 2, PORT_ADD, 1);
    for (id, name) in [(1, b"a"), (2, b"b")] {
        say(driver, id, PORT_READY, 1);
        if id == 2 {
            hear(driver, id, CONSOLE_PORT, 1);
        }
        assert_eq!(hear(driver, id, PORT_NAME, 1), name);
    }
}

fn pattern() -> Vec<u8> {
    (0..MUCH).map(|index| u8::try_from(index % 251).unwrap()).collect()
}

#[test]
fn a_driver_learns_which_ports_there_are_and_who_is_there() {
    let state = state();
    let mut process = start(&state);
    let mut driver = process.driver(8);
    let mut ports = [0; 4];
    driver.frontend.get_config(4, &mut ports).unwrap();
    assert_eq!(ports, 3u32.to_le_bytes(), "port 0 counts");
    begin(&mut driver);
    let mut peer = attach(&process, 1);
    hear(&mut driver, 2, PORT_OPEN, 1);
    // What comes before the guest has opened the port waits.
    peer.write_all(b"early").unwrap();
    say(&mut driver, 2, PORT_OPEN, 1);
    assert_eq!(driver.run(6, &[(BUFFERS, 100, true)]), 5);
    assert_eq!(driver.get(BUFFERS, 5), b"early");
    driver.put(BUFFERS, b"answer");
    driver.run(7, &[(BUFFERS, 6, false)]);
    let mut seen = [0; 6];
    peer.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"answer");
    drop(peer);
    hear(&mut driver, 2, PORT_OPEN, 0);
    // Nobody hears this, and the next one does not either.
    driver.run(7, &[(BUFFERS, 6, false)]);
    let mut peer = attach(&process, 1);
    hear(&mut driver, 2, PORT_OPEN, 1);
    driver.put(BUFFERS, b"new");
    driver.run(7, &[(BUFFERS, 3, false)]);
    let mut seen = [0; 3];
    peer.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"new");
    process.stop();
}

#[test]
fn a_driver_that_begins_anew_is_told_everything_again() {
    let state = state();
    let mut process = start(&state);
    let mut driver = process.driver(8);
    begin(&mut driver);
    let _peer = attach(&process, 1);
    hear(&mut driver, 2, PORT_OPEN, 1);
    begin(&mut driver);
    hear(&mut driver, 2, PORT_OPEN, 1);
    process.stop();
}

#[test]
fn a_peer_that_does_not_read_holds_up_its_own_port_alone() {
    let state = state();
    let mut process = start(&state);
    let mut driver = process.driver(8);
    begin(&mut driver);
    let (mut slow, mut other) = (attach(&process, 0), attach(&process, 1));
    hear(&mut driver, 1, PORT_OPEN, 1);
    hear(&mut driver, 2, PORT_OPEN, 1);
    say(&mut driver, 2, PORT_OPEN, 1);
    driver.put(BUFFERS, &pattern());
    let head = driver.queues[5].submit(&driver.ram, &[(BUFFERS, u32::try_from(MUCH).unwrap(), false)]);
    driver.queues[5].kick();
    let end = Instant::now() + LIMIT;
    while progress(&process) != (Progress::WaitsForHost { queue: 5 }) {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    let after = BUFFERS + 2 * MUCH as u64;
    for _ in 0..100 {
        driver.put(after, b"ping");
        driver.run(7, &[(after, 4, false)]);
        let mut seen = [0; 4];
        other.read_exact(&mut seen).unwrap();
        other.write_all(b"pong").unwrap();
        assert_eq!(driver.run(6, &[(after + 8, 8, true)]), 4);
    }
    assert!(driver.queues[5].finished(&driver.ram).is_none(), "nothing is dropped");
    let mut seen = vec![0; MUCH];
    slow.read_exact(&mut seen).unwrap();
    assert!(seen == pattern());
    let ram = driver.ram.clone();
    assert_eq!(driver.queues[5].wait(&ram).0, head);
    process.stop();
}

#[test]
fn a_successor_goes_on_in_the_middle_of_a_request_and_no_byte_is_lost_or_doubled() {
    let state = state();
    let mut process = start(&state);
    let mut driver = process.driver(8);
    begin(&mut driver);
    let (mut peer, theirs) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    process.channel.send(&ToDevice::AttachPort(0), &[theirs.as_fd()]).unwrap();
    hear(&mut driver, 1, PORT_OPEN, 1);
    say(&mut driver, 1, PORT_OPEN, 1);
    driver.put(BUFFERS, &pattern());
    let head = driver.queues[5].submit(&driver.ram, &[(BUFFERS, u32::try_from(MUCH).unwrap(), false)]);
    driver.queues[5].kick();
    let mut seen = vec![0; MUCH];
    peer.read_exact(&mut seen[..1000]).unwrap();

    // As the supervisor replaces a process: the successor is there before the other ends.
    let mut successor = start(&state);
    for queue in 0..8 {
        driver.frontend.get_vring_base(queue).unwrap();
    }
    assert!(driver.queues[5].finished(&driver.ram).is_none());
    process.stop();
    successor.channel.send(&ToDevice::AttachPort(0), &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let Driver { ram, queues, .. } = driver;
    let mut driver = Driver::unstarted(successor.stream.take().unwrap(), 0);
    (driver.ram, driver.queues) = (ram, queues);
    driver.set_up(0, u64::MAX);
    driver.start(None);
    peer.read_exact(&mut seen[1000..]).unwrap();
    let wrong = seen.iter().zip(pattern()).position(|(seen, said)| *seen != said);
    assert_eq!(wrong, None, "a byte is lost or doubled");
    let ram = driver.ram.clone();
    assert_eq!(driver.queues[5].wait(&ram).0, head);
    // The port is still open, and the driver is told nothing that it knows.
    peer.write_all(b"more").unwrap();
    assert_eq!(driver.run(4, &[(BUFFERS, 100, true)]), 4);
    drop(peer);
    hear(&mut driver, 1, PORT_OPEN, 0);
    successor.stop();
}

/// What a guest at a port has said and got.
#[derive(Default)]
struct Talk {
    posted: HashMap<u16, u64>,
    said: u64,
    back: u64,
    typed: u64,
    seen: u64,
    printed: Vec<u8>,
}

impl Talk {
    const RECEIVE: usize = 4;
    const TRANSMIT: usize = 5;
    const DEPTH: u64 = 8;
    const LINE: usize = 16;
    const ROOM: u64 = 24;
    const TYPED: u64 = BUFFERS + 0x1000;

    fn done(&mut self, driver: &Driver, queue: usize, (head, len): (u16, u32)) {
        if queue == Self::TRANSMIT {
            self.back += 1;
        } else if queue == Self::RECEIVE {
            let address = self.posted.remove(&head).expect("a buffer comes back twice");
            for found in driver.get(address, len as usize) {
                assert_eq!(found, byte(self.seen), "byte {} to the guest", self.seen);
                self.seen += 1;
            }
        }
    }

    /// Keeps both directions busy; with nothing `more` until what was said is there.
    fn turn(&mut self, driver: &mut Driver, peer: &mut UnixStream, more: bool) {
        while more && self.said - self.back < Self::DEPTH {
            let at = BUFFERS + self.said % Self::DEPTH * Self::LINE as u64;
            driver.put(at, format!("{:0width$}\n", self.said, width = Self::LINE - 1).as_bytes());
            driver.queues[Self::TRANSMIT].submit(&driver.ram, &[(at, Self::LINE as u32, false)]);
            self.said += 1;
        }
        let free = (0..Self::DEPTH).map(|slot| Self::TYPED + slot * Self::ROOM);
        let free: Vec<u64> = free.filter(|at| !self.posted.values().any(|used| used == at)).collect();
        for address in free {
            let buffers = [(address, Self::ROOM as u32, true)];
            let head = driver.queues[Self::RECEIVE].submit(&driver.ram, &buffers);
            self.posted.insert(head, address);
        }
        while more && self.typed < self.seen + 200 && peer.write(&[byte(self.typed)]).is_ok() {
            self.typed += 1;
        }
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = peer.read(&mut piece) {
            self.printed.extend_from_slice(&piece[..count]);
        }
        let ram = driver.ram.clone();
        for queue in [Self::RECEIVE, Self::TRANSMIT] {
            driver.queues[queue].kick();
            while let Some(finished) = driver.queues[queue].finished(&ram) {
                self.done(driver, queue, finished);
            }
        }
    }
}

#[test]
fn a_storm_of_kills_loses_no_byte_of_a_port_and_its_guest_gets_none_twice() {
    let (state, kept) = (state(), memory());
    let (mut peer, theirs) = UnixStream::pair().unwrap();
    let theirs: OwnedFd = theirs.into();
    let resources = [&state, &kept, &theirs, &theirs];
    let end = |name: &str, index| (name == "a").then_some(FdIndex(index));
    let ports = ["a", "b"].map(|name| PortConfig {
        name: name.into(),
        console: name == "b",
        input: end(name, 3),
        output: end(name, 4),
    });
    let config = PortsConfig { ports: ports.into(), state: Some(FdIndex(1)), typed: Some(FdIndex(2)) };
    let mut victim = Victim::new("console", DeviceConfig::Ports(config), &resources, 8);
    let driver = &mut victim.driver;
    say(driver, u32::MAX, DEVICE_READY, 1);
    hear(driver, 1, PORT_ADD, 1);
    hear(driver, 2, PORT_ADD, 1);
    say(driver, 1, PORT_READY, 1);
    assert_eq!(hear(driver, 1, PORT_NAME, 1), b"a");
    hear(driver, 1, PORT_OPEN, 1);
    say(driver, 1, PORT_OPEN, 1);
    peer.set_nonblocking(true).unwrap();
    let mut talk = Talk::default();
    let mut random = Random(0x2468_ace0_1357_9bdf);
    let mut longest = Duration::ZERO;
    for _ in 0..OTHER_KILLS {
        let end = Instant::now() + Duration::from_micros(random.below(4000));
        loop {
            talk.turn(&mut victim.driver, &mut peer, true);
            if Instant::now() >= end {
                break;
            }
        }
        longest = longest.max(victim.kill(|driver, queue, done| talk.done(driver, queue, done)));
    }
    let end = Instant::now() + LIMIT;
    let last = |talk: &Talk| format!("{:0width$}\n", talk.said - 1, width = Talk::LINE - 1).into_bytes();
    while talk.back < talk.said || talk.seen < talk.typed || !talk.printed.ends_with(&last(&talk)) {
        talk.turn(&mut victim.driver, &mut peer, false);
        let Talk { back, said, seen, typed, .. } = talk;
        assert!(Instant::now() < end, "{back} of {said} lines, {seen} of {typed} bytes to the guest");
    }
    // What was being written in the instant of a death comes again, whole lines after a part of one.
    let (mut next, mut twice) = (0_u64, 0_u64);
    for line in String::from_utf8(std::mem::take(&mut talk.printed)).unwrap().lines() {
        let end = line.get(line.len().saturating_sub(Talk::LINE - 1)..).unwrap_or_default();
        match end.parse::<u64>() {
            Ok(number) if number == next => next += 1,
            Ok(number) if number < next => twice += 1,
            other => panic!("after {next} lines came '{line}' ({other:?})"),
        }
    }
    assert_eq!(next, talk.said, "lines are missing");
    let typed = talk.typed;
    println!(
        "ports: {OTHER_KILLS} kills under {next} lines, {twice} of which came twice, and {typed} bytes to the guest, none lost: pause at most {longest:.1?}"
    );
    check_pause(longest);
    victim.process.stop();
}

#[test]
fn what_a_predecessor_left_that_makes_no_sense_harms_nobody() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0xff; 5000]).unwrap();
    let state = File::into(file);
    let mut process = start(&state);
    let mut driver = process.driver(8);
    begin(&mut driver);
    process.stop();
}

#[test]
fn a_driver_without_ports_is_left_alone() {
    let state = state();
    let mut process = start(&state);
    let mut driver = Driver::unstarted(process.stream.take().unwrap(), 2);
    driver.set_up(0, 0);
    driver.start(None);
    for _ in 0..100 {
        driver.run(1, &[(BUFFERS, 8, false)]);
    }
    assert_eq!(progress(&process), Progress::Fine);
    process.stop();
}
