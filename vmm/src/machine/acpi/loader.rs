//! The tables as firmware takes them: files of fw_cfg and a script that says how to place and link them (the commands of
//! QEMU's `bios-linker-loader`, which SeaBIOS and OVMF carry out).

use super::super::Machine;
use super::super::isa::{FirmwareTables, GENERATION_ADDRESS};
use super::{GENERATION_ID, Placed};

/// Offset of a table's checksum (section 5.2.6).
pub(super) const CHECKSUM: usize = 9;
/// The RSDP: its length, its checksums with the bytes that each counts, and its pointer to the XSDT (section 5.2.5.3).
const RSDP: usize = 36;
const RSDP_CHECKSUMS: [(usize, usize); 2] = [(8, 20), (32, RSDP)];
const RSDP_XSDT: usize = 24;
/// The file of tables is at least so much longer than they are at first: numbers in AML grow when what they describe moves.
const SLACK: usize = 1024;
/// The generation id has a page of its own.
const PAGE: usize = 4096;

/// The files.
const TABLES_FILE: &str = "etc/acpi/tables";
const RSDP_FILE: &str = "etc/acpi/rsdp";
const GENERATION_FILE: &str = "etc/vmgenid_guid";

/// Commands, and the zones of [`ALLOCATE`](command::ALLOCATE).
mod command {
    pub(super) const ALLOCATE: u32 = 1;
    pub(super) const ADD_POINTER: u32 = 2;
    pub(super) const ADD_CHECKSUM: u32 = 3;
    pub(super) const WRITE_POINTER: u32 = 4;
    pub(super) const ZONE_HIGH: u8 = 1;
    pub(super) const ZONE_FSEG: u8 = 2;
}
/// The length of a command and of a file's name in it.
const ENTRY: usize = 128;
const NAME: usize = 56;

/// The script.
#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn entry(&mut self, command: u32, names: &[&str], numbers: &[u32], last: &[u8]) {
        let start = self.0.len();
        self.0.extend(command.to_le_bytes());
        for name in names {
            let end = self.0.len().saturating_add(NAME);
            self.0.extend(name.bytes().take(NAME - 1));
            self.0.resize(end, 0);
        }
        self.0.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self.0.extend(last);
        self.0.resize(start.saturating_add(ENTRY), 0);
    }

    fn allocate(&mut self, file: &str, align: usize, zone: u8) {
        self.entry(command::ALLOCATE, &[file], &[number(align)], &[zone]);
    }

    fn pointer(&mut self, (at, width): (usize, u8), within: &str, to: &str) {
        self.entry(command::ADD_POINTER, &[within, to], &[number(at)], &[width]);
    }

    fn checksum(&mut self, file: &str, at: usize, start: usize, length: usize) {
        self.entry(command::ADD_CHECKSUM, &[file], &[number(at), number(start), number(length)], &[]);
    }
}

/// Offsets within the tables are far below 4 GiB.
fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Machine {
    /// The files that describe the machine as it is now.
    pub(in super::super) fn firmware_tables(&self) -> FirmwareTables {
        let mut placed = self.place_tables(0);
        let mut script = Script::default();
        script.allocate(RSDP_FILE, 16, command::ZONE_FSEG);
        script.allocate(TABLES_FILE, super::ALIGN, command::ZONE_HIGH);
        script.allocate(GENERATION_FILE, PAGE, command::ZONE_HIGH);
        script.pointer((placed.generation, 4), TABLES_FILE, GENERATION_FILE);
        for pointer in &placed.pointers {
            script.pointer(*pointer, TABLES_FILE, TABLES_FILE);
        }
        script.pointer((RSDP_XSDT, 8), RSDP_FILE, TABLES_FILE);
        for (start, length) in std::mem::take(&mut placed.moving) {
            let at = start.saturating_add(CHECKSUM);
            script.checksum(TABLES_FILE, at, start, length);
            placed.set(at, &[0]);
        }
        for (at, length) in RSDP_CHECKSUMS {
            script.checksum(RSDP_FILE, at, 0, length);
            placed.set(at, &[0]);
        }
        let pointer = [0, number(GENERATION_ID)];
        script.entry(command::WRITE_POINTER, &[GENERATION_ADDRESS, GENERATION_FILE], &pointer, &[8]);
        let Placed { mut blob, .. } = placed;
        let rsdp = blob.get(..RSDP).unwrap_or_default().to_vec();
        blob.resize(blob.len().saturating_add(SLACK).next_multiple_of(PAGE), 0);
        let mut generation = vec![0; PAGE];
        for (to, from) in generation.iter_mut().skip(GENERATION_ID).zip(self.generation.id()) {
            *to = from;
        }
        [
            (TABLES_FILE, blob),
            (RSDP_FILE, rsdp),
            (GENERATION_FILE, generation),
            ("etc/table-loader", script.0),
        ]
    }
}
