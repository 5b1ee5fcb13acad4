//! Devices that come and go while the machine runs.
//!
//! To add one: its process is started and seals itself, the core opens the session with it, and only then the guest finds
//! something in the slot. To remove one: the guest is asked by ACPI, or not asked with `--force`; when the core has let go of
//! the device, its process finishes and ends, and when that is reaped, disk lock and slot are free.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceLink, FdIndex, ToCore, ToDevice};

use super::recovery::Recovery;
use super::{EventLoop, Phase, STOP_DEADLINE};
use crate::supervisor::api::{AddRequest, EventKind, Response};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::confinement::{LimitSpec, ProcessLimits};
use crate::supervisor::config::limit_group::check_member;
use crate::supervisor::config::port::{self, PortSpecError};
use crate::supervisor::config::{
    BalloonConfig, BalloonSpec, CONSOLE, ConsoleSpec, DiskConfig, DiskSpec, FsSpec, Ids, NetSpec, PORTS,
    PciAddress, PortSpec, RestartPolicy, RngSpec, ShareConfig, StreamTarget, VhostUserConfig, VhostUserSpec,
    VsockConfig, VsockSpec, name_balloon, name_vsock,
};
use crate::supervisor::launch::{link_of, relaunch};
use crate::supervisor::process::State;
use crate::supervisor::resources::NewDevice;

/// From the start of an added device's process until it has reported READY.
const READY_DEADLINE: Duration = Duration::from_secs(5);

/// A device on its way in or out.
#[derive(Debug)]
pub(super) struct Change {
    id: String,
    /// Who waits for the end of it.
    clients: Vec<u16>,
    stage: Stage,
    /// Why it came to nothing.
    failure: Option<String>,
}

#[derive(Debug)]
enum Stage {
    /// Its process is started as soon as no event is being handled: its number may be one that was used before.
    Asked(RestartPolicy),
    /// Its process has until then to report READY; this stream is for the core.
    Starting(UnixStream, Instant),
    /// The core puts it into its slot.
    Adding,
    /// The guest has until then to let go of it.
    Removing(Instant, Duration),
    /// The core has let go of it; its process has until then to end.
    Stopping(Instant),
}

impl Change {
    const fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Starting(_, at) | Stage::Removing(at, _) | Stage::Stopping(at) => Some(at),
            Stage::Asked(_) | Stage::Adding => None,
        }
    }
}

