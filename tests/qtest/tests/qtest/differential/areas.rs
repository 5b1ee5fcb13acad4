//! Ports, area by area, and RAM.

use std::collections::{BTreeMap, BTreeSet};

use super::super::peer::Peer;
use super::super::random::Random;
use super::Pair;
use super::reviewed::{FW_CFG, FW_CFG_FILES};

/// Asks both the same and compares.
struct Script {
    pair: Pair,
    /// What was asked last, for the message.
    said: Vec<String>,
}

impl Script {
    fn start() -> Self {
        Self { pair: Pair::start(), said: Vec::new() }
    }

    fn line(&mut self, line: String) {
        let (ours, theirs) = self.pair.both(&line);
        self.said.push(line);
        let from = self.said.len().saturating_sub(12);
        assert_eq!(ours, theirs, "ours and QEMU's answer to the last of {:#?}", &self.said[from..]);
    }

    fn out8(&mut self, port: u64, value: u64) {
        self.line(format!("outb {port:#x} {:#x}", value & 0xFF));
    }

    fn in8(&mut self, port: u64) {
        self.line(format!("inb {port:#x}"));
    }

    fn configure(&mut self, devfn: u64, register: u64, value: u64) {
        self.line(format!("outl 0xcf8 {:#x}", 0x8000_0000 | devfn << 8 | register));
        self.line(format!("outl 0xcfc {value:#x}"));
    }
}

#[test]
fn configuration_mechanism_answers_like_that_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(1));
    for _ in 0..600 {
        let (letter, size) = random.of(&[("b", 1), ("w", 2), ("l", 4)]);
        match random.below(3) {
            // A register of one of the three functions, or a place where there is none; bits 1:0 are another test's.
            0 => {
                let place = random.of(&[0x0000_u32, 0x0800, 0x0B00, 0x0A00, 0x1800, 0xF800]);
                let enable = random.of(&[0x8000_0000_u32, 0x8000_0000, 0]);
                script.line(format!("outl 0xcf8 {:#x}", enable | place | random.of(&[0, 8, 0x0C, 0x2C])));
            }
            1 => script.line(format!("in{letter} {:#x}", 0xCFC + random.below(4 / size) * size)),
            _ => script.line("inl 0xcf8".into()),
        }
    }
}

#[test]
fn cmos_and_clock_answer_like_those_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(2));
    // The time stands still; the century is in 32. What firmware is told about memory and disks is not compared.
    for _ in 0..600 {
        let index = random.of(&[0, 2, 4, 6, 7, 8, 9, 0x32, 1, 3, 5, 0x0D, 0x40, 0x50, 0x7F]);
        script.out8(0x70, index);
        match random.below(4) {
            0 if index >= 0x40 => script.out8(0x71, random.next()),
            // Time and alarm, as BCD that is a time.
            1 if index < 4 => script.out8(0x71, random.of(&[0, 0x10, 0x29, 0x45, 0x59])),
            // Binary or BCD, 24 hours or 12; SET holds the time, no interrupts.
            2 => {
                script.out8(0x70, 0x0B);
                let format = random.of(&[0x02, 0x00]);
                script.out8(0x71, 0x80 | format);
                script.out8(0x71, format);
            }
            _ => script.in8(0x71),
        }
    }
}

#[test]
fn power_management_answers_like_that_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(3));
    script.configure(0x0B, 0x40, 0x600);
    script.configure(0x0B, 0x80, 1);
    // QEMU begins with a timer that has run over.
    script.line("outw 0x600 1".into());
    for _ in 0..600 {
        let word = random.of(&[0x600, 0x602, 0x604]);
        match random.below(5) {
            0 => script.line(format!("inw {word:#x}")),
            // SLP_EN would power off.
            1 if word == 0x604 => script.line(format!("outw 0x604 {:#x}", random.next() & 0x1C01)),
            1 => script.line(format!("outw {word:#x} {:#x}", random.next() & 0x0521)),
            2 => script.line("inl 0x608".into()),
            3 => script.out8(0xB3, random.next()),
            _ => script.in8(random.of(&[0xB3, 0xAFE0, 0xAFE2, 0xAFE3])),
        }
    }
}

#[test]
fn the_power_button_raises_and_lowers_the_sci_like_qemus() {
    let mut script = Script::start();
    script.line("irq_intercept_in ioapic".into());
    script.configure(0x0B, 0x40, 0x600);
    script.configure(0x0B, 0x80, 1);
    // QEMU begins with a timer that has run over.
    script.line("outw 0x600 1".into());
    // QEMU forgets a button that is pressed while its event is not enabled, and raises the SCI without SCI_EN; ACPI does
    // neither (4.8.3.1.1, 4.8.3.2.1).
    for (enable, control) in [(0x100, 1), (0x120, 1), (0x500, 3)] {
        script.line(format!("outw 0x602 {enable:#x}"));
        script.line(format!("outw 0x604 {control:#x}"));
        for peer in [&mut script.pair.ours, &mut script.pair.theirs] {
            assert!(peer.execute("system_powerdown").contains("return"));
            peer.event("POWERDOWN");
        }
        script.line("inw 0x600".into());
        script.line("outw 0x600 0x100".into());
        script.line("inw 0x600".into());
        assert_eq!(script.pair.ours.irqs, script.pair.theirs.irqs, "enable {enable:#x} control {control:#x}");
    }
    assert!(script.pair.ours.irqs.contains(&"raise 9".to_owned()));
}

