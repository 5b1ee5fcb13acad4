//! Reset values and writable bits of the chipset's configuration registers, through configuration mechanism #1.

use super::super::pci::Register;
use super::super::{i440fx, piix3, piix4_pm};
use super::*;

/// Header registers: offset, value after reset, writable bits; bits cleared by writing ones are not among them.
type Header = [(u16, u32, u32); 6];

const HOST_BRIDGE: Header = [
    (0x00, 0x1237_8086, 0),
    (0x04, 0x0280_0006, 0x0140),
    (0x08, 0x0600_0002, 0),
    (0x0C, 0x0000_0000, 0xF800),
    (0x2C, 0x1100_1AF4, 0),
    (0x3C, 0, 0),
];
const ISA_BRIDGE: Header = [
    (0x00, 0x7000_8086, 0),
    (0x04, 0x0200_0007, 0x0008),
    (0x08, 0x0601_0000, 0),
    (0x0C, 0x0080_0000, 0),
    (0x2C, 0x1100_1AF4, 0),
    (0x3C, 0, 0),
];
const PM: Header = [
    (0x00, 0x7113_8086, 0),
    (0x04, 0x0280_0000, 0x0001),
    (0x08, 0x0680_0003, 0),
    (0x0C, 0, 0),
    (0x2C, 0x1100_1AF4, 0),
    (0x3C, 0x0000_0100, 0x00FF),
];

/// Registers with a meaning of their own, which these tables do not hold.
const SMRAM: u16 = 0x72;

/// Every byte of a function's configuration space: what it is after reset, and which bits stick.
fn check(at: (u64, u64), header: &Header, table: &[Register], skip: &[u16], cpus: u8) {
    let mut expected = [(0_u8, 0_u8); 256];
    for (offset, reset, writable) in header {
        for (index, (reset, writable)) in
            reset.to_le_bytes().into_iter().zip(writable.to_le_bytes()).enumerate()
        {
            expected[usize::from(*offset) + index] = (reset, writable);
        }
    }
    for register in table {
        expected[usize::from(register.offset)] = (register.reset, register.writable);
    }
    let (_, machine) = machine(cpus);
    for (offset, (reset, writable)) in (0_u16..).zip(expected) {
        if skip.contains(&offset) {
            continue;
        }
        let register = u64::from(offset);
        let value = config_read(&machine, at, register, 1);
        assert_eq!(value, u64::from(reset), "{at:?} register {offset:#04x} after reset");
        config_write(&machine, at, register, 1, 0xFF);
        let ones = config_read(&machine, at, register, 1);
        config_write(&machine, at, register, 1, 0x00);
        let zeros = config_read(&machine, at, register, 1);
        assert_eq!(ones ^ zeros, u64::from(writable), "{at:?} register {offset:#04x} writable bits");
        machine.reset();
        assert_eq!(
            config_read(&machine, at, register, 1),
            value,
            "{at:?} register {offset:#04x} after a reset"
        );
    }
}

#[test]
fn host_bridge() {
    check((0, 0), &HOST_BRIDGE, &i440fx::REGISTERS, &[0x51, SMRAM], 1);
    let (_, machine) = machine(1);
    assert_eq!(config_read(&machine, (0, 0), SMRAM.into(), 1), 0x02);
}

#[test]
fn host_bridge_tells_a_second_processor() {
    for (cpus, pmccfg) in [(1, 0x0000), (2, 0x8000)] {
        let (_, machine) = machine(cpus);
        assert_eq!(config_read(&machine, (0, 0), 0x50, 2), pmccfg);
    }
}

#[test]
fn isa_bridge() {
    check((1, 0), &ISA_BRIDGE, &piix3::REGISTERS, &[], 1);
}

#[test]
fn power_management() {
    check((1, 3), &PM, &piix4_pm::REGISTERS, &[], 1);
}

#[test]
fn absent_functions_read_all_ones() {
    let (_, machine) = machine(1);
    for at in [(0, 1), (1, 1), (1, 2), (2, 0), (31, 7)] {
        assert_eq!(config_read(&machine, at, 0, 4), 0xFFFF_FFFF, "{at:?}");
        config_write(&machine, at, 4, 2, 0xFFFF);
    }
}

#[test]
fn bars_report_their_size_and_flags() {
    let (_, machine) = machine(1);
    machine.attach_pci(2, TestFunction::new(2)).unwrap();
    let sizes = [0xFFFF_F00C, 0xFFFF_FFFF, 0xFFFF_FF00, 0, 0xFFFF_FFF1, 0];
    for (register, size) in (0x10..).step_by(4).zip(sizes) {
        config_write(&machine, (2, 0), register, 4, 0xFFFF_FFFF);
        assert_eq!(config_read(&machine, (2, 0), register, 4), size, "{register:#x}");
    }
}
