//! The device program as its supervisor starts it: in a jail, sealed, under its policies.

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::channel::message::{
    BlkConfig, BlkOptions, ConsoleConfig, DeviceConfig, DeviceStart, FdIndex, FromDevice, Left, Progress,
    RngConfig, ToDevice,
};
use bulkhead_ipc::jail::{self, Enforcement, Identity, JailSpec, JailedProcess, Limits, SharedDirectory};
use bulkhead_ipc::log::LogLevel;
use bulkhead_ipc::vhost_user::frontend::{BackendRequest, InflightMemory};

use crate::driver::header;
use crate::driver::{BUFFERS, Driver, PROGRAM, SIZE};

pub const LIMIT: Duration = Duration::from_secs(10);
const HEADER: u64 = 0xf0_0000;

pub struct Supervised {
    process: JailedProcess,
    pub channel: Channel,
    pub stream: Option<UnixStream>,
    log: std::io::PipeReader,
    listeners: Vec<OwnedFd>,
}

impl Supervised {
    pub fn start(kind: &str, config: DeviceConfig, resources: &[&OwnedFd], enforcement: Enforcement) -> Self {
        let mut this = Self::spawn(kind, None);
        this.tell(config, resources, enforcement);
        this.ready()
    }

    /// One that may have a directory (`O_PATH`) to share.
    pub fn start_sharing(
        directory: Option<&OwnedFd>,
        kind: &str,
        config: DeviceConfig,
        resources: &[&OwnedFd],
    ) -> Self {
        let mut this = Self::spawn(kind, directory);
        this.tell(config, resources, Enforcement::Supervised);
        this.ready()
    }

    fn ready(self) -> Self {
        let mut this = self;
        match this.channel.recv::<FromDevice>(Some(LIMIT)) {
            Ok((FromDevice::Ready { .. }, listeners)) => this.listeners = listeners,
            other => panic!("{other:?}\n{}", this.ending()),
        }
        this
    }

    /// A process that waits for its start message.
    fn spawn(kind: &str, directory: Option<&OwnedFd>) -> Self {
        let (ours, theirs) = Channel::pair().unwrap();
        let (log, log_end) = pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let program = File::open(PROGRAM).unwrap();
        let spec = JailSpec {
            program: program.as_fd(),
            arguments: &["bulkhead-device".to_owned(), kind.to_owned()],
            channel: theirs.into_fd(),
            log: log_end.as_fd(),
            null: null.as_fd(),
            // As the supervisor does it: io_uring's rings count as locked memory.
            limits: Limits { file_size: None, locked: 8 << 20, descriptors: 2048, ..Limits::default() },
            identity: Identity::default(),
            subordinate: None,
            cgroup: None,
            shared: directory.map(|directory| SharedDirectory {
                directory: directory.as_fd(),
                read_only: false,
                all_owners: false,
            }),
        };
        let mut process = jail::spawn(spec).unwrap();
        drop(log_end);
        process.confirm(LIMIT).unwrap();
        Self { process, channel: ours, stream: None, log, listeners: Vec::new() }
    }

    /// Sends the start message; the descriptors begin with the front end's socket.
    fn tell(&mut self, config: DeviceConfig, resources: &[&OwnedFd], enforcement: Enforcement) {
        let (stream, socket) = UnixStream::pair().unwrap();
        self.stream = Some(stream);
        let start = DeviceStart {
            id: "id".into(),
            machine: "machine".into(),
            log: LogLevel::Info,
            enforcement,
            socket: FdIndex(0),
            config,
            metrics: None,
        };
        let mut fds = vec![socket.as_fd()];
        fds.extend(resources.iter().map(|fd| fd.as_fd()));
        self.channel.send(&ToDevice::Start(start), &fds).unwrap();
    }

    pub fn driver(&mut self, queues: u16) -> Driver {
        Driver::new(self.stream.take().unwrap(), queues)
    }

    /// Reads the log and forgets it, so that a process with much to say does not wait.
    pub fn forget_log(&self) {
        let mut log = self.log.try_clone().unwrap();
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    }

    /// Ends the process; returns its exit and its log.
    fn ending(&mut self) -> String {
        let exit = self.process.wait();
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        format!("{exit:?}: {log}")
    }

