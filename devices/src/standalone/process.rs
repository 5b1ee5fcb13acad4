//! The process of one front end: the device in its jail, and what this program does for it as its supervisor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, DeviceStart, FdIndex, FromDevice, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::uids::UidBlock;
use bulkhead_ipc::jail::{
    self, Enforcement, Exit, Identity, JailError, JailSpec, JailedProcess, PANIC_EXIT_CODE, SharedDirectory,
    ViolationListener,
};
use bulkhead_ipc::log::LogLevel;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::{SignalFd, siginfo};
use tracing::{debug, error, info};

use super::StandaloneError;
use super::outfit::Outfit;

/// How long a process may take until it is sealed, and until it has ended after it was asked to.
const READY_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// The "machine" that a service belongs to.
const MACHINE: &str = "service";

/// What is needed to start the device's process, any number of times.
#[derive(Debug)]
pub(super) struct Recipe {
    kind: &'static str,
    config: DeviceConfig,
    outfit: Outfit,
    log: LogLevel,
    program: File,
    null: File,
    users: Option<UidBlock>,
}

/// How the service of a front end ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Served {
    /// It has closed its connection.
    Left,
    /// A signal has ended this program.
    Stopped,
}

/// Whether it is SIGHUP: the disk may have another size.
pub(super) fn is_hang_up(signal: &siginfo) -> bool {
    i32::try_from(signal.ssi_signo) == Ok(libc::SIGHUP)
}

/// How a process ended.
#[derive(Debug)]
pub(super) struct End {
    /// Why nobody is served any more.
    pub(super) served: Served,
    /// What went wrong.
    pub(super) problem: Option<StandaloneError>,
}

/// A process that serves a front end.
#[derive(Debug)]
pub(super) struct Process {
    jailed: JailedProcess,
    channel: Option<Channel>,
    started: Instant,
    listeners: Vec<ViolationListener>,
    ready: bool,
    /// Done once, when the process is sealed.
    when_ready: Option<fn()>,
    /// When it is killed.
    deadline: Option<Instant>,
    stopping: bool,
    problem: Option<StandaloneError>,
}

impl Recipe {
    pub(super) fn new(
        kind: &'static str,
        config: DeviceConfig,
        outfit: Outfit,
        log: LogLevel,
    ) -> Result<Self, StandaloneError> {
        let open = |path: &'static str, write: bool, flags: i32| {
            let opened = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
            opened.map_err(|error| StandaloneError::System(path, error))
        };
        // A user of its own, where the host has one to give; else that of this program, or nobody's for root. A directory is shared
        // by a user who may use it.
        let own = outfit.shared.is_none().then(|| UidBlock::claim(None, 1));
        let users =
            own.and_then(|own| own.inspect_err(|why| info!(%why, "no user of its own for the device")).ok());
        Ok(Self {
            kind,
            config,
            outfit,
            log,
            program: open("/proc/self/exe", false, libc::O_PATH | libc::O_CLOEXEC)?,
            null: open("/dev/null", true, libc::O_CLOEXEC)?,
            users,
        })
    }

    /// What the device is given.
    pub(super) fn outfit(&self) -> &Outfit {
        &self.outfit
    }

    /// Least severe level that is logged.
    pub(super) fn log(&self) -> LogLevel {
        self.log
    }

    /// Starts a process that does not know yet what it is for: its jail takes longer than all else of a start.
    pub(super) fn begin(&self) -> Result<Begun, StandaloneError> {
        let started = Instant::now();
        let (channel, theirs) = Channel::pair()?;
        let user = self.users.as_ref().and_then(|users| users.uid(0));
        let subordinate = self.users.as_ref().is_some_and(UidBlock::is_subordinate);
        let owner = self.outfit.shared.as_ref().and_then(|shared| shared.owner);
        let owner = owner.map(|(uid, gid)| Identity { uid, gid });
        let own = user.map(|uid| Identity { uid, gid: uid });
        let stderr = io::stderr();
        let jailed = jail::spawn(JailSpec {
            program: self.program.as_fd(),
            arguments: &[format!("bulkhead-device[{MACHINE}/{0}]", self.kind), self.kind.to_owned()],
            channel: theirs.into_fd(),
            log: stderr.as_fd(),
            null: self.null.as_fd(),
            limits: self.outfit.limits_now(),
            identity: owner.or(own).unwrap_or_default(),
            subordinate: user.filter(|_| subordinate),
            cgroup: None,
            shared: self.outfit.shared.as_ref().map(|shared| SharedDirectory {
                directory: shared.directory.as_fd(),
                read_only: shared.read_only,
                all_owners: shared.owner.is_none(),
            }),
        })?;
        Ok(Begun { jailed, channel, started })
    }
}

