//! A device process, and a virtio driver for its queues.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vhost_user::frontend::{
    Frontend, InflightMemory, Limits, MemoryRegion, RingAddresses, SUPPORTED_PROTOCOL_FEATURES,
};
use bulkhead_ipc::vhost_user::message::VHOST_USER_F_PROTOCOL_FEATURES;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Guest RAM of the tests, bytes.
pub const RAM: u64 = 96 << 20;
/// Where buffers begin; the rings lie below.
pub const BUFFERS: u64 = 16 << 20;
/// Entries of a ring.
pub const SIZE: u16 = 256;
const PATIENCE: Duration = Duration::from_secs(20);

/// `bulkhead-device` serving a socket.
pub struct Service {
    pub child: Child,
    pub socket: PathBuf,
    pub directory: TempDir,
}

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_bulkhead-device");

impl Service {
    /// A disk of `size` bytes with `options`.
    pub fn disk(size: u64, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
        let mut arguments = vec!["--blk-file".to_owned(), disk.to_str().unwrap().to_owned()];
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        Self::start("blk", directory, &arguments)
    }

    pub fn start(kind: &str, directory: TempDir, arguments: &[String]) -> Self {
        let socket = directory.path().join("socket");
        let child = Self::spawn(kind, &socket, arguments);
        Self { child, socket, directory }
    }

