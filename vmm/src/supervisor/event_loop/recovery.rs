//! A device process that has ended is replaced while the machine runs.
//!
//! The order keeps two processes from ever serving one device: the old one is reaped first, then its successor is started
//! with the resources that the supervisor has kept, and only when that is READY the core gets the stream to it. What the core
//! says about the predecessor may arrive late; it acknowledges each stream it takes, and what it says between the death and
//! that acknowledgement is about a process that is gone.
//!
//! How a process that hangs is found is in `liveness`; how one is replaced that does its work, in `orders`.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{FdIndex, Left, ToCore, ToDevice};
use bulkhead_ipc::jail::{Exit, JailError};

use super::liveness::Pulse;
use super::orders::Standby;
use super::{EventLoop, KILL_DEADLINE, Phase, WORD_DEADLINE};
use crate::supervisor::api::{DeviceState, EventKind};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::RestartPolicy;
use crate::supervisor::exit_code::ExitCode;
use crate::supervisor::launch::{advice, relaunch};
use crate::supervisor::process::{Role, State};
use crate::supervisor::programs::DeviceProgram;

/// For a process that the core has given up to end by itself: how it ends says more than that it was killed.
const OWN_END: Duration = Duration::from_millis(20);
/// Messages that a process may leave to its successor.
const MOST_LEFT: usize = 16;
/// For a successor to report READY.
pub(super) const SUCCESSOR_DEADLINE: Duration = Duration::from_secs(5);

/// Where a device is between the death of its process and the work of the next.
#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing happened.
    Serving,
    /// The core has given it up: it is killed then, if it has not ended by itself.
    Doomed(Instant),
    /// It ended in order; the core is about to say why it closed the connection.
    Unexplained(Instant),
    /// A successor is READY, and it was told to finish; it is killed then.
    Leaving(Instant),
    /// A successor is to be started.
    Due(Instant),
    /// The successor has until then to report READY; this stream is for the core.
    Starting(UnixStream, Instant),
    /// The core was given the stream.
    Handed,
    /// Nothing more will be tried, unless a user asks for it.
    GivenUp,
}

/// A device across the lives of its processes.
#[derive(Debug)]
pub(super) struct Recovery {
    policy: RestartPolicy,
    /// Deaths within the policy's window.
    deaths: VecDeque<Instant>,
    pub(super) stage: Stage,
    /// What the core said about the process that is to end.
    word: Option<String>,
    /// Streams that the core has not acknowledged yet.
    unacknowledged: u32,
    pub(super) pulse: Pulse,
    /// The successor that a user asked for, until it takes the place.
    pub(super) standby: Option<Standby>,
    /// What a user asked for is under way.
    pub(super) ordered: bool,
    /// The program that the successor runs, when it is another one; kept once the successor serves.
    pub(super) candidate: Option<Rc<DeviceProgram>>,
    /// What a process that was told to end has left for its successor.
    pub(super) left: Vec<Left>,
    /// When the process stopped serving.
    pub(super) since: Instant,
    /// How often a process took the place of another.
    pub(super) restarts: u64,
    /// Why the last process ended, from when it is known.
    pub(super) last_end: Option<String>,
}

impl Recovery {
    pub(super) fn new(policy: RestartPolicy) -> Self {
        Self {
            policy,
            deaths: VecDeque::new(),
            stage: Stage::Serving,
            word: None,
            unacknowledged: 0,
            pulse: Pulse::default(),
            standby: None,
            ordered: false,
            candidate: None,
            left: Vec::new(),
            since: Instant::now(),
            restarts: 0,
            last_end: None,
        }
    }

    pub(super) const fn policy(&self) -> RestartPolicy {
        self.policy
    }

    /// Whether its process was told to end.
    pub(super) const fn leaves(&self) -> bool {
        matches!(self.stage, Stage::Leaving(_))
    }

