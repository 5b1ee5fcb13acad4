//! A core or a device that turns hostile after it was started.
//!
//! The real supervisor starts it, in the real jail, with the descriptors of its kind; it enters, takes its start message and
//! loads the policies as the real program does. What it does then, the name of its machine says:
//!
//! - `sealed-…`: every thread tries everything under its policy;
//! - `open-…`: the process tries everything without a policy, so that the other walls show;
//! - `violate-WORD-…`: one thread breaks its policy, `WORD` says which and when;
//! - `mishap-WORD-…`: see [`crate::mishaps`];
//! - `die-KIND-…`: the process of that kind ends before it is READY.
//!
//! Contains unsafe code: fork, so that what one attempt changes is gone for the next.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::process::exit;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use bulkhead_ipc::channel::message::{
    DeviceConfig, FromCore, FromDevice, MachineEnd, MappedRegion, Progress, ToCore, ToDevice,
};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::{self, Enforcement, PolicyName, Sealed};
use bulkhead_ipc::memory::{MappedFile, SharedRegion};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;

use crate::attempts::{self, Attempt, Held};
use crate::mishaps;
use crate::watch::Watch;

/// What a forbidden call returns here (EHWPOISON): no other wall answers so.
pub const STOPPED: i32 = 133;
/// Exit code of a process that ends before it is READY.
pub const DIES: i32 = 9;
/// Outcomes in one line of the log.
const IN_A_LINE: usize = 24;

/// A kind of process: its policies, and what it is called in the machine that is attacked.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    /// Its name in messages.
    pub id: &'static str,
    /// The main thread's policy.
    pub main: PolicyName,
    /// Policies of the other threads, with the threads' names.
    pub others: &'static [(PolicyName, &'static str)],
}

impl Kind {
    const fn new(
        [name, id]: [&'static str; 2],
        main: PolicyName,
        others: &'static [(PolicyName, &'static str)],
    ) -> Self {
        Self { name, id, main, others }
    }

    /// What the outcomes under one of its policies are called: the policy, and the kind where the policy is another's too.
    pub fn column(&self, policy: PolicyName) -> String {
        let file = policy.file().trim_start_matches("seccomp-policies/").trim_end_matches(".json");
        if file.split('-').next() == Some(self.name) {
            file.to_owned()
        } else {
            format!("{}/{file}", self.name)
        }
    }
}

/// The core.
pub const CORE: Kind = Kind::new(
    ["core", "core"],
    PolicyName::CoreMain,
    &[(PolicyName::CoreDevices, "devices"), (PolicyName::CoreVcpu, "vcpu0")],
);

/// The devices.
pub const DEVICES: [Kind; 14] = [
    Kind::new(
        ["blk", "disk0"],
        PolicyName::BlkMain,
        &[(PolicyName::BlkQueue, "queue0"), (PolicyName::BlkImage, "image-0")],
    ),
    Kind::new(["rng", "rng"], PolicyName::RngMain, &[(PolicyName::RngQueue, "queue0")]),
    Kind::new(["console", "console"], PolicyName::ConsoleMain, &[(PolicyName::ConsoleQueue, "queue0")]),
    Kind::new(["uart", "serial"], PolicyName::UartMain, &[]),
    Kind::new(["flash", "firmware-vars"], PolicyName::FlashMain, &[]),
    Kind::new(["keyboard", "keyboard"], PolicyName::KeyboardMain, &[]),
    Kind::new(["vsock", "vsock"], PolicyName::VsockMain, &[(PolicyName::VsockQueue, "queue0")]),
    Kind::new(["balloon", "balloon"], PolicyName::BalloonMain, &[(PolicyName::BalloonQueue, "queue0")]),
    Kind::new(["net", "net"], PolicyName::NetMain, &[(PolicyName::NetQueue, "queue0")]),
    Kind::new(["relay", "relay"], PolicyName::RelayMain, &[]),
    Kind::new(["pmem", "pmem0"], PolicyName::PmemMain, &[(PolicyName::PmemQueue, "queue0")]),
    // What a console of named ports holds is not what another console holds.
    Kind::new(["ports", "ports"], PolicyName::ConsoleMain, &[(PolicyName::ConsoleQueue, "queue0")]),
    Kind::new(["fs", "fs0"], PolicyName::FsMain, &[(PolicyName::FsQueue, "queue0")]),
    Kind::new(["watchdog", "watchdog"], PolicyName::WatchdogMain, &[]),
];

