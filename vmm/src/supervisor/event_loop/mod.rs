//! Watches over a machine from its launch to its end: one thread, one epoll set, no polling, no sleeping.
//!
//! Whatever happens arrives as an event: control messages, the end of a process (pidfd), a system call that a policy
//! forbids (seccomp listener), log lines, signals (signalfd), keys, API clients, and deadlines as the timeout of the wait.
//! A machine ends in one way: the first cause is kept in `end`, every process is stopped or killed, and when the last
//! one is reaped the loop is left.

mod balloon;
mod cables;
mod cpus;
mod disks;
mod early;
mod hotplug;
mod keyboard;
mod liveness;
mod orders;
mod ports;
mod processes;
mod recovery;
mod requests;
mod vsock;
mod watchdog;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::ToDevice;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::api::server::Server;
use super::api::{EventEntry, EventKind};
use super::cli::{EndAction, LogLevel};
use super::config::{CONSOLE, MachineConfig, SERIAL};
use super::exit_code::ExitCode;
use super::history::History;
use super::launch::{LaunchError, launch};
use super::logs::Log;
use super::notify::Notifier;
use super::poller::{Event, Poller, Source};
use super::process::{Process, Role, State};
use super::programs::Programs;
use super::resources::{Listener, Resources, Stream};
use super::terminal::{self, Escapes, Key, RawTerminal};
use cables::Cables;
use cpus::Cpus;
use hotplug::Change;
use keyboard::Unread;
use orders::Order;
use recovery::Recovery;

/// From the start of the first process until all have reported READY.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// For the core to say why it left a device alone.
const WORD_DEADLINE: Duration = Duration::from_secs(1);
/// For the devices to finish what is in flight after the guest powered off.
const STOP_DEADLINE: Duration = Duration::from_secs(3);
/// Between two attempts to accept a connection when no descriptor is left.
const MUTED: Duration = Duration::from_secs(1);
/// For the kernel to end what was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Why a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest panicked.
    Panicked,
    /// The guest's watchdog ran out.
    Watchdog {
        /// The action is a reset.
        restart: bool,
    },
    /// The guest wrote this to the debug exit port.
    DebugExit(u8),
    /// Something failed, and was reported; with the exit code for it.
    Failed(ExitCode),
    /// This signal came.
    Signal(u8),
    /// Somebody asked for it.
    Forced,
}

impl End {
    /// The exit code of `bulkhead run` after it.
    pub const fn exit_code(self) -> ExitCode {
        match self {
            Self::PowerOff | Self::Reset => ExitCode::Success,
            Self::Panicked => ExitCode::GuestPanic,
            Self::Watchdog { .. } => ExitCode::Watchdog,
            Self::DebugExit(value) => ExitCode::Guest(value << 1 | 1),
            Self::Failed(code) => code,
            Self::Signal(number) => ExitCode::Signal(number),
            Self::Forced => ExitCode::Forced,
        }
    }

    /// Whether the configuration says to start the machine anew after this.
    pub fn restarts(self, config: &MachineConfig) -> bool {
        match self {
            Self::Reset | Self::Watchdog { restart: true } => config.on_reboot == EndAction::Restart,
            Self::Panicked => config.on_panic == EndAction::Restart,
            Self::PowerOff
            | Self::Watchdog { restart: false }
            | Self::DebugExit(_)
            | Self::Failed(_)
            | Self::Signal(_)
            | Self::Forced => false,
        }
    }
}

/// Where the machine is between launch and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not every process is READY.
    Starting(Instant),
    /// All are.
    Running,
    /// A device ended because the core closed its connection; the core is about to say why.
    Abandoned(Instant),
    /// The devices were told to stop.
    Stopping(Instant),
    /// Every process was killed.
    Killing(Instant),
}

/// What outlives a restart of the machine.
#[derive(Debug)]
pub struct Environment {
    /// The epoll set.
    pub poller: Poller,
    /// The API.
    pub server: Server,
    /// SIGINT, SIGTERM, SIGHUP and SIGWINCH.
    pub signals: SignalFd,
    /// The terminal while it is raw.
    pub terminal: Option<RawTerminal>,
    /// Messages.
    pub log: Log,
    /// The service manager.
    pub notifier: Notifier,
    /// What happened.
    pub history: History,
    /// The programs of the devices.
    pub programs: Programs,
    /// No descriptor was left for a connection: until then the listening sockets, which stay readable, are not watched.
    pub muted: Option<Instant>,
}

