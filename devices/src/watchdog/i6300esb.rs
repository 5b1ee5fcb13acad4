//! The watchdog timer of the Intel 6300ESB (datasheet 300641-004, chapter 16): a 35-bit counter that runs out twice before it acts.
//!
//! Registers are named by one byte: 00–0F lie in the memory BAR, 60–6B in configuration space. Times are nanoseconds of any clock
//! that does not go back. As QEMU's does, it resets itself but for the time-out bit when it has acted, and interrupts at the end of
//! the first stage go nowhere.

use serde::{Deserialize, Serialize};

/// Preload values of the two stages, 20 bits each.
const PRELOAD_1: u8 = 0x00;
const PRELOAD_2: u8 = 0x04;
/// The reload register, which is also where the others are unlocked.
const RELOAD: u8 = 0x0C;
/// WDT configuration register and WDT lock register, in configuration space.
const CONFIG: u8 = 0x60;
const LOCK: u8 = 0x68;

const PRELOAD_MASK: u32 = 0xF_FFFF;
/// Reload register: start again with the first stage.
const RELOAD_NOW: u32 = 1 << 8;
/// Reload register: it has run out; cleared by writing one.
const TIMEOUT: u32 = 1 << 9;
/// Where old Linux drivers clear it.
const TIMEOUT_OLD: u32 = 1 << 12;
/// What unlocks the next write, in this order.
const UNLOCK: [u32; 2] = [0x80, 0x86];

/// Configuration: interrupt type, prescaler, output disabled.
const CONFIG_MASK: u8 = 0x27;
const CONFIG_FAST: u8 = 1 << 2;
const CONFIG_NO_OUTPUT: u8 = 1 << 5;
/// Lock: lock it, enable, free-running mode.
const LOCK_MASK: u8 = 0x07;
const LOCK_LOCKED: u8 = 1 << 0;
const LOCK_ENABLED: u8 = 1 << 1;
const LOCK_FREE: u8 = 1 << 2;

/// The PCI clock, Hz, and how many of its periods one count takes, as powers of two: 1 kHz or 1 MHz.
const CLOCK: u64 = 33_000_000;
const SLOW: u32 = 15;
const FAST: u32 = 5;
/// A stage takes no less, lest a guest keeps its process busy: ns.
const SHORTEST: u64 = 1_000_000;

/// What happens at a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was none, or the first stage is over.
    Nothing,
    /// WDT_TOUT# goes low: the machine shall be reset.
    Expired,
}

/// The registers and the counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I6300Esb {
    config: u8,
    lock: u8,
    preload: [u32; 2],
    /// How many of the unlocking writes have come.
    unlocked: u8,
    second_stage: bool,
    timeout: bool,
    deadline: Option<u64>,
}

impl I6300Esb {
    /// After a reset; the time-out bit tells what was before it.
    #[must_use]
    pub const fn new(timeout: bool) -> Self {
        Self {
            config: 0,
            lock: 0,
            preload: [PRELOAD_MASK; 2],
            unlocked: 0,
            second_stage: false,
            timeout,
            deadline: None,
        }
    }

    /// RST#: the time-out bit stays.
    pub const fn reset(&mut self) {
        *self = Self::new(self.timeout);
    }

    /// When [`Self::tick`] is to be called, ns.
    #[must_use]
    pub const fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Puts off a deadline that comes before this moment.
    pub fn postpone(&mut self, until: u64) {
        self.deadline = self.deadline.map(|deadline| deadline.max(until));
    }

    /// What a byte of the registers reads.
    #[must_use]
    pub fn read(&self, register: u8) -> u8 {
        let status = if self.timeout { TIMEOUT } else { 0 };
        let words = [(PRELOAD_1, self.preload[0]), (PRELOAD_2, self.preload[1]), (RELOAD, status)];
        match register {
            CONFIG => self.config,
            LOCK => self.lock,
            _ => {
                let word = words.into_iter().find(|(first, _)| register & !3 == *first).map(|(_, word)| word);
                word.map_or(0, |word| word.to_le_bytes()[usize::from(register & 3)])
            }
        }
    }

