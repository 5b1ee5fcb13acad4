//! A device process that has ended is replaced while the machine runs.
//!
//! The order keeps two processes from ever serving one device: the old one is reaped first, then its successor is started
//! with the resources that the supervisor has kept, and only when that is READY the core gets the stream to it. What the core
//! says about the predecessor may arrive late; it acknowledges each stream it takes, and what it says between the death and
//! that acknowledgement is about a process that is gone.
//!
//! A process that hangs while the guest waits for it is found by the core's deadlines. One that hangs unnoticed, for its queues
//! and its shadow page are read without it, is found by the heartbeat: it must answer on its control channel.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{FdIndex, ToCore, ToDevice};
use bulkhead_ipc::jail::{Exit, JailError};

use super::{EventLoop, Phase, WORD_DEADLINE};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::RestartPolicy;
use crate::supervisor::exit_code::ExitCode;
use crate::supervisor::launch::{advice, relaunch};
use crate::supervisor::process::{Role, State, describe};

/// For a process that the core has given up to end by itself: how it ends says more than that it was killed.
const OWN_END: Duration = Duration::from_millis(20);
/// For a successor to report READY.
const SUCCESSOR_DEADLINE: Duration = Duration::from_secs(5);

/// How often the devices are asked whether they are alive, and how long they may take to answer. Generous: to drain a queue on a
/// slow disk takes a while, and an overloaded host is no reason to kill anything.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(2);
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Where a device is between the death of its process and the work of the next.
#[derive(Debug)]
enum Stage {
    /// Nothing happened.
    Serving,
    /// The core has given it up: it is killed then, if it has not ended by itself.
    Doomed(Instant),
    /// It ended in order; the core is about to say why it closed the connection.
    Unexplained(Instant),
    /// A successor is to be started.
    Due(Instant),
    /// The successor has until then to report READY; this stream is for the core.
    Starting(UnixStream, Instant),
    /// The core was given the stream.
    Handed,
    /// Nothing more will be tried.
    GivenUp,
}

/// A device across the lives of its processes.
#[derive(Debug)]
pub(super) struct Recovery {
    policy: RestartPolicy,
    /// Deaths within the policy's window.
    deaths: VecDeque<Instant>,
    stage: Stage,
    /// What the core said about the process that is to end.
    word: Option<String>,
    /// Streams that the core has not acknowledged yet.
    unacknowledged: u32,
    /// Since when an answer to a ping is due.
    asked: Option<Instant>,
}

impl Recovery {
    pub(super) fn new(policy: RestartPolicy) -> Self {
        Self {
            policy,
            deaths: VecDeque::new(),
            stage: Stage::Serving,
            word: None,
            unacknowledged: 0,
            asked: None,
        }
    }

    const fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Doomed(at) | Stage::Unexplained(at) | Stage::Due(at) | Stage::Starting(_, at) => Some(at),
            Stage::Serving | Stage::Handed | Stage::GivenUp => None,
        }
    }

    /// Counts a death; returns the pause before the restart, if there is to be one.
    fn died(&mut self, now: Instant) -> Option<Duration> {
        if let RestartPolicy::Restart { window, .. } = self.policy {
            self.deaths.retain(|death| now.duration_since(*death) < window);
        }
        self.asked = None;
        let pause = self.policy.pause(self.deaths.len());
        self.deaths.push_back(now);
        pause
    }
}

