//! PAM, SMRAM, the hole and firmware, as the CPU sees memory and as the host is told.

use std::os::unix::fs::FileExt;

use bulkhead_ipc::memory::{MappedFile, SharedRegion};

use super::super::memory_map::{Backing, MemorySlot};
use super::super::setup::high_window;
use super::*;

const ROM_SIZE: u64 = 0x4_0000;
const ROM: u64 = (1 << 32) - ROM_SIZE;

/// A machine whose 256 KiB of firmware hold A5.
fn with_rom() -> (Arc<Recorder>, Arc<Machine>) {
    machine_with(1, vec![Rom::chip(ROM, &[0xA5; 0x4_0000])])
}

fn bridge(machine: &Machine, register: u64, value: u64) {
    config_write(machine, (0, 0), register, 1, value);
}

fn peek(machine: &Machine, address: u64) -> u64 {
    read(machine, Space::Memory, address, 1)
}

fn poke(machine: &Machine, address: u64, value: u64) {
    write(machine, Space::Memory, address, 1, value);
}

/// First and last address, whether it is RAM, whether it is writable.
fn told(host: &Recorder) -> Vec<(u64, u64, bool, bool)> {
    let line = |slot: &MemorySlot| {
        (slot.address, slot.address + (slot.size - 1), slot.backing == Backing::Ram, slot.writable)
    };
    host.recorded().slots.iter().map(line).collect()
}

/// Register, shift and first and last address of each PAM area (290549, table in section 3.2.18).
const AREAS: [(u64, u32, u64, u64); 13] = [
    (0x59, 4, 0xF_0000, 0xF_FFFF),
    (0x5A, 0, 0xC_0000, 0xC_3FFF),
    (0x5A, 4, 0xC_4000, 0xC_7FFF),
    (0x5B, 0, 0xC_8000, 0xC_BFFF),
    (0x5B, 4, 0xC_C000, 0xC_FFFF),
    (0x5C, 0, 0xD_0000, 0xD_3FFF),
    (0x5C, 4, 0xD_4000, 0xD_7FFF),
    (0x5D, 0, 0xD_8000, 0xD_BFFF),
    (0x5D, 4, 0xD_C000, 0xD_FFFF),
    (0x5E, 0, 0xE_0000, 0xE_3FFF),
    (0x5E, 4, 0xE_4000, 0xE_7FFF),
    (0x5F, 0, 0xE_8000, 0xE_BFFF),
    (0x5F, 4, 0xE_C000, 0xE_FFFF),
];

#[test]
fn reset_shows_firmware_and_no_ram_between_640_kib_and_1_mib() {
    let (host, _) = with_rom();
    let expected = [
        (0, 0x9_FFFF, true, true),
        (0xE_0000, 0xF_FFFF, false, false),
        (0x10_0000, RAM - 1, true, true),
        (ROM, (1 << 32) - 1, false, false),
    ];
    assert_eq!(told(&host), expected);
    assert_eq!(host.recorded().slots[1].source, (1 << 32) - 0x2_0000, "the last 128 KiB");
}

#[test]
fn a_kernel_that_is_started_directly_has_few_slots() {
    let (host, machine) = machine(1);
    machine.assign_resources();
    let expected =
        [(0, 0x9_FFFF, true, true), (0xC_0000, 0xF_FFFF, true, true), (0x10_0000, RAM - 1, true, true)];
    assert_eq!(told(&host), expected);
}

/// What QEMU's own test leaves out as broken: write-only areas.
#[test]
fn each_pam_area_has_four_modes() {
    let (host, machine) = with_rom();
    for (register, shift, first, last) in AREAS {
        let outside = if first >= 0xE_0000 { 0xA5 } else { 0xFF };
        for (mode, reads, writes) in [(0, false, false), (1, true, false), (2, false, true), (3, true, true)]
        {
            for at in [first, last] {
                bridge(&machine, register, 3 << shift);
                poke(&machine, at, 0x11);
                bridge(&machine, register, mode << shift);
                assert_eq!(peek(&machine, at), if reads { 0x11 } else { outside }, "{at:#x} mode {mode}");
                machine.ram.take_dirty();
                poke(&machine, at, 0x22);
                assert_eq!(machine.ram.take_dirty().pages().eq([at & !0xFFF]), writes, "{at:#x} mode {mode}");
                bridge(&machine, register, 1 << shift);
                assert_eq!(peek(&machine, at), if writes { 0x22 } else { 0x11 }, "{at:#x} mode {mode}");
            }
            bridge(&machine, register, mode << shift);
            let slot = told(&host).into_iter().find(|slot| slot.0 <= first && slot.1 >= last);
            let slot = slot.map(|slot| (slot.2, slot.3));
            let expected = match mode {
                1 => Some((true, false)),
                3 => Some((true, true)),
                _ => (first >= 0xE_0000).then_some((false, false)),
            };
            assert_eq!(slot, expected, "{first:#x} mode {mode}");
        }
        bridge(&machine, register, 0);
    }
}

