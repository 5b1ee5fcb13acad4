//! The thread that waits for device processes: it connects successors, serves what back ends ask of their own accord, and puts
//! devices in and takes them out. So the main thread never waits for one device while another has an interrupt to deliver.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use bulkhead_ipc::channel::message::FromCore;
use bulkhead_ipc::jail::{self, PolicyName};
use nix::sys::epoll::Epoll;

use super::assembly::Core;
use super::devices::Line;
use super::{CoreError, event_loop};

/// Its deepest path is a replay to a successor, with logging.
const STACK: usize = 256 * 1024;

/// What there is to do for a device. Each names it by id, or by its slot.
pub(super) enum Job {
    /// Connect to the successor behind this stream.
    Replace(String, OwnedFd),
    /// Tell the guest that there will be none.
    GiveUp(String),
    /// Serve one request of the back end.
    Request(u8),
    /// Open a session with the process of a new device, and put it into its slot.
    Add(Line),
    /// Ask the guest to let a device go; with `force`, take it away and tell the guest.
    Remove { id: String, force: bool },
    /// Let go of what belonged to the device that was in this slot.
    Release(u8),
}

/// Starts the thread and returns when it is under its policy. Jobs are done in order. `epoll` is what the main thread waits with.
pub(super) fn start(core: &Arc<Core>, epoll: &Arc<Epoll>) -> Result<Sender<Job>, CoreError> {
    let (sender, jobs) = channel();
    let (ready, entered) = channel();
    let (core, epoll) = (Arc::clone(core), Arc::clone(epoll));
    let body = move || {
        let result = jail::enter_thread(PolicyName::CoreDevices);
        let failed = result.is_err();
        if ready.send(result).is_ok() && !failed {
            serve(&core, &epoll, &jobs);
        }
    };
    let thread = thread::Builder::new().name("devices".to_owned()).stack_size(STACK).spawn(body);
    thread.map_err(CoreError::system("clone3"))?;
    entered.recv().map_err(|_| CoreError::system("clone3")(std::io::ErrorKind::BrokenPipe))??;
    Ok(sender)
}

fn serve(core: &Core, epoll: &Epoll, jobs: &Receiver<Job>) {
    for job in jobs {
        match job {
            Job::Replace(id, socket) => replace(core, &id, socket),
            Job::GiveUp(id) => give_up(core, &id),
            Job::Request(slot) => {
                core.virtio_in(slot).inspect(|device| device.serve_request());
            }
            Job::Add(line) => {
                let id = line.id().to_owned();
                let added = add(core, epoll, line);
                core.reports.tell(answer(id, added));
            }
            Job::Remove { id, force } => match core.remove_device(&id, force) {
                Ok(Some(slot)) => release(core, epoll, slot),
                Ok(None) => {}
                Err(error) => core.reports.tell(answer(id, Err(error))),
            },
            Job::Release(slot) => release(core, epoll, slot),
        }
    }
}

/// Connects a device to the successor of its process. It is READY, so that this takes little time, and deadlines bound it.
fn replace(core: &Core, id: &str, socket: OwnedFd) {
    let (virtio, registers) = (core.virtio_named(id), core.registers(id));
    // First the predecessor's connection is closed: what fails from here on is the successor's failure.
    virtio.iter().for_each(|device| device.disconnect_backend());
    registers.inspect(|device| device.disconnect());
    core.reports.tell(FromCore::DeviceReplaced { id: id.to_owned() });
    let result = match (virtio, registers) {
        (Some(device), _) => device.replace_backend(socket.into()).map_err(|error| error.to_string()),
        (_, Some(device)) => device.replace(socket).map_err(|error| error.to_string()),
        // It has just been removed, and the supervisor is about to hear of it.
        (None, None) => Ok(()),
    };
    if let Err(reason) = result {
        core.reports.device_failed(id, reason);
    }
}

fn give_up(core: &Core, id: &str) {
    core.virtio_named(id).inspect(|device| {
        device.disconnect_backend();
        device.give_up();
    });
    core.registers(id).inspect(|device| device.give_up());
}

fn add(core: &Core, epoll: &Epoll, line: Line) -> Result<(), CoreError> {
    let (slot, device) = core.add_device(line)?;
    event_loop::watch(epoll, slot, device.as_fd()).inspect_err(|_| core.pull_out(slot))
}

/// A slot is empty: nothing of what was in it stays.
fn release(core: &Core, epoll: &Epoll, slot: u8) {
    if let Some(device) = core.release_slot(slot) {
        let _ = epoll.delete(device.as_fd());
        core.reports.tell(FromCore::DeviceRemoved { id: device.id().to_owned() });
    }
}

/// What the supervisor hears of a device that it wants to add or remove.
fn answer(id: String, result: Result<(), CoreError>) -> FromCore {
    match result {
        Ok(()) => FromCore::DeviceAdded { id },
        Err(error) => FromCore::DeviceRefused { id, reason: super::chain(&error) },
    }
}
