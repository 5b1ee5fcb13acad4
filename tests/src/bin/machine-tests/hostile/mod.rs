//! Device processes that have turned hostile, against the real core with a real guest.
//!
//! The case itself is the supervisor: it starts the core in its jail, puts one honest device (a console) beside three hostile ones, and
//! gives these a successor whenever a connection has ended, without the pauses that the real supervisor makes. The guest
//! prints without end on the console, each character by way of the core's event loop: the longest time between two of them is the gap.

mod nonsense;
mod vfio_user;
mod vhost_user;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::channel::message::{
    Boot, ConsoleConfig, CoreStart, CpuidLeaf, DeviceConfig, DeviceLink, DeviceStart, FdIndex, FromCore,
    FromDevice, LinkKind, Processors, ToCore, ToDevice,
};
use bulkhead_ipc::jail::{self, Enforcement, Identity, JailSpec, JailedProcess, Limits};
use bulkhead_ipc::log::LogLevel;
use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use nonsense::Random;

/// Messages that the hostile devices send in all, at least.
const MESSAGES: u64 = 100_000;
/// The longest gap in the service of the honest device that passes, time in which others had the CPU left out. Usual is a
/// hundredth of it.
const GAP: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(10);
const RAM: u64 = 32 << 20;

pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "bare",
        "hostile device processes end their own connection and disturb nobody",
        120,
        storm,
    )]
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Starts a program of ours in its jail.
fn start(
    context: &Context,
    program: &str,
    arguments: &[&str],
    limits: Limits,
) -> Outcome<(JailedProcess, Channel)> {
    let (ours, theirs) = Channel::pair().map_err(text)?;
    let (log, log_end) = pipe().map_err(text)?;
    let null = File::open("/dev/null").map_err(text)?;
    let file = File::open(context.places.programs.join(program)).map_err(text)?;
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let spec = JailSpec {
        program: file.as_fd(),
        arguments: &arguments,
        channel: theirs.into_fd(),
        log: log_end.as_fd(),
        null: null.as_fd(),
        limits,
        identity: Identity::default(),
        subordinate: None,
        cgroup: None,
        shared: None,
    };
    let mut process = jail::spawn(spec).map_err(text)?;
    drop(log_end);
    process.confirm(PATIENCE).map_err(text)?;
    let context = context.clone();
    thread::spawn(move || {
        // All of it is read, so that nobody waits; a storm fills no log.
        for (number, line) in BufReader::new(log).lines().map_while(Result::ok).enumerate() {
            if number < 2000 {
                context.log(&line);
            }
        }
    });
    Ok((process, ours))
}

/// The hostile devices by name, and what the core takes them for.
const HOSTILE: [(&str, LinkKind); 3] = [
    ("disk", LinkKind::VirtioVhostUser { virtio_id: 2, slot: 3 }),
    ("entropy", LinkKind::VirtioVhostUser { virtio_id: 4, slot: 4 }),
    ("com1", LinkKind::Registers),
];

fn play(kind: LinkKind, stream: UnixStream, random: &mut Random) -> Outcome<u64> {
    match kind {
        LinkKind::Registers | LinkKind::Flash | LinkKind::Keyboard | LinkKind::Watchdog { .. } => {
            vfio_user::play(stream, random)
        }
        LinkKind::VirtioVhostUser { .. } | LinkKind::Foreign { .. } => vhost_user::play(stream, random),
    }
}

/// One processor with all that KVM offers.
fn one_processor() -> Outcome<Processors> {
    let supported =
        Kvm::new().and_then(|kvm| kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)).map_err(text)?;
    let leaf = |entry: &kvm_cpuid_entry2| CpuidLeaf {
        leaf: entry.function,
        subleaf: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    };
    let cpuid = supported.as_slice().iter().map(leaf).collect();
    Ok(Processors { present: 1, apic_ids: vec![0], core_shift: 0, package_shift: 0, cpuid })
}

/// The core, its honest console, and the hostile ends of the other devices.
struct Rig {
    core: JailedProcess,
    channel: Arc<Channel>,
    console: JailedProcess,
    _console_channel: Channel,
    output: UnixStream,
    streams: Vec<UnixStream>,
}