#[test]
fn a_write_across_two_areas_reaches_each_as_it_is() {
    let (_, machine) = machine(1);
    bridge(&machine, 0x5A, 0x23);
    write(&machine, Space::Memory, 0xC_3FFC, 8, 0x8877_6655_4433_2211);
    assert_eq!(read(&machine, Space::Memory, 0xC_3FFC, 8), 0xFFFF_FFFF_4433_2211);
    bridge(&machine, 0x5A, 0x13);
    assert_eq!(read(&machine, Space::Memory, 0xC_3FFE, 4), 0x6655_4433);
}

#[test]
fn smram_opens_while_enabled_and_never_again_once_locked() {
    let (host, machine) = machine(1);
    for (value, open) in [(0x4A, true), (0x42, false), (0x0A, false), (0x4A, true), (0x6A, true)] {
        bridge(&machine, 0x72, value);
        assert_eq!(told(&host).iter().any(|slot| slot.1 == 0xB_FFFF), open, "{value:#x}");
    }
    poke(&machine, 0xA_0000, 0x77);
    assert_eq!(peek(&machine, 0xA_0000), 0x77);
    bridge(&machine, 0x72, 0x5A);
    assert_eq!(peek(&machine, 0xA_0000), 0xFF);
    for value in [0x4A, 0x48, 0xFF, 0x00] {
        bridge(&machine, 0x72, value);
        assert_eq!(
            config_read(&machine, (0, 0), 0x72, 1) & 0x57,
            0x12,
            "D_OPEN clear, D_LCK and C_BASE_SEG kept"
        );
        assert_eq!(peek(&machine, 0xA_0000), 0xFF);
    }
    machine.reset();
    bridge(&machine, 0x72, 0x4A);
    assert_eq!(peek(&machine, 0xA_0000), 0x77, "SMRAM is DRAM");
}

#[test]
fn the_hole_belongs_to_pci() {
    let (host, machine) = machine(1);
    poke(&machine, 0x8_0000, 0x33);
    bridge(&machine, 0x68, 0x40);
    assert_eq!(peek(&machine, 0x8_0000), 0xFF);
    assert_eq!(told(&host)[0], (0, 0x7_FFFF, true, true));
    bridge(&machine, 0x68, 0x80);
    assert_eq!(peek(&machine, 0x8_0000), 0x33);
    bridge(&machine, 0x68, 0x00);
    assert_eq!(told(&host)[0], (0, 0x9_FFFF, true, true));
}

#[test]
fn reset_restores_the_map() {
    let (host, machine) = with_rom();
    let before = told(&host);
    machine.shadow_ram();
    bridge(&machine, 0x72, 0x4A);
    bridge(&machine, 0x68, 0x40);
    assert_ne!(told(&host), before);
    machine.reset();
    assert_eq!(told(&host), before);
    for register in 0x59..=0x5F {
        assert_eq!(config_read(&machine, (0, 0), register, 1), 0);
    }
}

