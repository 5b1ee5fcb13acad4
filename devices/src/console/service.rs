//! A console as a service: on standard input and output.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use bulkhead_ipc::channel::message::{ConsoleConfig, DeviceConfig};

use crate::standalone::outfit::{Outfit, OutfitError};
use crate::standalone::{ServiceType, StandaloneError};

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "console",
    backend_type: "console",
    features: &[],
    description: "a console on standard input and output (virtio-console, one port)",
    options: &[],
    prepare: |_, outfit| prepare(outfit),
};

fn prepare(outfit: &mut Outfit) -> Result<DeviceConfig, StandaloneError> {
    let (input, output) = ends().map_err(|error| OutfitError::Open {
        what: "console",
        path: "standard input and output".into(),
        error,
    })?;
    // Where the output goes is the user's business, a file of any size too.
    outfit.may_write(None);
    let (input, output) = (Some(outfit.add(input)), Some(outfit.add(output)));
    Ok(DeviceConfig::Console(ConsoleConfig { input, output, size: None, typed: None }))
}

/// Standard input and output. A terminal is opened anew for the output, so that it can be made non-blocking without a change of
/// the shell's flags: one that expands line ends may not take what it polled ready for. Everything else is shared, for its
/// position in the file counts.
fn ends() -> io::Result<(OwnedFd, OwnedFd)> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let output = if stdout.is_terminal() {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        OpenOptions::new().write(true).custom_flags(flags).open("/dev/stdout")?.into()
    } else {
        stdout.as_fd().try_clone_to_owned()?
    };
    Ok((stdin.as_fd().try_clone_to_owned()?, output))
}