    pub(super) const fn state(&self) -> DeviceState {
        match self.stage {
            Stage::Serving => DeviceState::Serving,
            Stage::GivenUp => DeviceState::Failed,
            _ => DeviceState::Restarting,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let own = match self.stage {
            Stage::Doomed(at)
            | Stage::Unexplained(at)
            | Stage::Leaving(at)
            | Stage::Due(at)
            | Stage::Starting(_, at) => Some(at),
            Stage::Serving | Stage::Handed | Stage::GivenUp => None,
        };
        [own, self.standby.as_ref().and_then(Standby::deadline)].into_iter().flatten().min()
    }

    /// Counts a death; returns the pause before the restart, if there is to be one.
    fn died(&mut self, now: Instant) -> Option<Duration> {
        if let RestartPolicy::Restart { window, .. } = self.policy {
            self.deaths.retain(|death| now.duration_since(*death) < window);
        }
        (self.pulse, self.since) = (Pulse::default(), now);
        let pause = self.policy.pause(self.deaths.len());
        self.deaths.push_back(now);
        pause
    }

    /// Keeps what a process leaves that was told to end, within bounds.
    pub(super) fn inherit(&mut self, left: Left) {
        if self.leaves() && self.left.len() < MOST_LEFT {
            self.left.push(left);
        }
    }

    /// Forgets the deaths: a user wants another attempt.
    pub(super) fn forgive(&mut self) {
        self.deaths.clear();
    }
}

impl EventLoop<'_> {
    /// Whether every process is there and none is to end.
    pub(super) fn serves(&self) -> bool {
        self.end.is_none() && self.phase == Phase::Running
    }

    /// Whether the process, should it end now, is to be replaced.
    pub(super) fn replaceable(&self, index: usize) -> bool {
        let wanted = |it: &Recovery| it.policy != RestartPolicy::Never || it.ordered;
        self.serves() && !self.is_core(index) && self.recoveries.get(index).is_some_and(wanted)
    }

    /// When something is to be done for a process.
    pub(super) fn recovery_deadline(&self) -> Option<Instant> {
        if self.phase != Phase::Running {
            return None;
        }
        let deadlines = self.recoveries.iter().filter_map(Recovery::deadline);
        deadlines.chain(self.config.liveness.interval().map(|_| self.heartbeat)).min()
    }

    pub(super) fn enter(&mut self, index: usize, stage: Stage) {
        if let Some(recovery) = self.recoveries.get_mut(index) {
            recovery.stage = stage;
        }
    }

    pub(super) fn id_of(&self, index: usize) -> String {
        self.processes.get(index).map(|process| process.id.clone()).unwrap_or_default()
    }

    /// A process did what none may do: it is killed and replaced, or the machine ends.
    pub(super) fn condemn(&mut self, index: usize, kind: EventKind, text: &str) {
        let said = self.processes.get(index).is_some_and(|process| process.explained);
        if !said {
            self.note(kind, Some(index), |entry| entry.reason = Some(text.to_owned()));
        }
        if self.added_is_condemned(index, text) {
            self.say(LogLevel::Error, text);
            return;
        }
        if !self.replaceable(index) {
            if let Some(process) = self.processes.get_mut(index) {
                process.explained = true;
            }
            self.fail(ExitCode::Process, text);
            return;
        }
        let (Some(process), Some(recovery)) = (self.processes.get_mut(index), self.recoveries.get_mut(index))
        else {
            return;
        };
        process.explained = true;
        let killed = process.kill();
        if !said {
            recovery.last_end = Some(text.to_owned());
            self.say(LogLevel::Error, text);
        }
        if let Err(text) = killed {
            self.say(LogLevel::Error, &text);
        }
    }

    /// The core has given up the connection to a device.
    pub(super) fn device_failed(&mut self, id: &str, reason: &str) {
        let text = format!("device {id} failed: {reason}");
        let found = self.processes.iter().position(|p| p.id == id && p.role != Role::Core);
        let Some(index) = found.filter(|index| self.replaceable(*index)) else {
            self.note(EventKind::Failure, found, |entry| entry.reason = Some(reason.to_owned()));
            self.reap_the_dying(|other| Some(other) == found);
            self.fail(ExitCode::Process, &text);
            return;
        };
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        match recovery.stage {
            Stage::Serving if recovery.unacknowledged == 0 => {
                recovery.word = Some(reason.to_owned());
                recovery.stage = Stage::Doomed(Instant::now() + OWN_END);
                self.note(EventKind::Failure, Some(index), |entry| entry.reason = Some(reason.to_owned()));
            }
            Stage::Unexplained(_) => self.schedule(index, &text),
            // About a process that is gone, or was told to go.
            _ => self.say(LogLevel::Debug, &text),
        }
    }

