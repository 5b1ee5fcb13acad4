//! Processes that are replaced because a user asked for it, with the same program or another: nothing is lost, and when the
//! new process does not become ready, the old one goes on.
//!
//! The successor is started beside the process that serves (a *standby*), and touches neither guest memory nor the device's
//! resources until the core is connected to it. When it is READY, the old process is told to finish what is in flight and end;
//! when that is reaped, the successor takes its place. So there is never more than one that serves.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::channel::message::ToDevice;

use super::processes::{Message, receive};
use super::recovery::{SUCCESSOR_DEADLINE, Stage};
use super::{EventLoop, Phase};
use crate::supervisor::api::{EventKind, Response};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::nearest::hint;
use crate::supervisor::launch::{advice, relaunch};
use crate::supervisor::poller::{Poller, Source};
use crate::supervisor::process::{Process, Role, State, describe};
use crate::supervisor::programs::DeviceProgram;

/// For a process to finish what is in flight.
const FINISH_DEADLINE: Duration = Duration::from_secs(5);

/// A successor beside the process that serves.
#[derive(Debug)]
pub(super) struct Standby {
    process: Process,
    /// For the core.
    stream: UnixStream,
    /// For READY.
    deadline: Instant,
}

impl Standby {
    pub(super) fn deadline(&self) -> Option<Instant> {
        (self.process.state == State::Starting).then_some(self.deadline)
    }

    fn forget(&self, poller: &Poller) {
        poller.remove(&self.process.channel);
        poller.remove(&self.process.jailed);
        poller.remove(&self.process.log);
    }
}

/// What a user asked for: devices, one after the other.
#[derive(Debug)]
pub(super) struct Order {
    client: u16,
    program: Option<Rc<DeviceProgram>>,
    left: VecDeque<String>,
    current: Option<String>,
    failures: Vec<String>,
}