    /// The guest writes `value`, of as many bytes as its access has, at `now`.
    pub fn write(&mut self, register: u8, value: u32, now: u64) {
        match (register, self.unlocked) {
            (CONFIG, _) => self.config = value.to_le_bytes()[0] & CONFIG_MASK,
            (LOCK, _) => self.set_lock(value.to_le_bytes()[0] & LOCK_MASK, now),
            (CONFIG.., _) => {}
            (RELOAD, _) if value == UNLOCK[0] => self.unlocked = 1,
            (RELOAD, 1) if value == UNLOCK[1] => self.unlocked = 2,
            (_, unlocked) => {
                self.unlocked = 0;
                if unlocked == 2 {
                    self.unlocked_write(register, value, now);
                }
            }
        }
    }

    fn unlocked_write(&mut self, register: u8, value: u32, now: u64) {
        match register {
            PRELOAD_1 => self.preload[0] = value & PRELOAD_MASK,
            PRELOAD_2 => self.preload[1] = value & PRELOAD_MASK,
            RELOAD => {
                if value & RELOAD_NOW != 0 && self.deadline.is_some() {
                    self.start(false, now);
                }
                if value & (TIMEOUT | TIMEOUT_OLD) != 0 {
                    self.timeout = false;
                }
            }
            _ => {}
        }
    }

    fn set_lock(&mut self, value: u8, now: u64) {
        if self.lock & LOCK_LOCKED != 0 {
            return;
        }
        let before = std::mem::replace(&mut self.lock, value);
        if value & LOCK_ENABLED == 0 {
            self.deadline = None;
        } else if before & LOCK_ENABLED == 0 {
            self.start(false, now);
        }
    }

    fn start(&mut self, second_stage: bool, now: u64) {
        self.second_stage = second_stage;
        let scale = if self.config & CONFIG_FAST == 0 { SLOW } else { FAST };
        let count = u64::from(self.preload[usize::from(second_stage)]) << scale;
        // 2^35 counts are 1041 s: the product fits.
        let nanoseconds = count.saturating_mul(1_000_000_000 / 1_000_000) / (CLOCK / 1_000_000);
        self.deadline = now.checked_add(nanoseconds.max(SHORTEST));
    }

    /// Acts upon the deadline, if it has come.
    pub fn tick(&mut self, now: u64) -> Outcome {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now) else {
            return Outcome::Nothing;
        };
        if !self.second_stage {
            self.start(true, deadline);
            return Outcome::Nothing;
        }
        self.timeout = true;
        let (silent, free) = (self.config & CONFIG_NO_OUTPUT != 0, self.lock & LOCK_FREE != 0);
        if !silent {
            self.reset();
            return Outcome::Expired;
        }
        self.deadline = None;
        if free {
            self.start(false, now);
        }
        Outcome::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn unlock(chip: &mut I6300Esb, register: u8, value: u32, now: u64) {
        chip.write(RELOAD, 0x80, now);
        chip.write(RELOAD, 0x86, now);
        chip.write(register, value, now);
    }

    /// As Linux does it: so many seconds, half of them in each stage.
    fn armed(seconds: u32) -> I6300Esb {
        let mut chip = I6300Esb::new(false);
        chip.write(CONFIG, 3, 0);
        for register in [PRELOAD_1, PRELOAD_2] {
            unlock(&mut chip, register, seconds << 9, 0);
        }
        chip.write(LOCK, 2, 0);
        chip
    }

    /// The moment at which it acts, stage by stage.
    fn end(chip: &mut I6300Esb) -> Option<u64> {
        for _ in 0..4 {
            let deadline = chip.deadline()?;
            assert_eq!(chip.tick(deadline - 1), Outcome::Nothing);
            if chip.tick(deadline) == Outcome::Expired {
                return Some(deadline);
            }
        }
        None
    }

    #[test]
    fn it_runs_out_after_two_stages_within_two_percent() {
        for seconds in [1, 30, 1000] {
            let end = end(&mut armed(seconds)).unwrap();
            let wanted = u64::from(seconds) * SECOND;
            assert!(end.abs_diff(wanted) * 50 < wanted, "{seconds} s: {end}");
        }
    }