/// The signals that are read as events; they must be blocked before anything is opened.
pub fn signals() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGWINCH].into_iter().collect()
}

impl Environment {
    /// Blocks the signals and watches what does not belong to a single run of the machine.
    pub fn new(server: Server, mut log: Log) -> io::Result<Self> {
        let mask = signals();
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let poller = Poller::new()?;
        poller.add(&signals, Source::Signals)?;
        server.register(&poller)?;
        let notifier = Notifier::from_environment().unwrap_or_else(|error| {
            log.say(LogLevel::Warn, &format!("the service manager is told nothing: {error}"));
            Notifier::default()
        });
        let (history, programs) = (History::default(), Programs::default());
        Ok(Self { poller, server, signals, terminal: None, log, notifier, history, programs, muted: None })
    }

    /// Does not listen for a while.
    fn mute(&mut self, resources: &Resources) {
        self.muted = Some(Instant::now() + MUTED);
        self.server.mute(&self.poller);
        for stream in [&resources.serial, &resources.console].into_iter().flatten() {
            stream.listener.iter().for_each(|listener| self.poller.remove(listener));
        }
        for port in resources.ports.iter().flat_map(|ports| &ports.ports) {
            port.stream.listener.iter().for_each(|listener| self.poller.remove(listener));
        }
        resources.vsock.iter().for_each(|vsock| self.poller.remove(&vsock.listener));
        self.log.say(LogLevel::Warn, "no descriptor is left for a connection: it has to wait");
    }

    /// Listens again.
    fn unmute(&mut self, resources: &Resources) -> io::Result<()> {
        self.muted = None;
        self.server.register(&self.poller)?;
        self.watch(resources)
    }

    /// Watches the sockets of serial port, console and vsock.
    pub fn watch(&self, resources: &Resources) -> io::Result<()> {
        for (stream, source) in
            [(&resources.serial, Source::SerialListener), (&resources.console, Source::ConsoleListener)]
        {
            let Some(stream) = stream else { continue };
            if let Some(listener) = &stream.listener {
                self.poller.add(listener, source)?;
            }
        }
        self.watch_ports(resources)?;
        self.watch_vsock(resources)
    }
}

/// One run of a machine.
pub struct EventLoop<'a> {
    config: &'a MachineConfig,
    resources: &'a mut Resources,
    environment: &'a mut Environment,
    processes: Vec<Process>,
    /// What is to be done for each of `processes` when it ends, by the same index.
    recoveries: Vec<Recovery>,
    /// When the processes are asked again whether they are alive.
    heartbeat: Instant,
    /// When the processes that are not READY are looked at.
    early_look: Instant,
    /// What users asked for and has not been carried out.
    orders: Vec<Order>,
    /// Connections to the sockets of serial port and console, for the successors of these devices.
    peers: Vec<(&'static str, UnixStream)>,
    /// The same of named ports, by their indices.
    port_peers: Vec<(u16, UnixStream)>,
    /// Devices that are being added or removed.
    changes: Vec<Change>,
    /// Streams of network cards that are to be made anew.
    cables: Cables,
    /// Keys that the keyboard's process has not taken.
    unread_keys: Unread,
    /// The CPUs that are plugged in, and what was asked about them.
    cpus: Cpus,
    started: Instant,
    phase: Phase,
    end: Option<End>,
    /// What was said about the end.
    why: Option<String>,
    escapes: Escapes,
    /// The CPUs stand still.
    paused: bool,
}

