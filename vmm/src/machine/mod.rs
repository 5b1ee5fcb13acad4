//! The PC: a tree of buses and devices like the block diagram of the 82441FX PMC, the 82371SB PIIX3 and the 82371AB PIIX4.
//!
//! ```text
//! CPU ── I440Fx ── PciBus 0 ──┬─ host bridge 00:00.0
//!                             ├─ PIIX3 00:01.0 ── IsaBus ── RTC, i8042, UART, fw_cfg …
//!                             ├─ PIIX4 PM 00:01.3
//!                             └─ further functions from 00:02.0
//! ```
//!
//! Knows neither KVM nor files nor processes: what it needs comes through [`Host`].

mod config;
mod host;
mod irq;
pub mod isa;
pub mod pci;
mod sync;

use std::sync::Arc;

pub use config::{AcpiTables, AttachError, MachineConfig};
pub use host::{Host, MappedDoorbell, PowerEvent, ResetSource, Space};
pub use isa::{IrqLine, IsaDevice, PortRange};
pub use pci::{InterruptPin, PciFunction};

/// Stands in until the mapping layer is there.
#[derive(Clone)]
pub struct GuestRam;

/// The machine. Shared by all vCPU threads.
pub struct Machine {
    host: Arc<dyn Host>,
}

impl Machine {
    /// Builds the machine as it is after power-on.
    #[must_use]
    pub fn new(_config: MachineConfig, _ram: GuestRam, host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self { host })
    }

    /// A vCPU reads. Never fails: what nobody claims reads all ones.
    pub fn read(&self, _space: Space, _address: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    /// A vCPU writes. Never fails: what nobody claims drops the write.
    pub fn write(&self, _space: Space, _address: u64, _data: &[u8]) {
        let _ = &self.host;
    }

    /// Plugs a function into `slot` (1–31) of bus 0 as function 0 and returns its interrupt pin (INTA# unless its
    /// configuration space names another).
    ///
    /// # Errors
    /// [`AttachError::NoSuchSlot`], [`AttachError::SlotTaken`].
    pub fn attach_pci(&self, slot: u8, _function: Arc<dyn PciFunction>) -> Result<InterruptPin, AttachError> {
        Err(AttachError::NoSuchSlot(slot))
    }

    /// Unplugs the function in `slot`.
    ///
    /// # Errors
    /// [`AttachError::NoSuchSlot`] when nothing that can be unplugged is there.
    pub fn detach_pci(&self, slot: u8) -> Result<Arc<dyn PciFunction>, AttachError> {
        Err(AttachError::NoSuchSlot(slot))
    }

    /// Puts a device on the ISA bus and returns its interrupt line, if it drives one.
    ///
    /// # Errors
    /// [`AttachError::PortsTaken`].
    pub fn attach_isa(&self, _device: Arc<dyn IsaDevice>) -> Result<Option<IrqLine>, AttachError> {
        Ok(None)
    }

    /// Does what firmware does before it starts an operating system: gives every BAR an address, enables I/O and memory
    /// decode (bus mastering is left to drivers), routes PIRQs, fills in interrupt line registers, places the PM block.
    pub fn assign_resources(&self) {}

    /// The ACPI tables as of now, for a direct boot.
    #[must_use]
    pub fn acpi_tables(&self) -> AcpiTables {
        AcpiTables::default()
    }

    /// Resets every register of every device to its reset value and derives the map anew. The caller has stopped the vCPUs.
    pub fn reset(&self) {}

    /// The power button was pressed and released.
    pub fn press_power_button(&self) {}
}
