//! The core process: owns KVM and the bus tree, and forwards what the guest does to the device processes.
//!
//! - `assembly`: builds the machine from the supervisor's start message;
//! - `platform`: KVM's part, chipset and vCPUs; `devices`: the device processes and their places on the buses;
//! - `host`: what the tree asks of KVM and of the clocks;
//! - `register_device`: a device on the ISA bus whose registers live in another process;
//! - `remote`: the way to a process that holds registers, for `keyboard`, `watchdog` and `flash`;
//! - `flash`: the chip with firmware's variables, whose commands another process carries out;
//! - `event_loop`: the main thread while the machine runs; `device_thread`: the one that waits for device processes.

mod assembly;
mod device_thread;
mod devices;
mod event_loop;
mod flash;
mod host;
mod keyboard;
mod platform;
pub mod register_device;
mod remote;
mod reports;
mod watchdog;

use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, FromCore, Input, MachineEnd, ToCore};
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
    /// No virtio device of that name.
    #[error("{0} is no device that can be added or removed while the machine runs")]
    NotPluggable(String),
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

    /// What the user gave that makes no machine, if that is the reason.
    fn input(&self) -> Option<Input> {
        match self {
            Self::Boot(error) => error.input(),
            Self::Build(BuildError::Cpus(_)) => Some(Input::Setting),
            _ => None,
        }
    }

    /// As the supervisor hears it.
    fn end(&self) -> MachineEnd {
        let reason = chain(self);
        match self.input() {
            Some(input) => MachineEnd::BadInput { input, reason },
            None => MachineEnd::Failed(reason),
        }
    }
}

/// An error and its causes in one sentence; a cause that its error already tells is not repeated.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
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
    let end = run(&channel).unwrap_or_else(|error| error.end());
    let failed = matches!(end, MachineEnd::BadInput { .. } | MachineEnd::Failed(_));
    let code = if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS };
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
    // Before it reads the kernel image, which may be anybody's, and before it hears a device process.
    jail::enter_setup(PolicyName::CoreSetup)?;
    let core = Arc::new(Core::assemble(start, Descriptors::from(descriptors))?);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_gave_is_told_from_what_failed() {
        let end = |error: CoreError| error.end();
        let input = |error| match end(error) {
            MachineEnd::BadInput { input, reason } => (input, reason),
            other => panic!("{other:?}"),
        };
        let eio = || std::io::Error::from_raw_os_error(libc::EIO);
        let (what, reason) = input(BootError::Read { what: "initrd", source: eio() }.into());
        assert_eq!(what, Input::Initrd);
        assert!(reason.starts_with("cannot read the initrd: Input/output error"), "{reason}");
        assert_eq!(input(BootError::NoPvhNote.into()).0, Input::Kernel);
        assert_eq!(
            input(BootError::CommandLineTooLong { length: 3000, limit: 2047 }.into()).0,
            Input::Setting
        );
        let (what, reason) = input(BuildError::Cpus(255).into());
        assert_eq!(what, Input::Setting);
        assert!(reason.contains("255"), "{reason}");
        assert!(matches!(end(CoreError::NotStarted), MachineEnd::Failed(_)));
        let ours = BootError::MapTooLong { entries: 200, limit: 128 };
        assert!(matches!(end(ours.into()), MachineEnd::Failed(_)));
    }
}