/// A new type of device does not compile here before it is attacked too.
fn kind(config: &DeviceConfig) -> Kind {
    let [blk, rng, console, uart, flash, keyboard, vsock, balloon, net, relay, pmem, ports, fs, watchdog] =
        DEVICES;
    match config {
        DeviceConfig::Blk(_) => blk,
        DeviceConfig::Rng(_) => rng,
        DeviceConfig::Console(_) => console,
        DeviceConfig::Ports(_) => ports,
        DeviceConfig::Uart(_) => uart,
        DeviceConfig::Flash(_) => flash,
        DeviceConfig::Keyboard(_) => keyboard,
        DeviceConfig::Vsock(_) => vsock,
        DeviceConfig::Balloon(_) => balloon,
        DeviceConfig::Net(_) => net,
        DeviceConfig::Relay(_) => relay,
        DeviceConfig::Fs(_) => fs,
        DeviceConfig::Pmem(_) => pmem,
        DeviceConfig::Watchdog(_) => watchdog,
    }
}

/// One process.
struct Process {
    channel: Channel,
    kind: Kind,
    held: Held,
}

/// Waits only with what every main policy allows.
fn recv<M: DeserializeOwned>(channel: &Channel) -> (M, Vec<OwnedFd>) {
    loop {
        poll(&mut [PollFd::new(channel.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).expect("poll");
        match channel.recv(Some(Duration::ZERO)) {
            Ok(message) => return message,
            Err(ChannelError::Deadline) => {}
            Err(ChannelError::PeerClosed) => exit(0),
            Err(error) => panic!("{error}"),
        }
    }
}

impl Process {
    fn new(channel: Channel, kind: Kind, machine: String) -> Self {
        mishaps::prepare();
        let host_pid = machine.rsplit('-').next().and_then(|word| word.parse().ok()).unwrap_or(2);
        let descriptors = jail::open_descriptors().expect("descriptors");
        let shared = jail::shared_directory().map(|(root, names)| (root.into_raw_fd(), names.into_raw_fd()));
        let users = [0, nix::unistd::getuid().as_raw()];
        Self { channel, kind, held: Held { descriptors, machine, users, host_pid, shared } }
    }

    fn mode(&self) -> &str {
        self.held.machine.split('-').next().unwrap_or_default()
    }

    /// Ends here when it is to die before it is READY.
    fn die_early(&self) {
        if self.mode() == "die" && self.word() == self.kind.name {
            exit(DIES);
        }
    }

    fn word(&self) -> &str {
        self.held.machine.split('-').nth(1).unwrap_or_default()
    }

    /// Puts other threads, and then the main thread, under their policies. The others do what they are sent.
    fn seal(&self) -> (Sealed, Vec<Sender<Task>>) {
        let other = |&(policy, name): &(PolicyName, &str)| {
            let (tasks, work) = mpsc::channel::<Task>();
            let (entered, has_entered) = mpsc::channel();
            let thread = thread::Builder::new().name(name.to_owned());
            thread.spawn(move || other(policy, &entered, &work)).expect("thread");
            has_entered.recv().expect("entered");
            tasks
        };
        let others = self.kind.others.iter().map(other).collect();
        let open = jail::open_descriptors().expect("descriptors");
        (jail::seal(self.kind.main, &open).expect("seal"), others)
    }

    /// Every thread tries everything under its policy.
    fn attack_sealed(&self) {
        if self.kind.name == CORE.name {
            let outcomes: Vec<String> =
                attempts::all().map(|attempt| during_set_up(attempt, &self.held)).collect();
            say(&self.kind.column(PolicyName::CoreSetup), &outcomes);
        }
        let watch = Watch::default();
        let (listeners, served) = mpsc::channel();
        watch.serve(served);
        let (sealed, others) = self.seal();
        listeners.send(sealed.descriptors().iter().map(AsRawFd::as_raw_fd).collect()).expect("watch");
        for (other, (policy, _)) in others.iter().zip(self.kind.others) {
            let (done, is_done) = mpsc::channel();
            let (held, watch) = (self.held.clone(), watch.clone());
            other.send(Box::new(move || drop(done.send(try_all(&held, &watch))))).expect("other");
            say(&self.kind.column(*policy), &is_done.recv().expect("done"));
        }
        say(&self.kind.column(self.kind.main), &try_all(&self.held, &watch));
    }

    /// The process tries everything without a policy, each attempt in a child.
    fn attack_open(&self) {
        let outcomes: Vec<String> = attempts::all().map(|attempt| in_child(attempt, &self.held)).collect();
        say(self.kind.name, &outcomes);
    }

    /// Turns on itself; returns when there is nothing (more) to do.
    fn attack(&self) {
        match self.mode() {
            "sealed" => self.attack_sealed(),
            "open" => self.attack_open(),
            _ => {}
        }
    }

    /// Seals and reports as the real program does, unless the policy is broken before; then does what the word says.
    fn misbehave(&self, ready: impl Fn(Vec<PolicyName>) -> Report, all_are_ready: impl FnOnce()) {
        let (sealed, others) = self.seal();
        let early = self.word().starts_with("early");
        let act: Task = match self.mode() {
            "violate" => Box::new(violate),
            _ => {
                let mishap = self.word().split('_').next().unwrap_or_default().to_owned();
                Box::new(move || mishaps::happen(&mishap))
            }
        };
        if !early {
            ready(sealed.policies()).send(&self.channel, &sealed);
            drop(sealed);
            all_are_ready();
        }
        // 0 is the main thread. A device with fewer threads takes its last one.
        let number: usize = self.word().rsplit('_').next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match others.get(number.min(others.len()).wrapping_sub(1)) {
            Some(other) => other.send(act).expect("other"),
            None => act(),
        }
        if early {
            // Without a call: none is allowed that waits so long on every thread.
            loop {
                std::hint::spin_loop();
            }
        }
        std::mem::forget(others);
    }
}

type Task = Box<dyn FnOnce() + Send>;

fn other(policy: PolicyName, entered: &Sender<()>, work: &Receiver<Task>) {
    jail::enter_thread(policy).expect("enter_thread");
    entered.send(()).expect("main");
    for task in work {
        task();
    }
}

/// `READY` of either kind of process.
enum Report {
    Core(FromCore),
    Device(FromDevice),
}

impl Report {
    fn send(&self, channel: &Channel, sealed: &Sealed) {
        match self {
            Self::Core(message) => channel.send(message, &sealed.descriptors()),
            Self::Device(message) => channel.send(message, &sealed.descriptors()),
        }
        .expect("READY");
    }
}

/// A call that no policy allows.
pub fn violate() {
    let _stopped = attempts::call(libc::SYS_sethostname, [0x1234, 7, 0, 0, 0, 0]);
}

fn try_all(held: &Held, watch: &Watch) -> Vec<String> {
    let attempt = |attempt: &Attempt| {
        watch.take();
        let outcome = (attempt.run)(held);
        let stopped = watch.take();
        match (outcome, stopped.as_slice()) {
            (Err(_), [name, ..]) => format!("seccomp:{name}"),
            (Ok(()), _) => "works".to_owned(),
            (Err(errno), []) => errno.to_string(),
        }
    };
    attempts::all().map(attempt).collect()
}

/// Without a policy.
fn in_child(attempt: &Attempt, held: &Held) -> String {
    if attempt.goal.starts_with("KVM_") {
        // KVM refuses every process but the one that made the virtual machine.
        return outcome((attempt.run)(held));
    }
    forked(|| (attempt.run)(held))
}

/// Under the first policy of the core alone, which has no listener: what it forbids fails with ENOSYS.
fn during_set_up(attempt: &'static Attempt, held: &Held) -> String {
    let held = held.clone();
    let run = move || {
        jail::enter_setup(PolicyName::CoreSetup).expect("enter_setup");
        (attempt.run)(&held)
    };
    let text = if attempt.goal.starts_with("KVM_") {
        outcome(thread::spawn(run).join().expect("thread"))
    } else {
        forked(run)
    };
    match (text.parse() == Ok(libc::ENOSYS), attempt.calls) {
        (true, [call, ..]) => format!("seccomp:{call}"),
        _ => text,
    }
}

fn outcome(result: attempts::Result) -> String {
    result.map_or_else(|errno| errno.to_string(), |()| "works".to_owned())
}

/// In a child, which ends with what it changed.
fn forked(run: impl FnOnce() -> attempts::Result) -> String {
    const WORKS: i32 = 255;
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: EFBIG alone is easier to tell.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let outcome = run().map_or_else(|errno| errno, |()| WORKS);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(outcome) };
    }
    let mut status = 0;
    // SAFETY: the kernel writes to a live integer.
    let waited = unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) };
    // Grandchildren of a bomb end with their pid namespace at the latest.
    match (waited == child && libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, WORKS) => "works".to_owned(),
        (true, errno) => errno.to_string(),
        (false, _) => format!("signal:{}", libc::WTERMSIG(status)),
    }
}

