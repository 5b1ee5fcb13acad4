//! pvpanic, port 505: the guest's kernel says that it panicked.
//!
//! The interface is that of QEMU's `docs/specs/pvpanic`, whose drivers Linux and Windows have; they find it by ACPI.

use std::sync::Arc;

use super::super::host::{Host, PowerEvent};
use super::{IsaDevice, PortRange};

/// Its port.
pub(in super::super) const PORT: u16 = 0x505;
/// The guest panicked; the host shall act.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and handles it itself (it starts a crash kernel); the host shall not disturb it.
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
pub(in super::super) struct PvPanic {
    host: Arc<dyn Host>,
}

impl PvPanic {
    pub(in super::super) fn new(host: Arc<dyn Host>) -> Self {
        Self { host }
    }
}

impl IsaDevice for PvPanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: PORT, count: 1 }]
    }

    /// The events that it knows.
    fn read(&self, _port: u16, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _port: u16, data: &[u8]) {
        let [value] = data else { return };
        if value & PANICKED != 0 {
            self.host.power(PowerEvent::Panicked);
        }
    }

    fn reset(&self) {}
}