impl EventLoop<'_> {
    /// Takes an order; the client is answered when it is carried out.
    pub(super) fn order(
        &mut self,
        client: u16,
        device: Option<&str>,
        program: Option<Rc<DeviceProgram>>,
    ) -> Result<(), String> {
        if !self.serves() {
            let what = if matches!(self.phase, Phase::Starting(_)) { "starting" } else { "ending" };
            return Err(format!("the machine is {what}"));
        }
        let is_device = |process: &&Process| process.role != Role::Core && !process.id.is_empty();
        let devices = self.processes.iter().filter(is_device);
        let devices: Vec<&str> = devices.map(|process| process.id.as_str()).collect();
        let left: VecDeque<String> = match device {
            None => devices.into_iter().map(str::to_owned).collect(),
            Some(device) if devices.contains(&device) => [device.to_owned()].into(),
            Some(device) => {
                let name = device.escape_debug().to_string();
                return Err(format!("this machine has no device '{name}': {}", hint(&name, &devices)));
            }
        };
        self.orders.push(Order { client, program, left, current: None, failures: Vec::new() });
        self.advance();
        Ok(())
    }

    /// Goes on with orders that wait for nothing, and answers those that are carried out.
    pub(super) fn advance(&mut self) {
        let mut at = 0;
        while let Some(order) = self.orders.get_mut(at) {
            if order.current.is_some() {
                at = at.saturating_add(1);
                continue;
            }
            let Some(id) = order.left.pop_front() else {
                let mut order = self.orders.remove(at);
                let failures = std::mem::take(&mut order.failures);
                self.answer(order, &failures);
                continue;
            };
            let program = order.program.clone();
            match self.begin(&id, program) {
                Ok(()) => {
                    if let Some(order) = self.orders.get_mut(at) {
                        order.current = Some(id);
                    }
                }
                Err(failure) => {
                    if let Some(order) = self.orders.get_mut(at) {
                        order.failures.push(format!("{id}: {failure}"));
                    }
                }
            }
        }
    }

    /// Tells the client what became of its order.
    pub(super) fn answer(&mut self, order: Order, failures: &[String]) {
        let response = if failures.is_empty() {
            Response::Done
        } else {
            Response::Error { message: failures.join("; ") }
        };
        self.environment.server.respond(order.client, &response, &self.environment.poller);
    }

    /// What was ordered for a device is done, or cannot be.
    pub(super) fn conclude(&mut self, id: &str, result: Result<(), String>) {
        if let Some(recovery) = self.position(id).and_then(|index| self.recoveries.get_mut(index)) {
            recovery.ordered = false;
        }
        let Some(order) = self.orders.iter_mut().find(|order| order.current.as_deref() == Some(id)) else {
            return;
        };
        order.current = None;
        order.failures.extend(result.err());
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.processes.iter().position(|process| process.id == id)
    }

    /// Begins to replace the process of a device.
    fn begin(&mut self, id: &str, program: Option<Rc<DeviceProgram>>) -> Result<(), String> {
        let index = self.position(id).ok_or("there is no such device")?;
        let (Some(process), Some(recovery)) = (self.processes.get(index), self.recoveries.get_mut(index))
        else {
            return Err("there is no such device".to_owned());
        };
        match recovery.stage {
            Stage::GivenUp => {
                recovery.forgive();
                (recovery.since, recovery.stage) = (Instant::now(), Stage::Due(Instant::now()));
            }
            Stage::Serving if process.state == State::Ready && recovery.standby.is_none() => {
                let own = self.environment.programs.of(id, self.resources);
                let file = program.as_ref().map_or(own, |program| &program.file);
                let (process, stream) =
                    relaunch(self.config, self.resources, id, file).map_err(|error| error.to_string())?;
                let number = u16::try_from(index).map_err(|error| error.to_string())?;
                let poller = &self.environment.poller;
                let watched = poller
                    .add(&process.channel, Source::StandbyControl(number))
                    .and_then(|()| poller.add(&process.jailed, Source::StandbyExit(number)))
                    .and_then(|()| poller.add(&process.log, Source::StandbyLog(number)));
                let deadline = Instant::now() + SUCCESSOR_DEADLINE;
                let standby = Standby { process, stream, deadline };
                if let Err(error) = watched {
                    standby.forget(poller);
                    return Err(format!("the new process cannot be watched: {error}"));
                }
                let pid = standby.process.jailed.pid();
                recovery.standby = Some(standby);
                self.note(EventKind::Start, Some(index), |entry| entry.pid = Some(pid));
            }
            _ => return Err("it is being restarted already".to_owned()),
        }
        if let Some(recovery) = self.recoveries.get_mut(index) {
            recovery.ordered = true;
            recovery.candidate = program;
        }
        let text = format!("{id} is to be replaced, as a user asked");
        self.say(LogLevel::Info, &text);
        self.note(EventKind::Asked, Some(index), |_| ());
        Ok(())
    }

    /// A standby says something: READY is all that is expected.
    pub(super) fn standby_control(&mut self, index: usize) {
        let Some(standby) = self.recoveries.get_mut(index).and_then(|it| it.standby.as_mut()) else { return };
        match receive(&standby.process) {
            Ok(Message::Ready(policies, listeners))
                if standby.process.state == State::Starting && policies.len() == listeners.len() =>
            {
                standby.process.ready(&policies, listeners);
                let pid = standby.process.jailed.pid();
                self.note(EventKind::Ready, Some(index), |entry| entry.pid = Some(pid));
                let Some(process) = self.processes.get(index) else { return };
                if process.state == State::Ended {
                    self.take_place(index);
                    return;
                }
                let _full_or_gone = process.channel.send(&ToDevice::Stop, &[]);
                if let Some(recovery) = self.recoveries.get_mut(index) {
                    recovery.since = Instant::now();
                    recovery.stage = Stage::Leaving(Instant::now() + FINISH_DEADLINE);
                }
            }
            Ok(Message::Failed(reason)) => self.dismiss(index, &format!("the new process failed: {reason}")),
            // Its end is an event of its own.
            Err(ChannelError::PeerClosed) => self.environment.poller.remove(&standby.process.channel),
            Err(ChannelError::Deadline) => {}
            Ok(_) => self.dismiss(index, "the new process sent something else than READY"),
            Err(error) => self.dismiss(index, &format!("the new process sent nonsense: {error}")),
        }
    }

    /// A standby has ended.
    pub(super) fn standby_exited(&mut self, index: usize) {
        let Some(standby) = self.recoveries.get_mut(index).and_then(|it| it.standby.as_mut()) else { return };
        let jail_error = standby.process.jail_error();
        let exit = match standby.process.jailed.try_wait() {
            Ok(None) => return,
            Ok(Some(exit)) => describe(exit),
            Err(error) => format!("ended: {error}"),
        };
        // Its last words first: they may be the reason.
        self.standby_control(index);
        let text = match jail_error {
            Some(error) => format!("the new process cannot be started: {error}{}", advice(&error)),
            None => format!("the new process {exit}"),
        };
        self.standby_log(index);
        self.dismiss(index, &text);
    }

    /// A standby writes to its log.
    pub(super) fn standby_log(&mut self, index: usize) {
        let Some(standby) = self.recoveries.get_mut(index).and_then(|it| it.standby.as_mut()) else { return };
        let process = &mut standby.process;
        if !process.log.read(&process.id, &mut self.environment.log) {
            self.environment.poller.remove(&process.log);
        }
    }

    /// A standby is of no use. The old process goes on, unless it was told to end already.
    pub(super) fn dismiss(&mut self, index: usize, why: &str) {
        let id = self.id_of(index);
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        let Some(standby) = recovery.standby.take() else { return };
        standby.forget(&self.environment.poller);
        recovery.candidate = None;
        let leaves = recovery.leaves();
        let rest =
            if leaves { "it is replaced by another of the old program" } else { "the old process goes on" };
        let text = format!("{id} was not replaced: {why}; {rest}");
        self.say(LogLevel::Warn, &text);
        self.note(EventKind::Refused, Some(index), |entry| entry.reason = Some(text));
        self.conclude(&id, Err(format!("{id}: {why}; {rest}")));
        if let Some(recovery) = self.recoveries.get_mut(index) {
            recovery.ordered = leaves;
        }
    }

    /// The place is free: the standby takes it, or, where it was dismissed, one that is started now.
    pub(super) fn take_place(&mut self, index: usize) {
        let id = self.id_of(index);
        let Some(recovery) = self.recoveries.get_mut(index) else { return };
        let Some(Standby { process, stream, deadline }) = recovery.standby.take() else {
            recovery.stage = Stage::Due(Instant::now());
            return;
        };
        let poller = &self.environment.poller;
        poller.remove(&process.channel);
        poller.remove(&process.jailed);
        poller.remove(&process.log);
        recovery.stage = Stage::Starting(stream, deadline);
        let ready = process.state == State::Ready;
        if let Some(place) = self.processes.get_mut(index) {
            *place = process;
        }
        let watched = self.watch_process(index).and_then(|()| self.watch_listeners(index));
        if let Err(error) = watched {
            self.condemn(index, EventKind::Failure, &format!("{id} cannot be watched: {error}"));
            return;
        }
        self.pass_on(index);
        self.hand_over_cable_again(&id);
        self.attach_again(&id);
        if ready {
            self.hand_to_core(index, &id);
        }
    }

    /// Ends what waits for its turn: the machine ends.
    pub(super) fn drop_standbys(&mut self) {
        for recovery in &mut self.recoveries {
            if let Some(standby) = recovery.standby.take() {
                standby.forget(&self.environment.poller);
            }
        }
    }
}
