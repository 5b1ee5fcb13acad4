//! The core process: owns KVM and the bus tree, and forwards what the guest does to the device processes.
//!
//! - `assembly`: builds the machine from the supervisor's start message;
//! - `platform`: KVM's part, chipset and vCPUs; `devices`: the device processes and their places on the buses;
//! - `host`: what the tree asks of KVM and of the clocks;
//! - `register_device`: a device on the ISA bus whose registers live in another process;
//! - `event_loop`: the main thread while the machine runs.

mod assembly;
mod devices;
mod event_loop;
mod host;
mod platform;
pub mod register_device;
mod reports;

use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, FromCore, MachineEnd, ToCore};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::{self, JailError, PolicyName};
use bulkhead_ipc::log::{self, LogLevel};
use bulkhead_ipc::memory::MemoryError;
use bulkhead_ipc::vfio_user::ClientError;

use self::assembly::Core;
use self::event_loop::EventLoop;
use crate::boot::BootError;
use crate::kvm::KvmError;
use crate::machine::{AttachError, BuildError};
use crate::virtio::VirtioError;

/// How long the supervisor may take to send the start message.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// How long the supervisor may take to make room for a message.
const SEND_DEADLINE: Duration = Duration::from_secs(1);

/// Why the core cannot build or run its machine.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The control channel.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The first message was not the start message.
    #[error("the supervisor's first message is not Start")]
    NotStarted,
    /// The jail.
    #[error("jail: {0}")]
    Jail(#[from] JailError),
    /// Guest RAM.
    #[error("memory: {0}")]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] KvmError),
    /// Kernel, initial RAM file system or command line.
    #[error("{0}")]
    Boot(#[from] BootError),
    /// The chipset.
    #[error("{0}")]
    Build(#[from] BuildError),
    /// A device did not fit into the tree.
    #[error("{0}")]
    Attach(#[from] AttachError),
    /// A virtio device's process did not answer as it must.
    #[error("device {id}: {source}")]
    Virtio {
        /// Which device.
        id: String,
        /// What went wrong.
        source: VirtioError,
    },
    /// A register-level device's process did not answer as it must.
    #[error("device {id}: {source}")]
    Register {
        /// Which device.
        id: String,
        /// What went wrong.
        source: ClientError,
    },
    /// A system call failed.
    #[error("{call}: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl CoreError {
    /// Attaches the system call's name to its error.
    fn system<E: Into<std::io::Error>>(call: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { call, source: source.into() }
    }
}

/// The program `bulkhead-vmm`: runs one machine and reports its end on the control channel. Exit code 0 when the
/// machine ended in order, 1 otherwise.
#[must_use]
pub fn main() -> ExitCode {
    log::init(LogLevel::Info);
    let channel = match jail::enter() {
        Ok(channel) => Channel::from_fd(channel),
        Err(error) => {
            tracing::error!(%error, "this program is started by bulkhead; try `bulkhead run --help`");
            return ExitCode::FAILURE;
        }
    };
    let end = run(&channel).unwrap_or_else(|error| MachineEnd::Failed(error.to_string()));
    let code = if matches!(end, MachineEnd::Failed(_)) { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    if let Err(error) = channel.send_within(&FromCore::Ended(end), &[], SEND_DEADLINE) {
        tracing::error!(%error, "the supervisor does not hear how the machine ended");
        return ExitCode::FAILURE;
    }
    code
}

fn run(channel: &Channel) -> Result<MachineEnd, CoreError> {
    let (message, descriptors) = channel.recv(Some(START_DEADLINE))?;
    let ToCore::Start(start) = message else { return Err(CoreError::NotStarted) };
    log::init(start.log);
    jail::set_enforcement(start.enforcement);
    let core = Core::assemble(start, Descriptors::from(descriptors))?;
    let events = EventLoop::new(channel, &core)?;
    seal(channel, &core, &events)?;
    core.vcpus.resume();
    events.run(channel, &core)
}

/// Locks the process down and tells the supervisor that the machine is complete.
fn seal(channel: &Channel, core: &Core, events: &EventLoop) -> Result<(), CoreError> {
    let mut held = core.descriptors.clone();
    held.extend([channel.as_fd().as_raw_fd(), events.as_fd().as_raw_fd()]);
    let sealed = jail::seal(PolicyName::CoreMain, &held)?;
    let ready = FromCore::Ready { policies: sealed.policies() };
    Ok(channel.send_within(&ready, &sealed.descriptors(), SEND_DEADLINE)?)
}