/// Writes outcomes to the log, by the number of the attempt.
fn say(who: &str, outcomes: &[String]) {
    for (index, line) in outcomes.chunks(IN_A_LINE).enumerate() {
        eprintln!("INFO outcomes of {who} from {}: {}", index * IN_A_LINE, line.join(" "));
    }
}

pub fn core() {
    let channel = Channel::from_fd(jail::enter().expect("enter"));
    let (message, mut descriptors) = recv::<ToCore>(&channel);
    let ToCore::Start(start) = message else { panic!("{message:?}") };
    jail::set_enforcement(Enforcement::Supervised);
    let mut devices: Vec<File> = Vec::new();
    for link in start.devices.iter().rev() {
        // The descriptors of devices come last, a socket and perhaps a ROM, which the core reads and closes.
        if link.rom.is_some() {
            drop(descriptors.pop());
        }
        assert_eq!(usize::from(link.socket.0) + 1, descriptors.len());
        devices.push(descriptors.pop().expect("a socket for each device").into());
    }
    // As the core does it: before them those of files for the guest, mapped and let go of.
    let map = |region: &MappedRegion| {
        let fd = descriptors.pop().expect("a file for each region");
        let MappedRegion { address: guest_address, size, writable, .. } = *region;
        let region = SharedRegion { guest_address, size, offset: 0, fd };
        MappedFile::new(region, writable).expect("a mapping")
    };
    let _mapped: Vec<MappedFile> = start.mapped.iter().rev().map(map).collect();
    let kvm: Vec<RawFd> = descriptors.into_iter().map(IntoRawFd::into_raw_fd).collect();
    mishaps::virtual_machine(kvm[usize::from(start.kvm.0)]);
    let ram = bulkhead_ipc::memory::GuestRam::create(start.memory_bytes).expect("guest RAM");
    let process = Process::new(channel, CORE, start.machine);
    process.die_early();
    let ready = |policies| Report::Core(FromCore::Ready { policies });
    if matches!(process.mode(), "violate" | "mishap") && process.word().contains("core") {
        process.misbehave(ready, || gather(&mut devices));
    } else {
        ready(Vec::new()).send(&process.channel, &Sealed::default());
        if !process.word().starts_with("early") {
            gather(&mut devices);
        }
    }
    process.attack();
    if matches!(process.mode(), "violate" | "mishap") {
        given_up(&process.channel, devices.len());
    } else {
        // The main thread may be sealed by now: `read` is among what it may do.
        for device in &mut devices {
            let _ended = device.read(&mut [0]);
        }
    }
    process.channel.send(&FromCore::Ended(MachineEnd::PowerOff), &[]).expect("end");
    drop(ram);
    // The supervisor kills what is left.
    recv::<ToCore>(&process.channel);
}