impl<'a> EventLoop<'a> {
    /// Starts every process.
    pub fn launch(
        config: &'a MachineConfig,
        resources: &'a mut Resources,
        environment: &'a mut Environment,
        started: Instant,
    ) -> Result<Self, LaunchError> {
        if let Some(balloon) = &mut resources.balloon {
            // No guest has given it anything yet.
            balloon.actual = 0;
        }
        for nic in &mut resources.nics {
            if let Err(error) = nic.begin() {
                environment.log.say(LogLevel::Warn, &error.to_string());
            }
        }
        let processes = launch(config, resources, &environment.programs)?;
        if let Some(watchdog) = &mut resources.watchdog {
            watchdog.expired = false;
        }
        let recovery = |process: &Process| Recovery::new(config.restart_of(&process.id));
        let recoveries = processes.iter().map(recovery).collect();
        let cpus = Cpus::new(config.topology.count(), resources.cpus);
        let phase = Phase::Starting(Instant::now() + READY_DEADLINE);
        Ok(Self {
            config,
            resources,
            environment,
            processes,
            recoveries,
            heartbeat: Instant::now(),
            early_look: Instant::now() + early::INTERVAL,
            orders: Vec::new(),
            peers: Vec::new(),
            port_peers: Vec::new(),
            changes: Vec::new(),
            cables: Cables::new(),
            unread_keys: Unread::default(),
            cpus,
            started,
            phase,
            end: None,
            why: None,
            escapes: Escapes::new(false),
            paused: false,
        })
    }

    /// Stays until the last process has ended.
    pub fn run(mut self) -> io::Result<End> {
        self.environment.log.say(LogLevel::Debug, &self.timing("all processes created"));
        for index in 0..self.processes.len() {
            self.watch_process(index)?;
            self.note(EventKind::Start, Some(index), |_| ());
        }
        for device in [SERIAL, CONSOLE] {
            self.attach_again(device);
        }
        self.watch_cables();
        while self.processes.iter().any(|process| process.state != State::Ended) {
            let environment = &self.environment;
            let deadlines = [
                self.deadline(),
                self.recovery_deadline(),
                self.early_deadline(),
                self.change_deadline(),
                self.cable_deadline(),
                self.cpus.deadline(),
                environment.server.deadline(),
                environment.muted,
            ];
            let deadline = deadlines.into_iter().flatten().min();
            for event in self.environment.poller.wait(deadline)? {
                self.handle(event);
            }
            let now = Instant::now();
            self.environment.server.expire(now, &self.environment.poller);
            if self.environment.muted.is_some_and(|until| until <= now) {
                self.environment.unmute(self.resources)?;
            }
            // Not while events are handled: those left of a batch may be about the process that is replaced.
            self.recover(now);
            self.carry_out(now);
            self.reconnect_cables(now);
            self.cpus_late(now);
            self.look_early(now);
            if self.deadline().is_some_and(|deadline| deadline <= now) && !self.deadline_passed() {
                break;
            }
        }
        self.unwatch_cables();
        self.settle_changes();
        self.settle_cpus();
        // All have ended without a cause only when each of them exited with code 0 by itself.
        let end = self.end.unwrap_or(End::Failed(ExitCode::Process));
        let why = self.why.take();
        for order in std::mem::take(&mut self.orders) {
            self.answer(order, &["the machine has ended".to_owned()]);
        }
        self.note(EventKind::End, None, |entry| {
            entry.reason = why;
            // A machine that starts anew has no exit code yet.
            entry.exit_code = (!end.restarts(self.config)).then(|| end.exit_code().number().into());
        });
        Ok(end)
    }

    /// Notes an event for `bulkhead events`.
    fn note(&mut self, kind: EventKind, index: Option<usize>, fill: impl FnOnce(&mut EventEntry)) {
        let process = index.and_then(|index| self.processes.get(index));
        let entry = self.environment.history.note(kind, |entry| {
            entry.process = process.map(|process| process.id.clone());
            entry.pid = process.map(|process| process.jailed.pid());
            fill(entry);
        });
        self.environment.server.publish(&entry, &self.environment.poller);
    }

    /// Says why the machine ends, the first time.
    fn ends_because(&mut self, text: &str) {
        self.why.get_or_insert_with(|| text.to_owned());
    }

