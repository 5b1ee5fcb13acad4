//! The tables as bytes. What a compiler makes of the AML is tested with the whole system.

use bulkhead_ipc::memory::GuestRam;

use super::super::testing::Recorder;
use super::super::{Machine, MachineConfig};
use super::*;

fn tables(cpus: u8) -> AcpiTables {
    let ram = GuestRam::create(4 << 20).unwrap();
    let config = MachineConfig { cpus, address_bits: 40, firmware: Vec::new() };
    let machine = Machine::new(config, ram, Recorder::new()).unwrap();
    machine.acpi_tables()
}

fn at(tables: &AcpiTables, address: u64) -> &[u8] {
    &tables.blob[usize::try_from(address - tables.address).unwrap()..]
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// A table by its address: as long as it says, with its checksum right.
fn table(tables: &AcpiTables, address: u64) -> &[u8] {
    let bytes = at(tables, address);
    let bytes = &bytes[..u32_at(bytes, 4) as usize];
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    assert_eq!(sum, 0, "checksum of {:?}", String::from_utf8_lossy(&bytes[..4]));
    bytes
}

/// The tables that the XSDT lists.
fn listed(tables: &AcpiTables) -> Vec<&[u8]> {
    let rsdp = at(tables, tables.rsdp);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    for length in [20, 36] {
        assert_eq!(rsdp[..length].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }
    let xsdt = table(tables, u64_at(rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    xsdt[36..].chunks(8).map(|entry| table(tables, u64_at(entry, 0))).collect()
}

#[test]
fn every_table_is_linked_and_sums_to_zero() {
    let tables = tables(2);
    let signatures: Vec<&[u8]> = listed(&tables).iter().map(|table| &table[..4]).collect();
    assert_eq!(signatures, [b"FACP", b"APIC"]);
    let fadt = listed(&tables)[0];
    let (facs, dsdt) = (u32_at(fadt, 36), u32_at(fadt, 40));
    assert!(facs.is_multiple_of(64));
    assert_eq!(&at(&tables, facs.into())[..4], b"FACS");
    assert_eq!(u32_at(at(&tables, facs.into()), 4), 64);
    assert_eq!(&table(&tables, dsdt.into())[..4], b"DSDT");
    assert_eq!(u64_at(fadt, 140), u64::from(dsdt));
}

#[test]
fn madt_lists_every_cpu_the_io_apic_and_the_overrides() {
    let tables = tables(3);
    let madt = listed(&tables)[1];
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xFEE0_0000, 1));
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while let [kind, length, ..] = rest {
        entries.push((*kind, rest[2..usize::from(*length)].to_vec()));
        rest = &rest[usize::from(*length)..];
    }
    assert!(rest.is_empty());
    let of = |kind| {
        entries.iter().filter(|entry| entry.0 == kind).map(|entry| entry.1.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(0), [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 2, 1, 0, 0, 0]]);
    assert_eq!(of(1).len(), 1);
    assert_eq!(of(2)[0], [0, 0, 2, 0, 0, 0, 0, 0]);
    let level: Vec<(u8, u8, u8)> = of(2)[1..].iter().map(|entry| (entry[1], entry[2], entry[6])).collect();
    assert_eq!(level, [(5, 5, 13), (9, 9, 13), (10, 10, 13), (11, 11, 13)]);
}

#[test]
fn fixed_hardware_is_where_the_machine_has_it() {
    let tables = tables(1);
    let fadt = listed(&tables)[0];
    assert_eq!(fadt[46..48], [9, 0], "SCI_INT");
    assert_eq!((u32_at(fadt, 48), fadt[52], fadt[53]), (0xB2, 0xF1, 0xF0));
    assert_eq!((u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76)), (0x600, 0x604, 0x608));
    assert_eq!(u32_at(fadt, 80), 0xAFE0);
    assert_eq!((fadt[88], fadt[89], fadt[91], fadt[92]), (4, 2, 4, 4));
    assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xCF9, 6), "RESET_REG");
    assert_eq!((u64_at(fadt, 152), u64_at(fadt, 176), u64_at(fadt, 212)), (0x600, 0x604, 0x608));
}

#[test]
fn tables_of_the_largest_machine_fit_below_one_mib() {
    let tables = tables(254);
    assert!(tables.address + tables.blob.len() as u64 <= 1 << 20);
    assert_eq!(tables.rsdp % 16, 0);
}

#[test]
fn serial_port_is_described_only_when_it_is_there() {
    let find = |blob: &[u8]| blob.windows(4).any(|name| name == b"COM1");
    assert!(!find(&tables(1).blob));
    let platform = dsdt::Platform { cpus: 1, high_window: None, serial: true };
    assert!(find(&dsdt::table(&platform)));
}

/// Disassembles and recompiles a table with `iasl`, which checks what it reads; returns what it complained about.
fn complaints(name: &str, table: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new("iasl").args(arguments).current_dir(folder.path()).output();
        let output = output.expect("iasl of the Debian package acpica-tools is needed");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    std::fs::write(folder.path().join(format!("{name}.aml")), table).unwrap();
    let texts = [run(&["-d", &format!("{name}.aml")]), run(&["-p", "again", &format!("{name}.dsl")])];
    let bad = ["Error", "Warning", "Remark", "Invalid", "mismatch"];
    let lines = texts.iter().flat_map(|text| text.lines());
    let lines: Vec<_> = lines.filter(|line| bad.iter().any(|word| line.contains(word))).collect();
    assert!(texts[1].contains("Compilation successful. 0 Errors"), "{}", texts[1]);
    lines.into_iter().filter(|line| !line.contains("0 Errors, 0 Warnings, 0 Remarks")).collect()
}

#[test]
fn iasl_accepts_every_table() {
    let tables = tables(2);
    let fadt = listed(&tables)[0];
    assert_eq!(complaints("fadt", fadt), "");
    assert_eq!(complaints("madt", listed(&tables)[1]), "");
    let facs = &at(&tables, u32_at(fadt, 36).into())[..64];
    assert_eq!(complaints("facs", facs), "");
    let platform = dsdt::Platform { cpus: 254, high_window: Some((1 << 32, (1 << 36) - 1)), serial: true };
    assert_eq!(complaints("dsdt", &dsdt::table(&platform)), "");
}
