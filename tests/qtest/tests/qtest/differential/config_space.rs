//! Configuration space of the chipset's functions: reset values, writable bits, and effects of one register on another.

use super::super::random::Random;
use super::Pair;
use super::reviewed::{ConfigDifference, RESET, WRITTEN};

/// 00:00.0, 00:01.0, 00:01.3.
const FUNCTIONS: [u64; 3] = [0x00, 0x08, 0x0B];
const OPERATIONS: usize = 1500;

fn select(pair: &mut Pair, devfn: u64, register: u64) {
    pair.both(&format!("outl 0xcf8 {:#x}", 0x8000_0000 | devfn << 8 | register & 0xFC));
}

/// By function and register: the bits that ever differed.
type Differences = Vec<(u64, u64, u8)>;

/// The functions' registers as they are after a reset on our side.
struct Reset(Vec<(u64, Vec<u64>)>);

impl Reset {
    fn read(pair: &mut Pair) -> Self {
        let mut all = Vec::new();
        for devfn in FUNCTIONS {
            let mut dwords = Vec::new();
            for register in (0..256).step_by(4) {
                select(pair, devfn, register);
                dwords.push(pair.ours.number("inl 0xcfc"));
            }
            all.push((devfn, dwords));
        }
        Self(all)
    }

    /// The bits of a dword that still have their reset value.
    fn unchanged(&self, devfn: u64, register: u64, ours: u64) -> u64 {
        let dwords = &self.0.iter().find(|(other, _)| *other == devfn).unwrap().1;
        !(dwords[usize::try_from(register / 4).unwrap()] ^ ours)
    }
}

fn note(differences: &mut Differences, devfn: u64, register: u64, bits: u64) {
    for (register, bits) in (register..).zip(u32::try_from(bits).unwrap().to_le_bytes()) {
        match differences.iter_mut().find(|(other, at, _)| (*other, *at) == (devfn, register)) {
            Some((_, _, known)) => *known |= bits,
            None if bits != 0 => differences.push((devfn, register, bits)),
            None => {}
        }
    }
}

/// QEMU stores whatever is written from register 40 on, reserved or not. Bits that keep their reset value on our side are
/// therefore no finding; that they have to is for the tests of the registers to say.
fn compare(pair: &mut Pair, reset: &Reset, devfn: u64, register: u64, differences: &mut Differences) {
    select(pair, devfn, register);
    let (ours, theirs) = pair.numbers("inl 0xcfc");
    let reserved = if register >= 0x40 { reset.unchanged(devfn, register, ours) } else { 0 };
    note(differences, devfn, register, (ours ^ theirs) & !reserved);
}

fn judge(what: &str, mut found: Differences, reviewed: &[ConfigDifference]) {
    found.sort_unstable();
    let listed: Differences = reviewed.iter().map(|row| (row.devfn, row.register, row.bits)).collect();
    let show = |rows: Vec<&(u64, u64, u8)>| -> String {
        rows.iter()
            .map(|(devfn, register, bits)| format!("({devfn:#04x}, {register:#04x}, {bits:#04x})\n"))
            .collect()
    };
    let new = show(found.iter().filter(|row| !listed.contains(row)).collect());
    let gone = show(listed.iter().filter(|row| !found.contains(row)).collect());
    assert!(
        new.is_empty() && gone.is_empty(),
        "{what}: not in the table:\n{new}in the table, but not so:\n{gone}"
    );
}

#[test]
fn reset_values_are_those_of_qemu_but_for_the_reviewed_ones() {
    let mut pair = Pair::start();
    let mut differences = Vec::new();
    for devfn in FUNCTIONS {
        for register in (0..256).step_by(4) {
            select(&mut pair, devfn, register);
            let (ours, theirs) = pair.numbers("inl 0xcfc");
            note(&mut differences, devfn, register, ours ^ theirs);
        }
    }
    judge("reset values", differences, &RESET);
}

#[test]
fn registers_take_and_keep_what_those_of_qemu_do_but_for_the_reviewed_ones() {
    let mut pair = Pair::start();
    let reset = Reset::read(&mut pair);
    let mut differences = Vec::new();
    for devfn in FUNCTIONS {
        let mut random = Random(0x0169_0BED ^ devfn);
        for _ in 0..OPERATIONS {
            let (letter, size) = random.of(&[("b", 1), ("w", 2), ("l", 4)]);
            let register = random.below(256 / size) * size;
            let value = match random.below(4) {
                0 => u64::MAX,
                1 => 0,
                _ => random.next(),
            } & ((1 << (8 * size)) - 1);
            // TRC of the host bridge resets this machine, and is a byte like any other in QEMU.
            if devfn == 0 && (register..register + size).contains(&0x93) {
                continue;
            }
            select(&mut pair, devfn, register);
            pair.both(&format!("out{letter} {:#x} {value:#x}", 0xCFC + (register & 3)));
            compare(&mut pair, &reset, devfn, register & 0xFC, &mut differences);
        }
        for register in (0..256).step_by(4) {
            compare(&mut pair, &reset, devfn, register, &mut differences);
        }
    }
    judge("written registers", differences, &WRITTEN);
}
