//! The keyboard controller, ports 60 and 64, whose registers another process holds.
//!
//! What resets the machine is acted upon here: no device process has a say in that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_ipc::channel::message::MachineEnd;
use bulkhead_ipc::vfio_user::Client;

use super::register_device::RemoteDevice;
use super::remote::Remote;
use super::reports::Reports;
use crate::machine::{IsaDevice, PortRange};

/// IRQ 1.
const IRQ: u8 = 1;
const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
/// Command: write the output port, whose bit 0 low holds the processor in reset.
const WRITE_OUTPUT_PORT: u8 = 0xD1;
/// Commands from here on pulse the low bits of the output port that are zero in them.
const PULSE: u8 = 0xF0;
const NOT_RESET: u8 = 1 << 0;

/// The controller.
pub(super) struct Keyboard {
    remote: Arc<Remote<u8>>,
    reports: Arc<Reports>,
    /// The next byte at port 60 is for the output port.
    output_port: AtomicBool,
}

impl Keyboard {
    /// The controller behind `remote`, whose eventfd the caller connects to IRQ 1.
    pub(super) fn new(remote: Arc<Remote<u8>>, reports: Arc<Reports>) -> Self {
        Self { remote, reports, output_port: AtomicBool::new(false) }
    }
}

/// Registers of the process: 0 the data port, 1 the command port.
fn register(port: u16) -> u64 {
    u64::from(port == COMMAND)
}

impl IsaDevice for Keyboard {
    fn name(&self) -> &str {
        self.remote.id()
    }

    fn ports(&self) -> Vec<PortRange> {
        [DATA, COMMAND].map(|first| PortRange { first, count: 1 }).into()
    }

    fn irq(&self) -> Option<u8> {
        Some(IRQ)
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        self.remote.read(register(port), data);
    }

    fn write(&self, port: u16, data: &[u8]) {
        let [value] = *data else { return };
        let next_is_output = port == COMMAND && value == WRITE_OUTPUT_PORT;
        let for_output_port = self.output_port.swap(next_is_output, Ordering::SeqCst);
        let takes_reset = if port == COMMAND { value >= PULSE } else { for_output_port };
        if takes_reset && value & NOT_RESET == 0 {
            tracing::debug!("the guest resets the machine by the keyboard controller");
            return self.reports.end(MachineEnd::Reset);
        }
        self.remote.write(register(port), data);
    }

    fn reset(&self) {
        self.output_port.store(false, Ordering::SeqCst);
        self.remote.exchange(self.remote.lock(), Client::reset);
    }
}

#[cfg(test)]
#[path = "keyboard_tests.rs"]
mod tests;
