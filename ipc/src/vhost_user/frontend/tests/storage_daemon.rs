//! Against a real peer: QEMU's storage daemon serves a file as a vhost-user-blk device.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::memory::{Direction, GuestRam};

const PROGRAM: &str = "qemu-storage-daemon";
const SECTOR: usize = 512;
const SECTORS: usize = 2048;
const QUEUE_SIZE: u16 = 16;
const RING: RingAddresses = RingAddresses { descriptors: 0x1000, available: 0x2000, used: 0x3000 };
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4800;
const DATA: u64 = 0x5000;

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    fn start(folder: &Path, image: &Path) -> (Self, UnixStream) {
        let socket = folder.join("blk.sock");
        let child = Command::new(PROGRAM)
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn();
        let mut daemon = Self(child.unwrap_or_else(|error| {
            panic!("{PROGRAM} cannot be started ({error}): install Debian's qemu-system-common")
        }));
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                return (daemon, stream);
            }
            if let Some(status) = daemon.0.try_wait().unwrap() {
                panic!("{PROGRAM} ended with {status}");
            }
            assert!(start.elapsed() < LONG, "{PROGRAM} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A driver that has one request on the ring at a time.
struct Driver {
    ram: GuestRam,
    kick: EventFd,
    call: EventFd,
    submitted: u16,
}

impl Driver {
    fn new(ram: GuestRam) -> Self {
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        Self { ram, kick: event(), call: event(), submitted: 0 }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.view(address, bytes.len() as u64, Direction::Write).unwrap().write_bytes(0, bytes).unwrap();
    }

    fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.view(address, length as u64, Direction::Read).unwrap().read_bytes(0, &mut bytes).unwrap();
        bytes
    }

    fn word(&self, address: u64) -> u16 {
        self.ram.view(address, 2, Direction::Read).unwrap().load(0, Ordering::Acquire).unwrap()
    }

    fn descriptor(&self, index: u64, address: u64, length: usize, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(u32::try_from(length).unwrap().to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(RING.descriptors + 16 * index, &bytes);
    }

    /// Runs a request (type 0 read, 1 write) on `length` bytes at DATA and returns its status byte.
    fn request(&mut self, kind: u32, sector: u64, length: usize) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xFF]);
        let (next, write) = (1, 2);
        self.descriptor(0, HEADER, 16, next, 1);
        self.descriptor(1, DATA, length, if kind == 0 { next | write } else { next }, 2);
        self.descriptor(2, STATUS, 1, write, 0);
        self.put(RING.available + 4 + 2 * u64::from(self.submitted % QUEUE_SIZE), &[0, 0]);
        self.submitted += 1;
        let index = self.ram.view(RING.available + 2, 2, Direction::Write).unwrap();
        index.store(0, self.submitted, Ordering::Release).unwrap();
        self.kick.write(1).unwrap();
        let mut fds = [nix::poll::PollFd::new(self.call.as_fd(), nix::poll::PollFlags::POLLIN)];
        while self.word(RING.used + 2) != self.submitted {
            assert_eq!(nix::poll::poll(&mut fds, 10_000u16).unwrap(), 1, "no interrupt");
            self.call.read().unwrap();
        }
        self.get(STATUS, 1)[0]
    }
}

fn start_queue(frontend: &mut Frontend, driver: &Driver, base: u16) {
    let regions: Vec<MemoryRegion<'_>> = driver.ram.regions().map(MemoryRegion::from).collect();
    frontend.set_features(1 << 32 | 1 << 30).unwrap();
    frontend.set_memory(&regions).unwrap();
    frontend.set_vring_num(0, QUEUE_SIZE).unwrap();
    frontend.set_vring_base(0, base).unwrap();
    frontend.set_vring_addr(0, &RING, None).unwrap();
    frontend.set_vring_call(0, Some(driver.call.as_fd())).unwrap();
    frontend.set_vring_kick(0, driver.kick.as_fd()).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
}

#[test]
fn qemu_storage_daemon_reads_and_writes_through_a_ring() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let contents: Vec<u8> = (0..SECTORS * SECTOR).map(|n| (n / 7).to_le_bytes()[0]).collect();
    File::create(&image).unwrap().write_all(&contents).unwrap();
    let (_daemon, stream) = Daemon::start(folder.path(), &image);

    let mut frontend = Frontend::new("disk0", stream, limits(LONG));
    frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).unwrap();
    assert_ne!(frontend.offered_features() & 1 << 32, 0, "VERSION_1");
    assert!(frontend.has(VhostUserProtocolFeatures::CONFIG));
    assert!(frontend.has(VhostUserProtocolFeatures::MQ));
    assert_eq!(frontend.max_queues(), 2);
    let mut config = [0; 60];
    frontend.get_config(0, &mut config).unwrap();
    assert_eq!(config[..8], (SECTORS as u64).to_le_bytes(), "capacity");
    assert_eq!(config[34..36], 2u16.to_le_bytes(), "num_queues");

    let mut driver = Driver::new(GuestRam::create(4 << 20).unwrap());
    start_queue(&mut frontend, &driver, 0);
    assert_eq!(driver.request(0, 8, 8 * SECTOR), 0);
    assert_eq!(driver.get(DATA, 8 * SECTOR), contents[8 * SECTOR..16 * SECTOR]);
    driver.put(DATA, &[0x5A; 3 * SECTOR]);
    assert_eq!(driver.request(1, 100, 3 * SECTOR), 0);
    assert_eq!(driver.request(0, SECTORS as u64, SECTOR), 1, "beyond the end: VIRTIO_BLK_S_IOERR");

    // Stop, and go on from where it stopped.
    let base = frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 3);
    start_queue(&mut frontend, &driver, base);
    assert_eq!(driver.request(0, 101, SECTOR), 0);
    assert_eq!(driver.get(DATA, SECTOR), [0x5A; SECTOR]);

    // The dirty log is taken, with the answer that this daemon gives.
    let log = tempfile::tempfile().unwrap();
    log.set_len(0x1000).unwrap();
    frontend.set_log_base(0x1000, 0, log.as_fd()).unwrap();
    assert_eq!(frontend.get_vring_base(0).unwrap(), 4);
    drop(frontend);

    let written = std::fs::read(&image).unwrap();
    assert_eq!(written[100 * SECTOR..103 * SECTOR], [0x5A; 3 * SECTOR]);
    assert_eq!(written[..100 * SECTOR], contents[..100 * SECTOR]);
}

#[test]
fn qemu_storage_daemon_dying_is_seen_as_a_closed_connection() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let (daemon, stream) = Daemon::start(folder.path(), &image);
    let mut frontend = Frontend::new("disk0", stream, limits(LONG));
    frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).unwrap();
    drop(daemon);
    let error = frontend.get_config(0, &mut [0; 8]).unwrap_err();
    assert!(matches!(error.problem, Problem::Connection(ConnectionError::Closed)), "{error}");
}
