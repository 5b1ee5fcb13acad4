//! What a user of `bulkhead console` may expect, of the console and of the serial port: the device programs in their jail, a guest
//! on one side and peers that come and go on the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{ConsoleConfig, DeviceConfig, FdIndex, ToDevice, UartConfig};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::vfio_user::Client;

use crate::driver::{BUFFERS, Driver};
use crate::supervised::{LIMIT, Supervised};

const HISTORY: usize = 64 * 1024;

/// The guest's end of a stream.
enum Guest {
    Console(Box<Driver>),
    Uart(Client),
}

impl Guest {
    fn say(&mut self, bytes: &[u8]) {
        match self {
            Self::Console(driver) => {
                for piece in bytes.chunks(4096) {
                    driver.put(BUFFERS, piece);
                    driver.run(1, &[(BUFFERS, piece.len() as u32, false)]);
                }
            }
            Self::Uart(client) => {
                for piece in bytes.chunks(16) {
                    while register(client, 5) & 0x20 == 0 {}
                    for byte in piece {
                        client.post(0, 0, &[*byte]).unwrap();
                    }
                }
                register(client, 5);
            }
        }
    }

    fn hear(&mut self, count: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        let end = Instant::now() + LIMIT;
        while heard.len() < count {
            assert!(Instant::now() < end, "heard only {heard:?}");
            match self {
                Self::Console(driver) => {
                    let len = driver.run(0, &[(BUFFERS, 64, true)]);
                    heard.extend(driver.get(BUFFERS, len as usize));
                }
                Self::Uart(client) => {
                    if register(client, 5) & 1 != 0 {
                        heard.push(register(client, 0));
                    }
                }
            }
        }
        heard
    }
}

fn register(client: &mut Client, offset: u64) -> u8 {
    let mut data = [0];
    client.read(0, offset, &mut data).unwrap();
    data[0]
}

/// A device with its guest.
struct Rig {
    device: Supervised,
    guest: Guest,
}

impl Rig {
    fn both() -> [Self; 2] {
        [Self::start("console", None, None), Self::start("uart", None, None)]
    }

    fn start(kind: &str, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        let resources: Vec<&OwnedFd> = input.iter().chain(&output).collect();
        let first = input.as_ref().map(|_| FdIndex(1));
        let second = output.as_ref().map(|_| FdIndex(resources.len() as u8));
        let config = match kind {
            "console" => {
                DeviceConfig::Console(ConsoleConfig { input: first, output: second, size: None, typed: None })
            }
            _ => {
                DeviceConfig::Uart(UartConfig { input: first, output: second, typed: None, own_file: false })
            }
        };
        let mut device = Supervised::start(kind, config, &resources, Enforcement::Standalone);
        let guest = if kind == "console" {
            Guest::Console(Box::new(device.driver(2)))
        } else {
            let socket = device.stream.take().unwrap().into();
            let mut client = Client::connect(socket, "uart", Duration::from_secs(5)).unwrap();
            // FIFOs on.
            client.post(0, 2, &[0x01]).unwrap();
            Guest::Uart(client)
        };
        Self { device, guest }
    }

    fn attach(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        self.device.channel.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
        ours
    }
}