    /// Its number on the host.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Kills the process and waits for its end.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub fn stop(mut self) {
        // One whose front end has gone ends by itself, perhaps already.
        let _told = self.channel.send(&ToDevice::Stop, &[]);
        assert!(self.ending().starts_with("Ok(Code(0))"));
    }

    /// Private dirty memory, KiB.
    fn private_dirty(&self) -> u64 {
        let path = format!("/proc/{}/smaps_rollup", self.process.pid());
        let rollup = std::fs::read_to_string(path).unwrap();
        let line = rollup.lines().find(|line| line.starts_with("Private_Dirty")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

fn disk(size: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file.into()
}

pub fn blk(queues: u16) -> DeviceConfig {
    DeviceConfig::Blk(BlkConfig {
        disk: FdIndex(1),
        read_only: false,
        serial: "1".into(),
        queues,
        logical_block_size: 512,
        options: BlkOptions::default(),
    })
}

fn disk_requests(driver: &mut Driver, queues: u16) {
    for queue in 0..usize::from(queues) {
        for (kind, data) in
            [(0, vec![(BUFFERS, 65536, true)]), (1, vec![(BUFFERS, 4096, false)]), (4, vec![])]
        {
            driver.put(HEADER, &header(kind, 0));
            let buffers = [vec![(HEADER, 16, false)], data, vec![(BUFFERS + 0x10_0000, 1, true)]].concat();
            driver.run(queue, &buffers);
            assert_eq!(driver.get(BUFFERS + 0x10_0000, 1), [0]);
        }
        for kind in [11, 13] {
            driver.put(
                HEADER,
                &[header(kind, 0), 0u64.to_le_bytes().to_vec(), 8u64.to_le_bytes().to_vec()].concat(),
            );
            driver.run(queue, &[(HEADER, 32, false), (BUFFERS + 0x10_0000, 1, true)]);
            assert_eq!(driver.get(BUFFERS + 0x10_0000, 1), [0]);
        }
    }
}

#[test]
fn a_jailed_disk_serves_everything_its_policy_allows() {
    for enforcement in [Enforcement::Supervised, Enforcement::Standalone] {
        let image = disk(16 << 20);
        let mut process = Supervised::start("blk", blk(2), &[&image], enforcement);
        if enforcement == Enforcement::Supervised {
            assert_eq!(process.listeners.len(), 3, "main thread and two queues");
        }
        let mut driver = Driver::unstarted(process.stream.take().unwrap(), 2);
        driver.set_up(1 << 29, u64::MAX);
        let memory: InflightMemory = driver.frontend.get_inflight(2, SIZE).unwrap().unwrap();
        driver.start(Some(&memory));
        disk_requests(&mut driver, 2);
        driver.frontend.get_vring_base(0).unwrap();
        driver.frontend.get_vring_base(1).unwrap();
        driver.frontend.set_memory(&[]).unwrap();
        process.stop();
    }
}

/// Reads the sector at this place; the status.
fn read_sector(driver: &mut Driver, sector: u64) -> u8 {
    driver.put(HEADER, &header(0, sector));
    driver.run(0, &[(HEADER, 16, false), (BUFFERS, 512, true), (BUFFERS + 0x10_0000, 1, true)]);
    driver.get(BUFFERS + 0x10_0000, 1)[0]
}

#[test]
fn a_disk_has_another_size_at_once() {
    const SMALL: u64 = 1 << 20;
    let file = tempfile::tempfile().unwrap();
    file.set_len(SMALL).unwrap();
    let image = file.try_clone().unwrap().into();
    let mut process = Supervised::start("blk", blk(1), &[&image], Enforcement::Supervised);
    let mut driver = process.driver(1);
    let mut requests = driver.frontend.open_backend_requests().unwrap();
    assert_eq!((read_sector(&mut driver, 2047), read_sector(&mut driver, 2048)), (0, 1));
    for (bytes, last) in [(SMALL * 2 + 100, 4095), (SMALL / 2, 1023)] {
        file.set_len(bytes).unwrap();
        process.channel.send(&ToDevice::DiskSize { bytes }, &[]).unwrap();
        assert!(matches!(requests.receive().unwrap(), BackendRequest::ConfigChange));
        let mut capacity = [0; 8];
        driver.frontend.get_config(0, &mut capacity).unwrap();
        assert_eq!(u64::from_le_bytes(capacity), last + 1, "whole sectors");
        assert_eq!((read_sector(&mut driver, last), read_sector(&mut driver, last + 1)), (0, 1));
    }
    process.stop();
}

#[test]
fn a_jailed_entropy_device_serves() {
    let source = File::open("/dev/urandom").unwrap().into();
    let config = DeviceConfig::Rng(RngConfig { source: FdIndex(1), limit: None });
    let mut process = Supervised::start("rng", config, &[&source], Enforcement::Supervised);
    let mut driver = process.driver(1);
    assert_eq!(driver.run(0, &[(BUFFERS, 64, true)]), 64);
    assert_ne!(driver.get(BUFFERS, 64), vec![0; 64]);
    process.stop();
}

#[test]
fn a_jailed_console_changes_its_peer_and_its_size() {
    let config = DeviceConfig::Console(ConsoleConfig {
        input: None,
        output: None,
        size: Some((100, 30)),
        typed: None,
    });
    let mut process = Supervised::start("console", config, &[], Enforcement::Supervised);
    let mut driver = process.driver(2);
    driver.put(BUFFERS, b"before");
    driver.run(1, &[(BUFFERS, 6, false)]);

    for round in 0..2 {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        process.channel.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
        drop(theirs);
        if round == 0 {
            let mut seen = [0; 6];
            ours.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"before", "what was said to nobody waits for the first peer");
        }
        ours.write_all(b"typed").unwrap();
        assert_eq!(driver.run(0, &[(BUFFERS, 64, true)]), 5);
        assert_eq!(driver.get(BUFFERS, 5), b"typed");
        driver.put(BUFFERS, b"shown");
        driver.run(1, &[(BUFFERS, 5, false)]);
        let mut seen = [0; 5];
        ours.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"shown");
    }

    let mut size = [0; 4];
    driver.frontend.get_config(0, &mut size).unwrap();
    assert_eq!(size, [100, 0, 30, 0]);
    let mut requests = driver.frontend.open_backend_requests().unwrap();
    process.channel.send(&ToDevice::Resize { columns: 132, rows: 50 }, &[]).unwrap();
    assert!(matches!(requests.receive().unwrap(), BackendRequest::ConfigChange));
    driver.frontend.get_config(0, &mut size).unwrap();
    assert_eq!(size, [132, 0, 50, 0]);
    process.stop();
}

