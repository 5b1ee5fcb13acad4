//! Disks that get another size while the guest uses them (`bulkhead device resize`).
//!
//! The file of a raw disk is changed here; an image in a format only its own process looks into, which is asked to. A disk that grows has its new end before anybody hears of it; one that shrinks is not asked for the end any more before that goes.

use bulkhead_ipc::channel::message::{ImageFormat, ToDevice};

use super::EventLoop;
use crate::supervisor::api::Response;
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::Size;
use crate::supervisor::config::nearest::hint;
use crate::supervisor::process::{Process, State};
use crate::supervisor::resources::{Disk, ResizeError};

impl EventLoop<'_> {
    /// A user gives a disk another size.
    pub(super) fn resize_disk(
        &mut self,
        client: u16,
        device: &str,
        size: Option<u64>,
        shrink: bool,
    ) -> Result<Option<Response>, String> {
        let disk = self.disk(device)?;
        let failed = |error: ResizeError| format!("{device} {error}");
        if disk.options.format.0 != ImageFormat::Raw {
            let bytes = disk.new_image_size(size, shrink).map_err(failed)?;
            return self.resize_image(client, device, bytes).map(|()| None);
        }
        let (before, grows) = (disk.size, !disk.readonly);
        let bytes = disk.new_size(size, shrink).map_err(failed)?;
        self.not_replacing(device)?;
        let index = self.processes.iter().position(|process| process.id == device);
        if bytes < before {
            self.tell(device, &ToDevice::DiskSize { bytes });
        }
        if let Err(error) = self.disk(device)?.set_size(bytes) {
            self.tell(device, &ToDevice::DiskSize { bytes: before });
            return Err(failed(error));
        }
        let most = self.disk(device)?.most_written();
        let process = index.and_then(|index| self.processes.get(index));
        if let Some(process) = process.filter(|process| grows && process.state != State::Ended) {
            let raised = process.jailed.set_file_size(most);
            raised
                .map_err(|error| format!("{device}: its process may not write more than before: {error}"))?;
        }
        self.tell(device, &ToDevice::DiskSize { bytes });
        self.say(LogLevel::Info, &format!("{device}: has {} now", Size(bytes)));
        Ok(Some(Response::Done))
    }

    /// Refuses what a process and its successor would have to be told both.
    fn not_replacing(&self, device: &str) -> Result<(), String> {
        let index = self.processes.iter().position(|process| process.id == device);
        if index.and_then(|index| self.recoveries.get(index)).is_some_and(|it| it.standby.is_some()) {
            return Err(format!("the process of {device} is being replaced: ask again in a moment"));
        }
        Ok(())
    }

    /// Has a process change its image, and answers the client when it has, or when it ends without a word.
    fn resize_image(&mut self, client: u16, device: &str, bytes: u64) -> Result<(), String> {
        self.not_replacing(device)?;
        if self.disk(device)?.client.is_some() {
            return Err(format!("{device} is being resized: ask again when that is done"));
        }
        let serves = |process: &&Process| process.id == device && process.state == State::Ready;
        let process = self.processes.iter().find(serves);
        let process = process
            .ok_or_else(|| format!("{device} has no process that serves just now: ask again in a moment"))?;
        let sent = process.channel.send(&ToDevice::DiskSize { bytes }, &[]);
        sent.map_err(|error| format!("the process of {device} does not listen: {error}"))?;
        self.disk(device)?.client = Some(client);
        Ok(())
    }

    /// A process has changed its image, or not.
    pub(super) fn image_resized(&mut self, device: &str, size: Result<u64, String>) {
        // What nobody asked for changes nothing, and fills no log.
        let Some(client) = self.disk(device).ok().and_then(|disk| disk.client.take()) else { return };
        let response = match size {
            Ok(bytes) => {
                self.say(LogLevel::Info, &format!("{device}: has {} now", Size(bytes)));
                Response::Done
            }
            Err(reason) => Response::Error { message: format!("{device} {reason}") },
        };
        self.environment.server.respond(client, &response, &self.environment.poller);
    }

    /// A process has ended: what it was asked and has not answered, it never will.
    pub(super) fn image_not_resized(&mut self, device: &str) {
        let reason = "has lost its process meanwhile: look for its size, and ask again";
        self.image_resized(device, Err(reason.to_owned()));
    }

    fn disk(&mut self, device: &str) -> Result<&mut Disk, String> {
        let disks = &mut self.resources.disks;
        let names: Vec<String> = disks.iter().map(|disk| disk.id.clone()).collect();
        disks.iter_mut().find(|disk| disk.id == device).ok_or_else(|| {
            let name = device.escape_debug().to_string();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let hint = if names.is_empty() { "it has none".to_owned() } else { hint(&name, &names) };
            format!("this machine has no disk '{name}': {hint}")
        })
    }
}
