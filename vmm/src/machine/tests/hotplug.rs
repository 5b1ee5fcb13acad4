//! ACPI hot-plug of functions and CPUs: what the guest's handlers read and write.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::{AttachError, SlotFunction};
use super::*;

const UP: u64 = 0xAE00;
const DOWN: u64 = 0xAE04;
const EJECT: u64 = 0xAE08;
const REMOVABLE: u64 = 0xAE0C;
const SELECT: u64 = 0xAE10;
const GPE0_STS: u64 = 0xAFE0;
const GPE0_EN: u64 = 0xAFE2;
const CPU_SELECTOR: u64 = 0xAF00;
const CPU_FLAGS: u64 = 0xAF04;
const CPU_COMMAND: u64 = 0xAF05;
const CPU_DATA: u64 = 0xAF08;

fn inl(machine: &Machine, port: u64) -> u64 {
    read(machine, Space::Port, port, 4)
}

fn outl(machine: &Machine, port: u64, value: u64) {
    write(machine, Space::Port, port, 4, value);
}

/// A machine whose operating system has taken the PM registers and listens to GPE.1 and GPE.2.
fn listening(machine: &Machine) {
    machine.assign_resources();
    outb(machine, 0xB2, 0xF1);
    outb(machine, GPE0_EN, 0x06);
}

fn sci(host: &Recorder) -> bool {
    host.recorded().irqs & 1 << 9 != 0
}

#[test]
fn an_added_function_is_told_once_by_the_sci() {
    let (host, machine) = machine(1);
    listening(&machine);
    machine.attach_pci(5, TestFunction::new(5)).unwrap();
    assert!(!sci(&host), "attached, and nothing said yet");
    machine.announce_pci(5);
    assert!(sci(&host));
    assert_eq!(inb(&machine, GPE0_STS), 0x02);
    outb(&machine, GPE0_STS, 0x02);
    assert!(!sci(&host));
    assert_eq!(inb(&machine, UP), 0x20, "a part of the register clears nothing");
    assert_eq!((inl(&machine, UP), inl(&machine, UP), inl(&machine, DOWN)), (0x20, 0, 0));
    assert_eq!(config_read(&machine, (5, 0), 0, 4), 0x0005_1234);
}

#[test]
fn an_ejected_function_is_gone_before_the_write_is_over() {
    let (host, machine) = machine(1);
    machine.attach_pci(5, TestFunction::new(5)).unwrap();
    listening(&machine);
    assert!(!host.recorded().doorbells.is_empty());
    machine.request_eject(5);
    assert!(sci(&host));
    assert_eq!((inl(&machine, UP), inl(&machine, DOWN)), (0, 0x20));
    write(&machine, Space::Port, EJECT, 2, 0x20);
    assert_eq!(host.recorded().ejected, [] as [u16; 0], "dwords alone eject");
    outl(&machine, EJECT, 0x20);
    assert_eq!(host.recorded().ejected, [5]);
    assert_eq!(inl(&machine, DOWN), 0);
    assert_eq!(config_read(&machine, (5, 0), 0, 4), 0xFFFF_FFFF);
    assert_eq!(host.recorded().doorbells, []);
    outl(&machine, EJECT, 0x20);
    assert_eq!(host.recorded().ejected, [5], "it is gone already");
}

#[test]
fn the_functions_of_a_slot_are_found_one_by_one_and_ejected_together() {
    let (host, machine) = machine(1);
    let header = |function| config_read(&machine, (5, function), 0x0E, 1);
    let second = SlotFunction { slot: 5, function: 1 }.place();
    machine.attach_pci(5, TestFunction::new(5)).unwrap();
    assert_eq!(header(0), 0x00, "it is alone");
    let pin = machine.attach_pci(second, TestFunction::new(6)).unwrap();
    assert_eq!((header(0), header(1)), (0x80, 0x00));
    assert_eq!(config_read(&machine, (5, 0), 0x0C, 4) >> 16 & 0xFF, 0x80, "by a dword as well");
    assert_eq!(config_read(&machine, (5, 1), 0, 4), 0x0006_1234);
    assert_eq!(config_read(&machine, (6, 0), 0, 4), 0xFFFF_FFFF);
    assert!(matches!(machine.attach_pci(second, TestFunction::new(7)), Err(AttachError::SlotTaken(5))));
    let chipset = SlotFunction { slot: 1, function: 4 }.place();
    assert!(matches!(machine.attach_pci(chipset, TestFunction::new(7)), Err(AttachError::NoSuchSlot(1))));
    listening(&machine);
    pin.set(true);
    assert_eq!(config_read(&machine, (5, 1), 6, 2) & 8, 8, "interrupt status of its own");
    assert_eq!(config_read(&machine, (5, 0), 6, 2) & 8, 0);
    let places: BTreeSet<u8> = host.recorded().doorbells.iter().map(|bell| bell.slot).collect();
    assert_eq!(places, [5, second].into());
    outl(&machine, EJECT, 0x20);
    assert_eq!(host.recorded().ejected, [5, u16::from(second)]);
    assert_eq!(host.recorded().doorbells, []);
    machine.attach_pci(5, TestFunction::new(5)).unwrap();
    assert_eq!(header(0), 0x00);
}

