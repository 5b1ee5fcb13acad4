//! The tables as bytes. What a compiler makes of the AML is tested with the whole system.

use bulkhead_ipc::memory::GuestRam;

use super::super::config::MAX_CPUS;
use super::super::testing::Recorder;
use super::super::{Machine, MachineConfig};
use super::*;

fn tables(cpus: u16) -> AcpiTables {
    let ram = GuestRam::create(4 << 20).unwrap();
    let config = MachineConfig { generation: [7; 16], ..MachineConfig::new(cpus, 40) };
    let machine = Machine::new(config, ram, Recorder::new()).unwrap();
    machine.assign_resources();
    machine.acpi_tables()
}

fn platform(cpus: u16, apic_ids: &[u32], high_window: Option<(u64, u64)>) -> dsdt::Platform<'_> {
    dsdt::Platform {
        cpus,
        apic_ids,
        pm_block: 0x600,
        low_window: 0xC000_0000,
        high_window,
        serial: true,
        keyboard: false,
    }
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
    let of = |kind| entries(madt, kind);
    assert_eq!(of(0), [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 2, 1, 0, 0, 0]]);
    assert_eq!(of(1).len(), 1);
    assert_eq!(of(2)[0], [0, 0, 2, 0, 0, 0, 0, 0]);
    let level: Vec<(u8, u8, u8)> = of(2)[1..].iter().map(|entry| (entry[1], entry[2], entry[6])).collect();
    assert_eq!(level, [(5, 5, 13), (9, 9, 13), (10, 10, 13), (11, 11, 13)]);
}

/// The structures of this type, without type and length.
fn entries(madt: &[u8], kind: u8) -> Vec<Vec<u8>> {
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while let [other, length, ..] = rest {
        entries.extend((*other == kind).then(|| rest[2..usize::from(*length)].to_vec()));
        rest = &rest[usize::from(*length)..];
    }
    assert!(rest.is_empty());
    entries
}

/// ACPI 6.5, sections 5.2.12.12 and 5.2.12.13.
#[test]
fn processors_with_ids_from_255_on_have_structures_of_their_own() {
    // Sparse, so that a UID (the index) is not the id.
    let madt = madt::table(4, &[0, 2, 254, 255, 0x1234]);
    let madt = madt.as_slice();
    assert_eq!(entries(madt, 0), [[0, 0, 1, 0, 0, 0], [1, 2, 1, 0, 0, 0], [2, 254, 1, 0, 0, 0]]);
    let wide = [([255, 0], 1, 3), ([0x34, 0x12], 2, 4)];
    let wide = wide.map(|([low, high], flags, uid)| [0, 0, low, high, 0, 0, flags, 0, 0, 0, uid, 0, 0, 0]);
    assert_eq!(entries(madt, 9), wide);
    assert_eq!(entries(madt, 10), [[0, 0, 255, 255, 255, 255, 1, 0, 0, 0]]);
    let tables = self::tables(255);
    let madt = listed(&tables)[1];
    assert_eq!((entries(madt, 0).len(), entries(madt, 9).len(), entries(madt, 10).len()), (255, 0, 0));
}

/// Nothing is placed over SMBIOS, whatever there is room for.
#[test]
fn tables_of_many_processors_end_below_smbios() {
    for (present, possible, address) in
        [(255, 255, 0xE_0000), (1024, 1024, 0xE_0000), (MAX_CPUS, MAX_CPUS, 0xC_0000), (1, 1536, 0xC_0000)]
    {
        let config = MachineConfig { cpus: present, ..MachineConfig::new(possible, 40) };
        let machine = Machine::new(config, GuestRam::create(4 << 20).unwrap(), Recorder::new()).unwrap();
        let tables = machine.acpi_tables();
        assert_eq!((tables.address, tables.rsdp), (address, address));
        let end = address + tables.blob.len() as u64;
        assert!(end <= 0xF_0000, "{present} of {possible} CPUs: {end:#x}");
        assert_eq!(listed(&tables).len(), 2);
    }
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
    let tables = tables(255);
    assert!(tables.address + tables.blob.len() as u64 <= 1 << 20);
    assert_eq!(tables.rsdp % 16, 0);
}