/// Waits until every device has reported READY, then lets them all go.
fn gather(devices: &mut [File]) {
    for device in devices.iter_mut() {
        device.read_exact(&mut [0]).expect("a device is ready");
    }
    for device in devices {
        device.write_all(b"g").expect("go");
    }
}

/// Waits until no device is left.
fn given_up(channel: &Channel, devices: usize) {
    let mut left = devices;
    while left > 0 {
        match recv::<ToCore>(channel) {
            (ToCore::DeviceGivenUp { .. }, _) => left -= 1,
            (ToCore::DeviceReplaced { id, .. }, _) => {
                channel.send(&FromCore::DeviceReplaced { id }, &[]).expect("acknowledge");
            }
            _ => {}
        }
    }
}

pub fn device() {
    let channel = Channel::from_fd(jail::enter().expect("enter"));
    let (message, descriptors) = recv::<ToDevice>(&channel);
    let ToDevice::Start(start) = message else { panic!("{message:?}") };
    jail::set_enforcement(Enforcement::Supervised);
    let numbers: Vec<RawFd> = descriptors.into_iter().map(IntoRawFd::into_raw_fd).collect();
    let socket = numbers[usize::from(start.socket.0)];
    let process = Process::new(channel, kind(&start.config), start.machine);
    process.die_early();
    let ready = |policies| Report::Device(FromDevice::Ready { policies });
    // SAFETY: the descriptor came with the start message and nobody else has it.
    let mut core = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(socket) };
    let mut all_are_ready = || {
        let _ready = core.write_all(b"r");
        // Not every main thread may read: it waits with what all may do, as in `recv`.
        let _go = poll(&mut [PollFd::new(core.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
    };
    if matches!(process.mode(), "violate" | "mishap") && !process.word().contains("core") {
        process.misbehave(ready, all_are_ready);
    } else {
        ready(Vec::new()).send(&process.channel, &Sealed::default());
        all_are_ready();
        process.attack();
        let _done = core.write_all(b"d");
    }
    std::mem::forget(core);
    loop {
        match recv::<ToDevice>(&process.channel).0 {
            ToDevice::Stop => exit(0),
            ToDevice::Ping => process.channel.send(&FromDevice::Alive(Progress::Fine), &[]).expect("alive"),
            _ => {}
        }
    }
}