    const fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Starting(deadline)
            | Phase::Abandoned(deadline)
            | Phase::Stopping(deadline)
            | Phase::Killing(deadline) => Some(deadline),
            Phase::Running => None,
        }
    }

    fn say(&mut self, level: LogLevel, message: &str) {
        self.environment.log.say(level, message);
    }

    /// Tells the service manager; one that does not listen changes nothing for the machine.
    fn notify(&mut self, tell: fn(&mut Notifier) -> io::Result<()>) {
        if let Err(error) = tell(&mut self.environment.notifier) {
            self.say(LogLevel::Warn, &format!("the service manager does not listen: {error}"));
        }
    }

    /// Processes are about to be ended: says so, unless new ones take their places.
    fn notify_end(&mut self) {
        if !self.end.is_some_and(|end| end.restarts(self.config)) {
            self.notify(Notifier::stopping);
        }
    }

    fn timing(&self, what: &str) -> String {
        let micros = self.started.elapsed().as_micros();
        format!("{what} after {}.{:03} ms", micros / 1000, micros % 1000)
    }

    fn handle(&mut self, event: Event) {
        match event.source {
            Source::Signals => self.signal(),
            Source::Api => {
                let accepted = self.environment.server.accept(&self.environment.poller);
                self.accepted(accepted);
            }
            Source::Client(client) => self.request(client),
            Source::Keyboard => self.keyboard(event),
            Source::SerialListener => self.connection(SERIAL),
            Source::ConsoleListener => self.connection(CONSOLE),
            Source::PortListener(number) => self.port_connected(number),
            Source::Control(index) => self.control(index.into(), event.hang_up),
            Source::Exit(index) => self.exited(index.into()),
            Source::Log(index) => self.log_line(index.into()),
            Source::Violation(index, listener) => self.violation(index.into(), listener.into(), event),
            Source::StandbyControl(index) => self.standby_control(index.into()),
            Source::StandbyExit(index) => self.standby_exited(index.into()),
            Source::StandbyLog(index) => self.standby_log(index.into()),
            Source::VsockListener => self.vsock_connection(),
            Source::Connector => self.connector(),
            Source::CableEnd(number) => self.cable_ended(number),
            Source::CableListener(number) => self.cable_connected(number),
        }
    }

    /// Returns false when there is nothing left to wait for.
    fn deadline_passed(&mut self) -> bool {
        match self.phase {
            Phase::Running => true,
            Phase::Starting(_) => {
                let late = self.names(State::Starting);
                let text = format!("{late} did not report READY within {} s", READY_DEADLINE.as_secs());
                self.fail(ExitCode::Process, &text);
                true
            }
            Phase::Abandoned(_) => {
                let ended = self.names(State::Ended);
                self.fail(ExitCode::Process, &format!("{ended} ended by itself although the machine runs"));
                true
            }
            Phase::Stopping(_) => {
                let text = format!(
                    "killing what did not stop within {} s: {}",
                    STOP_DEADLINE.as_secs(),
                    self.names_of_living()
                );
                self.say(LogLevel::Warn, &text);
                self.kill_all();
                true
            }
            Phase::Killing(_) => {
                let living = self.names_of_living();
                self.say(
                    LogLevel::Error,
                    &format!("the kernel does not end {living}, although it was killed"),
                );
                // Reaping them would wait for ever.
                self.processes.drain(..).for_each(std::mem::forget);
                false
            }
        }
    }

    fn names(&self, state: State) -> String {
        let names: Vec<&str> =
            self.processes.iter().filter(|process| process.state == state).map(|p| p.id.as_str()).collect();
        names.join(", ")
    }

    fn names_of_living(&self) -> String {
        let living = self.processes.iter().filter(|process| process.state != State::Ended);
        living
            .map(|process| format!("{} (process {})", process.id, process.jailed.pid()))
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn signal(&mut self) {
        while let Ok(Some(information)) = self.environment.signals.read_signal() {
            let number = information.ssi_signo;
            if number == Signal::SIGWINCH as u32 {
                if let Some((columns, rows)) = terminal::size(io::stdin()) {
                    self.resize_stdio(columns, rows);
                }
                continue;
            }
            let number = u8::try_from(number).unwrap_or_default();
            self.ends_because(&format!("signal {number} came"));
            self.interrupt(End::Signal(number));
        }
    }

    fn resize_stdio(&mut self, columns: u16, rows: u16) {
        let on_stdio =
            |stream: &Option<Stream>| stream.as_ref().is_some_and(|stream| stream.keyboard.is_some());
        if on_stdio(&self.resources.console) {
            self.tell(CONSOLE, &ToDevice::Resize { columns, rows });
        }
    }

    /// Sends a message to a device; one that cannot take it is noticed by other means.
    fn tell(&self, id: &str, message: &ToDevice) {
        let alive = |process: &&Process| process.id == id && process.state != State::Ended;
        if let Some(process) = self.processes.iter().find(alive) {
            let _full_or_gone = process.channel.send(message, &[]);
        }
    }

    fn keyboard(&mut self, event: Event) {
        let mut typed = [0; 256];
        let count = if event.readable { nix::unistd::read(io::stdin(), &mut typed).unwrap_or(0) } else { 0 };
        if count == 0 {
            // In raw mode a read of nothing is no end; only a hang-up is.
            if event.hang_up {
                self.environment.poller.remove(io::stdin());
            }
            return;
        }
        let mut keys = Vec::with_capacity(count);
        let command = self.escapes.filter(typed.get(..count).unwrap_or(&[]), &mut keys);
        let streams = [&self.resources.serial, &self.resources.console];
        if let Some(keyboard) = streams.into_iter().flatten().find_map(|stream| stream.keyboard.as_ref()) {
            keyboard.type_keys(&keys);
        }
        match command {
            Some(Key::Leave) => self.force("ended by Ctrl-A X"),
            Some(Key::Help) => self.say(
                LogLevel::Error,
                "Ctrl-A X ends the machine, Ctrl-A Ctrl-A sends Ctrl-A to the guest, Ctrl-A H prints this",
            ),
            None => {}
        }
    }

    fn force(&mut self, why: &str) {
        self.say(LogLevel::Info, why);
        self.ends_because(why);
        self.interrupt(End::Forced);
    }

    /// Ends the machine because somebody outside wants it. It must not start again then, whatever the guest did before.
    fn interrupt(&mut self, end: End) {
        if matches!(self.end, None | Some(End::Reset | End::Panicked)) {
            self.end = Some(end);
        }
        self.kill_all();
    }

    /// What accepting a connection came to. Without a descriptor for it nobody listens for a while.
    fn accepted<T>(&mut self, result: Result<T, Errno>) -> Option<T> {
        if matches!(result, Err(Errno::EMFILE | Errno::ENFILE)) {
            self.environment.mute(self.resources);
        }
        result.ok()
    }

    /// A connection to the Unix socket of the serial port or console goes to the device as it is.
    fn connection(&mut self, device: &'static str) {
        let stream = if device == SERIAL { &self.resources.serial } else { &self.resources.console };
        let listener = stream.as_ref().and_then(|stream| stream.listener.as_ref());
        let accepted = listener.map_or(Err(Errno::EAGAIN), Listener::accept);
        if let Some(connection) = self.accepted(accepted) {
            self.environment.server.detach(device, &self.environment.poller);
            self.peers.retain(|(id, _)| *id != device);
            let handed = self.hand_over(device, connection.as_fd());
            self.peers.push((device, connection));
            if let Err(reason) = handed {
                self.say(LogLevel::Warn, &format!("{device}: cannot take the new connection: {reason}"));
            }
        }
    }

    /// The terminal becomes raw once the guest can read it; until then Ctrl-C ends the launch.
    fn take_terminal(&mut self) {
        let streams = [&self.resources.serial, &self.resources.console];
        if self.environment.terminal.is_none()
            && streams.into_iter().flatten().any(|stream| stream.keyboard.is_some())
        {
            let raw = RawTerminal::enter();
            match raw.and_then(|raw| self.environment.poller.add(io::stdin(), Source::Keyboard).map(|()| raw))
            {
                Ok(raw) => {
                    self.environment.terminal = Some(raw);
                    self.say(
                        LogLevel::Info,
                        "this terminal belongs to the guest now; Ctrl-A X ends the machine",
                    );
                }
                Err(error) => self.say(LogLevel::Warn, &format!("cannot make the terminal raw: {error}")),
            }
        }
    }

    /// The role of a process by its index, for messages.
    fn is_core(&self, index: usize) -> bool {
        self.processes.get(index).is_some_and(|process| process.role == Role::Core)
    }
}
