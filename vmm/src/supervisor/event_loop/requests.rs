//! What API clients ask.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bulkhead_ipc::channel::message::{self, ToCore, ToDevice};

use super::{EventLoop, Phase};
use crate::supervisor::api::packet::is_stream_socket;
use crate::supervisor::api::server::Attachment;
use crate::supervisor::api::{
    DeviceEntry, DeviceState, DeviceStats, MachineEntry, ProcessEntry, ProgramInfo, Request, Response,
};
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::{CONSOLE, KEYBOARD, SERIAL, SUPERVISOR};
use crate::supervisor::keys::strokes;
use crate::supervisor::process::{Role, State};
use crate::supervisor::programs::DeviceProgram;

impl EventLoop<'_> {
    /// Answers a client.
    pub(super) fn request(&mut self, client: u16) {
        let Some((request, fds)) = self.environment.server.receive(client, &self.environment.poller) else {
            return;
        };
        let answer = match request {
            Request::Ps => Ok(Some(Response::Machine(self.entry()))),
            Request::Stop => self.press_power_button().map(Some),
            Request::Kill => {
                self.force("ended by `bulkhead stop --force`");
                Ok(Some(Response::Done))
            }
            Request::Attach { device, size } => self.attach(client, device, size, fds).map(Some),
            Request::Resize { columns, rows } => self.resize(client, columns, rows).map(Some),
            Request::Devices => {
                Ok(Some(Response::Devices { devices: self.devices(), protocol: message::PROTOCOL }))
            }
            Request::Stats => Ok(Some(Response::Stats { devices: self.stats() })),
            // Answered when they are carried out.
            Request::DeviceRestart { device } => self.order(client, Some(&device), None).map(|()| None),
            Request::DeviceUpgrade { device, program } => {
                self.upgrade(client, device.as_deref(), program, fds).map(|()| None)
            }
            Request::Events { follow } => {
                self.environment.server.tell_all(
                    client,
                    &self.environment.history,
                    follow,
                    &self.environment.poller,
                );
                Ok(None)
            }
            Request::Cpus { count, timeout } => {
                self.resize_cpus(client, count, Duration::from_secs(timeout.into()))
            }
            Request::Balloon { size } => self.ask_balloon(client, size).map(|()| None),
            Request::Resume => self.resume().map(Some),
            Request::Sendkey { keys } => self.strike(&keys).map(Some),
            Request::DeviceAdd { device, limits } => {
                self.add_device(client, &device, limits.as_deref()).map(|()| None)
            }
            Request::DeviceLink { device, up } => self.link(&device, up).map(Some),
            Request::DeviceResize { device, size, shrink } => self.resize_disk(client, &device, size, shrink),
            Request::DeviceRemove { device, force, timeout } => {
                let limit = Duration::from_secs(timeout.into());
                self.remove_device(client, &device, force, limit).map(|()| None)
            }
        };
        if let Some(response) = answer.unwrap_or_else(|message| Some(Response::Error { message })) {
            self.environment.server.respond(client, &response, &self.environment.poller);
        }
    }

    fn strike(&self, keys: &[String]) -> Result<Response, String> {
        let keys = strokes(keys)?;
        let keyboard = self.processes.iter().find(|process| process.id == KEYBOARD);
        let keyboard = keyboard.ok_or("this machine has no keyboard: start it with --keyboard")?;
        match keyboard.state {
            State::Ready => {
                keyboard.channel.send(&ToDevice::Keys(keys), &[]).map_err(|error| error.to_string())?
            }
            State::Starting | State::Ended => return Err("the keyboard does not serve now".to_owned()),
        }
        Ok(Response::Done)
    }

    fn devices(&self) -> Vec<DeviceEntry> {
        let devices = self.processes.iter().zip(&self.recoveries);
        let devices = devices.filter(|(process, _)| process.role != Role::Core && !process.id.is_empty());
        devices
            .map(|(process, recovery)| DeviceEntry {
                id: process.id.clone(),
                role: process.role,
                state: match recovery.state() {
                    DeviceState::Serving if process.state == State::Starting => DeviceState::Starting,
                    state => state,
                },
                pid: (process.state != State::Ended).then(|| process.jailed.pid()),
                policy: recovery.policy().to_string(),
                restarts: recovery.restarts,
                last_end: recovery.last_end.clone(),
                version: self.environment.programs.version_of(&process.id).to_owned(),
            })
            .collect()
    }

    fn stats(&self) -> Vec<DeviceStats> {
        let devices = self.processes.iter().zip(&self.recoveries);
        let devices = devices.filter(|(process, _)| process.role != Role::Core && !process.id.is_empty());
        devices
            .map(|(process, recovery)| DeviceStats {
                id: process.id.clone(),
                role: process.role,
                restarts: recovery.restarts,
                counters: self.resources.meters.read(&process.id),
            })
            .collect()
    }

    fn upgrade(
        &mut self,
        client: u16,
        device: Option<&str>,
        program: ProgramInfo,
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let ProgramInfo { version, protocol } = program;
        if protocol != message::PROTOCOL {
            return Err(format!(
                "the program speaks control protocol {protocol}, this machine speaks {}",
                message::PROTOCOL
            ));
        }
        let [file]: [OwnedFd; 1] = fds.try_into().map_err(|_| "exactly one descriptor is needed")?;
        self.order(client, device, Some(Rc::new(DeviceProgram { file, version })))
    }

    fn entry(&self) -> MachineEntry {
        let supervisor = ProcessEntry {
            id: SUPERVISOR.to_owned(),
            role: Role::Supervisor,
            pid: i32::try_from(std::process::id()).unwrap_or(0),
        };
        let living = self.processes.iter().filter(|process| process.state != State::Ended);
        let others = living.map(|process| ProcessEntry {
            id: process.id.clone(),
            role: process.role,
            pid: process.jailed.pid(),
        });
        let state = match self.phase {
            Phase::Starting(_) => "starting",
            Phase::Running => "running",
            Phase::Abandoned(_) | Phase::Stopping(_) | Phase::Killing(_) => "ending",
        };
        MachineEntry {
            name: self.config.name.clone(),
            state: state.to_owned(),
            cpus: self.cpus.count(),
            memory: self.config.memory,
            processes: std::iter::once(supervisor).chain(others).collect(),
        }
    }

    fn press_power_button(&mut self) -> Result<Response, String> {
        let core = self.processes.iter().find(|process| process.role == Role::Core);
        let core = core.ok_or("this machine has no core process")?;
        core.channel
            .send(&ToCore::Stop, &[])
            .map_err(|error| format!("the core does not listen: {error}"))?;
        self.say(LogLevel::Info, "the power button was pressed");
        Ok(Response::Done)
    }

    fn attach(
        &mut self,
        client: u16,
        device: Option<String>,
        size: Option<(u16, u16)>,
        fds: Vec<OwnedFd>,
    ) -> Result<Response, String> {
        let device = self.attachable(device.as_deref())?;
        let [stream]: [OwnedFd; 1] = fds.try_into().map_err(|_| "exactly one descriptor is needed")?;
        if !is_stream_socket(stream.as_fd()) {
            return Err("the descriptor is no Unix stream socket".to_owned());
        }
        self.hand_over(device, stream.as_fd())?;
        if let Some((columns, rows)) = size
            && device == CONSOLE
        {
            self.tell(device, &ToDevice::Resize { columns, rows });
        }
        let attachment = Attachment { device: device.to_owned(), stream };
        self.environment.server.attach(client, attachment, &self.environment.poller);
        Ok(Response::Attached { device: device.to_owned() })
    }

    /// The device that is meant, if it may be attached.
    fn attachable(&self, wanted: Option<&str>) -> Result<&'static str, String> {
        let devices = [(CONSOLE, &self.resources.console), (SERIAL, &self.resources.serial)];
        let free: Vec<&'static str> = devices
            .into_iter()
            .filter(|(_, stream)| stream.as_ref().is_some_and(|stream| stream.attachable))
            .map(|(id, _)| id)
            .collect();
        match wanted {
            Some(wanted) => free.iter().copied().find(|id| *id == wanted).ok_or_else(|| {
                let free = if free.is_empty() { "none".to_owned() } else { free.join(", ") };
                format!("'{}' cannot be attached; what can: {free}", wanted.escape_debug())
            }),
            None => free.first().copied().ok_or_else(|| {
                "this machine has nothing to attach to: start it with --console or --serial attach".to_owned()
            }),
        }
    }

    fn resize(&mut self, client: u16, columns: u16, rows: u16) -> Result<Response, String> {
        let attachment = self.environment.server.attachment(client).ok_or("nothing is attached")?;
        if attachment.device == CONSOLE {
            self.tell(CONSOLE, &ToDevice::Resize { columns, rows });
        }
        Ok(Response::Done)
    }
}