impl Rig {
    fn start(context: &Context) -> Outcome<Self> {
        let (output, theirs) = UnixStream::pair().map_err(text)?;
        let (core_end, device_end) = UnixStream::pair().map_err(text)?;
        let (console, console_channel) =
            start(context, "bulkhead-device", &["bulkhead-device", "console"], Limits::default())?;
        let config = ConsoleConfig { input: None, output: Some(FdIndex(1)), size: None, typed: None };
        let message = ToDevice::Start(DeviceStart {
            id: "console".into(),
            machine: "hostile".into(),
            log: LogLevel::Info,
            enforcement: Enforcement::Standalone,
            socket: FdIndex(0),
            config: DeviceConfig::Console(config),
            metrics: None,
        });
        console_channel.send(&message, &[device_end.as_fd(), theirs.as_fd()]).map_err(text)?;
        let (answer, _) = console_channel.recv::<FromDevice>(Some(PATIENCE)).map_err(text)?;
        ensure!(matches!(answer, FromDevice::Ready { .. }), "the console says {answer:?}");

        let limits = Limits {
            data: Some(512 << 20),
            descriptors: 512,
            threads: 16,
            file_size: Some(RAM),
            ..Limits::default()
        };
        let (core, channel) = start(context, "bulkhead-vmm", &["bulkhead-vmm"], limits)?;
        let mut fds: Vec<OwnedFd> = vec![
            File::options().read(true).write(true).open("/dev/kvm").map_err(text)?.into(),
            File::open(context.places.payloads.join("peers.elf")).map_err(text)?.into(),
            core_end.into(),
        ];
        let mut devices = vec![DeviceLink {
            id: "console".into(),
            kind: LinkKind::VirtioVhostUser { virtio_id: 3, slot: 2 },
            socket: FdIndex(2),
            rom: None,
        }];
        let mut streams = Vec::new();
        for (index, (id, kind)) in (3..).zip(HOSTILE) {
            let (ours, theirs) = UnixStream::pair().map_err(text)?;
            devices.push(DeviceLink { id: id.into(), kind, socket: FdIndex(index), rom: None });
            streams.push(ours);
            fds.push(theirs.into());
        }
        let message = ToCore::Start(CoreStart {
            machine: "hostile".into(),
            log: LogLevel::Info,
            enforcement: Enforcement::Standalone,
            processors: one_processor()?,
            memory_bytes: RAM,
            huge_pages: false,
            kvm: FdIndex(0),
            boot: Boot::Kernel {
                kernel: FdIndex(1),
                initrd: None,
                cmdline: String::new(),
                smbios: Vec::new(),
            },
            generation: [0; 16],
            debug_exit: false,
            devices,
            mapped: Vec::new(),
        });
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        channel.send(&message, &fds).map_err(text)?;
        Ok(Self {
            core,
            channel: Arc::new(channel),
            console,
            _console_channel: console_channel,
            output,
            streams,
        })
    }

    /// Where the kernel tells about the threads that serve the console: the core's main thread and vCPU, and the console's.
    fn threads(&self) -> Outcome<Vec<PathBuf>> {
        let mut found = Vec::new();
        for pid in [self.core.pid(), self.console.pid()] {
            for task in std::fs::read_dir(format!("/proc/{pid}/task")).map_err(text)? {
                let task = task.map_err(text)?.path();
                let name = std::fs::read_to_string(task.join("comm")).map_err(text)?;
                if name.trim() != "devices" {
                    found.push(task.join("schedstat"));
                }
            }
        }
        Ok(found)
    }

    /// Descriptors that the core holds.
    fn descriptors(&self) -> Outcome<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.core.pid())).map_err(text)?.count())
    }
}

/// What the core says meanwhile: which devices failed how often.
#[derive(Default)]
struct Heard {
    failed: AtomicU64,
    reasons: Mutex<Vec<String>>,
    ended: Mutex<Option<String>>,
    ready: AtomicBool,
}