/// A process on its way into its jail; killed on drop.
#[derive(Debug)]
pub(super) struct Begun {
    jailed: JailedProcess,
    channel: Channel,
    started: Instant,
}

impl Begun {
    /// Tells the process of the device and its front end; it logs from `log` upwards.
    pub(super) fn serve(
        self,
        recipe: &Recipe,
        front_end: &OwnedFd,
        log: LogLevel,
    ) -> Result<Process, StandaloneError> {
        let Self { mut jailed, channel, started } = self;
        let start = ToDevice::Start(DeviceStart {
            id: recipe.kind.to_owned(),
            machine: MACHINE.to_owned(),
            log,
            enforcement: Enforcement::Supervised,
            socket: FdIndex(0),
            config: recipe.config.clone(),
            metrics: None,
        });
        let descriptors: Vec<_> =
            std::iter::once(front_end.as_fd()).chain(recipe.outfit.descriptors()).collect();
        channel.send(&start, &descriptors)?;
        jailed.release()?;
        Ok(Process {
            jailed,
            channel: Some(channel),
            started,
            listeners: Vec::new(),
            ready: false,
            when_ready: None,
            deadline: Instant::now().checked_add(READY_LIMIT),
            stopping: false,
            problem: None,
        })
    }
}

impl Process {
    /// What to do once, when the process is sealed.
    pub(super) fn when_ready(self, act: fn()) -> Self {
        Self { when_ready: Some(act), ..self }
    }

