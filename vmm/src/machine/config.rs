//! What a machine is built from, and what it hands out.

use std::fmt;
use std::sync::Arc;

use bulkhead_ipc::memory::MappedFile;

use super::memory_map::MemoryChip;
use super::pci::ConfigError;

/// The parts of a machine that are the user's choice.
#[derive(Clone)]
pub struct MachineConfig {
    /// Number of vCPUs at the start, at least 1.
    pub cpus: u16,
    /// The local APIC ids of all vCPUs that there may be, those at the start first, in ascending order.
    pub apic_ids: Vec<u32>,
    /// Width of guest-physical addresses in bits, as CPUID leaf 8000_0008 tells the guest; bounds the 64-bit PCI window.
    pub address_bits: u8,
    /// The generation id: 128 bits that no other run of a machine has.
    pub generation: [u8; 16],
    /// There is a debug exit port.
    pub debug_exit: bool,
    /// A keyboard controller will be attached, in place of the one without a keyboard that the machine has by itself.
    pub keyboard: bool,
    /// Firmware on the X-bus, lowest address first. None overlaps another.
    pub firmware: Vec<Arc<dyn MemoryChip>>,
    /// Files that the guest sees as memory, beyond RAM. None overlaps another.
    pub files: Vec<Arc<MappedFile>>,
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
    /// Too few or too many vCPUs, or ids that they cannot have.
    #[error("a machine has 1 to {MAX_CPUS} CPUs, not {0}, with APIC ids of 15 bits")]
    Cpus(u16),
    /// An address width that no such CPU has.
    #[error("guest-physical addresses have 36 to 52 bits, not {0}")]
    AddressBits(u8),
    /// More CPUs and slots than there is room for in a direct boot.
    #[error("the ACPI tables are longer than the {0} bytes below SMBIOS")]
    Tables(u64),
    /// A built-in function's registers are defined wrongly.
    #[error("the chipset's configuration space is defined wrongly: {0}")]
    Config(#[from] ConfigError),
    /// Built-in devices decode the same ports.
    #[error("the chipset's devices do not fit together: {0}")]
    Attach(#[from] AttachError),
}

/// The most vCPUs: what three digits in the names of their ACPI objects tell apart.
pub const MAX_CPUS: u16 = 1 << 12;
/// The last APIC id that an interrupt message without remapping can be sent to: 8 bits, and 7 where the guest knows of them.
const LAST_APIC_ID: u32 = 0x7FFF;

impl MachineConfig {
    /// A machine with `cpus` vCPUs, all there from the start, with the APIC ids 0, 1, 2 …, and nothing beyond what every one
    /// has.
    #[must_use]
    pub fn new(cpus: u16, address_bits: u8) -> Self {
        let apic_ids = (0..cpus.into()).collect();
        let (generation, debug_exit, keyboard) = ([0; 16], false, false);
        Self {
            cpus,
            apic_ids,
            address_bits,
            generation,
            debug_exit,
            keyboard,
            firmware: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Checks the limits.
    pub(super) fn check(&self) -> Result<(), BuildError> {
        let ids = &self.apic_ids;
        let fit = ids.is_sorted_by(|a, b| a < b) && ids.last() <= Some(&LAST_APIC_ID);
        if self.cpus == 0 || !(self.cpus.into()..=MAX_CPUS.into()).contains(&ids.len()) || !fit {
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