impl EventLoop<'_> {
    /// Whether the process, should it end now, is to be replaced.
    pub(super) fn replaceable(&self, index: usize) -> bool {
        let policy = self.recoveries.get(index).map_or(RestartPolicy::Never, |recovery| recovery.policy);
        self.end.is_none()
            && self.phase == Phase::Running
            && !self.is_core(index)
            && policy != RestartPolicy::Never
    }

    /// When something is to be done for a device.
    pub(super) fn recovery_deadline(&self) -> Option<Instant> {
        if self.phase != Phase::Running {
            return None;
        }
        let beats = (0..self.recoveries.len()).any(|index| self.replaceable(index));
        let deadlines = self.recoveries.iter().filter_map(Recovery::deadline);
        deadlines.chain(beats.then_some(self.heartbeat)).min()
    }

    fn enter(&mut self, index: usize, stage: Stage) {
        if let Some(recovery) = self.recoveries.get_mut(index) {
            recovery.stage = stage;
        }
    }

    /// A process did what none may do: it is killed and replaced, or the machine ends.
    pub(super) fn condemn(&mut self, index: usize, text: &str) {
        if self.added_is_condemned(index, text) {
            self.say(LogLevel::Error, text);
            return;
        }
        if !self.replaceable(index) {
            self.fail(ExitCode::Process, text);
            return;
        }
        let Some(process) = self.processes.get_mut(index) else { return };
        let said = std::mem::replace(&mut process.explained, true);
        let killed = process.kill();
        if !said {
            self.say(LogLevel::Error, text);
        }
        if let Err(text) = killed {
            self.say(LogLevel::Error, &text);
        }
    }

    /// The core has given up the connection to a device.
    pub(super) fn device_failed(&mut self, id: &str, reason: &str) {
        let text = format!("device {id} failed: {reason}");
        let Some(index) = self.processes.iter().position(|p| p.id == id && p.role != Role::Core) else {
            self.fail(ExitCode::Process, &text);
            return;
        };
        if !self.replaceable(index) {
            self.fail(ExitCode::Process, &text);
            return;
        }
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        match recovery.stage {
            Stage::Serving if recovery.unacknowledged == 0 => {
                recovery.word = Some(reason.to_owned());
                recovery.stage = Stage::Doomed(Instant::now() + OWN_END);
            }
            Stage::Unexplained(_) => self.schedule(index, &text),
            // About a process that is gone.
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
            (None, _, exit) => format!("{id} (process {pid}) {}", describe(exit)),
        };
        self.schedule(index, &text);
    }

    /// Says why a process is gone, and plans its successor if there may be one.
    fn schedule(&mut self, index: usize, text: &str) {
        let now = Instant::now();
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        match recovery.died(now) {
            Some(pause) => {
                recovery.stage = Stage::Due(now + pause);
                let when =
                    if pause.is_zero() { String::new() } else { format!(" in {} ms", pause.as_millis()) };
                self.say(LogLevel::Warn, &format!("{text}; it is restarted{when}"));
            }
            None => {
                recovery.stage = Stage::GivenUp;
                let times = recovery.deaths.len();
                self.say(
                    LogLevel::Error,
                    &format!(
                        "{text}; after {times} such ends it is given up: the guest finds a broken device, the machine runs on"
                    ),
                );
                let id = self.processes.get(index).map(|process| process.id.clone()).unwrap_or_default();
                self.tell_core(&ToCore::DeviceGivenUp { id }, None);
            }
        }
    }

    /// Asks the devices whether they are alive, and condemns those that did not answer.
    fn beat(&mut self, now: Instant) {
        self.heartbeat = now + HEARTBEAT;
        for index in 0..self.recoveries.len() {
            if !self.replaceable(index) {
                continue;
            }
            let (Some(process), Some(recovery)) = (self.processes.get(index), self.recoveries.get_mut(index))
            else {
                continue;
            };
            if process.state != State::Ready {
                continue;
            }
            match recovery.asked {
                None => {
                    recovery.asked = Some(now);
                    let _full_or_gone = process.channel.send(&ToDevice::Ping, &[]);
                }
                Some(asked) if now.duration_since(asked) >= ANSWER_DEADLINE => {
                    let seconds = ANSWER_DEADLINE.as_secs();
                    let text = format!("{} hangs: it did not answer within {seconds} s", process.id);
                    self.condemn(index, &text);
                }
                Some(_) => {}
            }
        }
    }

    /// A device answered.
    pub(super) fn alive(&mut self, index: usize) {
        if let Some(recovery) = self.recoveries.get_mut(index) {
            recovery.asked = None;
        }
    }

    /// Does what is due.
    pub(super) fn recover(&mut self, now: Instant) {
        if self.heartbeat <= now {
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
            let id = self.processes.get(index).map(|process| process.id.clone()).unwrap_or_default();
            match recovery.stage {
                Stage::Due(_) => self.restart(index, &id),
                Stage::Doomed(_) => {
                    // Its end is an event.
                    self.enter(index, Stage::Serving);
                    if let Some(Err(text)) = self.processes.get(index).map(super::Process::kill) {
                        self.say(LogLevel::Error, &text);
                    }
                }
                Stage::Unexplained(_) => {
                    self.schedule(index, &format!("{id} ended although the machine runs"));
                }
                Stage::Starting(..) => {
                    self.enter(index, Stage::Serving);
                    let seconds = SUCCESSOR_DEADLINE.as_secs();
                    self.condemn(index, &format!("{id} did not report READY within {seconds} s"));
                }
                Stage::Serving | Stage::Handed | Stage::GivenUp => {}
            }
        }
    }

    /// Starts a successor in the place of a process that was reaped.
    fn restart(&mut self, index: usize, id: &str) {
        match relaunch(self.config, self.resources, id) {
            Ok((process, stream)) => {
                if let Some(place) = self.processes.get_mut(index) {
                    *place = process;
                }
                self.enter(index, Stage::Starting(stream, Instant::now() + SUCCESSOR_DEADLINE));
                if let Err(error) = self.watch_process(index) {
                    self.condemn(index, &format!("{id} cannot be watched: {error}"));
                    return;
                }
                self.attach_again(id);
            }
            Err(error) => self.schedule(index, &error.to_string()),
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
            let took = recovery.deaths.back().map_or(Duration::ZERO, Instant::elapsed);
            let micros = took.as_micros();
            let text = format!("{id} was replaced within {}.{:03} ms", micros / 1000, micros % 1000);
            self.say(LogLevel::Info, &text);
        }
    }

    /// A device is no more: nothing will be done for it.
    pub(super) fn retire(&mut self, index: usize) {
        self.enter(index, Stage::GivenUp);
        self.alive(index);
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
    }
}