/// What the answer to a heartbeat says.
pub fn progress(process: &Supervised) -> Progress {
    process.channel.send(&ToDevice::Ping, &[]).unwrap();
    match process.channel.recv::<FromDevice>(Some(LIMIT)) {
        Ok((FromDevice::Alive(progress), _)) => progress,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_that_works_or_waits_for_its_guest_reports_no_stall() {
    let image = disk(1 << 20);
    let mut process = Supervised::start("blk", blk(2), &[&image], Enforcement::Supervised);
    let mut driver = process.driver(2);
    for _ in 0..5 {
        assert_eq!(progress(&process), Progress::Fine);
        disk_requests(&mut driver, 2);
    }
    process.stop();

    let config = DeviceConfig::Console(ConsoleConfig { input: None, output: None, size: None, typed: None });
    let mut process = Supervised::start("console", config, &[], Enforcement::Supervised);
    let mut driver = process.driver(2);
    // Buffers for input that nobody types.
    driver.queues[0].submit(&driver.ram, &[(BUFFERS, 64, true)]);
    driver.queues[0].kick();
    for _ in 0..5 {
        assert_eq!(progress(&process), Progress::Fine);
        std::thread::sleep(Duration::from_millis(5));
    }
    process.stop();
}

#[test]
fn a_request_without_a_notification_is_served_at_the_next_heartbeat() {
    let image = disk(1 << 20);
    let mut process = Supervised::start("blk", blk(1), &[&image], Enforcement::Supervised);
    let mut driver = process.driver(1);
    disk_requests(&mut driver, 1);
    driver.put(HEADER, &header(0, 0));
    let buffers = [(HEADER, 16, false), (BUFFERS, 4096, true), (BUFFERS + 0x10_0000, 1, true)];
    driver.queues[0].submit(&driver.ram, &buffers);
    assert_eq!(progress(&process), Progress::Fine);
    let ram = driver.ram.clone();
    driver.queues[0].wait(&ram);
    process.stop();
}

#[test]
fn a_thread_that_does_nothing_about_its_queue_is_reported() {
    // An entropy source that has nothing: the read never comes back.
    let (source, _writer) = nix::unistd::pipe().unwrap();
    let config = DeviceConfig::Rng(RngConfig { source: FdIndex(1), limit: None });
    let mut process = Supervised::start("rng", config, &[&source], Enforcement::Supervised);
    let mut driver = process.driver(1);
    assert_eq!(progress(&process), Progress::Fine);
    driver.queues[0].submit(&driver.ram, &[(BUFFERS, 64, true)]);
    driver.queues[0].kick();
    let end = std::time::Instant::now() + LIMIT;
    while progress(&process) != (Progress::Stalled { queue: 0 }) {
        assert!(std::time::Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(progress(&process), Progress::Stalled { queue: 0 }, "and it stays so");
}

#[test]
fn a_console_whose_reader_is_slow_waits_for_the_host() {
    let (_reader, writer) = nix::unistd::pipe().unwrap();
    let config = DeviceConfig::Console(ConsoleConfig {
        input: None,
        output: Some(FdIndex(1)),
        size: None,
        typed: None,
    });
    let mut process = Supervised::start("console", config, &[&writer], Enforcement::Supervised);
    let mut driver = process.driver(2);
    // More than pipe and backlog hold.
    driver.queues[1].submit(&driver.ram, &[(BUFFERS, 1 << 20, false)]);
    driver.queues[1].kick();
    let end = std::time::Instant::now() + LIMIT;
    while progress(&process) != (Progress::WaitsForHost { queue: 1 }) {
        assert!(std::time::Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a process leaves when it is told to end.
fn left(process: &Supervised) -> Left {
    process.channel.send(&ToDevice::Stop, &[]).unwrap();
    let mut all = Left { output: Vec::new() };
    while let Ok((FromDevice::Left(left), _)) = process.channel.recv::<FromDevice>(Some(LIMIT)) {
        all.output.extend(left.output);
    }
    all
}

#[test]
fn what_nobody_has_read_on_a_console_is_left_to_the_successor() {
    let config = DeviceConfig::Console(ConsoleConfig { input: None, output: None, size: None, typed: None });
    let said: Vec<u8> =
        (0..40_000_u32).flat_map(|number| [b'a' + u8::try_from(number % 26).unwrap()]).collect();
    let mut process = Supervised::start("console", config.clone(), &[], Enforcement::Supervised);
    let mut driver = process.driver(2);
    driver.put(BUFFERS, &said);
    driver.run(1, &[(BUFFERS, u32::try_from(said.len()).unwrap(), false)]);
    let rest = left(&process);
    assert!(rest.output == said, "{} bytes", rest.output.len());

    let mut process = Supervised::start("console", config, &[], Enforcement::Supervised);
    process.channel.send(&ToDevice::Take(rest), &[]).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    process.channel.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
    let mut driver = process.driver(2);
    driver.put(BUFFERS, b"!");
    driver.run(1, &[(BUFFERS, 1, false)]);
    let mut seen = vec![0; said.len() + 1];
    ours.read_exact(&mut seen).unwrap();
    assert!(seen.ends_with(b"!") && seen.starts_with(&said));
    process.stop();
}

#[test]
fn a_device_ends_with_its_front_end_and_with_its_supervisor() {
    let image = disk(1 << 20);
    let mut process = Supervised::start("blk", blk(1), &[&image], Enforcement::Supervised);
    drop(process.stream.take());
    let ending = process.ending();
    assert!(ending.starts_with("Ok(Code(0))") && ending.contains("front end has closed"), "{ending}");

    let Supervised { mut process, channel, stream, .. } =
        Supervised::start("blk", blk(1), &[&image], Enforcement::Supervised);
    drop(channel);
    assert_eq!(process.wait().unwrap(), jail::Exit::Code(0));
    drop(stream);
}

#[test]
fn a_start_that_cannot_be_served_says_why() {
    let image = disk(1 << 20);
    let mut process = Supervised::spawn("rng", None);
    process.tell(blk(1), &[&image], Enforcement::Supervised);
    let (answer, _) = process.channel.recv::<FromDevice>(Some(LIMIT)).unwrap();
    assert!(matches!(answer, FromDevice::Failed(reason) if reason.contains("started as rng")));
    let ending = process.ending();
    assert!(ending.starts_with("Ok(Code(1))") && ending.contains("started as rng"), "{ending}");
}

#[test]
fn an_idle_device_has_little_memory_of_its_own() {
    let image = disk(1 << 20);
    let mut process = Supervised::start("blk", blk(1), &[&image], Enforcement::Supervised);
    let mut driver = process.driver(1);
    disk_requests(&mut driver, 1);
    let kib = process.private_dirty();
    println!("private dirty memory of a disk's process: {kib} KiB");
    // The debug program's relocations alone are more than the release program's whole.
    let most = if cfg!(debug_assertions) { 2000 } else { 400 };
    assert!(kib < most, "{kib} KiB");
}