#[test]
fn chipset_and_empty_slots_cannot_be_ejected() {
    let (host, machine) = machine(1);
    assert_eq!(inl(&machine, REMOVABLE), 0xFFFF_FFFC);
    outl(&machine, EJECT, 0xFFFF_FFFF);
    assert_eq!(host.recorded().ejected, [] as [u16; 0]);
    assert_eq!(config_read(&machine, (0, 0), 0, 4), 0x1237_8086);
    assert_eq!(config_read(&machine, (1, 3), 0, 4), 0x7113_8086);
}

#[test]
fn there_is_one_bus() {
    let (host, machine) = machine(1);
    machine.attach_pci(2, TestFunction::new(2)).unwrap();
    machine.announce_pci(2);
    outl(&machine, SELECT, 1);
    for register in [UP, DOWN, EJECT, REMOVABLE] {
        assert_eq!(inl(&machine, register), 0);
    }
    outl(&machine, EJECT, 4);
    assert_eq!(host.recorded().ejected, [] as [u16; 0]);
    assert_eq!(inl(&machine, SELECT), 1);
    outl(&machine, SELECT, 0);
    assert_eq!(inl(&machine, UP), 4);
}

#[test]
fn a_reset_carries_out_what_was_asked_for() {
    let (host, machine) = machine(1);
    for slot in [3, 4] {
        machine.attach_pci(slot, TestFunction::new(slot)).unwrap();
        machine.announce_pci(slot);
    }
    machine.request_eject(4);
    machine.reset();
    assert_eq!(host.recorded().ejected, [4]);
    assert_eq!((inl(&machine, UP), inl(&machine, DOWN)), (0, 0));
    assert_eq!(config_read(&machine, (3, 0), 0, 4), 0x0003_1234);
}

#[test]
fn what_is_pulled_out_without_asking_waits_for_nothing() {
    let (host, machine) = machine(1);
    machine.attach_pci(3, TestFunction::new(3)).unwrap();
    machine.request_eject(3);
    machine.detach_pci(3).unwrap();
    machine.announce_pci(3);
    assert_eq!((inl(&machine, UP), inl(&machine, DOWN)), (8, 0));
    assert_eq!(host.recorded().ejected, [] as [u16; 0], "nobody ejected it");
}

fn machine_with_room(cpus: u16, possible: u16) -> (Arc<Recorder>, Arc<Machine>) {
    let host = Recorder::new();
    let config = MachineConfig { cpus, ..MachineConfig::new(possible, 40) };
    let machine = Machine::new(config, GuestRam::create(RAM).unwrap(), host.clone()).unwrap();
    (host, machine)
}

/// What `CSCN` in the DSDT does: the CPUs with an event, and which event.
fn scan(machine: &Machine) -> Vec<(u64, u64)> {
    outl(machine, CPU_SELECTOR, 0);
    let mut events = Vec::new();
    loop {
        outb(machine, CPU_COMMAND, 0);
        let flags = inb(machine, CPU_FLAGS) & 6;
        if flags == 0 {
            return events;
        }
        events.push((inl(machine, CPU_DATA), flags));
        outb(machine, CPU_FLAGS, flags);
    }
}

#[test]
fn the_number_of_possible_cpus_can_be_found_out() {
    let (_, machine) = machine_with_room(2, 5);
    outl(&machine, CPU_SELECTOR, 0);
    outb(&machine, CPU_COMMAND, 0);
    assert_eq!(inl(&machine, CPU_SELECTOR), 0, "the modern interface");
    let present = |index| {
        outl(&machine, CPU_SELECTOR, index);
        inb(&machine, CPU_FLAGS)
    };
    assert_eq!([0, 1, 2, 3, 4, 5, 0xFFFF_FFFF].map(present), [1, 1, 0, 0, 0, 0, 0]);
    outl(&machine, CPU_SELECTOR, 4);
    assert_eq!(inl(&machine, CPU_DATA), 4);
    outl(&machine, CPU_SELECTOR, 5);
    assert_eq!(inl(&machine, CPU_DATA), 0);
}

