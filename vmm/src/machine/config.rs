//! What a machine is built from, and what it hands out.

use std::fmt;
use std::sync::Arc;

use super::memory_map::MemoryChip;
use super::pci::ConfigError;

/// The parts of a machine that are the user's choice.
#[derive(Clone)]
pub struct MachineConfig {
    /// Number of vCPUs, 1–254; their local APIC ids are 0, 1, 2 …
    pub cpus: u8,
    /// Width of guest-physical addresses in bits, as CPUID leaf 8000_0008 tells the guest; bounds the 64-bit PCI window.
    pub address_bits: u8,
    /// Firmware on the X-bus, lowest address first. None overlaps another.
    pub firmware: Vec<Arc<dyn MemoryChip>>,
}

impl fmt::Debug for MachineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let firmware: Vec<_> = self.firmware.iter().map(|chip| chip.name()).collect();
        write!(f, "{} CPUs, {} address bits, firmware {firmware:?}", self.cpus, self.address_bits)
    }
}

/// A configuration that makes no machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// Too few or too many vCPUs.
    #[error("a machine has 1 to {MAX_CPUS} CPUs, not {0}")]
    Cpus(u8),
    /// An address width that no such CPU has.
    #[error("guest-physical addresses have 36 to 52 bits, not {0}")]
    AddressBits(u8),
    /// A built-in function's registers are defined wrongly.
    #[error("the chipset's configuration space is defined wrongly: {0}")]
    Config(#[from] ConfigError),
    /// Built-in devices decode the same ports.
    #[error("the chipset's devices do not fit together: {0}")]
    Attach(#[from] AttachError),
}

/// The most vCPUs that 8-bit local APIC ids allow: 255 is the broadcast id.
pub const MAX_CPUS: u8 = 254;

impl MachineConfig {
    /// Checks the limits.
    pub(super) fn check(&self) -> Result<(), BuildError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(BuildError::Cpus(self.cpus));
        }
        if !(36..=52).contains(&self.address_bits) {
            return Err(BuildError::AddressBits(self.address_bits));
        }
        Ok(())
    }
}

/// ACPI tables, ready to be copied into guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiTables {
    /// The guest-physical address of `blob`. The first bytes of `blob` are the RSDP.
    pub address: u64,
    /// The guest-physical address of the RSDP.
    pub rsdp: u64,
    /// All tables, linked to each other for `address`.
    pub blob: Vec<u8>,
}

/// A device that cannot be plugged in or out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// No slot of that number that can take a device.
    #[error("PCI slot {0} does not exist, is empty or belongs to the chipset")]
    NoSuchSlot(u8),
    /// There is a device in it.
    #[error("PCI slot {0} is taken")]
    SlotTaken(u8),
    /// Ports that another device, or the host's interrupt controllers and timer, decodes.
    #[error("device {name} wants port {port:#x}, which is taken or does not exist")]
    PortsTaken {
        /// The device's name.
        name: String,
        /// The first such port.
        port: u16,
    },
}
