//! ACPI tables (ACPI specification 6.5) of the machine as it is when they are asked for: a direct boot asks after
//! [`Machine::assign_resources`], firmware when it selects them in fw_cfg, after it has placed what they describe.

mod dsdt;
mod fadt;
mod hotplug;
mod loader;
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

/// Where they go in a direct boot: the BIOS area, which e820 maps keep from the kernel and where kernels look for the RSDP.
const ADDRESS: u32 = 0xE_0000;
/// From where they end, with hundreds of CPUs; nothing else is at C0000 in a direct boot. SMBIOS comes behind them.
const LONG_ADDRESS: u32 = 0xC_0000;
const ADDRESS_END: usize = 0xF_0000;
/// Every table starts at such a multiple; the FACS must (section 5.2.10).
const ALIGN: usize = 64;
/// Where the generation id lies behind the RSDP.
const GENERATION_ID: usize = 64;
/// Firmware places BARs from here on, below 4 GiB.
const LOW_WINDOW: u32 = 0x8000_0000;

/// Tables one after another, linked for the address `base`.
#[derive(Default)]
struct Placed {
    base: u32,
    blob: Vec<u8>,
    /// Tables with pointers in them, as (offset, length): those that change when they are moved.
    moving: Vec<(usize, usize)>,
    /// Fields that hold addresses of tables, as (offset, bytes).
    pointers: Vec<(usize, u8)>,
    /// The field of 4 bytes that holds the address of the generation id.
    generation: usize,
}

impl Placed {
    /// Appends a table with pointers at these places and returns its guest-physical address.
    fn add(&mut self, table: &[u8], pointers: &[(usize, u8)]) -> u32 {
        self.blob.resize(self.blob.len().next_multiple_of(ALIGN), 0);
        let start = self.blob.len();
        self.blob.extend_from_slice(table);
        self.pointers.extend(pointers.iter().map(|(at, width)| (start.saturating_add(*at), *width)));
        if !pointers.is_empty() {
            self.moving.push((start, table.len()));
        }
        self.base.saturating_add(u32::try_from(start).unwrap_or(u32::MAX))
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.blob.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// Appends the DSDT with the generation id's address in its place.
    fn add_dsdt(&mut self, table: &[u8]) -> u32 {
        let at = table.windows(4).position(|place| place == dsdt::GENERATION_PLACE).unwrap_or(table.len());
        let address = self.base.saturating_add(u32::try_from(GENERATION_ID).unwrap_or(0));
        let placed = self.add(table, &[]);
        let start = self.blob.len().saturating_sub(table.len());
        self.moving.push((start, table.len()));
        self.generation = start.saturating_add(at);
        self.set(self.generation, &address.to_le_bytes());
        let checksum = start.saturating_add(loader::CHECKSUM);
        self.set(checksum, &[0]);
        let sum = self.blob.iter().skip(start).fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
        self.set(checksum, &[sum]);
        placed
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
        let mut placed = self.place_tables(ADDRESS);
        if placed.blob.len() > ADDRESS_END - ADDRESS as usize {
            placed = self.place_tables(LONG_ADDRESS);
        }
        placed.set(GENERATION_ID, &self.generation.id());
        let address = u64::from(placed.base);
        self.generation.placed_at(address.saturating_add(GENERATION_ID as u64));
        AcpiTables { address, rsdp: address, blob: placed.blob }
    }

    fn place_tables(&self, base: u32) -> Placed {
        let low_ram = self.ram.regions().map(|region| region.guest_address.saturating_add(region.size)).min();
        let low_ram = low_ram.and_then(|end| u32::try_from(end).ok()).unwrap_or(0);
        let pm_block = self.pm.block();
        let platform = dsdt::Platform {
            cpus: self.config.cpus,
            apic_ids: &self.config.apic_ids,
            pm_block,
            low_window: low_ram.max(LOW_WINDOW),
            high_window: self.high_bars().or_else(|| high_window(&self.config, self.ram.end())),
            serial: self.isa.decodes(0x3F8),
            keyboard: self.config.keyboard,
        };
        let blob = vec![0; GENERATION_ID.saturating_add(16)];
        let mut placed = Placed { base, blob, ..Placed::default() };
        let facs = placed.add(&bytes(&FACS::new()), &[]);
        let dsdt = placed.add_dsdt(&dsdt::table(&platform));
        let fadt = placed.add(
            &bytes(&fadt::table(facs, dsdt, pm_block, self.config.keyboard)),
            &[(36, 4), (40, 4), (140, 8)],
        );
        let madt = placed.add(&madt::table(self.config.cpus, &self.config.apic_ids), &[]);
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(fadt.into());
        xsdt.add_entry(madt.into());
        let xsdt = placed.add(&bytes(&xsdt), &[(36, 8), (44, 8)]);
        placed.set(0, &bytes(&Rsdp::new(OEM_ID, xsdt.into())));
        placed
    }

    /// From the first to the last BAR that the guest placed above 4 GiB, outside of the window that it is told otherwise.
    fn high_bars(&self) -> Option<(u64, u64)> {
        let window = high_window(&self.config, self.ram.end())?;
        let functions = self.root.bus.functions_in_order();
        let bars = functions.iter().flat_map(|(_, function)| {
            let command = function.config().command();
            function.config().bars().into_iter().filter_map(move |bar| bar.decoded(command))
        });
        let high = bars.filter(|(first, last)| *first >= 1 << 32 && (*first < window.0 || *last > window.1));
        high.reduce(|all, bar| (all.0.min(bar.0), all.1.max(bar.1)))
    }
}