    /// A process that is to be replaced has been reaped.
    pub(super) fn lost(&mut self, index: usize, exit: Exit, jail_error: Option<JailError>) {
        let (Some(process), Some(recovery)) = (self.processes.get(index), self.recoveries.get_mut(index))
        else {
            return;
        };
        let (id, pid) = (&process.id, process.jailed.pid());
        let word = recovery.word.take();
        let text = match (jail_error, word, exit) {
            _ if recovery.leaves() => {
                self.take_place(index);
                return;
            }
            _ if process.explained => format!("{id} (process {pid}) is gone"),
            (Some(error), ..) => format!("cannot start {id}: {error}{}", advice(&error)),
            (None, Some(reason), Exit::Code(0)) => format!("device {id} failed: {reason}"),
            (None, Some(reason), Exit::Signal(libc::SIGKILL)) => {
                format!("device {id} failed: {reason}; process {pid} was killed by SIGKILL")
            }
            (None, None, Exit::Code(0)) if !matches!(recovery.stage, Stage::Starting(..)) => {
                recovery.stage = Stage::Unexplained(Instant::now() + WORD_DEADLINE);
                return;
            }
            (None, _, exit) => {
                format!("{id} (process {pid}) {}", self.resources.confinement.describe(id, pid, exit))
            }
        };
        self.schedule(index, &text);
    }

    /// Says why a process is gone, and plans its successor if there may be one.
    fn schedule(&mut self, index: usize, text: &str) {
        let now = Instant::now();
        let id = self.id_of(index);
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        if !self.processes.get(index).is_some_and(|process| process.explained) {
            recovery.last_end = Some(text.to_owned());
        }
        let pause = recovery.died(now);
        if recovery.standby.is_some() {
            // A successor is on its way already.
            self.say(LogLevel::Warn, &format!("{text}; it is restarted"));
            self.take_place(index);
            return;
        }
        if recovery.candidate.take().is_some() {
            self.conclude(&id, Err(format!("the new program does not serve: {text}")));
        }
        match (pause, self.recoveries.get_mut(index)) {
            (Some(pause), Some(recovery)) => {
                recovery.stage = Stage::Due(now + pause);
                let when =
                    if pause.is_zero() { String::new() } else { format!(" in {} ms", pause.as_millis()) };
                self.say(LogLevel::Warn, &format!("{text}; it is restarted{when}"));
                self.note(EventKind::Restart, Some(index), |entry| {
                    entry.pid = None;
                    entry.pause_ms = u64::try_from(pause.as_millis()).ok();
                });
            }
            (None, Some(recovery)) if recovery.policy != RestartPolicy::Never => {
                recovery.stage = Stage::GivenUp;
                let times = recovery.deaths.len();
                let text = format!(
                    "{text}; after {times} such ends it is given up: the guest finds a broken device, the machine runs on"
                );
                self.say(LogLevel::Error, &text);
                self.note(EventKind::GivenUp, Some(index), |entry| {
                    (entry.pid, entry.reason) = (None, Some(text.clone()));
                });
                self.tell_core(&ToCore::DeviceGivenUp { id: id.clone() }, None);
                self.conclude(&id, Err(text));
            }
            // It was on its way because a user asked for it.
            _ => self.fail(ExitCode::Process, text),
        }
    }

    /// Does what is due.
    pub(super) fn recover(&mut self, now: Instant) {
        if self.serves() && self.heartbeat <= now {
            self.beat(now);
        }
        for index in 0..self.recoveries.len() {
            if !self.replaceable(index) {
                continue;
            }
            let Some(recovery) = self.recoveries.get(index) else { return };
            if recovery.deadline().is_none_or(|deadline| deadline > now) {
                continue;
            }
            if recovery.standby.as_ref().and_then(Standby::deadline).is_some_and(|deadline| deadline <= now) {
                let seconds = SUCCESSOR_DEADLINE.as_secs();
                self.dismiss(index, &format!("the new process did not report READY within {seconds} s"));
                continue;
            }
            let id = self.id_of(index);
            match recovery.stage {
                Stage::Due(_) => self.restart(index, &id),
                Stage::Doomed(_) => {
                    // Its end is an event.
                    self.enter(index, Stage::Serving);
                    self.kill(index);
                }
                Stage::Leaving(_) => {
                    // What was in flight is its successor's.
                    self.say(LogLevel::Warn, &format!("{id} does not finish its work in time: it is killed"));
                    self.enter(index, Stage::Leaving(now + KILL_DEADLINE));
                    self.kill(index);
                }
                Stage::Unexplained(_) => {
                    self.schedule(index, &format!("{id} ended although the machine runs"));
                }
                Stage::Starting(..) => {
                    self.enter(index, Stage::Serving);
                    let seconds = SUCCESSOR_DEADLINE.as_secs();
                    let text = format!("{id} did not report READY within {seconds} s");
                    self.condemn(index, EventKind::Hang, &text);
                }
                Stage::Serving | Stage::Handed | Stage::GivenUp => {}
            }
        }
        self.advance();
    }

