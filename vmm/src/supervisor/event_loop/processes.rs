//! What processes say and how they end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::channel::message::{
    BalloonReport, FromCore, FromDevice, Input, Left, MachineEnd, Progress, ToDevice,
};
use bulkhead_ipc::jail::{Exit, JailError, PolicyName, Violation};
use nix::poll::{PollFd, PollFlags, poll};

use super::{End, EventLoop, KILL_DEADLINE, Phase, STOP_DEADLINE, WORD_DEADLINE};
use crate::supervisor::api::EventKind;
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::{KEYBOARD, PORTS};
use crate::supervisor::exit_code::ExitCode;
use crate::supervisor::heap;
use crate::supervisor::launch::advice;
use crate::supervisor::logs::lines::escape;
use crate::supervisor::notify::Notifier;
use crate::supervisor::poller::{Event, Source};
use crate::supervisor::process::{Process, Role, State};

/// Messages handled in one go, so that a process that floods its channel does not starve the rest.
const MESSAGES_AT_ONCE: usize = 16;
/// The longest text of a process that is shown, in characters.
const MAX_TEXT: usize = 500;
/// How long a device may take to end after its stream closed, in milliseconds.
const LAST_BREATH: u8 = 200;

/// What arrived on a control channel, of either kind of process.
#[derive(Debug)]
pub(super) enum Message {
    Ready(Vec<PolicyName>, Vec<OwnedFd>),
    Ended(MachineEnd),
    DeviceFailed { id: String, reason: String },
    DeviceReplaced { id: String },
    DeviceAdded { id: String },
    DeviceRefused { id: String, reason: String },
    DeviceRemoved { id: String },
    CpuRemoved { index: u16 },
    Alive(Progress),
    Failed(String),
    Left(Left),
    Balloon(BalloonReport),
    Expired,
    KeysTaken(u64),
    DiskSize(Result<u64, String>),
}

pub(super) fn receive(process: &Process) -> Result<Message, ChannelError> {
    let now = Some(Duration::ZERO);
    Ok(if process.role == Role::Core {
        match process.channel.recv::<FromCore>(now)? {
            (FromCore::Ready { policies }, fds) => Message::Ready(policies, fds),
            (FromCore::Ended(end), _) => Message::Ended(end),
            (FromCore::DeviceFailed { id, reason }, _) => Message::DeviceFailed { id, reason },
            (FromCore::DeviceReplaced { id }, _) => Message::DeviceReplaced { id },
            (FromCore::DeviceAdded { id }, _) => Message::DeviceAdded { id },
            (FromCore::DeviceRefused { id, reason }, _) => Message::DeviceRefused { id, reason },
            (FromCore::DeviceRemoved { id }, _) => Message::DeviceRemoved { id },
            (FromCore::CpuRemoved { index }, _) => Message::CpuRemoved { index },
            (FromCore::Alive, _) => Message::Alive(Progress::Fine),
        }
    } else {
        match process.channel.recv::<FromDevice>(now)? {
            (FromDevice::Ready { policies }, fds) => Message::Ready(policies, fds),
            (FromDevice::Alive(progress), _) => Message::Alive(progress),
            (FromDevice::Left(left), _) => Message::Left(left),
            (FromDevice::Balloon(report), _) => Message::Balloon(report),
            (FromDevice::Expired, _) => Message::Expired,
            (FromDevice::KeysTaken(number), _) => Message::KeysTaken(number),
            (FromDevice::DiskSize(size), _) => Message::DiskSize(size.map_err(|reason| harmless(&reason))),
            (FromDevice::Failed(reason), _) => Message::Failed(harmless(&reason)),
        }
    })
}

/// Text of a process, which may be hostile, bounded and without control characters.
fn harmless(text: &str) -> String {
    escape(text.as_bytes()).chars().take(MAX_TEXT).collect()
}