    /// Waits for its end.
    pub(super) fn wait(mut self, signals: &SignalFd, outfit: &Outfit) -> Result<End, StandaloneError> {
        loop {
            let [ended, signal, message, violation] = self.poll(signals)?;
            if violation {
                self.violated();
            }
            if message {
                self.message();
            }
            if signal {
                match signals.read_signal() {
                    Ok(Some(signal)) if is_hang_up(&signal) => self.resize(outfit),
                    Ok(Some(_)) => self.stop(),
                    _ => {}
                }
            }
            // One that came not even into its jail has left a report of why.
            if ended
                && !self.ready
                && let Err(error @ JailError::Step { .. }) = self.jailed.confirm(Duration::ZERO)
            {
                return Err(error.into());
            }
            if ended
                && let Some(exit) =
                    self.jailed.try_wait().map_err(|error| StandaloneError::System("wait", error))?
            {
                // Its last words may have come together with its end.
                self.message();
                return Ok(self.end(exit));
            }
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.deadline = None;
                let what =
                    if self.stopping { "did not end when it was asked to" } else { "did not become ready" };
                self.kill(StandaloneError::Died(format!("{what} and is killed")));
            }
        }
    }

    /// Waits until something happened: to the process, to this program, on the channel, to a policy.
    fn poll(&mut self, signals: &SignalFd) -> Result<[bool; 4], StandaloneError> {
        let mut fds = vec![
            PollFd::new(self.jailed.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.channel.iter().map(|channel| PollFd::new(channel.as_fd(), PollFlags::POLLIN)));
        let timeout = match self.deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left.saturating_add(Duration::from_millis(1)))
                    .unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(StandaloneError::system("poll")(errno)),
        }
        let happened = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        let channel = self.channel.is_some() && fds.last().is_some_and(happened);
        let [ended, signal] = [0, 1].map(|index| fds.get(index).is_some_and(happened));
        let listeners = fds.get(2..2 + self.listeners.len()).unwrap_or_default();
        let events: Vec<_> = listeners.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        drop(fds);
        let violated = events.iter().any(|events| events.contains(PollFlags::POLLIN));
        // A listener whose threads are gone says so for ever.
        let mut events = events.into_iter();
        self.listeners.retain(|_| events.next() != Some(PollFlags::POLLHUP));
        Ok([ended, signal, channel, violated])
    }

    /// Takes what the process says. Nothing of it is trusted, and only the first READY brings listeners.
    fn message(&mut self) {
        let Some(channel) = &self.channel else { return };
        match channel.recv::<FromDevice>(Some(Duration::ZERO)) {
            Ok((FromDevice::Ready { policies }, descriptors)) if !self.ready => {
                self.ready = true;
                self.deadline = None;
                let microseconds = self.started.elapsed().as_micros();
                if let Some(act) = self.when_ready.take() {
                    act();
                }
                debug!(microseconds, "the device's process is sealed and ready");
                let pairs = policies.into_iter().zip(descriptors);
                self.listeners =
                    pairs.map(|(policy, listener)| ViolationListener::new(policy, listener)).collect();
                // From here on this process only waits. The other one runs, so nothing of its jail's construction is needed.
                let _none = self.jailed.confirm(Duration::ZERO);
                crate::footprint::release_program();
            }
            Ok((FromDevice::Failed(reason), _)) => {
                self.problem =
                    Some(StandaloneError::Refused(reason.chars().filter(|c| !c.is_control()).collect()));
            }
            // What a console leaves has no successor here.
            Ok(_) | Err(ChannelError::Deadline) => {}
            Err(_) => self.channel = None,
        }
    }

    /// A policy forbids what a thread tried.
    fn violated(&mut self) {
        let violation = self.listeners.iter().find_map(|listener| listener.read().ok().flatten());
        let Some(violation) = violation else { return };
        // It stays as it is: the thread waits until the process is killed.
        let (name, policy) = (violation.name, violation.policy.file());
        error!(name, policy, arguments = ?violation.arguments, "the device's process tried a forbidden system call");
        self.kill(StandaloneError::Died(format!(
            "was killed: it tried {name}, which its policy {policy} forbids"
        )));
    }

    /// The disk may have another size.
    fn resize(&self, outfit: &Outfit) {
        let Some(bytes) = outfit.disk_size().filter(|bytes| *bytes > 0) else {
            return error!("SIGHUP: the disk's size cannot be found, or is zero");
        };
        if let Some(error) = outfit.most_written().and_then(|most| self.jailed.set_file_size(most).err()) {
            return error!(%error, "SIGHUP: the device's process may not write more than before");
        }
        info!(bytes, "the disk has this size now");
        // Room is made by the process, or it hangs.
        let _told = self.channel.as_ref().map(|channel| channel.send(&ToDevice::DiskSize { bytes }, &[]));
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.deadline = Instant::now().checked_add(STOP_LIMIT);
        // One that does not read is killed after the deadline.
        let _told = self.channel.as_ref().map(|channel| channel.send(&ToDevice::Stop, &[]));
    }

    fn kill(&mut self, problem: StandaloneError) {
        self.problem.get_or_insert(problem);
        if let Err(error) = self.jailed.kill() {
            error!(%error, "the device's process cannot be killed");
        }
    }

    fn end(self, exit: Exit) -> End {
        let served = if self.stopping { Served::Stopped } else { Served::Left };
        let problem = match (self.problem, exit) {
            (Some(problem), _) => Some(problem),
            (None, Exit::Code(0)) => None,
            (None, Exit::Code(PANIC_EXIT_CODE)) => Some(StandaloneError::Died("panicked".to_owned())),
            (None, Exit::Code(code)) => Some(StandaloneError::Died(format!("ended with exit code {code}"))),
            (None, Exit::Signal(signal)) => {
                Some(StandaloneError::Died(format!("was killed by signal {signal}")))
            }
        };
        End { served, problem }
    }
}