impl EventLoop<'_> {
    /// When something is to be done for a device that comes or goes.
    pub(super) fn change_deadline(&self) -> Option<Instant> {
        self.changes.iter().filter_map(Change::deadline).min()
    }

    /// A client wants a device to be added; it is answered when the guest was told, or on an error.
    pub(super) fn add_device(
        &mut self,
        client: u16,
        request: &AddRequest,
        limits: Option<&str>,
    ) -> Result<(), String> {
        if self.phase != Phase::Running {
            return Err("devices can be added while the machine runs, and it does not".to_owned());
        }
        let device = match request {
            AddRequest::Disk { spec, folder } => NewDevice::Disk(Box::new(self.new_disk(spec, folder)?)),
            AddRequest::Rng { spec } => self.new_rng(spec)?,
            AddRequest::Console { spec } => new_console(spec)?,
            AddRequest::Vsock { spec, folder } => NewDevice::Vsock(self.new_vsock(spec, folder)?),
            AddRequest::Balloon { spec } => NewDevice::Balloon(self.new_balloon(spec)?),
            AddRequest::Net { spec, folder } => self.new_nic(spec, folder)?,
            AddRequest::VhostUser { spec, folder } => NewDevice::VhostUser(self.new_foreign(spec, folder)?),
            AddRequest::Ports { specs, folder } => NewDevice::Ports(self.new_ports(specs, folder)?),
            AddRequest::Fs { spec, folder } => NewDevice::Share(self.new_share(spec, folder)?),
        };
        let id = device.id();
        // Those that have a name of their own: all others have taken one that is free.
        if matches!(device, NewDevice::Rng(..) | NewDevice::Console(_))
            && self.resources.slots.of(id).is_some()
        {
            self.not_changing(id)?;
            return Err(format!("this machine has the device '{id}' already"));
        }
        let limits = match limits {
            Some(text) => added_limits(&device, text)?,
            // What was said of a device of this name when the machine was started.
            None => self.config.confinement.limits.get(id).copied().unwrap_or_default(),
        };
        self.unwatch_cables();
        let added = self.resources.add(self.config, &device, limits);
        self.watch_cables();
        added.map_err(|error| format!("device {id}: {error}"))?;
        let policy = match &device {
            NewDevice::Disk(disk) => disk.restart,
            NewDevice::Net(_, restart) | NewDevice::Rng(_, _, restart) => *restart,
            NewDevice::Console(_) | NewDevice::Ports(_) | NewDevice::Share(_) => self.config.restart,
            NewDevice::Vsock(vsock) => vsock.restart,
            NewDevice::Balloon(balloon) => balloon.restart,
            NewDevice::VhostUser(device) => device.restart,
        };
        let watched = match &device {
            NewDevice::Ports(_) => self.environment.watch_ports(self.resources),
            _ => self.environment.watch_vsock(self.resources),
        };
        if let Err(error) = watched {
            self.resources.remove(id);
            return Err(format!("it cannot be watched: {error}"));
        }
        let stage = Stage::Asked(policy);
        self.changes.push(Change { id: id.to_owned(), clients: vec![client], stage, failure: None });
        Ok(())
    }

    /// Which ids are taken: also those of devices that come or go.
    fn ids(&self) -> Ids {
        Ids::new(self.resources.slots.ids())
    }

    /// Refuses an id of a device that comes or goes, and says which of them.
    fn not_changing(&self, id: &str) -> Result<(), String> {
        match self.changes.iter().find(|change| change.id == id) {
            Some(change) => Err(format!("device {id} {}", busy(&change.stage))),
            None => Ok(()),
        }
    }

    /// The id that a user gives, or the first free one of STEM0, STEM1, …
    fn choose_id(&self, id: Option<String>, stem: &str) -> Result<String, String> {
        id.map_or_else(|| Ok(self.ids().free(stem)), |id| self.not_changing(&id).map(|()| id))
    }

    fn new_vsock(&self, spec: &str, folder: &Path) -> Result<VsockConfig, String> {
        if let Some(vsock) = &self.resources.vsock {
            self.not_changing(&vsock.id)?;
            return Err(format!("this machine has a vsock already: {}", vsock.id));
        }
        let spec: VsockSpec = spec.parse().map_err(text)?;
        name_vsock(spec.below(folder), &mut self.ids(), self.config.restart).map_err(text)
    }

    fn new_ports(&self, specs: &[String], folder: &Path) -> Result<Vec<PortSpec>, String> {
        if self.resources.ports.is_some() {
            self.not_changing(PORTS)?;
            return Err(format!(
                "this machine has its ports already, and their device is made for so many: `bulkhead device remove {} {PORTS}`, then add all that there shall be in one call",
                self.config.name
            ));
        }
        let ports = specs.iter().map(|spec| Ok(spec.parse::<PortSpec>()?.below(folder)));
        let ports = ports.collect::<Result<Vec<_>, _>>().map_err(|error: PortSpecError| text(error))?;
        port::check(&ports).map_err(text)?;
        Ok(ports)
    }

    fn new_rng(&self, spec: &str) -> Result<NewDevice, String> {
        let spec: RngSpec = spec.parse().map_err(|error| format!("{error}"))?;
        if !spec.on {
            return Err("rng: off is for `bulkhead run`".to_owned());
        }
        Ok(NewDevice::Rng(spec.limit, spec.addr, spec.restart.unwrap_or(self.config.restart)))
    }

    fn new_balloon(&self, spec: &str) -> Result<BalloonConfig, String> {
        if let Some(balloon) = &self.resources.balloon {
            self.not_changing(&balloon.id)?;
            return Err(format!("this machine has a balloon already: {}", balloon.id));
        }
        let spec: BalloonSpec = spec.parse().map_err(text)?;
        name_balloon(spec, &mut self.ids(), self.config.memory, self.config.restart).map_err(text)
    }

    fn new_foreign(&self, spec: &str, folder: &Path) -> Result<VhostUserConfig, String> {
        let mut spec: VhostUserSpec = spec.parse().map_err(text)?;
        spec.socket = folder.join(spec.socket);
        let id = self.choose_id(spec.id.take(), "vhost-user")?;
        let id = self.ids().take("vhost-user", id).map_err(text)?;
        spec.resolve(id, RestartPolicy::always()).map_err(text)
    }

    fn new_disk(&self, spec: &str, folder: &Path) -> Result<DiskConfig, String> {
        let disk: DiskSpec = spec.parse().map_err(text)?;
        if disk.vhost_user {
            return Err("say --vhost-user type=blk,socket=PATH here".to_owned());
        }
        let id = self.ids().take("disk", self.choose_id(disk.id, "disk")?).map_err(text)?;
        self.check_group(&id, disk.options.limit_group.as_deref())?;
        let restart = disk.restart.unwrap_or(self.config.restart);
        let options = disk.options.below(folder);
        let (path, readonly, addr) = (folder.join(disk.path), disk.readonly, disk.addr);
        Ok(DiskConfig { path, readonly, id, restart, addr, options })
    }

    /// Refuses a limit group that the machine was not started with.
    fn check_group(&self, id: &str, group: Option<&str>) -> Result<(), String> {
        let checked = group.map(|group| check_member(&self.config.limit_groups, id, group));
        checked.unwrap_or(Ok(())).map_err(text)
    }

    fn new_nic(&self, spec: &str, folder: &Path) -> Result<NewDevice, String> {
        let net: NetSpec = spec.parse().map_err(text)?;
        if net.vhost_user.is_some() {
            return Err("say --vhost-user type=net,socket=PATH here".to_owned());
        }
        let id = self.ids().take("net", self.choose_id(net.id.clone(), "net")?).map_err(text)?;
        self.check_group(&id, net.limit_group.as_deref())?;
        let nic =
            net.resolve(&self.config.name, &id, folder).map_err(|error| format!("net {id}: {error}"))?;
        Ok(NewDevice::Net(Box::new(nic), net.restart.unwrap_or(self.config.restart)))
    }

    fn new_share(&self, spec: &str, folder: &Path) -> Result<ShareConfig, String> {
        let mut spec: FsSpec = spec.parse().map_err(text)?;
        if spec.vhost_user {
            return Err("say --vhost-user type=fs,socket=PATH,tag=TAG here".to_owned());
        }
        if let Some(other) = self.resources.shares.iter().find(|share| share.config.tag == spec.tag) {
            return Err(format!("the tag '{}' is already that of {}", spec.tag, other.config.id));
        }
        if spec.restart.is_some() {
            return Err("restart= is for `bulkhead run`; an added directory follows the machine's --restart"
                .to_owned());
        }
        spec.path = folder.join(spec.path);
        let id = self.choose_id(spec.id.take(), "fs")?;
        ShareConfig::new(spec, id, &mut self.ids()).map_err(text)
    }

    /// A client wants a device to be removed; it is answered when nothing is left of it, or on an error.
    pub(super) fn remove_device(
        &mut self,
        client: u16,
        id: &str,
        force: bool,
        limit: Duration,
    ) -> Result<(), String> {
        if self.phase != Phase::Running {
            return Err("devices can be removed while the machine runs, and it does not".to_owned());
        }
        if self.resources.slots.of(id).is_none() {
            return Err(format!(
                "'{}' is no device that can be removed: `bulkhead device list {}` names them",
                id.escape_debug(),
                self.config.name
            ));
        }
        if self.resources.pmems.iter().any(|pmem| pmem.config.id == id) {
            return Err(format!("{id} cannot be removed while the machine runs: the guest maps its file"));
        }
        let slot = self.resources.slots.of(id).map(|place| PciAddress::from_place(place).slot);
        let others = slot.map_or(Vec::new(), |slot| self.resources.slots.others(slot, id));
        if !others.is_empty() {
            return Err(format!(
                "device {id} shares its PCI slot with {}: guests let go of whole slots alone",
                others.join(", ")
            ));
        }
        let until = Instant::now() + limit;
        match self.changes.iter_mut().find(|change| change.id == id) {
            // Whoever asked before waits for the same event.
            Some(change) if force && matches!(change.stage, Stage::Removing(..)) => {
                change.stage = Stage::Removing(until, limit);
                change.clients.push(client);
            }
            Some(change) => return Err(format!("device {id} {}", busy(&change.stage))),
            None => self.changes.push(Change {
                id: id.to_owned(),
                clients: vec![client],
                stage: Stage::Removing(until, limit),
                failure: None,
            }),
        }
        self.tell_core(&ToCore::DeviceRemove { id: id.to_owned(), force }, None);
        Ok(())
    }

    /// The process of a device is READY. Says whether the device is one that is being added.
    pub(super) fn added_is_ready(&mut self, id: &str) -> bool {
        let change = self.changes.iter_mut().find(|change| change.id == id);
        let Some(change) = change.filter(|change| matches!(change.stage, Stage::Starting(..))) else {
            return false;
        };
        if let Stage::Starting(stream, _) = std::mem::replace(&mut change.stage, Stage::Adding)
            && let Some(kind) = link_of(self.resources, id)
        {
            let link = DeviceLink { id: id.to_owned(), kind, socket: FdIndex(0), rom: None };
            self.tell_core(&ToCore::DeviceAdd(link), Some(stream));
        }
        true
    }

    /// The process of a device did what none may do. Says whether the device was just being added: then nothing came of it.
    pub(super) fn added_is_condemned(&mut self, index: usize, text: &str) -> bool {
        let Some(process) = self.processes.get(index) else { return false };
        let change = self.changes.iter_mut().find(|change| change.id == process.id);
        let Some(change) = change.filter(|change| matches!(change.stage, Stage::Starting(..))) else {
            return false;
        };
        change.failure.get_or_insert(text.to_owned());
        let _gone = process.kill();
        true
    }

    /// Whether the end of this process is one that was expected, or concerns a device that the guest does not have yet.
    pub(super) fn ends_with_change(&self, index: usize) -> bool {
        let Some(process) = self.processes.get(index) else { return false };
        let change = self.changes.iter().find(|change| change.id == process.id);
        change.is_some_and(|change| matches!(change.stage, Stage::Starting(..) | Stage::Stopping(_)))
    }

    /// The core has put a device into its slot.
    pub(super) fn device_added(&mut self, id: &str) {
        let is_it = |change: &Change| change.id == id && matches!(change.stage, Stage::Adding);
        if let Some(position) = self.changes.iter().position(is_it) {
            let change = self.changes.remove(position);
            let slot = self.resources.slots.of(id).unwrap_or_default();
            self.say(LogLevel::Info, &format!("device {id} was added in PCI slot {slot}"));
            let index = self.processes.iter().position(|process| process.id == id);
            self.note(EventKind::Added, index, |_| ());
            self.answer_change(&change);
        }
    }

    /// The core cannot add or remove a device.
    pub(super) fn device_refused(&mut self, id: &str, reason: String) {
        self.say(LogLevel::Error, &format!("device {id}: {reason}"));
        let Some(position) = self.changes.iter().position(|change| change.id == id) else { return };
        let Some(change) = self.changes.get_mut(position) else { return };
        change.failure = Some(reason);
        if matches!(change.stage, Stage::Adding) {
            self.stop_process(id);
        } else {
            let change = self.changes.remove(position);
            self.answer_change(&change);
        }
    }

    /// The core has let go of a device: the guest was asked, or ejected it by itself.
    pub(super) fn device_removed(&mut self, id: &str) {
        if let Phase::Abandoned(_) = self.phase {
            self.phase = Phase::Running;
        }
        if self.changes.iter().all(|change| change.id != id) {
            self.say(LogLevel::Info, &format!("the guest ejected device {id}"));
            let stage = Stage::Stopping(Instant::now());
            self.changes.push(Change { id: id.to_owned(), clients: Vec::new(), stage, failure: None });
        }
        self.stop_process(id);
    }

    /// Lets the process of a device end that nobody uses any more.
    fn stop_process(&mut self, id: &str) {
        if let Some(change) = self.changes.iter_mut().find(|change| change.id == id) {
            change.stage = Stage::Stopping(Instant::now() + STOP_DEADLINE);
        }
        let Some(index) = self.processes.iter().position(|process| process.id == id) else { return };
        self.retire(index);
        let Some(process) = self.processes.get(index) else { return };
        match process.state {
            State::Ready => {
                let _full_or_gone = process.channel.send(&ToDevice::Stop, &[]);
            }
            State::Starting => {
                let _gone = process.kill();
            }
            State::Ended => {}
        }
    }

    /// Does what is due. Not while events are handled: those left of a batch may be about the process whose number is taken.
    pub(super) fn carry_out(&mut self, now: Instant) {
        if self.phase != Phase::Running || self.changes.is_empty() {
            return;
        }
        for mut change in std::mem::take(&mut self.changes) {
            let process = self.processes.iter().find(|process| process.id == change.id);
            let ended = process.is_none_or(|process| process.state == State::Ended);
            let late = change.deadline().is_some_and(|deadline| deadline <= now);
            match change.stage {
                Stage::Asked(policy) => match self.start_added(&change.id, policy) {
                    Ok(stream) => change.stage = Stage::Starting(stream, now + READY_DEADLINE),
                    Err(reason) => change.failure = Some(reason),
                },
                Stage::Starting(..) if ended => {
                    change.failure.get_or_insert("its process ended before it was ready".to_owned());
                }
                Stage::Starting(..) if late => {
                    let text = format!("its process did not report READY within {READY_DEADLINE:?}");
                    change.failure.get_or_insert(text);
                    process.map(super::Process::kill);
                    change.stage = Stage::Stopping(now + super::KILL_DEADLINE);
                }
                Stage::Removing(_, limit) if late => {
                    change.failure = Some(format!(
                        "the guest did not let go of {} within {} s: it may still do so; --force takes it away",
                        change.id,
                        limit.as_secs()
                    ));
                    self.answer_change(&change);
                    continue;
                }
                Stage::Stopping(_) if late && !ended => {
                    process.map(super::Process::kill);
                    change.stage = Stage::Stopping(now + super::KILL_DEADLINE);
                }
                _ => {}
            }
            let gone = matches!(change.stage, Stage::Stopping(_)) && ended;
            if gone
                || change.failure.is_some() && matches!(change.stage, Stage::Asked(_) | Stage::Starting(..))
            {
                self.forget(&change);
            } else {
                self.changes.push(change);
            }
        }
    }

    /// Starts the process of an added device. Returns the core's end of the stream to it.
    fn start_added(&mut self, id: &str, policy: RestartPolicy) -> Result<UnixStream, String> {
        let program = self.environment.programs.of(id, self.resources);
        let (process, stream) =
            relaunch(self.config, self.resources, id, program).map_err(|error| error.to_string())?;
        let recovery = Recovery::new(policy);
        let free = self.processes.iter().position(|process| process.id.is_empty());
        let index = free.unwrap_or(self.processes.len());
        match (self.processes.get_mut(index), self.recoveries.get_mut(index)) {
            (Some(place), Some(place_of_recovery)) => (*place, *place_of_recovery) = (process, recovery),
            _ => {
                self.processes.push(process);
                self.recoveries.push(recovery);
            }
        }
        self.note(EventKind::Start, Some(index), |_| ());
        self.watch_process(index).map_err(|error| format!("its process cannot be watched: {error}"))?;
        Ok(stream)
    }

    /// Nothing is left of a device: its number, slot and resources are free, and whoever waits is answered.
    fn forget(&mut self, change: &Change) {
        if let Some(process) = self.processes.iter_mut().find(|process| process.id == change.id) {
            let _ended = process.kill();
            process.id.clear();
        }
        while self.processes.last().is_some_and(|process| process.id.is_empty()) {
            self.processes.pop();
            self.recoveries.pop();
        }
        if change.id == CONSOLE {
            self.environment.server.detach(CONSOLE, &self.environment.poller);
            self.peers.retain(|(device, _)| *device != CONSOLE);
        }
        if change.id == PORTS {
            self.port_peers.clear();
        }
        if let Some(vsock) = self.resources.vsock.as_ref().filter(|vsock| vsock.id == change.id) {
            self.environment.forget_vsock(vsock);
        }
        self.unwatch_cables();
        self.resources.remove(&change.id);
        self.cables.retain(|(id, _)| *id != change.id);
        self.watch_cables();
        if change.failure.is_none() {
            self.say(LogLevel::Info, &format!("device {} was removed", change.id));
            self.note(EventKind::Removed, None, |entry| entry.process = Some(change.id.clone()));
        }
        self.answer_change(change);
    }

    fn answer_change(&mut self, change: &Change) {
        let response = match &change.failure {
            None => Response::Done,
            Some(reason) => Response::Error { message: format!("device {}: {reason}", change.id) },
        };
        for client in change.clients.iter().copied() {
            self.environment.server.respond(client, &response, &self.environment.poller);
        }
    }

    /// The machine has ended. What was to go is gone when it starts anew, and what was to come is not there.
    pub(super) fn settle_changes(&mut self) {
        for mut change in std::mem::take(&mut self.changes) {
            if matches!(change.stage, Stage::Asked(_) | Stage::Starting(..) | Stage::Adding) {
                change.failure = Some("the machine ended".to_owned());
            }
            self.forget(&change);
        }
    }
}