impl Heard {
    fn listen(&self, channel: &Channel) {
        loop {
            match channel.recv::<FromCore>(None) {
                Ok((FromCore::Ready { .. }, _)) => self.ready.store(true, Ordering::SeqCst),
                Ok((FromCore::DeviceFailed { reason, .. }, _)) => {
                    self.failed.fetch_add(1, Ordering::SeqCst);
                    // Numbers left out, the reasons are few.
                    let kind: String =
                        reason.chars().filter(|it| !it.is_ascii_hexdigit() || it.is_alphabetic()).collect();
                    let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
                    if !reasons.contains(&kind) && reasons.len() < 500 {
                        reasons.push(kind);
                    }
                }
                Ok((FromCore::DeviceReplaced { .. } | FromCore::Alive, _)) => {}
                Ok((FromCore::Ended(end), _)) => return self.end(format!("{end:?}")),
                Ok((other, _)) => return self.end(format!("the core says {other:?}, unasked")),
                Err(error) => return self.end(error.to_string()),
            }
        }
    }

    fn end(&self, how: String) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(how);
    }
}

/// The console's output: characters, and the longest time between two.
#[derive(Default)]
struct Pulse {
    characters: AtomicU64,
    /// Microseconds.
    longest: AtomicU64,
    /// The same without the time in which the threads that serve the console waited for a CPU.
    longest_unserved: AtomicU64,
    /// Where the kernel tells how long each of these threads waited.
    threads: Mutex<Vec<PathBuf>>,
}

