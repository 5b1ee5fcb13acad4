//! An Intel 6300ESB watchdog, a PCI function whose registers another process holds: those in its BAR, and those at 60–6B of its
//! configuration space. What follows when it runs out is the supervisor's affair.

use std::ops::Range;
use std::sync::Arc;

use bulkhead_ipc::vfio_user::Client;

use super::remote::Remote;
use crate::machine::pci::{BarKind, ConfigError, ConfigSpace, ConfigSpaceBuilder, Identity, PciFunction};
use crate::virtio::MsiMessage;

/// Where it is on the bus as QEMU has it: subsystem IDs are that of its machines.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25AB,
    revision: 0,
    class: 0x08_80_00,
    subsystem_vendor: 0x1AF4,
    subsystem: 0x1100,
};
/// Configuration register, and lock register.
const REGISTERS: Range<u16> = 0x60..0x6C;
/// An NMI to all CPUs (Intel SDM volume 3, section 11.11).
pub(super) const NMI: MsiMessage = MsiMessage { address: 0xFEEF_F000, data: 0x400 };

/// The function.
pub(super) struct Watchdog {
    remote: Arc<Remote<u8>>,
    config: ConfigSpace,
}

impl Watchdog {
    /// The function behind `remote`.
    pub(super) fn new(remote: Arc<Remote<u8>>) -> Result<Self, ConfigError> {
        let mut config = ConfigSpaceBuilder::new(IDENTITY);
        config.bar(0, BarKind::Memory32, 16)?.register(REGISTERS.start, &[0; 12], &[0xFF; 12])?;
        Ok(Self { remote, config: config.build() })
    }
}

impl PciFunction for Watchdog {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_will_read(&self, offset: u16, _len: usize) {
        if REGISTERS.contains(&offset) {
            let mut data = [0; 12];
            self.remote.read(REGISTERS.start.into(), &mut data);
            self.config.set(REGISTERS.start, &data);
        }
    }

    fn config_written(&self, offset: u16, len: usize) {
        let mut data = [0; 4];
        if let Some(data) = data.get_mut(..len).filter(|_| REGISTERS.contains(&offset)) {
            self.config.read(offset, data);
            self.remote.write(offset.into(), data);
        }
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.remote.read(offset, data);
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.remote.write(offset, data);
    }

    fn reset(&self) {
        self.remote.exchange(self.remote.lock(), Client::reset);
    }
}