fn new_console(spec: &str) -> Result<NewDevice, String> {
    let spec: ConsoleSpec = spec.parse().map_err(text)?;
    match spec.target {
        StreamTarget::Attach => Ok(NewDevice::Console(spec.addr)),
        _ => {
            Err("an added console is for `bulkhead console`: say --console or --console=addr=SLOT".to_owned())
        }
    }
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// The limits that a user gives a device to be added.
fn added_limits(device: &NewDevice, text: &str) -> Result<ProcessLimits, String> {
    let id = device.id();
    let LimitSpec { limits, .. } = format!("{id}:{text}").parse().map_err(|error| format!("{error}"))?;
    let disk = matches!(device, NewDevice::Disk(_));
    let misplaced = (limits.has_io() && !disk).then_some("read and write are for disks");
    match limits.impossible().or(misplaced) {
        Some(reason) => Err(format!("limit of {id}: {reason}")),
        None => Ok(limits),
    }
}

/// What keeps a device from being added or removed now.
const fn busy(stage: &Stage) -> &'static str {
    match stage {
        Stage::Asked(_) | Stage::Starting(..) | Stage::Adding => "is being added",
        Stage::Removing(..) => "is being removed already: the guest was asked; --force takes it away",
        Stage::Stopping(_) => "is being removed already",
    }
}