#[test]
fn cpus_beyond_8_bits_come_and_go() {
    let (host, machine) = machine_with_room(2, 300);
    listening(&machine);
    assert!(machine.insert_cpu(299) && !machine.insert_cpu(300) && !machine.insert_cpu(1));
    assert_eq!(scan(&machine), [(299, 2)]);
    outl(&machine, CPU_SELECTOR, 299);
    outb(&machine, CPU_COMMAND, 3);
    assert_eq!(inl(&machine, CPU_DATA), 299, "its APIC id");
    outl(&machine, CPU_SELECTOR, 299 + 256);
    assert_eq!(inb(&machine, CPU_FLAGS), 0, "no such CPU");
    assert!(machine.request_cpu_removal(299));
    assert_eq!(scan(&machine), [(299, 4)]);
    outl(&machine, CPU_SELECTOR, 299);
    outb(&machine, CPU_FLAGS, 8);
    assert_eq!(host.recorded().ejected, [299]);
}

#[test]
fn cpus_come_and_go() {
    let (host, machine) = machine_with_room(1, 4);
    listening(&machine);
    assert!(!machine.insert_cpu(0) && !machine.insert_cpu(4), "there already, and not possible");
    assert!(machine.insert_cpu(2) && machine.insert_cpu(3) && !machine.insert_cpu(3));
    assert!(sci(&host));
    assert_eq!(inb(&machine, GPE0_STS), 0x04);
    assert_eq!(scan(&machine), [(2, 2), (3, 2)]);
    assert!(!machine.request_cpu_removal(0) && !machine.request_cpu_removal(1));
    assert!(machine.request_cpu_removal(2));
    assert_eq!(scan(&machine), [(2, 4)]);
    assert_eq!(host.recorded().ejected, [] as [u16; 0]);
    outl(&machine, CPU_SELECTOR, 2);
    outb(&machine, CPU_FLAGS, 8);
    outb(&machine, CPU_FLAGS, 8);
    assert_eq!(host.recorded().ejected, [2]);
    assert_eq!(inb(&machine, CPU_FLAGS), 0);
    outl(&machine, CPU_SELECTOR, 0);
    outb(&machine, CPU_FLAGS, 8);
    assert_eq!(host.recorded().ejected, [2], "the boot processor stays");
    assert!(machine.insert_cpu(2));
    machine.request_cpu_removal(3);
    machine.reset();
    assert_eq!(host.recorded().ejected, [2, 3], "a reset carries out what was asked for");
}

proptest! {
    /// Plug, ask, eject and reset in any order against a set of slots.
    #[test]
    fn slots_hold_what_was_plugged_and_not_ejected(
        steps in proptest::collection::vec((0_u8..5, 2_u8..8), 0..60)
    ) {
        let (host, machine) = machine(1);
        let (mut filled, mut asked) = (BTreeSet::new(), BTreeSet::new());
        let mut ejected = Vec::new();
        for (step, slot) in steps {
            match step {
                0 => {
                    let taken = machine.attach_pci(slot, TestFunction::new(slot)).is_err();
                    prop_assert_eq!(taken, !filled.insert(slot));
                }
                1 if filled.contains(&slot) => {
                    machine.request_eject(slot);
                    asked.insert(slot);
                }
                2 => {
                    outl(&machine, EJECT, 1 << slot);
                    ejected.extend(filled.take(&slot).map(u16::from));
                    asked.remove(&slot);
                }
                3 => {
                    prop_assert_eq!(machine.detach_pci(slot).is_ok(), filled.remove(&slot));
                    asked.remove(&slot);
                }
                4 => {
                    machine.reset();
                    ejected.extend(std::mem::take(&mut asked).iter().filter_map(|slot| filled.take(slot)).map(u16::from));
                }
                _ => {}
            }
            for slot in 2..8 {
                let there = config_read(&machine, (slot.into(), 0), 0, 4) != 0xFFFF_FFFF;
                prop_assert_eq!(there, filled.contains(&slot));
            }
            prop_assert_eq!(&host.recorded().ejected, &ejected);
        }
    }
}

#[test]
fn another_generation_id_is_in_memory_before_the_sci_tells() {
    let (host, machine) = machine(1);
    listening(&machine);
    machine.renew_generation([3; 16]).unwrap();
    assert!(!sci(&host), "nobody has been told of the first one");
    let tables = machine.acpi_tables();
    let at = usize::try_from(tables.rsdp - tables.address).unwrap() + 64;
    assert_eq!(tables.blob[at..at + 16], [3; 16]);
    outb(&machine, GPE0_EN, 0x26);
    machine.renew_generation([4; 16]).unwrap();
    assert!(sci(&host));
    assert_eq!(inb(&machine, GPE0_STS), 0x20);
    let mut id = [0; 16];
    let place = machine.ram.view(tables.address + 64, 16, Direction::Read).unwrap();
    place.read_bytes(0, &mut id).unwrap();
    assert_eq!(id, [4; 16]);
    outb(&machine, GPE0_STS, 0x20);
    assert!(!sci(&host));
}