#[test]
fn serial_port_is_described_only_when_it_is_there() {
    let find = |blob: &[u8]| blob.windows(4).any(|name| name == b"COM1");
    assert!(!find(&tables(1).blob));
    let platform = platform(1, &[0], None);
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
    let apic_ids: Vec<u32> = (0..300).collect();
    assert_eq!(complaints("madt", &madt::table(2, &apic_ids)), "");
    for cpus in [2, 300] {
        let platform = platform(cpus, &apic_ids, Some((1 << 32, (1 << 36) - 1)));
        assert_eq!(complaints("dsdt", &dsdt::table(&platform)), "");
    }
}

/// The objects that ACPI's reference interpreter says it notifies at these commands, sorted. It does so in threads of its own,
/// which it does not wait for at its end.
fn notified(table: &[u8], commands: &[String]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let [path, input] = ["dsdt.aml", "commands"].map(|name| folder.path().join(name));
    std::fs::write(&path, table).unwrap();
    std::fs::write(&input, commands.join("\n") + "\nquit\n").unwrap();
    let mut command = std::process::Command::new("acpiexec");
    command.arg(&path).current_dir(folder.path()).stdin(std::fs::File::open(input).unwrap());
    let output = command.output().expect("acpiexec of the Debian package acpica-tools is needed");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = said.split("Notify on [").skip(1).map(|rest| rest.split(']').next().unwrap().to_owned());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// The scan halves the CPUs, so that those beside each middle matter.
#[test]
fn each_cpu_is_notified_once_and_none_beyond() {
    let apic_ids: Vec<u32> = (0..40).collect();
    for count in [9, 40] {
        let table = dsdt::table(&platform(1, &apic_ids[..count], None));
        let execute = |index| format!("execute \\_SB.CTFY {index:#x} 3");
        let commands: Vec<_> = (0..count + 2).map(execute).collect();
        let expected: Vec<_> = (0..count).map(|index| format!("C{index:03X}")).collect();
        let says =
            |commands: &[String], expected: &[String]| (0..5).any(|_| notified(&table, commands) == expected);
        assert!(says(&commands, &expected), "{count} CPUs: {:?}", notified(&table, &commands));
        // Which is which: one alone, at its end and at its middle.
        for index in [count / 2, count - 1] {
            assert!(says(&[execute(index)], &expected[index..=index]), "CPU {index} of {count}");
        }
    }
}

/// fw_cfg as firmware reads it: the files by name, and what the loader's script makes of them at these addresses.
mod firmware {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use bulkhead_ipc::memory::Direction;

    use super::super::super::Space;
    use super::*;

    /// What a DMA request does: read after select, write after select.
    const READ: u32 = 1 << 1 | 1 << 3;
    const WRITE: u32 = 1 << 4 | 1 << 3;

    struct Firmware(Arc<Machine>, GuestRam);

    /// Files with their addresses.
    type Placed = BTreeMap<String, (u64, Vec<u8>)>;

    impl Firmware {
        fn new() -> Self {
            let ram = GuestRam::create(4 << 20).unwrap();
            let config = MachineConfig { generation: [7; 16], ..MachineConfig::new(2, 40) };
            let machine = Machine::new(config, ram.clone(), Recorder::new()).unwrap();
            machine.shadow_ram();
            machine.serve_firmware(vec![("etc/test".to_owned(), vec![1, 2, 3])], true);
            Self(machine, ram)
        }

        /// Outcome of a request, with the bytes at its target.
        fn dma(&self, key: u16, command: u32, data: &[u8]) -> (u32, Vec<u8>) {
            let request = self.1.view(0x1000, 16, Direction::ReadWrite).unwrap();
            request.write(0, (u32::from(key) << 16 | command).to_be()).unwrap();
            request.write(4, u32::try_from(data.len()).unwrap().to_be()).unwrap();
            request.write(8, 0x2000_u64.to_be()).unwrap();
            let target = self.1.view(0x2000, data.len() as u64, Direction::ReadWrite).unwrap();
            target.write_bytes(0, data).unwrap();
            self.0.write(Space::Port, 0x518, &0x1000_u32.to_be_bytes());
            let mut bytes = vec![0; data.len()];
            target.read_bytes(0, &mut bytes).unwrap();
            (u32::from_be(request.read(0).unwrap()), bytes)
        }

        /// Key and size of every file.
        fn directory(&self) -> BTreeMap<String, (u16, usize)> {
            let (_, bytes) = self.dma(0x19, READ, &[0; 4 + 64 * 16]);
            let count = u32::from_be_bytes(bytes[..4].try_into().unwrap());
            let files = bytes[4..].chunks(64).take(count as usize).map(|entry| {
                let size = u32::from_be_bytes(entry[..4].try_into().unwrap());
                let name = String::from_utf8_lossy(&entry[8..]).trim_end_matches('\0').to_owned();
                (name, (u16::from_be_bytes([entry[4], entry[5]]), size as usize))
            });
            files.collect()
        }

        fn file(&self, name: &str) -> Vec<u8> {
            let (key, size) = self.directory()[name];
            self.dma(key, READ, &vec![0; size]).1
        }
    }

    /// Carries out the script: the files in memory by name, with their addresses, and what is written back.
    fn link(firmware: &Firmware) -> (Placed, Vec<(String, u64)>) {
        let (mut placed, mut back) = (Placed::new(), Vec::new());
        let mut next = 0x10_0000_u64;
        for entry in firmware.file("etc/table-loader").chunks(128) {
            let name =
                |at: usize| String::from_utf8_lossy(&entry[at..at + 56]).trim_end_matches('\0').to_owned();
            let number = |at: usize| u32_at(entry, at) as usize;
            match u32_at(entry, 0) {
                1 => {
                    next = next.next_multiple_of(number(60) as u64);
                    let file = firmware.file(&name(4));
                    let end = next + file.len() as u64;
                    placed.insert(name(4), (next, file));
                    next = end;
                }
                2 => {
                    let base = placed[&name(60)].0;
                    let (at, width) = (number(116), usize::from(entry[120]));
                    let field = &mut placed.get_mut(&name(4)).unwrap().1[at..at + width];
                    let mut value = [0; 8];
                    value[..width].copy_from_slice(field);
                    let value = u64::from_le_bytes(value) + base;
                    field.copy_from_slice(&value.to_le_bytes()[..width]);
                }
                3 => {
                    let (at, start, length) = (number(60), number(64), number(68));
                    let file = &mut placed.get_mut(&name(4)).unwrap().1;
                    assert_eq!(file[at], 0, "OVMF counts what stands there");
                    let bytes = &file[start..start + length];
                    file[at] = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
                }
                4 => back.push((name(4), placed[&name(60)].0 + number(120) as u64)),
                other => panic!("command {other}"),
            }
        }
        (placed, back)
    }

    #[test]
    fn the_script_links_what_the_direct_boot_has() {
        let firmware = Firmware::new();
        let (placed, back) = link(&firmware);
        let (address, blob) = placed["etc/acpi/tables"].clone();
        let (_, rsdp) = placed["etc/acpi/rsdp"].clone();
        assert_eq!(rsdp.len(), 36);
        for length in [20, 36] {
            assert_eq!(rsdp[..length].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        }
        // As the other tests look at a direct boot: the RSDP stands before the tables there.
        let mut tables = AcpiTables { address, rsdp: address, blob };
        tables.blob[..36].copy_from_slice(&rsdp);
        let signatures: Vec<&[u8]> = listed(&tables).iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC"]);
        let fadt = listed(&tables)[0];
        let dsdt = table(&tables, u32_at(fadt, 40).into());
        assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)));
        assert_eq!(&at(&tables, u32_at(fadt, 36).into())[..4], b"FACS");
        let (guid, page) = placed["etc/vmgenid_guid"].clone();
        let named = dsdt.windows(4).position(|name| name == b"ADDR").unwrap();
        let pointer = u64::from(u32_at(&dsdt[named..], 8));
        assert_eq!(page[usize::try_from(pointer - guid).unwrap()..][..16], [7; 16]);
        assert_eq!(back, [("etc/vmgenid_addr".to_owned(), pointer)]);
    }

    #[test]
    fn another_generation_id_goes_where_firmware_has_placed_the_first() {
        let firmware = Firmware::new();
        firmware.0.renew_generation([8; 16]).unwrap();
        let (_, page) = link(&firmware).0["etc/vmgenid_guid"].clone();
        assert!(page.windows(16).any(|id| id == [8; 16]), "firmware had not asked yet");
        let key = firmware.directory()["etc/vmgenid_addr"].0;
        firmware.dma(key, WRITE, &0x3000_u64.to_le_bytes());
        firmware.0.renew_generation([9; 16]).unwrap();
        let mut id = [0; 16];
        firmware.1.view(0x3000, 16, Direction::Read).unwrap().read_bytes(0, &mut id).unwrap();
        assert_eq!(id, [9; 16]);
        let mut status = [0];
        firmware.0.read(Space::Port, 0xAFE0, &mut status);
        assert_eq!(status, [0x20]);
        firmware.dma(key, WRITE, &u64::MAX.to_le_bytes());
        firmware.0.renew_generation([10; 16]).unwrap_err();
    }

    #[test]
    fn tables_describe_the_machine_when_they_are_selected() {
        let firmware = Firmware::new();
        let pm_block = |firmware: &Firmware| {
            let (placed, _) = link(firmware);
            let (address, mut blob) = placed["etc/acpi/tables"].clone();
            blob[..36].copy_from_slice(&placed["etc/acpi/rsdp"].1);
            let tables = AcpiTables { address, rsdp: address, blob };
            u32_at(listed(&tables)[0], 56)
        };
        assert_eq!(pm_block(&firmware), 0);
        let size = firmware.directory()["etc/acpi/tables"].1;
        for place in [0x600, 0xB000] {
            firmware.0.write(Space::Port, 0xCF8, &0x8000_0B40_u32.to_le_bytes());
            firmware.0.write(Space::Port, 0xCFC, &u32::to_le_bytes(place));
            assert_eq!(pm_block(&firmware), place);
            assert_eq!(firmware.directory()["etc/acpi/tables"].1, size, "firmware was told the size");
        }
    }

    #[test]
    fn only_the_generation_address_can_be_written_and_only_whole() {
        let firmware = Firmware::new();
        let key = |name: &str| firmware.directory()[name].0;
        let address = key("etc/vmgenid_addr");
        assert_eq!(firmware.dma(address, WRITE, &[1; 8]).0, 0);
        assert_eq!(firmware.file("etc/vmgenid_addr"), [1; 8]);
        assert_eq!(firmware.dma(address, WRITE, &[2; 7]).0, 1);
        assert_eq!(firmware.dma(address, WRITE, &[2; 9]).0, 1);
        assert_eq!(firmware.dma(key("etc/test"), WRITE, &[2; 8]).0, 1);
        assert_eq!(firmware.dma(0xFFFF, WRITE, &[2; 8]).0, 1);
        assert_eq!(firmware.file("etc/vmgenid_addr"), [1; 8]);
        assert_eq!(firmware.file("etc/test"), [1, 2, 3]);
    }
}