#[test]
fn a_bar_over_firmware_hides_it_and_one_over_ram_is_hidden() {
    let (host, machine) = with_rom();
    let function = TestFunction::new(2);
    machine.attach_pci(2, function.clone()).unwrap();
    config_write(&machine, (2, 0), 4, 2, 2);
    let before = told(&host);
    // Sizing with decode on: BAR 0 lies at the top of 4 GiB for a moment.
    config_write(&machine, (2, 0), 0x10, 4, 0xFFFF_FFFF);
    assert_ne!(peek(&machine, 0xFFFF_FFF0), 0xA5);
    assert_eq!(told(&host).last(), Some(&(ROM, 0xFFFF_EFFF, false, false)));
    config_write(&machine, (2, 0), 0x10, 4, 0x20_0000);
    assert_eq!(told(&host), before);
    poke(&machine, 0x20_0000, 1);
    assert_eq!(function.writes(), []);
    // In an area that PAM leaves to PCI it answers, and covers a page of the firmware's alias.
    config_write(&machine, (2, 0), 0x10, 4, 0xE_8000);
    poke(&machine, 0xE_8000, 1);
    assert_eq!(function.writes(), [(0, 0, vec![1])]);
    assert!(!told(&host).iter().any(|slot| slot.0 <= 0xE_8000 && slot.1 >= 0xE_8000));
    assert_eq!((peek(&machine, 0xE_7FFF), peek(&machine, 0xE_9000)), (0xA5, 0xA5));
}

#[test]
fn firmware_cannot_be_written() {
    let (_, machine) = with_rom();
    for at in [ROM, 0xFFFF_FFFF, 0xE_0000, 0xF_FFFF] {
        poke(&machine, at, 0);
        assert_eq!(peek(&machine, at), 0xA5, "{at:#x}");
    }
    assert_eq!(peek(&machine, ROM - 1), 0xFF);
}

/// A flash chip: any write turns its bytes into a status, FF turns them back.
struct Flash(GuestRam, Mutex<bool>);

impl MemoryChip for Flash {
    fn name(&self) -> &str {
        "flash"
    }
    fn memory(&self) -> &GuestRam {
        &self.0
    }
    fn shows_bytes(&self) -> bool {
        *lock(&self.1)
    }
    fn read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0x80);
    }
    fn write(&self, _address: u64, data: &[u8]) {
        *lock(&self.1) = data == [0xFF];
    }
    fn reset(&self) {
        *lock(&self.1) = true;
    }
}

#[test]
fn flash_leaves_the_map_while_it_shows_its_status() {
    let flash = Arc::new(Flash(GuestRam::create_at(ROM, ROM_SIZE).unwrap(), Mutex::new(true)));
    let (host, machine) = machine_with(1, vec![flash]);
    let before = told(&host);
    poke(&machine, ROM, 0x70);
    assert_eq!(read(&machine, Space::Memory, ROM + 4, 2), 0x8080);
    assert_eq!(told(&host).len(), before.len() - 2);
    poke(&machine, ROM, 0xFF);
    assert_eq!((peek(&machine, ROM), told(&host)), (0, before.clone()));
    poke(&machine, 0xF_0000, 0x70);
    assert_eq!(peek(&machine, ROM), 0x80, "the alias is the same chip");
    machine.reset();
    assert_eq!(told(&host), before);
}

#[test]
fn a_file_is_a_slot_above_ram_and_nobody_but_the_guest_looks_into_it() {
    let block = 2 << 20;
    let mapped = |guest_address, writable| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(block).unwrap();
        file.write_all_at(&[7; 16], 0).unwrap();
        let region = SharedRegion { guest_address, size: block, offset: 0, fd: file.into() };
        Arc::new(MappedFile::new(region, writable).unwrap())
    };
    let first = 1 << 32;
    let files = vec![mapped(first, true), mapped(first + block, false)];
    let (host, ram) = (Recorder::new(), GuestRam::create(RAM).unwrap());
    let config = MachineConfig { files, ..MachineConfig::new(1, 40) };
    let machine = Machine::new(config, ram, host.clone()).unwrap();
    let slots = host.recorded().slots.clone();
    let above: Vec<_> = slots.iter().filter(|slot| slot.address >= first).collect();
    let seen: Vec<_> =
        above.iter().map(|slot| (slot.address, slot.source, slot.size, slot.writable)).collect();
    assert_eq!(seen, [(first, first, block, true), (first + block, first + block, block, false)]);
    // An access that comes here all the same.
    assert_eq!(read(&machine, Space::Memory, first, 4), 0xFFFF_FFFF);
    write(&machine, Space::Memory, first, 4, 1);
    let window = high_window(&machine.config, machine.ram.end()).unwrap();
    assert!(window.0 >= first + 2 * block, "{window:x?}");
}
