//! Every register of the three chips: its value after reset, its writable bits, those that ones clear, and its effect.
//!
//! This table stands for itself; it shares nothing with the tables in the code. Sections are those of the datasheets 290549
//! (82441FX PMC), 290550 (82371SB PIIX3) and 290562 (82371AB PIIX4). What was not at hand in the datasheets' own words is founded
//! on at least two that read them independently, named in brackets:
//!
//! - `B`: 86Box, `src/chipset/intel_piix.c` and `intel_4x0.c`;
//! - `C`: Bochs, `iodev/pci.cc` and `pci2isa.cc`, for values after reset;
//! - `D`: DOSLIB's PIIX register dump, which decodes every bit and tells PIIX from PIIX3;
//! - `L`: Linux, `drivers/pci/quirks.c` (PIIX4 device resources), and coreboot's boards that set them;
//! - `R`: Ralf Brown's Interrupt List, release 61, INT 1A/AX=B10Ah/SF=8086h, tables 01229 to 01239 (82441FX, bit by bit), 01217 to
//!   01222 (82371SB) and 01105 (82371AB function 3, names and sizes alone);
//! - `P`: Palacios, `devices/piix4.c`, whose structures name every bit and value after reset;
//! - `T`: the datasheet's text of that section (290550, pages 44 and 45).
//!
//! Where they disagree: MBDMA is 0C after reset (C, P, QEMU) and not 04 (B, as in the PIIX4); bit 3 of it is the PIIX's alone
//! (B, D, P). SEE has no bits 27:16 and has bit 28 (D, P), against B. FTMR is written and read back (T), against B. SMIREQ's
//! bits are set by hardware alone (T).
//!
//! DBC's bits are all named in R alone (B has no such register). PMCCFG and TRC are as B and R have them, but for two bits of
//! PMCCFG: bit 7, which R has as reserved, and the row select strap, which R has as read-only, against B. What a host bus, DRAM
//! chips, parity or a turbo switch would do with them is not modelled; TRC's bit 2 resets.
//!
//! Lines marked (u), all of the 82371AB's device monitors, have a mask that one model alone gives (B). The datasheet's text was
//! not to be had. Looked at: Bochs' `iodev/acpi.cc` and QEMU, which store all bits; Propolis, U-Boot's header of the chip and R, which
//! have names and sizes; L, which reads a few bits of DEVRESA to J, all within these masks; D and P, which have other functions
//! alone. They stay as B has them: no firmware or driver looks at them where there are no monitors, which are not modelled.

use super::super::SlotFunction;
use super::*;

