//! The thread that waits for device processes: it connects successors, and serves what back ends ask of their own accord. So
//! the main thread never waits for one device while another has an interrupt to deliver.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use bulkhead_ipc::jail::{self, PolicyName};

use super::CoreError;
use super::assembly::Core;

/// Its deepest path is a replay to a successor, with logging.
const STACK: usize = 256 * 1024;

/// What there is to do for a device. Each names it by id, or by its place among the virtio devices.
pub(super) enum Job {
    /// Connect to the successor behind this stream.
    Replace(String, OwnedFd),
    /// Tell the guest that there will be none.
    GiveUp(String),
    /// Serve one request of the back end.
    Request(usize),
}

/// Starts the thread and returns when it is under its policy. Jobs are done in order.
pub(super) fn start(core: &Arc<Core>) -> Result<Sender<Job>, CoreError> {
    let (sender, jobs) = channel();
    let (ready, entered) = channel();
    let core = Arc::clone(core);
    let body = move || {
        let result = jail::enter_thread(PolicyName::CoreDevices);
        let failed = result.is_err();
        if ready.send(result).is_ok() && !failed {
            serve(&core, &jobs);
        }
    };
    let thread = thread::Builder::new().name("devices".to_owned()).stack_size(STACK).spawn(body);
    thread.map_err(CoreError::system("clone3"))?;
    entered.recv().map_err(|_| CoreError::system("clone3")(std::io::ErrorKind::BrokenPipe))??;
    Ok(sender)
}

fn serve(core: &Core, jobs: &Receiver<Job>) {
    for job in jobs {
        match job {
            Job::Replace(id, socket) => replace(core, &id, socket),
            Job::GiveUp(id) => {
                core.virtio(&id).inspect(|device| {
                    device.disconnect_backend();
                    device.give_up();
                });
                core.registers(&id).inspect(|device| device.give_up());
            }
            Job::Request(index) => {
                core.virtio.get(index).inspect(|device| device.serve_request());
            }
        }
    }
}

/// Connects a device to the successor of its process. It is READY, so that this takes little time, and deadlines bound it.
fn replace(core: &Core, id: &str, socket: OwnedFd) {
    let (virtio, registers) = (core.virtio(id), core.registers(id));
    // First the predecessor's connection is closed: what fails from here on is the successor's failure.
    virtio.inspect(|device| device.disconnect_backend());
    registers.inspect(|device| device.disconnect());
    core.reports.device_replaced(id);
    let result = match (virtio, registers) {
        (Some(device), _) => device.replace_backend(socket.into()).map_err(|error| error.to_string()),
        (_, Some(device)) => device.replace(socket).map_err(|error| error.to_string()),
        (None, None) => Err("there is no such device".to_owned()),
    };
    if let Err(reason) = result {
        core.reports.device_failed(id, reason);
    }
}