impl EventLoop<'_> {
    /// Watches all descriptors of a process.
    pub(super) fn watch_process(&self, index: usize) -> io::Result<()> {
        let (Some(process), Ok(number)) = (self.processes.get(index), u16::try_from(index)) else {
            return Ok(());
        };
        let poller = &self.environment.poller;
        poller.add(&process.channel, Source::Control(number))?;
        poller.add(&process.jailed, Source::Exit(number))?;
        poller.add(&process.log, Source::Log(number))
    }

    /// Watches what the policies of a process forbid.
    pub(super) fn watch_listeners(&self, index: usize) -> io::Result<()> {
        let (Some(process), Ok(number)) = (self.processes.get(index), u16::try_from(index)) else {
            return Ok(());
        };
        let mut listeners = process.listeners.iter().zip(0..);
        listeners.try_for_each(|(listener, position)| {
            self.environment.poller.add(listener, Source::Violation(number, position))
        })
    }

    /// Reads what a process says on its control channel.
    pub(super) fn control(&mut self, index: usize, hang_up: bool) {
        for _ in 0..MESSAGES_AT_ONCE {
            let Some(process) = self.processes.get(index) else { return };
            match receive(process) {
                Ok(message) => self.message(index, message),
                Err(ChannelError::Deadline) => break,
                Err(ChannelError::PeerClosed) => {
                    // A process that closes its channel is about to end; the pidfd says how.
                    self.environment.poller.remove(&process.channel);
                    return;
                }
                Err(error) => {
                    let text = format!("{} sent nonsense on its control channel: {error}", process.id);
                    self.condemn(index, EventKind::Failure, &text);
                    return;
                }
            }
        }
        if hang_up && let Some(process) = self.processes.get(index) {
            self.environment.poller.remove(&process.channel);
        }
    }

    fn message(&mut self, index: usize, message: Message) {
        let id = self.processes.get(index).map(|process| process.id.clone()).unwrap_or_default();
        match message {
            Message::Ready(policies, listeners) => self.ready(index, &id, &policies, listeners),
            Message::Ended(MachineEnd::BadInput { input, reason }) => {
                self.explained(index);
                let text = self.bad_input(input, &harmless(&reason));
                self.fail(ExitCode::Usage, &text);
            }
            Message::Ended(MachineEnd::Failed(reason)) => {
                self.explained(index);
                // A device that died is why, not that the core noticed it.
                self.reap_the_dying(|other| other != index);
                self.fail(ExitCode::Process, &format!("core: {}", harmless(&reason)));
            }
            Message::Ended(end) => self.ended(&end),
            Message::DeviceFailed { id: device, reason } => {
                self.device_failed(&harmless(&device), &harmless(&reason));
            }
            Message::DeviceReplaced { id } => self.acknowledged(&id),
            Message::DeviceAdded { id } => self.device_added(&id),
            Message::DeviceRefused { id, reason } => self.device_refused(&id, harmless(&reason)),
            Message::DeviceRemoved { id } => self.device_removed(&id),
            Message::CpuRemoved { index } => self.cpu_removed(index),
            Message::Balloon(report) => self.balloon_report(&id, &report),
            Message::Expired => self.watchdog_expired(index),
            Message::KeysTaken(number) => self.keys_taken(index, &id, number),
            Message::DiskSize(size) => self.image_resized(&id, size),
            Message::Left(left) => {
                if let Some(recovery) = self.recoveries.get_mut(index) {
                    recovery.inherit(left);
                }
            }
            Message::Alive(progress) => {
                self.alive(index, progress);
                if id == KEYBOARD {
                    // It may have had no room for keys before.
                    self.send_keys();
                }
            }
            Message::Failed(reason) => {
                let text = format!("device {id} failed: {reason}");
                self.condemn(index, EventKind::Failure, &text);
            }
        }
    }

    /// Waits a moment until one of the `suspects` can be reaped, and reaps it: a process's streams close before
    /// it has ended, so that the core may hear of a death first.
    pub(super) fn reap_the_dying(&mut self, suspects: impl Fn(usize) -> bool) {
        let suspects: Vec<_> = (0..self.processes.len()).filter(|index| suspects(*index)).collect();
        let processes = suspects.iter().filter_map(|index| self.processes.get(*index));
        let alive = processes.filter(|process| process.state != State::Ended);
        let mut fds: Vec<_> =
            alive.map(|process| PollFd::new(process.jailed.as_fd(), PollFlags::POLLIN)).collect();
        // Without an answer the core's own sentence has to do.
        let _ = poll(&mut fds, LAST_BREATH);
        suspects.into_iter().for_each(|index| self.reap(index, false));
    }

    /// Why this process ends has been said.
    fn explained(&mut self, index: usize) {
        if let Some(process) = self.processes.get_mut(index) {
            process.explained = true;
        }
    }

    /// A sentence about what the user gave, with the name of the file.
    fn bad_input(&self, input: Input, reason: &str) -> String {
        let (what, file) = match input {
            Input::Kernel => ("kernel", self.config.kernel.as_ref()),
            Input::Firmware => ("firmware", self.config.firmware.as_ref().map(|firmware| &firmware.image)),
            Input::Initrd => ("initrd", self.config.initrd.as_ref()),
            Input::Setting => ("", None),
        };
        match file {
            Some(file) => format!("{what} '{}': {reason}", harmless(&file.to_string_lossy())),
            None => reason.to_owned(),
        }
    }

    fn ready(&mut self, index: usize, id: &str, policies: &[PolicyName], listeners: Vec<OwnedFd>) {
        let Some(process) = self.processes.get_mut(index) else { return };
        if process.state == State::Ended {
            return;
        }
        if process.state != State::Starting || policies.len() != listeners.len() {
            let text = format!("{id} sent a READY that makes no sense");
            self.condemn(index, EventKind::Failure, &text);
            return;
        }
        process.ready(policies, listeners);
        if let Err(error) = self.watch_listeners(index) {
            // A descriptor that is no listener: the process must not run without its policies being watched.
            let text = format!("{id} sent a seccomp listener that cannot be watched: {error}");
            self.condemn(index, EventKind::Failure, &text);
            return;
        }
        self.note(EventKind::Ready, Some(index), |_| ());
        let text = self.timing(&format!("{id} is ready"));
        self.say(LogLevel::Debug, &text);
        if matches!(self.phase, Phase::Starting(_)) && self.processes.iter().all(|p| p.state == State::Ready)
        {
            self.phase = Phase::Running;
            self.note(EventKind::Running, None, |_| ());
            self.notify(Notifier::ready);
            let text = self.timing(&format!("all {} processes are ready", self.processes.len()));
            self.say(LogLevel::Info, &text);
            self.take_terminal();
            heap::trim();
        } else if !self.added_is_ready(id) {
            self.hand_to_core(index, id);
        }
    }

    /// The core says that the machine ended.
    fn ended(&mut self, end: &MachineEnd) {
        let (end, level, text) = match end {
            MachineEnd::PowerOff => (End::PowerOff, LogLevel::Info, "the guest powered off".to_owned()),
            MachineEnd::Reset => (End::Reset, LogLevel::Info, "the guest reset the machine".to_owned()),
            MachineEnd::Panicked => (End::Panicked, LogLevel::Error, "the guest panicked".to_owned()),
            MachineEnd::DebugExit(value) => {
                let text = format!("the guest wrote {value:#04x} to the debug exit port");
                (End::DebugExit(*value), LogLevel::Info, text)
            }
            // Reported by the caller.
            MachineEnd::BadInput { .. } | MachineEnd::Failed(_) => return,
        };
        if self.end.is_none() {
            self.say(level, &text);
            self.ends_in_order(end, &text);
        }
    }

    /// The machine ends, which `text` says why; its devices finish what is in flight.
    pub(super) fn ends_in_order(&mut self, end: End, text: &str) {
        self.end = Some(end);
        self.ends_because(text);
        self.stop_devices();
    }

    /// Lets the devices finish what is in flight. The core has nothing left to do.
    fn stop_devices(&mut self) {
        self.notify_end();
        self.drop_standbys();
        self.phase = Phase::Stopping(Instant::now() + STOP_DEADLINE);
        for process in self.processes.iter().filter(|process| process.state != State::Ended) {
            if process.role == Role::Core {
                let _gone = process.kill();
            } else {
                let _full_or_gone = process.channel.send(&ToDevice::Stop, &[]);
            }
        }
    }

    /// Reports a failure and ends the machine at once.
    pub(super) fn fail(&mut self, code: ExitCode, text: &str) {
        self.say(LogLevel::Error, text);
        self.ends_because(text);
        if self.end.is_none() {
            self.end = Some(End::Failed(code));
        }
        self.kill_all();
    }

    /// Kills what lives. What has ended already is reported with its own cause first.
    pub(super) fn kill_all(&mut self) {
        if matches!(self.phase, Phase::Killing(_)) {
            return;
        }
        self.phase = Phase::Killing(Instant::now() + KILL_DEADLINE);
        self.notify_end();
        self.drop_standbys();
        for index in 0..self.processes.len() {
            self.reap(index, false);
            if let Some(Err(text)) = self.processes.get(index).map(Process::kill) {
                self.say(LogLevel::Error, &text);
            }
        }
    }

    /// The pidfd of a process says that it has ended.
    pub(super) fn exited(&mut self, index: usize) {
        let killed = matches!(self.phase, Phase::Killing(_))
            || matches!(self.phase, Phase::Stopping(_)) && self.is_core(index);
        self.reap(index, killed);
    }

    /// Reaps a process if it has ended and says of what, unless that was our doing.
    fn reap(&mut self, index: usize, killed_by_us: bool) {
        let Some(process) = self.processes.get_mut(index) else { return };
        // One that builds its jail would give up when it is asked for an error.
        if process.state == State::Ended || !process.has_ended() {
            return;
        }
        // Before it is reaped: afterwards nobody knows whether its program ever ran.
        let starting = process.state == State::Starting;
        let jail_error = if starting { process.jail_error() } else { None };
        let exit = match process.jailed.try_wait() {
            Ok(Some(exit)) => exit,
            Ok(None) => return,
            Err(error) => {
                let text = format!("cannot learn how {} ended: {error}", process.id);
                self.environment.log.say(LogLevel::Error, &text);
                Exit::Code(-1)
            }
        };
        process.state = State::Ended;
        // Its last words first: they may be the reason.
        self.control(index, false);
        self.image_not_resized(&self.id_of(index));
        let Some(process) = self.processes.get_mut(index) else { return };
        process.log.drain(&process.id, &mut self.environment.log);
        let poller = &self.environment.poller;
        poller.remove(&process.channel);
        poller.remove(&process.jailed);
        poller.remove(&process.log);
        process.listeners.iter().for_each(|listener| poller.remove(listener));
        self.note_death(index, exit, jail_error.as_ref());
        if self.ends_with_change(index) {
            return;
        }
        if self.replaceable(index) {
            self.lost(index, exit, jail_error);
            return;
        }
        let Some(process) = self.processes.get(index) else { return };
        // One whose jail is not built gives up by itself when nobody listens to it any more.
        let gave_up = starting && jail_error.is_none() && exit == Exit::Code(127);
        let ours = gave_up || killed_by_us && exit == Exit::Signal(libc::SIGKILL);
        let expected = self.end.is_some() && (ours || exit == Exit::Code(0));
        if expected || process.explained {
            return;
        }
        let (id, pid) = (process.id.clone(), process.jailed.pid());
        // In the middle of a handshake a device cannot tell a core that gives up from one that is broken: its code is 1 then.
        let starting = matches!(self.phase, Phase::Starting(_) | Phase::Abandoned(_));
        let abandoned = exit == Exit::Code(0) || starting && exit == Exit::Code(1) && jail_error.is_none();
        if abandoned
            && process.role != Role::Core
            && self.processes.iter().any(|other| other.role == Role::Core && other.state != State::Ended)
        {
            // Its pidfd may be seen before the core's last message is.
            if !matches!(self.phase, Phase::Abandoned(_)) {
                self.phase = Phase::Abandoned(Instant::now() + WORD_DEADLINE);
            }
            return;
        }
        match jail_error {
            Some(error) => {
                let code = if error.missing_layer().is_some() { ExitCode::Host } else { ExitCode::Internal };
                self.fail(code, &format!("cannot start {id}: {error}{}", advice(&error)));
            }
            None => {
                let how = self.resources.confinement.describe(&id, pid, exit);
                self.fail(ExitCode::Process, &format!("{id} (process {pid}) {how}"));
            }
        }
    }

    fn note_death(&mut self, index: usize, exit: Exit, jail_error: Option<&JailError>) {
        let Some(process) = self.processes.get(index) else { return };
        let (id, pid) = (&process.id, process.jailed.pid());
        let how = || self.resources.confinement.describe(id, pid, exit);
        let why = jail_error.map_or_else(how, ToString::to_string);
        self.note(EventKind::Death, Some(index), |entry| {
            entry.reason = Some(why);
            match exit {
                Exit::Code(code) => entry.exit_code = Some(code),
                Exit::Signal(number) => entry.signal = Some(number),
            }
        });
    }

    /// Reads from the log pipe of a process.
    pub(super) fn log_line(&mut self, index: usize) {
        let Some(process) = self.processes.get_mut(index) else { return };
        if process.state != State::Ended && !process.log.read(&process.id, &mut self.environment.log) {
            self.environment.poller.remove(&process.log);
        }
    }

    /// A thread made a system call that its policy forbids; it waits in the kernel, for ever.
    pub(super) fn violation(&mut self, index: usize, listener: usize, event: Event) {
        let Some(process) = self.processes.get_mut(index) else { return };
        let Some(listener) = process.listeners.get(listener) else { return };
        let seen = listener.read();
        if event.hang_up {
            // Its threads are gone.
            self.environment.poller.remove(listener);
        }
        let Ok(Some(violation)) = seen else { return };
        // While the thread has a name.
        let text = describe_violation(&process.id, &violation);
        // Not later: nothing the process does from here on is wanted.
        let _gone = process.kill();
        self.condemn(index, EventKind::Violation, &text);
    }

    /// Hands a new peer of a console or serial port to its device.
    pub(super) fn hand_over(&self, device: &str, stream: BorrowedFd<'_>) -> Result<(), String> {
        self.hand_over_as(&ToDevice::Attach, device, stream)
    }

    /// The same by another message.
    pub(super) fn hand_over_as(
        &self,
        message: &ToDevice,
        device: &str,
        stream: BorrowedFd<'_>,
    ) -> Result<(), String> {
        let alive = |process: &&Process| process.id == device && process.state != State::Ended;
        let process = self.processes.iter().find(alive).ok_or("the device has ended")?;
        process.channel.send(message, &[stream]).map_err(|error| error.to_string())
    }

    /// A device that was started anew gets the peer that its predecessor had.
    pub(super) fn attach_again(&mut self, device: &str) {
        match device {
            PORTS => self.attach_ports_again(),
            KEYBOARD => self.send_keys(),
            _ => {}
        }
        let attachments = self.environment.server.attachments();
        let attached = attachments.filter(|it| it.device == device).map(|it| it.stream.as_fd());
        let connected = self.peers.iter().filter(|(id, _)| *id == device).map(|(_, peer)| peer.as_fd());
        for peer in attached.chain(connected) {
            let _noticed_by_the_client = self.hand_over(device, peer);
        }
    }
}

/// With the name of the thread, while it is there.
pub(super) fn describe_violation(id: &str, violation: &Violation) -> String {
    let comm = fs::read(format!("/proc/{}/comm", violation.thread)).unwrap_or_default();
    let comm = harmless(String::from_utf8_lossy(&comm).trim_end());
    format!("{id} was killed: {violation} (the thread's name: {comm})")
}