/// Section and name, offset, bytes after reset, writable bits, bits that are cleared by writing ones, effect.
type Line = (&'static str, u16, &'static [u8], &'static [u8], &'static [u8], &'static str);

const NONE: &[u8] = &[];

const HOST_BRIDGE: &[Line] = &[
    ("3.2.2 VID", 0x00, &[0x86, 0x80], NONE, NONE, "identity"),
    ("3.2.3 DID", 0x02, &[0x37, 0x12], NONE, NONE, "identity"),
    ("3.2.4 PCICMD", 0x04, &[0x06, 0x00], &[0x40, 0x01], NONE, "none: no parity, no SERR#"),
    ("3.2.5 PCISTS", 0x06, &[0x80, 0x02], NONE, &[0x00, 0xF1], "none: no errors"),
    ("3.2.6 RID", 0x08, &[0x02], NONE, NONE, "identity"),
    ("3.2.7 CLASSC", 0x09, &[0x00, 0x00, 0x06], NONE, NONE, "identity"),
    ("3.2.8 MLT", 0x0D, &[0x00], &[0xF8], NONE, "none: no bus time"),
    ("3.2.9 HEDT", 0x0E, &[0x00], NONE, NONE, "identity"),
    ("3.2.10 BIST", 0x0F, &[0x00], NONE, NONE, "none"),
    ("subsystem, of the platform", 0x2C, &[0xF4, 0x1A, 0x00, 0x11], NONE, NONE, "identity"),
    ("3.2.11 PMCCFG [BR]", 0x50, &[0x00, 0x00], &[0x74, 0x83], NONE, "none; WPE tells a second CPU"),
    ("3.2.12 DETURBO [BR]", 0x52, &[0x00], &[0xFF], NONE, "none: no speed"),
    ("3.2.13 DBC [R]", 0x53, &[0x80], &[0xFF], NONE, "none: no buffers"),
    ("3.2.14 AXC [BR]", 0x54, &[0x00], &[0x82], NONE, "none"),
    ("3.2.15 DRT [BR]", 0x55, &[0x00, 0x00], &[0xFF, 0xFF], NONE, "none: no rows"),
    ("3.2.16 DRAMC [BR]", 0x57, &[0x01], &[0x77], NONE, "none: no refresh"),
    ("3.2.17 DRAMT [BR]", 0x58, &[0x10], &[0x7F], NONE, "none: no timing"),
    ("3.2.18 PAM0", 0x59, &[0x00], &[0x30], NONE, "each_pam_area_has_four_modes"),
    ("3.2.18 PAM1–6", 0x5A, &[0; 6], &[0x33; 6], NONE, "each_pam_area_has_four_modes"),
    ("3.2.19 DRB0–7", 0x60, &[0x01; 8], &[0xFF; 8], NONE, "none: firmware does not size memory by it"),
    ("3.2.20 FDHC", 0x68, &[0x00], &[0xC0], NONE, "the_hole_belongs_to_pci"),
    ("3.2.21 MTT", 0x70, &[0x00], &[0xF8], NONE, "none: no bus time"),
    ("3.2.22 CLT [BR]", 0x71, &[0x10], &[0x1F], NONE, "none: no bus time"),
    // Written bit by bit, since all ones lock it: smram_opens_while_enabled_and_never_again_once_locked.
    ("3.2.23 SMRAM", 0x72, &[0x02], &[0x68], NONE, "smram_opens_while_enabled_…"),
    ("3.2.24 ERRCMD [BR]", 0x90, &[0x00], &[0x1B], NONE, "none: no errors"),
    ("3.2.25 ERRSTS [BR]", 0x91, &[0x00], NONE, &[0x11], "none: no errors"),
    ("3.2.26 TRC [BR]", 0x93, &[0x00], &[0x0F], NONE, "every_way_to_reset_is_told"),
];

const ISA_BRIDGE: &[Line] = &[
    ("2.2.1 VID", 0x00, &[0x86, 0x80], NONE, NONE, "identity"),
    ("2.2.2 DID", 0x02, &[0x00, 0x70], NONE, NONE, "identity"),
    (
        "2.2.3 PCICMD [BDP: SERR# enable goes with DLC bit 3]",
        0x04,
        &[0x07, 0x00],
        &[0x08, 0x01],
        NONE,
        "none: no special cycles, no SERR#",
    ),
    ("2.2.4 PCISTS", 0x06, &[0x00, 0x02], NONE, &[0x00, 0x78], "none: no errors"),
    ("2.2.5 RID", 0x08, &[0x00], NONE, NONE, "identity"),
    ("2.2.6 CLASSC", 0x09, &[0x00, 0x01, 0x06], NONE, NONE, "identity"),
    ("2.2.7 HEDT", 0x0E, &[0x80], NONE, NONE, "identity: several functions"),
    ("subsystem, of the platform", 0x2C, &[0xF4, 0x1A, 0x00, 0x11], NONE, NONE, "identity"),
    ("2.2.8 IORT", 0x4C, &[0x4D], &[0xFF], NONE, "none: no ISA timing"),
    (
        "2.2.9 XBCS",
        0x4E,
        &[0x03, 0x00],
        &[0xF7, 0x01],
        NONE,
        "chip_selects_gate_clock_and_keyboard_controller",
    ),
    ("2.2.10 PIRQRC A–D", 0x60, &[0x80; 4], &[0x8F; 4], NONE, "an_asserted_pin_follows_its_route"),
    ("2.2.11 TOM", 0x69, &[0x02], &[0xFE], NONE, "none: no ISA masters"),
    ("2.2.12 MSTAT [BDP]", 0x6A, &[0x00, 0x00], &[0xD1, 0x00], &[0x00, 0x80], "none: no USB, no SERR#"),
    ("2.2.13 MBIRQ0 [BCDP]", 0x70, &[0x80], &[0xEF], NONE, "none: no such pin"),
    ("2.2.14 MBDMA0–1 [CP, BDP]", 0x76, &[0x0C, 0x0C], &[0x87, 0x87], NONE, "none: no DMA"),
    ("2.2.15 PCSC", 0x78, &[0x02, 0x00], &[0xFF, 0xFF], NONE, "none: no such pin"),
    ("2.2.16 APICBASE [BCDP]", 0x80, &[0x00], &[0x7F], NONE, "none: the I/O APIC stays where it is"),
    ("2.2.17 DLC [CDP]", 0x82, &[0x00], &[0x0F], NONE, "none: no latency"),
    ("2.2.18 SMICNTL", 0xA0, &[0x08], &[0x1F], NONE, "none: no SMI"),
    ("2.2.19 SMIEN [BCDP]", 0xA2, &[0x00, 0x00], &[0xFF, 0x01], NONE, "none: no SMI"),
    ("2.2.20 SEE [DP]", 0xA4, &[0; 4], &[0xFB, 0xFF, 0x00, 0xF0], NONE, "none: no SMI"),
    ("2.2.21 FTMR [T]", 0xA8, &[0x0F], &[0xFF], NONE, "none: no SMI"),
    ("2.2.22 SMIREQ [T]", 0xAA, &[0x00, 0x00], NONE, NONE, "none: no SMI"),
    ("2.2.23 CTLTMR", 0xAC, &[0x00], &[0xFF], NONE, "none: no throttling"),
    ("2.2.24 CTHTMR", 0xAE, &[0x00], &[0xFF], NONE, "none: no throttling"),
];

const POWER_MANAGEMENT: &[Line] = &[
    ("7.1.1 VID", 0x00, &[0x86, 0x80], NONE, NONE, "identity"),
    ("7.1.2 DID", 0x02, &[0x13, 0x71], NONE, NONE, "identity"),
    ("7.1.3 PCICMD", 0x04, &[0x00, 0x00], &[0x01, 0x00], NONE, "the_smbus_controller_finds_nobody"),
    ("7.1.4 PCISTS", 0x06, &[0x80, 0x02], NONE, &[0x00, 0xF9], "none: no errors"),
    ("7.1.5 RID", 0x08, &[0x03], NONE, NONE, "identity"),
    ("7.1.6 CLASSC", 0x09, &[0x00, 0x80, 0x06], NONE, NONE, "identity"),
    ("7.1.7 HEDT", 0x0E, &[0x00], NONE, NONE, "identity"),
    ("subsystem, of the platform", 0x2C, &[0xF4, 0x1A, 0x00, 0x11], NONE, NONE, "identity"),
    ("7.1.8 INTLN", 0x3C, &[0x00], &[0xFF], NONE, "none, by definition"),
    ("7.1.9 INTPN", 0x3D, &[0x01], NONE, NONE, "identity"),
    ("7.1.10 PMBA", 0x40, &[0x01, 0, 0, 0], &[0xC0, 0xFF, 0, 0], NONE, "the_pm_block_goes_anywhere_…"),
    ("7.1.11 CNTA (u)", 0x44, &[0; 4], &[0xFF; 4], NONE, "none: no monitors"),
    ("7.1.12 CNTB (u)", 0x48, &[0; 4], &[0xFF, 0xFF, 0x73, 0x01], NONE, "none: no monitors"),
    ("7.1.13 GPICTL (u)", 0x4C, &[0; 4], &[0xFF, 0xFF, 0xFF, 0x0F], NONE, "none: no such pins"),
    ("7.1.14 DEVRESD (u)", 0x50, &[0; 3], &[0x3F, 0x58, 0x7F], NONE, "none: no monitors"),
    ("7.1.16 DEVACTA (u)", 0x54, &[0; 4], &[0xFF; 4], NONE, "none: no monitors"),
    (
        "7.1.17 DEVACTB (u), APMC_EN preset",
        0x58,
        &[0, 0, 0, 2],
        &[0x77, 0xFF, 0xFF, 3],
        NONE,
        "firmware skips SMM",
    ),
    ("7.1.18 DEVRESA (u)", 0x5C, &[0; 4], &[0xFF; 4], NONE, "none: no monitors"),
    ("7.1.19 DEVRESB (u)", 0x60, &[0; 4], &[0xFF, 0xFF, 0xFF, 0xF7], NONE, "none: no monitors"),
    ("7.1.20 DEVRESC (u)", 0x64, &[0; 4], &[0xFF, 0xFF, 0xEF, 0xFF], NONE, "none: no monitors"),
    ("7.1.21 DEVRESE [BL]", 0x68, &[0; 3], &[0xFF, 0xFF, 0x1F], NONE, "none: no monitors"),
    ("7.1.22 DEVRESF [BL]", 0x6C, &[0; 4], &[0xFF, 0x80, 0xFF, 0xFF], NONE, "none: no monitors"),
    ("7.1.23 DEVRESG [BL]", 0x70, &[0; 3], &[0xFF, 0xFF, 0x1F], NONE, "none: no monitors"),
    ("7.1.24 DEVRESH [BL: as F]", 0x74, &[0; 4], &[0xFF, 0x80, 0xFF, 0xFF], NONE, "none: no monitors"),
    (
        "7.1.25 DEVRESI, J [BL]",
        0x78,
        &[0; 7],
        &[0xFF, 0xFF, 0x1F, 0, 0xFF, 0xFF, 0x1F],
        NONE,
        "none: no monitors",
    ),
    ("7.1.26 PMREGMISC", 0x80, &[0x00], &[0x01], NONE, "the_pm_block_goes_anywhere_…"),
    ("7.1.27 SMBBA", 0x90, &[0x01, 0, 0, 0], &[0xF0, 0xFF, 0, 0], NONE, "the_smbus_controller_finds_nobody"),
    ("7.1.28 SMBHSTCFG", 0xD2, &[0x09], &[0x0F], NONE, "the_smbus_controller_finds_nobody"),
    ("7.1.29–31 SMBSLVC, SMBSHDW1–2", 0xD3, &[0; 3], &[0xFF; 3], NONE, "none: no slave"),
];

/// A byte as the table wants it: after reset, writable, cleared by ones.
type Byte = (u8, u8, u8);

fn bytes(lines: &[Line]) -> [Byte; 256] {
    let mut expected = [(0, 0, 0); 256];
    for (name, offset, reset, writable, clear, _) in lines {
        for (index, reset) in reset.iter().enumerate() {
            let bits = |bits: &[u8]| bits.get(index).copied().unwrap_or(0);
            let byte = &mut expected[usize::from(*offset) + index];
            assert_eq!(*byte, (0, 0, 0), "{name} overlaps");
            *byte = (*reset, bits(writable), bits(clear));
        }
        assert!(writable.len() <= reset.len() && clear.len() <= reset.len(), "{name}");
    }
    expected
}

/// Every byte of a function's configuration space, whether the table has a line for it or not.
fn check(at: (u64, u64), lines: &[Line]) {
    let (_, machine) = machine(1);
    let place = SlotFunction { slot: u8::try_from(at.0).unwrap(), function: u8::try_from(at.1).unwrap() };
    let function = machine.root.bus.function(place).unwrap();
    for (offset, (reset, writable, clear)) in (0_u16..).zip(bytes(lines)) {
        let register = u64::from(offset);
        let get = || u8::try_from(config_read(&machine, at, register, 1)).unwrap();
        let put = |value: u8| config_write(&machine, at, register, 1, value.into());
        let name = format!("{at:?} register {offset:#04x}");
        assert_eq!(get(), reset, "{name} after reset");
        let mut sticky = 0;
        for bit in (0..8).map(|bit| 1 << bit).filter(|bit| (at, offset, *bit) != ((0, 0), 0x72, 0x10)) {
            put(reset | bit);
            let one = get();
            put(reset & !bit);
            sticky |= (one ^ get()) & bit;
            put(reset);
        }
        assert_eq!(sticky, writable, "{name} writable bits");
        function.config().set(offset, &[reset | clear]);
        put(reset & !clear);
        assert_eq!(get() & clear, clear, "{name} is not cleared by zeros");
        put(reset | 0xFF);
        assert_eq!(get() & clear, 0, "{name} is cleared by ones");
        machine.reset();
        assert_eq!(get(), reset, "{name} after a reset");
    }
    // The same by dwords.
    for (register, expected) in (0_u64..).step_by(4).zip(bytes(lines).chunks(4)) {
        config_write(&machine, at, register, 4, 0xFFFF_FFFF);
        let value = config_read(&machine, at, register, 4).to_le_bytes();
        for (byte, (reset, writable, clear)) in value.iter().zip(expected) {
            let lock = if (at, register) == ((0, 0), 0x70) { 0x50 } else { 0 };
            assert_eq!((byte ^ (reset & !clear | writable)) & !lock, 0, "{at:?} dword {register:#x}");
        }
    }
}

#[test]
fn host_bridge() {
    check((0, 0), HOST_BRIDGE);
}

#[test]
fn isa_bridge() {
    check((1, 0), ISA_BRIDGE);
}

#[test]
fn power_management() {
    check((1, 3), POWER_MANAGEMENT);
}

#[test]
fn host_bridge_tells_a_second_processor() {
    for (cpus, pmccfg) in [(1, 0x0000), (2, 0x8000)] {
        let (_, machine) = machine(cpus);
        assert_eq!(config_read(&machine, (0, 0), 0x50, 2), pmccfg);
    }
}

/// Registers in I/O space: section and name, port, bytes after reset, writable bits. PMBASE is 600.
const PORTS: &[(&str, u64, &[u8], &[u8])] = &[
    ("290550 RCR, bit 2 aside", 0xCF9, &[0x00], &[0x02]),
    ("290550 port 92, bit 0 aside", 0x92, &[0x00], &[0x02]),
    ("290562 7.2.1 PM1_STS", 0x600, &[0, 0], &[0, 0]),
    ("290562 7.2.2 PM1_EN", 0x602, &[0, 0], &[0x21, 0x05]),
    ("290562 7.2.3 PM1_CNT, SLP_EN aside", 0x604, &[0, 0], &[0x03, 0x1C]),
    ("290562 7.2.4 PMTMR, while time stands", 0x608, &[0, 0, 0, 0], &[0, 0, 0, 0]),
    ("290562 7.3 APMC, APMS", 0xB2, &[0, 0], &[0xFF, 0xFF]),
    ("GPE0 of the platform, status", 0xAFE0, &[0, 0], &[0, 0]),
];

#[test]
fn ports() {
    let (host, machine) = machine(1);
    config_write(&machine, (1, 3), 0x40, 2, 0x600);
    config_write(&machine, (1, 3), 0x80, 1, 1);
    for (name, first, reset, writable) in PORTS {
        for ((port, reset), writable) in (*first..).zip(*reset).zip(*writable) {
            assert_eq!(inb(&machine, port), u64::from(*reset), "{name}");
            let ends_machine = match port {
                0xCF9 => 0x04,
                0x92 => 0x01,
                0x605 => 0x20,
                _ => 0,
            };
            outb(&machine, port, 0xFF & !ends_machine);
            assert_eq!(inb(&machine, port), u64::from(*writable), "{name} writable bits");
            outb(&machine, port, 0);
        }
    }
    assert_eq!(host.recorded().power, []);
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