    fn kill(&mut self, index: usize) {
        if let Some(Err(text)) = self.processes.get(index).map(super::Process::kill) {
            self.say(LogLevel::Error, &text);
        }
    }

    /// Starts a successor in the place of a process that was reaped.
    fn restart(&mut self, index: usize, id: &str) {
        let candidate = self.recoveries.get(index).and_then(|recovery| recovery.candidate.clone());
        let program = candidate
            .as_ref()
            .map_or_else(|| self.environment.programs.of(id, self.resources), |program| &program.file);
        match relaunch(self.config, self.resources, id, program) {
            Ok((process, stream)) => {
                if let Some(place) = self.processes.get_mut(index) {
                    *place = process;
                }
                self.note(EventKind::Start, Some(index), |_| ());
                self.enter(index, Stage::Starting(stream, Instant::now() + SUCCESSOR_DEADLINE));
                if let Err(error) = self.watch_process(index) {
                    self.condemn(index, EventKind::Failure, &format!("{id} cannot be watched: {error}"));
                    return;
                }
                self.pass_on(index);
                self.attach_again(id);
            }
            Err(error) => self.schedule(index, &error.to_string()),
        }
    }

    /// Gives a successor what its predecessor has left.
    pub(super) fn pass_on(&mut self, index: usize) {
        let (Some(process), Some(recovery)) = (self.processes.get(index), self.recoveries.get_mut(index))
        else {
            return;
        };
        for left in recovery.left.drain(..) {
            let _gone_then = process.channel.send(&ToDevice::Take(left), &[]);
        }
    }

    /// A successor is READY: the core may use it.
    pub(super) fn hand_to_core(&mut self, index: usize, id: &str) {
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        if !matches!(recovery.stage, Stage::Starting(..)) {
            return;
        }
        if let Stage::Starting(stream, _) = std::mem::replace(&mut recovery.stage, Stage::Handed) {
            recovery.unacknowledged = recovery.unacknowledged.saturating_add(1);
            let message = ToCore::DeviceReplaced { id: id.to_owned(), socket: FdIndex(0) };
            self.tell_core(&message, Some(stream));
        }
    }

    /// The core has taken a successor: what it says from here on is about that.
    pub(super) fn acknowledged(&mut self, id: &str) {
        let Some(index) = self.processes.iter().position(|process| process.id == id) else { return };
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        recovery.unacknowledged = recovery.unacknowledged.saturating_sub(1);
        if matches!(recovery.stage, Stage::Handed) && recovery.unacknowledged == 0 {
            recovery.stage = Stage::Serving;
            recovery.restarts = recovery.restarts.saturating_add(1);
            let micros = recovery.since.elapsed().as_micros();
            if let Some(program) = recovery.candidate.take() {
                self.environment.programs.upgrade(id, program);
            }
            let text = format!("{id} was replaced within {}.{:03} ms", micros / 1000, micros % 1000);
            self.say(LogLevel::Info, &text);
            self.note(EventKind::Replaced, Some(index), |entry| entry.took_us = u64::try_from(micros).ok());
            self.conclude(id, Ok(()));
        }
    }

    /// A device is no more: nothing will be done for it.
    pub(super) fn retire(&mut self, index: usize) {
        const REMOVED: &str = "the device was removed";
        if self.recoveries.get(index).is_some_and(|recovery| recovery.standby.is_some()) {
            self.dismiss(index, REMOVED);
        }
        self.conclude(&self.id_of(index), Err(REMOVED.to_owned()));
        self.enter(index, Stage::GivenUp);
    }

    pub(super) fn tell_core(&mut self, message: &ToCore, stream: Option<UnixStream>) {
        let core = self.processes.iter().find(|p| p.role == Role::Core && p.state != State::Ended);
        let Some(core) = core else { return };
        let fds: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
        if let Err(error) = core.channel.send(message, &fds) {
            self.fail(ExitCode::Process, &format!("the core does not listen: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_count_within_the_window_only() {
        let mut recovery = Recovery::new("2/10".parse().unwrap());
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(recovery.died(start), Some(Duration::ZERO));
        assert_eq!(recovery.died(after(9)), Some(Duration::from_millis(10)));
        assert_eq!(recovery.died(after(11)), Some(Duration::from_millis(10)), "the first one is forgotten");
        assert_eq!(recovery.died(after(12)), None);
        recovery.forgive();
        assert_eq!(recovery.died(after(13)), Some(Duration::ZERO));
    }
}
