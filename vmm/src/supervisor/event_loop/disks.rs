//! Disks that get another size while the guest uses them (`bulkhead device resize`).
//!
//! A disk that grows has its new end before anybody hears of it; one that shrinks is not asked for the end any more before that goes.

use bulkhead_ipc::channel::message::ToDevice;

use super::EventLoop;
use crate::supervisor::api::Response;
use crate::supervisor::cli::LogLevel;
use crate::supervisor::config::Size;
use crate::supervisor::config::nearest::hint;
use crate::supervisor::process::State;
use crate::supervisor::resources::{Disk, ResizeError};

impl EventLoop<'_> {
    /// A user gives a disk another size.
    pub(super) fn resize_disk(
        &mut self,
        device: &str,
        size: Option<u64>,
        shrink: bool,
    ) -> Result<Response, String> {
        let disk = self.disk(device)?;
        let failed = |error: ResizeError| format!("{device} {error}");
        let (before, grows) = (disk.size, !disk.readonly);
        let bytes = disk.new_size(size, shrink).map_err(failed)?;
        let index = self.processes.iter().position(|process| process.id == device);
        if index.and_then(|index| self.recoveries.get(index)).is_some_and(|it| it.standby.is_some()) {
            return Err(format!("the process of {device} is being replaced: ask again in a moment"));
        }
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
        Ok(Response::Done)
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