fn exactly(stream: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Reads until `end` was shown.
fn until(stream: &mut impl Read, end: &[u8]) -> Vec<u8> {
    let mut seen = Vec::new();
    while !seen.ends_with(end) {
        let mut bytes = [0; 4096];
        let count = stream.read(&mut bytes).unwrap();
        assert_ne!(count, 0, "the stream ends before {end:?}");
        seen.extend_from_slice(&bytes[..count]);
    }
    seen
}

#[test]
fn who_attaches_late_sees_the_recent_output() {
    for mut rig in Rig::both() {
        rig.guest.say(b"long ago");
        rig.guest.say(&[b'.'; HISTORY - 6]);
        rig.guest.say(b"login:");
        let mut peer = rig.attach();
        let seen = exactly(&mut peer, HISTORY);
        assert!(seen[..HISTORY - 6].iter().all(|byte| *byte == b'.') && seen.ends_with(b"login:"));
        rig.guest.say(b"go on");
        assert_eq!(exactly(&mut peer, 5), b"go on");
        rig.device.stop();
    }
}

#[test]
fn every_byte_goes_through_both_ways() {
    let all: Vec<u8> = (0..=255).collect();
    for mut rig in Rig::both() {
        let mut peer = rig.attach();
        peer.write_all(&[3]).unwrap();
        assert_eq!(rig.guest.hear(1), [3], "Ctrl-C alone");
        peer.write_all(&all).unwrap();
        assert_eq!(rig.guest.hear(256), all);
        rig.guest.say(&all);
        assert_eq!(exactly(&mut peer, 256), all);
        rig.device.stop();
    }
}

#[test]
fn peers_come_and_go() {
    for mut rig in Rig::both() {
        for round in 0..6u8 {
            let mut peer = rig.attach();
            peer.write_all(&[b'a' + round]).unwrap();
            assert_eq!(rig.guest.hear(1), [b'a' + round]);
            rig.guest.say(&[b'A' + round]);
            assert_eq!(exactly(&mut peer, 1), [b'A' + round]);
            if round % 2 == 0 {
                // The next one takes over while this one is still there.
                let mut next = rig.attach();
                assert_eq!(peer.read(&mut [0]).unwrap(), 0, "who is replaced sees the end");
                rig.guest.say(b"!");
                assert_eq!(exactly(&mut next, 1), b"!");
            }
        }
        rig.device.stop();
    }
}

#[test]
fn a_peer_that_closes_while_output_is_pending_leaves_the_rest_to_the_next() {
    for mut rig in Rig::both() {
        let peer = rig.attach();
        // More than the socket takes.
        rig.guest.say(&[b'-'; 240_000]);
        drop(peer);
        rig.guest.say(b"still here");
        let mut next = rig.attach();
        let seen = until(&mut next, b"still here");
        assert!(seen.len() > 10 && seen.len() <= HISTORY + 10, "{}", seen.len());
        rig.device.stop();
    }
}

#[test]
fn a_peer_that_never_reads_does_not_stop_the_guest() {
    for mut rig in Rig::both() {
        let mut peer = rig.attach();
        let begin = Instant::now();
        rig.guest.say(&[b'-'; 500_000]);
        rig.guest.say(b"newest");
        assert!(begin.elapsed() < Duration::from_secs(30));
        until(&mut peer, b"newest");
        rig.device.stop();
    }
}

#[test]
fn the_first_output_and_input_serve_again_when_the_peer_has_gone() {
    for kind in ["console", "uart"] {
        let (mut shown, output) = std::io::pipe().unwrap();
        let (input, mut keyboard) = UnixStream::pair().unwrap();
        let mut rig = Rig::start(kind, Some(input.into()), Some(output.into()));
        rig.guest.say(b"one");
        assert_eq!(exactly(&mut shown, 3), b"one");
        let mut peer = rig.attach();
        peer.write_all(b"peer").unwrap();
        assert_eq!(rig.guest.hear(4), b"peer");
        rig.guest.say(b"two");
        assert_eq!(exactly(&mut peer, 3), b"two");
        drop(peer);
        keyboard.write_all(b"keys").unwrap();
        assert_eq!(rig.guest.hear(4), b"keys");
        rig.guest.say(b"three");
        assert_eq!(exactly(&mut shown, 5), b"three");
        rig.device.stop();
    }
}

#[test]
fn the_last_output_is_not_lost_with_the_device() {
    for kind in ["console", "uart"] {
        let (mut shown, output) = std::io::pipe().unwrap();
        let mut rig = Rig::start(kind, None, Some(output.into()));
        // A pipe takes 64 KiB, the device keeps the rest.
        rig.guest.say(&[b'-'; 120_000]);
        rig.guest.say(b"power down");
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            shown.read_to_end(&mut all).unwrap();
            all
        });
        rig.device.stop();
        let all = reader.join().unwrap();
        assert!(all.len() == 120_010 && all.ends_with(b"power down"), "{kind}: {}", all.len());
    }
}

#[test]
fn a_serial_port_has_no_size_and_does_not_mind_being_told_one() {
    let mut rig = Rig::start("uart", None, None);
    rig.device.channel.send(&ToDevice::Resize { columns: 80, rows: 25 }, &[]).unwrap();
    let mut peer = rig.attach();
    rig.guest.say(b"alive");
    assert_eq!(exactly(&mut peer, 5), b"alive");
    rig.device.stop();
}

#[test]
fn an_attach_without_its_descriptor_changes_nothing() {
    for mut rig in Rig::both() {
        let mut peer = rig.attach();
        rig.device.channel.send(&ToDevice::Attach, &[]).unwrap();
        let null = File::open("/dev/null").unwrap();
        rig.device.channel.send(&ToDevice::Attach, &[null.as_fd(), null.as_fd()]).unwrap();
        rig.guest.say(b"alive");
        assert_eq!(exactly(&mut peer, 5), b"alive");
        rig.device.stop();
    }
}
