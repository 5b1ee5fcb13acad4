//! The whole way with this project's own daemon: negotiation of everything that both sides have, a ring, reset, replacement.

use std::io;
use std::thread::JoinHandle;

use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::vhost_user::backend::{
    Chain, Daemon, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, no_jail,
};
use bulkhead_ipc::vhost_user::frontend::SUPPORTED_PROTOCOL_FEATURES;
use bulkhead_ipc::vhost_user::message::VhostUserProtocolFeatures;
use nix::sys::epoll::Epoll;

use super::*;

const RING: u64 = 0x1_0000;
const DATA: u64 = 0x5000;

/// Fills every buffer with its byte.
struct Filler(u8);

impl VirtioDevice for Filler {
    fn name(&self) -> &'static str {
        "filler"
    }

    fn features(&self) -> u64 {
        1
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        vec![Box::new(PollWorker::new(FillerQueue { byte: self.0, chain: Chain::new() }, 1))]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = at.to_le_bytes()[0];
        }
    }
}

struct FillerQueue {
    byte: u8,
    chain: Chain,
}

impl QueueHandler for FillerQueue {
    fn serve(&mut self, rings: &mut [Option<Vring>], _epoll: &Epoll) -> io::Result<Next> {
        if let Some(Some(ring)) = rings.first_mut() {
            while ring.next(&mut self.chain) {
                let mut written = 0;
                for segment in self.chain.writable() {
                    let view =
                        ring.ram().view(segment.address, segment.len.into(), Direction::Write).unwrap();
                    view.write_bytes(0, &vec![self.byte; usize::try_from(segment.len).unwrap()]).unwrap();
                    written += segment.len;
                }
                ring.finish(self.chain.head(), written);
            }
            ring.signal();
        }
        Ok(Next::Event)
    }
}

/// A daemon in a thread; it ends with the connection.
pub(super) fn daemon(byte: u8) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut daemon = Daemon::new(Box::new(Filler(byte)), &no_jail()).unwrap();
        let _ = daemon.run(theirs.into());
    });
    (ours, thread)
}

pub(super) fn post(scaffold: &Scaffold, number: u16) {
    let put = |address: u64, bytes: &[u8]| {
        let view = scaffold.ram.view(address, bytes.len() as u64, Direction::Write).unwrap();
        view.write_bytes(0, bytes).unwrap();
    };
    // One buffer of 64 bytes that the device writes.
    put(RING, &[DATA.to_le_bytes(), (64u64 | 2 << 32).to_le_bytes()].concat());
    put(RING + 0x1000 + 4 + 2 * u64::from(number % 256), &[0, 0]);
    put(RING + 0x1002, &(number + 1).to_le_bytes());
}

fn submit(scaffold: &Scaffold, number: u16) {
    post(scaffold, number);
    scaffold.driver.notify(0);
}

pub(super) fn used(scaffold: &Scaffold) -> u16 {
    scaffold.ram.view(RING + 0x2002, 2, Direction::Read).unwrap().read(0).unwrap()
}

fn data(scaffold: &Scaffold) -> [u8; 64] {
    let mut bytes = [0; 64];
    scaffold.ram.view(DATA, 64, Direction::Read).unwrap().read_bytes(0, &mut bytes).unwrap();
    bytes
}

pub(super) fn start(driver: &Driver) {
    driver.bus_master(true);
    assert!(driver.negotiate(1 << 32));
    driver.queue(0, 256, RING);
    driver.set_status(15);
    assert_eq!(driver.status(), 15);
}

fn serve_one(scaffold: &Scaffold, number: u16, byte: u8) {
    submit(scaffold, number);
    wait_until(&scaffold.device, || used(scaffold) == number + 1 && scaffold.pin.asserted());
    assert_eq!(scaffold.driver.get::<1>(scaffold.driver.isr, 0), [1]);
    assert_eq!(data(scaffold), [byte; 64]);
}

#[test]
fn a_device_of_our_own_works_through_reset_and_pause() {
    let (stream, thread) = daemon(0xEE);
    let scaffold = scaffold_with(settings(), stream);
    let driver = &scaffold.driver;
    {
        let state = scaffold.device.state();
        let link = state.link.as_ref().unwrap();
        // This device keeps its requests in order, and so tracks none in flight.
        let expected = SUPPORTED_PROTOCOL_FEATURES.difference(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        assert_eq!(link.frontend.protocol_features(), expected);
        assert!(link.requests.is_some());
    }
    assert_eq!(driver.get::<4>(driver.config, 8), [8, 9, 10, 11]);
    start(driver);
    serve_one(&scaffold, 0, 0xEE);
    serve_one(&scaffold, 1, 0xEE);
    // Paused, nothing happens; resumed, what waited is served.
    scaffold.device.pause().unwrap();
    submit(&scaffold, 2);
    assert_eq!(used(&scaffold), 2);
    scaffold.device.resume();
    wait_until(&scaffold.device, || used(&scaffold) == 3);
    // From the start again.
    driver.set_status(0);
    let rings = scaffold.ram.view(RING, 0x3000, Direction::Write).unwrap();
    rings.zero(0, 0x3000).unwrap();
    start(driver);
    serve_one(&scaffold, 0, 0xEE);
    assert_eq!(scaffold.failures.count(), 0);
    drop(scaffold);
    thread.join().unwrap();
}

#[test]
fn a_device_of_our_own_is_replaced_by_another() {
    let (stream, first) = daemon(1);
    let socket = stream.try_clone().unwrap();
    let scaffold = scaffold_with(Settings { hold_on_failure: true, ..settings() }, stream);
    start(&scaffold.driver);
    serve_one(&scaffold, 0, 1);
    socket.shutdown(std::net::Shutdown::Both).unwrap();
    first.join().unwrap();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    submit(&scaffold, 1);
    let (stream, _second) = daemon(2);
    scaffold.device.replace_backend(stream).unwrap();
    wait_until(&scaffold.device, || used(&scaffold) == 2);
    assert_eq!(data(&scaffold), [2; 64]);
    assert_eq!(scaffold.driver.status(), 15);
    // The interrupt that a predecessor may have owed and this one's own are told apart by nobody: take them.
    wait_until(&scaffold.device, || scaffold.pin.asserted());
    std::thread::sleep(Duration::from_millis(20));
    scaffold.device.on_event();
    scaffold.driver.get::<1>(scaffold.driver.isr, 0);
    serve_one(&scaffold, 2, 2);
}
