//! The programs that device processes are started from: the one beside the supervisor, and those of upgrades.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::resources::Resources;

/// A device program.
#[derive(Debug)]
pub struct DeviceProgram {
    /// The file.
    pub file: OwnedFd,
    /// Its version, as it says.
    pub version: String,
}

/// Which device has another program than the supervisor's own.
#[derive(Debug, Default)]
pub struct Programs {
    upgraded: BTreeMap<String, Rc<DeviceProgram>>,
}

impl Programs {
    /// The program for the processes of a device.
    pub fn of<'a>(&'a self, device: &str, resources: &'a Resources) -> &'a OwnedFd {
        self.upgraded.get(device).map_or(&resources.device_program, |program| &program.file)
    }

    /// Its version.
    pub fn version_of(&self, device: &str) -> &str {
        self.upgraded.get(device).map_or(env!("CARGO_PKG_VERSION"), |program| &program.version)
    }

    /// Processes of this device are started from `program` from now on.
    pub fn upgrade(&mut self, device: &str, program: Rc<DeviceProgram>) {
        self.upgraded.insert(device.to_owned(), program);
    }
}