#[test]
fn fw_cfg_answers_like_that_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(4));
    // Every well-known item, and places where there is none.
    let mut faults = Vec::new();
    for key in 0..0x1A_u64 {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        script.line(format!("outw 0x510 {key:#x}"));
        for _ in 0..20 {
            let (our, their) = script.pair.numbers("inb 0x511");
            ours.push(our);
            theirs.push(their);
        }
        // The directory is compared by names.
        let reviewed = key == 0x19 || FW_CFG.iter().any(|item| item.0 == key);
        if (ours != theirs) != reviewed {
            faults.push(format!("item {key:#x}: {ours:x?}, of QEMU {theirs:x?}"));
        }
    }
    faults.extend(files_that_differ(&mut script));
    assert!(faults.is_empty(), "{faults:#?}");
    for line in ["inl 0x514", "inl 0x518", "inb 0x514", "inw 0x516"] {
        script.line(line.into());
    }
    // DMA requests: control and length as they come, of items that both have, into RAM, beyond it, and across its end.
    for _ in 0..300 {
        let key = random.of(&[0, 1, 5]) << 16;
        let control = random.of(&[0x0A, 0x02, 0x0C, 0x04, 0x08, 0x00, 0x0E])
            | if random.below(2) == 0 { key } else { 0 };
        let length = random.of(&[0, 1, 4, 7, 64, 0x1000]);
        let target = random.of(&[0x2000_u64, 0x2FFC, 0x10_0000, (64 << 20) - 64]);
        let control = if control & 8 == 0 { control & 0xFFFF } else { control };
        script.line(format!("write 0x1000 16 0x{control:08x}{length:08x}{target:016x}"));
        script.line(format!("write {target:#x} 8 0x5555555555555555"));
        script.line("outl 0x514 0".into());
        script.line(format!("outl 0x518 {:#x}", 0x1000_u32.swap_bytes()));
        script.line("read 0x1000 4".into());
        // Of what ends beyond RAM QEMU transfers a part, and says that it failed; here nothing is transferred.
        if target + length <= 64 << 20 {
            script.line(format!("read {target:#x} 16"));
        }
    }
}

/// What names and lengths in the directory differ, and should not.
fn files_that_differ(script: &mut Script) -> Vec<String> {
    let read = |peer: &mut Peer, count: usize| -> Vec<u8> {
        (0..count).map(|_| u8::try_from(peer.number("inb 0x511")).unwrap_or(0)).collect()
    };
    let directory = |peer: &mut Peer| -> BTreeMap<String, u32> {
        peer.ok("outw 0x510 0x19");
        let count = u32::from_be_bytes(read(peer, 4).try_into().unwrap());
        let entry = |peer: &mut Peer| {
            let bytes = read(peer, 64);
            let name =
                bytes.iter().skip(8).take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
            (name, u32::from_be_bytes(bytes[..4].try_into().unwrap()))
        };
        (0..count).map(|_| entry(peer)).collect()
    };
    let (ours, theirs) = (directory(&mut script.pair.ours), directory(&mut script.pair.theirs));
    let names: BTreeSet<&str> = ours.keys().chain(theirs.keys()).map(String::as_str).collect();
    let reviewed = |name: &str| FW_CFG_FILES.iter().any(|file| file.0 == name);
    let differs = names.into_iter().filter(|name| (ours.get(*name) != theirs.get(*name)) != reviewed(name));
    differs.map(|name| format!("{name}: {:?}, of QEMU {:?}", ours.get(name), theirs.get(name))).collect()
}

#[test]
fn reset_and_delay_ports_answer_like_those_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(5));
    for _ in 0..300 {
        // Values that do not reset the machine.
        let (port, mask) = random.of(&[(0xCF9, 0x02), (0x92, 0x02)]);
        match random.below(2) {
            0 => script.out8(port, random.next() & mask),
            _ => script.in8(port),
        }
    }
    for port in [0x2E8, 0x279, 0x3E8, 0x2F8, 0x500] {
        script.in8(port);
    }
}

#[test]
fn keyboard_controller_answers_like_that_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(6));
    for _ in 0..200 {
        // Self-test, interface test, output port, command byte: each leaves one byte to read.
        match random.below(4) {
            0 => script.out8(0x64, 0xAA),
            1 => script.out8(0x64, 0xAB),
            2 => {
                script.out8(0x64, 0x60);
                // Bit 5 stays set, for there is no auxiliary interface.
                script.out8(0x60, random.next() & 0x14 | 0x20);
                script.out8(0x64, 0x20);
            }
            _ => {
                script.out8(0x64, 0xD2);
                script.out8(0x60, random.next());
            }
        }
        script.in8(0x60);
    }
}

#[test]
fn ram_answers_like_that_of_qemu() {
    let (mut script, mut random) = (Script::start(), Random(7));
    for _ in 0..300 {
        let address = random.of(&[0x1000_u64, 0x1FFF, 0x10_0000, 0x3F_FFFD]) + random.below(9);
        let (letter, size) = random.of(&[("b", 1_u64), ("w", 2), ("l", 4), ("q", 8)]);
        match random.below(4) {
            0 => script.line(format!("read{letter} {address:#x}")),
            1 => script.line(format!("write{letter} {address:#x} {:#x}", random.next())),
            2 => script.line(format!("memset {address:#x} {:#x} {:#x}", size * 3, random.below(256))),
            _ => script.line(format!("b64read {address:#x} {:#x}", 1 + random.below(20))),
        }
    }
}