    #[test]
    fn a_reload_begins_anew_and_needs_both_keys() {
        let mut chip = armed(2);
        let first = chip.deadline();
        for keys in [&[0x86, 0x80][..], &[0x80], &[0x80, 0x87], &[]] {
            keys.iter().for_each(|key| chip.write(RELOAD, *key, 1));
            chip.write(RELOAD, 0x100, 1);
            assert_eq!(chip.deadline(), first, "{keys:x?}");
        }
        // One write for each unlocking.
        unlock(&mut chip, 0x08, 0, 1);
        chip.write(RELOAD, 0x100, 1);
        assert_eq!(chip.deadline(), first);
        unlock(&mut chip, RELOAD, 0x100, SECOND / 2);
        assert_eq!(chip.deadline(), first.map(|first| first + SECOND / 2));
        // From the second stage, too.
        let second = chip.deadline().unwrap();
        chip.tick(second);
        assert!(chip.second_stage);
        unlock(&mut chip, RELOAD, 0x100, second);
        assert!(!chip.second_stage);
    }

    #[test]
    fn what_is_locked_cannot_be_turned_off() {
        let mut chip = armed(2);
        chip.write(LOCK, 0, 0);
        assert_eq!((chip.deadline(), chip.read(LOCK)), (None, 0));
        chip.write(LOCK, 3, 0);
        chip.write(LOCK, 0, 0);
        assert_eq!(chip.read(LOCK), 3);
        assert!(end(&mut chip).is_some());
        assert_eq!(chip.read(LOCK), 0, "it has reset itself");
    }

    #[test]
    fn a_reload_does_not_start_what_is_off() {
        let mut chip = I6300Esb::new(false);
        unlock(&mut chip, RELOAD, 0x100, 0);
        assert_eq!(chip.deadline(), None);
    }

    #[test]
    fn the_timeout_bit_survives_and_is_cleared_by_one() {
        let mut chip = armed(2);
        assert_eq!(chip.read(RELOAD + 1), 0);
        end(&mut chip).unwrap();
        chip.reset();
        assert_eq!(chip.read(RELOAD + 1), 2);
        unlock(&mut chip, RELOAD, 0x300, 0);
        assert_eq!(chip.read(RELOAD + 1), 0);
    }

    #[test]
    fn without_output_nothing_happens_once_or_for_ever() {
        for (lock, again) in [(2, false), (6, true)] {
            let mut chip = armed(2);
            chip.write(LOCK, 0, 0);
            chip.write(CONFIG, 0x23, 0);
            chip.write(LOCK, lock, 0);
            assert_eq!(end(&mut chip), None);
            assert_eq!((chip.deadline().is_some(), chip.read(RELOAD + 1)), (again, 2), "{lock}");
        }
    }

    #[test]
    fn the_fast_clock_counts_microseconds_and_nothing_is_shorter_than_one_millisecond() {
        let mut chip = armed(2);
        chip.write(LOCK, 0, 0);
        chip.write(CONFIG, 7, 0);
        unlock(&mut chip, PRELOAD_1, 100_000, 0);
        chip.write(LOCK, 2, 0);
        assert!(chip.deadline().unwrap().abs_diff(SECOND / 10) < SECOND / 200);
        for register in [PRELOAD_1, PRELOAD_2] {
            unlock(&mut chip, register, 0, 0);
        }
        unlock(&mut chip, RELOAD, 0x100, 5);
        assert_eq!(chip.deadline(), Some(5 + SHORTEST));
    }

    #[test]
    fn registers_read_what_was_written() {
        let mut chip = armed(2);
        unlock(&mut chip, PRELOAD_2, 0xFFF1_2345, 0);
        let word = |first: u8| [0, 1, 2, 3].map(|byte| chip.read(first + byte));
        assert_eq!(word(PRELOAD_2), [0x45, 0x23, 0x01, 0]);
        assert_eq!((chip.read(CONFIG), chip.read(0x62), chip.read(0x64)), (3, 0, 0));
    }
}