impl Pulse {
    fn follow(&self, mut output: UnixStream) {
        let (mut last, mut waited) = (Instant::now(), Duration::ZERO);
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut bytes) {
            let (gap, before) = (last.elapsed(), waited);
            waited = self.waited();
            last = Instant::now();
            let unserved = gap.saturating_sub(waited.saturating_sub(before));
            self.characters.fetch_add(count as u64, Ordering::SeqCst);
            for (longest, time) in [(&self.longest, gap), (&self.longest_unserved, unserved)] {
                longest.fetch_max(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::SeqCst);
            }
        }
    }

    /// How long the threads that serve the console have waited for a CPU, all together: one after the other works for a character.
    fn waited(&self) -> Duration {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let nanoseconds = threads.iter().filter_map(|path| {
            std::fs::read_to_string(path).ok()?.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// Begins anew; returns the longest time so far, all of it and without waiting for a CPU.
    fn renew(&self) -> (Duration, Duration) {
        let take = |longest: &AtomicU64| Duration::from_micros(longest.swap(0, Ordering::SeqCst));
        (take(&self.longest), take(&self.longest_unserved))
    }

    fn wait(&self, more: u64) -> Outcome {
        let (before, start) = (self.characters.load(Ordering::SeqCst), Instant::now());
        while self.characters.load(Ordering::SeqCst) < before + more {
            ensure!(start.elapsed() < PATIENCE, "the guest prints nothing any more");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Gives a device one hostile process after the other until all have sent enough. `first`: the connection that the core has already.
fn siege(
    (id, kind): (&str, LinkKind),
    first: UnixStream,
    channel: &Channel,
    sent: &AtomicU64,
    random: &mut Random,
) -> Outcome<u64> {
    let mut connections = 1;
    // The first is good, as a process is before somebody breaks into it: for ever.
    drop(first);
    while sent.load(Ordering::SeqCst) < MESSAGES {
        let (ours, theirs) = UnixStream::pair().map_err(text)?;
        let message = ToCore::DeviceReplaced { id: id.to_owned(), socket: FdIndex(0) };
        channel.send_within(&message, &[theirs.as_fd()], PATIENCE).map_err(text)?;
        drop(theirs);
        sent.fetch_add(play(kind, ours, random)?, Ordering::SeqCst);
        connections += 1;
    }
    Ok(connections)
}

fn storm(context: &Context) -> Outcome {
    let mut rig = Rig::start(context)?;
    let outcome = besiege(context, &mut rig);
    let exit = rig.core.try_wait().map_err(text)?;
    let _ = rig.core.kill();
    let _ = rig.console.kill();
    let _ = (rig.core.wait(), rig.console.wait());
    outcome.map_err(|sentence| match exit {
        Some(exit) => format!("{sentence}; the core ended: {exit:?}"),
        None => sentence,
    })
}

fn besiege(context: &Context, rig: &mut Rig) -> Outcome {
    let (heard, pulse) = (Arc::new(Heard::default()), Arc::new(Pulse::default()));
    let output = rig.output.try_clone().map_err(text)?;
    let (ear, eye) = (heard.clone(), pulse.clone());
    let channel = rig.channel.clone();
    thread::spawn(move || ear.listen(&channel));
    thread::spawn(move || eye.follow(output));
    let honest = good(std::mem::take(&mut rig.streams))?;
    pulse.wait(100)?;
    ensure!(heard.ready.load(Ordering::SeqCst), "the guest runs before the core is ready");
    let held = rig.descriptors()?;
    *pulse.threads.lock().unwrap_or_else(PoisonError::into_inner) = rig.threads()?;
    pulse.wait(10)?;
    pulse.renew();
    pulse.wait(500)?;
    let (quiet, _) = pulse.renew();
    let (sent, start) = (AtomicU64::new(0), Instant::now());
    let before = pulse.characters.load(Ordering::SeqCst);
    let results: Vec<Outcome<u64>> = thread::scope(|scope| {
        let sieges: Vec<_> = (1..)
            .zip(HOSTILE.into_iter().zip(honest))
            .map(|(number, (device, first))| {
                let (channel, sent) = (&rig.channel, &sent);
                let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ number << 40);
                scope.spawn(move || siege(device, first, channel, sent, &mut random))
            })
            .collect();
        sieges
            .into_iter()
            .map(|siege| siege.join().map_err(|_| "a hostile peer panicked".to_owned())?)
            .collect()
    });
    let (gap, unserved) = pulse.renew();
    let characters = pulse.characters.load(Ordering::SeqCst) - before;
    let connections = results.into_iter().collect::<Outcome<Vec<_>>>()?;
    let (took, messages) = (start.elapsed(), sent.load(Ordering::SeqCst));
    let failed = heard.failed.load(Ordering::SeqCst);
    let reasons = heard.reasons.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let summary = format!(
        "{messages} messages over {connections:?} connections in {took:.1?}: {failed} ended by the core for {} different reasons; \
         {characters} characters meanwhile, longest gap {gap:.1?}, {unserved:.1?} without waiting for a CPU; \
         without hostile devices {quiet:.1?}",
        reasons.len()
    );
    println!("    {summary}");
    reasons.iter().for_each(|reason| context.log(reason));
    let ended = heard.ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(ended.is_none(), "the core is gone: {ended:?}; {summary}");
    ensure!(unserved < GAP, "the honest device was not served for {unserved:?}; {summary}");
    ensure!(failed > 200 && reasons.len() > 20, "too little happened: {summary}");
    // Good processes again: all devices work, and nothing has been left behind.
    let mut last = Vec::new();
    for (id, _) in HOSTILE {
        let (ours, theirs) = UnixStream::pair().map_err(text)?;
        let message = ToCore::DeviceReplaced { id: id.to_owned(), socket: FdIndex(0) };
        rig.channel.send_within(&message, &[theirs.as_fd()], PATIENCE).map_err(text)?;
        last.push(ours);
    }
    let _last = good(last)?;
    pulse.wait(100)?;
    let left = rig.descriptors()?;
    // Memory for requests in flight, which not every process has.
    ensure!(left <= held + 2, "the core holds {left} descriptors, and held {held} before");
    Ok(())
}

/// Plays good processes of all devices up to the end of their start, side by side, and hands the connections back.
fn good(streams: Vec<UnixStream>) -> Outcome<Vec<UnixStream>> {
    let serve = |kind, stream: &UnixStream| {
        let copy = stream.try_clone().map_err(text)?;
        match kind {
            LinkKind::Registers | LinkKind::Flash | LinkKind::Keyboard | LinkKind::Watchdog { .. } => {
                vfio_user::serve(copy)
            }
            LinkKind::VirtioVhostUser { .. } | LinkKind::Foreign { .. } => vhost_user::serve(copy),
        }
    };
    thread::scope(|scope| -> Outcome {
        let started =
            HOSTILE.iter().zip(&streams).map(|(&(_, kind), stream)| scope.spawn(move || serve(kind, stream)));
        let started: Vec<_> = started.collect();
        started.into_iter().try_for_each(|device| device.join().map_err(|_| "a peer panicked".to_owned())?)
    })?;
    Ok(streams)
}
