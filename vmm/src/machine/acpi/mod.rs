//! ACPI tables (ACPI specification 6.5) for a machine that starts a kernel directly.
//!
//! They describe the machine as [`Machine::assign_resources`] leaves it.

mod dsdt;
mod fadt;
mod hotplug;
mod madt;

#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use super::Machine;
use super::config::AcpiTables;
use super::setup::high_window;

/// Who made the tables.
const OEM_ID: [u8; 6] = *b"BULKHD";
const OEM_TABLE_ID: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;

/// Where they go: the BIOS area, which e820 maps keep from the kernel and where kernels look for the RSDP.
const ADDRESS: u32 = 0xE_0000;
/// Every table starts at such a multiple; the FACS must (section 5.2.10).
const ALIGN: usize = 64;

/// Tables one after another, at known addresses.
struct Placed {
    blob: Vec<u8>,
}

impl Placed {
    /// Appends a table and returns its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u32 {
        self.blob.resize(self.blob.len().next_multiple_of(ALIGN), 0);
        let offset = self.blob.len();
        self.blob.extend_from_slice(table);
        ADDRESS.saturating_add(u32::try_from(offset).unwrap_or(u32::MAX))
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

impl Machine {
    /// The ACPI tables of the machine as it is now, for a direct boot. The RSDP comes first.
    #[must_use]
    pub fn acpi_tables(&self) -> AcpiTables {
        let platform = dsdt::Platform {
            cpus: self.config.cpus,
            apic_ids: &self.config.apic_ids,
            high_window: high_window(&self.config, self.ram.end()),
            serial: self.isa.decodes(0x3F8),
        };
        let mut placed = Placed { blob: vec![0; Rsdp::len()] };
        let facs = placed.add(&bytes(&FACS::new()));
        let dsdt = placed.add(&dsdt::table(&platform));
        let fadt = placed.add(&bytes(&fadt::table(facs, dsdt)));
        let madt = placed.add(&madt::table(self.config.cpus, &self.config.apic_ids));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(fadt.into());
        xsdt.add_entry(madt.into());
        let xsdt = placed.add(&bytes(&xsdt));
        let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt.into()));
        for (to, from) in placed.blob.iter_mut().zip(rsdp) {
            *to = from;
        }
        AcpiTables { address: ADDRESS.into(), rsdp: ADDRESS.into(), blob: placed.blob }
    }
}