    pub fn spawn(kind: &str, socket: &Path, arguments: &[String]) -> Child {
        let mut command = Command::new(PROGRAM);
        command.arg(kind).arg("--socket-path").arg(socket).arg("--persistent").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    pub fn disk_path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// Writes to the beginning of the disk, in place: the process may be looking at its size just now.
    pub fn write_disk(&self, bytes: &[u8]) {
        let disk = std::fs::File::options().write(true).open(self.disk_path()).unwrap();
        disk.write_all_at(bytes, 0).unwrap();
    }

    pub fn connect(&self) -> UnixStream {
        connect(&self.socket)
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

pub fn connect(socket: &Path) -> UnixStream {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > end => panic!("the service does not listen: {error}"),
            Err(_) => sleep(Duration::from_millis(2)),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A queue as the driver sees it.
pub struct Queue {
    pub index: u16,
    pub base: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    pub next_available: u16,
    pub last_used: u16,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
}

fn eventfd() -> EventFd {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

impl Queue {
    pub fn new(index: u16) -> Self {
        let base = 0x10_0000 + u64::from(index) * 0x1_0000;
        Self {
            index,
            base,
            kick: eventfd(),
            call: eventfd(),
            error: eventfd(),
            next_available: 0,
            last_used: 0,
            event_idx: false,
            free: (0..SIZE).rev().collect(),
            chains: vec![Vec::new(); usize::from(SIZE)],
        }
    }

    pub fn addresses(&self) -> RingAddresses {
        RingAddresses { descriptors: self.base, available: self.base + 0x4000, used: self.base + 0x8000 }
    }

    pub fn descriptor(&self, ram: &GuestRam, index: u16, entry: (u64, u32, u16, u16)) {
        put_descriptor(ram, self.base + u64::from(index) * 16, entry);
    }

    /// Makes descriptor `head` available, without a kick.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let slot = self.base + 0x4004 + u64::from(self.next_available % SIZE) * 2;
        ram.memory().write_obj(head, GuestAddress(slot)).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        let order = std::sync::atomic::Ordering::Release;
        ram.memory().store(self.next_available, GuestAddress(self.base + 0x4002), order).unwrap();
    }

    pub fn kick(&self) {
        nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Chains buffers (address, length, device writes) and makes them available.
    pub fn submit(&mut self, ram: &GuestRam, buffers: &[(u64, u32, bool)]) -> u16 {
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (position, (&index, &(address, len, writes))) in indices.iter().zip(buffers).enumerate() {
            let next = indices.get(position + 1).copied();
            let flags = if writes { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.descriptor(ram, index, (address, len, flags, next.unwrap_or(0)));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer(ram, head);
        head
    }

    /// The next finished request: head and bytes written. Polls the ring, as a driver without interrupts does.
    pub fn finished(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        let order = std::sync::atomic::Ordering::Acquire;
        let used: u16 = ram.memory().load(GuestAddress(self.base + 0x8002), order).unwrap();
        if used == self.last_used {
            return None;
        }
        let slot = self.base + 0x8004 + u64::from(self.last_used % SIZE) * 8;
        let head: u32 = ram.memory().read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = ram.memory().read_obj(GuestAddress(slot + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free.append(&mut self.chains[usize::from(head)]);
        // With EVENT_IDX: interrupt me at the next one.
        ram.memory()
            .write_obj(self.last_used, GuestAddress(self.base + 0x4004 + u64::from(SIZE) * 2))
            .unwrap();
        Some((head, len))
    }

    /// Waits for the next finished request by its interrupt.
    pub fn wait(&mut self, ram: &GuestRam) -> (u16, u32) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(finished) = self.finished(ram) {
                return finished;
            }
            let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            let count = poll(&mut fds, PollTimeout::from(1000u16)).unwrap();
            if count > 0 {
                let _ = self.call.read();
            }
            assert!(Instant::now() < end, "a request of queue {} is never finished", self.index);
        }
    }

    /// Waits until the device asks to be told of the next request, as one that sleeps must: a real driver would not kick it otherwise.
    pub fn rests(&self, ram: &GuestRam) {
        let end = Instant::now() + PATIENCE;
        let word = |at: u64| -> u16 { ram.memory().read_obj(GuestAddress(self.base + at)).unwrap() };
        let asks = || match self.event_idx {
            true => word(0x8004 + u64::from(SIZE) * 8) == self.next_available,
            false => word(0x8000) & 1 == 0,
        };
        while !asks() {
            assert!(Instant::now() < end, "queue {} sleeps and does not ask for kicks", self.index);
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

pub fn put_descriptor(ram: &GuestRam, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
    let mut bytes = Vec::new();
    bytes.write_all(&address.to_le_bytes()).unwrap();
    bytes.write_all(&len.to_le_bytes()).unwrap();
    bytes.write_all(&flags.to_le_bytes()).unwrap();
    bytes.write_all(&next.to_le_bytes()).unwrap();
    ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
}

/// A driver of all queues of a device.
pub struct Driver {
    pub frontend: Frontend,
    pub ram: GuestRam,
    pub queues: Vec<Queue>,
}

impl Driver {
    pub fn new(stream: UnixStream, queues: u16) -> Self {
        Self::with(stream, queues, EVENT_IDX | INDIRECT_DESC)
    }

    pub fn with(stream: UnixStream, queues: u16, ring_features: u64) -> Self {
        let mut driver = Self::unstarted(stream, queues);
        driver.set_up(ring_features, u64::MAX);
        driver.start(None);
        driver
    }

    pub fn unstarted(stream: UnixStream, queues: u16) -> Self {
        let frontend = Frontend::new("test", stream, Limits::default());
        let ram = GuestRam::create(RAM).unwrap();
        Self { frontend, ram, queues: (0..queues).map(Queue::new).collect() }
    }

    /// Features and memory.
    pub fn set_up(&mut self, ring_features: u64, device_features: u64) {
        self.frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).unwrap();
        let device = self.frontend.offered_features() & 0xff_ffff & device_features;
        let features = device | VERSION_1 | ring_features | VHOST_USER_F_PROTOCOL_FEATURES;
        self.frontend.set_features(features).unwrap();
        self.queues.iter_mut().for_each(|queue| queue.event_idx = ring_features & EVENT_IDX != 0);
        let regions: Vec<_> = self.ram.regions().map(MemoryRegion::from).collect();
        self.frontend.set_memory(&regions).unwrap();
    }

    pub fn start(&mut self, inflight: Option<&InflightMemory>) {
        if let Some(memory) = inflight {
            self.frontend.set_inflight(memory).unwrap();
        }
        for queue in &self.queues {
            let index = queue.index;
            self.frontend.set_vring_num(index, SIZE).unwrap();
            self.frontend.set_vring_base(index, queue.last_used).unwrap();
            self.frontend.set_vring_addr(index, &queue.addresses(), None).unwrap();
            self.frontend.set_vring_err(index, queue.error.as_fd()).unwrap();
            self.frontend.set_vring_call(index, Some(queue.call.as_fd())).unwrap();
            self.frontend.set_vring_kick(index, queue.kick.as_fd()).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Submits a chain to a queue and waits for it; returns the bytes written.
    pub fn run(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u32 {
        let queue = &mut self.queues[queue];
        let head = queue.submit(&self.ram, buffers);
        queue.kick();
        let (finished, len) = queue.wait(&self.ram);
        assert_eq!(finished, head);
        len
    }
}

/// A small generator of numbers; the same each run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &0u32.to_le_bytes(), &sector.to_le_bytes()].concat()
}
