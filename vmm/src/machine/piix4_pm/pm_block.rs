//! The PM register block at PMBASE (290562, section 7.2; ACPI 6.4, section 4.8.3): fixed events, sleep, PM timer.

use std::time::Duration;

/// The length of the block in ports.
pub(in super::super) const PM_BLOCK_SIZE: u64 = 64;
/// The sleep type of S5 in PM1_CNT and in the `_S5` package.
pub(in super::super) const S5_SLEEP_TYPE: u8 = 0;

/// Offsets in the block.
pub(in super::super) mod register {
    /// PM1_STS, 16 bits.
    pub(in super::super::super) const PM1_STS: u64 = 0x00;
    /// PM1_EN, 16 bits.
    pub(in super::super::super) const PM1_EN: u64 = 0x02;
    /// PM1_CNT, 16 bits.
    pub(in super::super::super) const PM1_CNT: u64 = 0x04;
    /// PM_TMR, 32 bits of which the timer has 24.
    pub(in super::super::super) const PM_TMR: u64 = 0x08;
}

/// The timer's frequency in Hz.
const TIMER_HZ: u128 = 3_579_545;
/// The timer's width.
const TIMER_MASK: u32 = 0x00FF_FFFF;

/// PM1_STS: the timer's top bit changed, global lock, power button, RTC alarm, resume.
const STS_TMROF: u16 = 1 << 0;
const STS_PWRBTN: u16 = 1 << 8;
const STS_MASK: u16 = STS_TMROF | 1 << 5 | STS_PWRBTN | 1 << 10 | 1 << 15;
/// PM1_EN: the bits that can be written.
const EN_MASK: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 10;
/// PM1_CNT: events raise the SCI, bus master reload, sleep type, sleep enable (write only).
const CNT_SCI_EN: u16 = 1 << 0;
const CNT_STORED: u16 = CNT_SCI_EN | 1 << 1 | 0b111 << 10;
const CNT_SLP_EN: u16 = 1 << 13;

/// The registers.
#[derive(Debug, Default)]
pub(in super::super) struct PmBlock {
    status: u16,
    enable: u16,
    control: u16,
    /// Timer ticks since the host's clock began, without end.
    ticks: u64,
}

impl PmBlock {
    /// Moves the timer to a moment of the host's monotonic clock.
    pub(super) fn set_time(&mut self, now: Duration) {
        let ticks = now.as_nanos().wrapping_mul(TIMER_HZ).checked_div(1_000_000_000).unwrap_or(0);
        let ticks = u64::try_from(ticks & u128::from(u64::MAX)).unwrap_or(0);
        if (ticks ^ self.ticks) & !u64::from(TIMER_MASK >> 1) != 0 && self.ticks != 0 {
            self.status |= STS_TMROF;
        }
        self.ticks = ticks;
    }

    /// When the timer's top bit changes next, if that raises the SCI.
    pub(super) fn deadline(&self) -> Option<Duration> {
        let wanted = self.sci_enabled() && self.enable & !self.status & STS_TMROF != 0;
        let ticks = u128::from(self.ticks | u64::from(TIMER_MASK >> 1)) + 1;
        let nanos = ticks.saturating_mul(1_000_000_000).div_ceil(TIMER_HZ);
        wanted.then(|| Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// The byte at `offset`. What is not modelled reads zero.
    pub(super) fn read(&self, offset: u64) -> u8 {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = self.control.to_le_bytes();
        let [t0, t1, t2, t3, ..] = (self.ticks & u64::from(TIMER_MASK)).to_le_bytes();
        let bytes = [s0, s1, e0, e1, c0, c1, 0, 0, t0, t1, t2, t3];
        let index = usize::try_from(offset).unwrap_or(usize::MAX);
        bytes.get(index).copied().unwrap_or(0)
    }

    /// Writes the byte at `offset`. Returns the sleep type when that puts the machine to sleep.
    pub(super) fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        let (register, wide, mask) = match offset & 1 {
            0 => (offset, u16::from(value), 0x00FF),
            _ => (offset.wrapping_sub(1), u16::from(value) << 8, 0xFF00),
        };
        match register {
            register::PM1_STS => self.status &= !(wide & STS_MASK),
            register::PM1_EN => self.enable = (self.enable & !mask | wide) & EN_MASK,
            register::PM1_CNT => {
                self.control = (self.control & !mask | wide) & CNT_STORED;
                if wide & CNT_SLP_EN != 0 {
                    return u8::try_from(self.control >> 10 & 0b111).ok();
                }
            }
            _ => {}
        }
        None
    }

    pub(super) fn press_power_button(&mut self) {
        self.status |= STS_PWRBTN;
    }

    pub(super) fn set_sci_enabled(&mut self, on: bool) {
        self.control = self.control & !CNT_SCI_EN | u16::from(on);
    }

    /// Whether events raise the SCI: the operating system owns the registers.
    pub(super) fn sci_enabled(&self) -> bool {
        self.control & CNT_SCI_EN != 0
    }

    /// Whether an enabled event is pending.
    pub(super) fn has_event(&self) -> bool {
        self.status & self.enable != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(block: &PmBlock, offset: u64) -> u16 {
        u16::from_le_bytes([block.read(offset), block.read(offset + 1)])
    }

    #[test]
    fn timer_counts_3579545_times_a_second_in_24_bits() {
        let mut block = PmBlock::default();
        let timer = |block: &PmBlock| u32::from_le_bytes([8, 9, 10, 11].map(|offset| block.read(offset)));
        block.set_time(Duration::from_secs(1));
        assert_eq!(timer(&block), 3_579_545);
        block.set_time(Duration::from_secs(5));
        assert_eq!(timer(&block), 5 * 3_579_545 - (1 << 24));
    }

    #[test]
    fn timer_status_is_set_when_its_top_bit_changes() {
        let mut block = PmBlock::default();
        block.set_time(Duration::from_secs(1));
        assert_eq!(word(&block, register::PM1_STS), 0);
        block.set_time(Duration::from_secs(3));
        assert_eq!(word(&block, register::PM1_STS), STS_TMROF);
        block.write(0, 1);
        assert_eq!(word(&block, register::PM1_STS), 0);
        block.set_time(Duration::from_secs(5));
        assert_eq!(word(&block, register::PM1_STS), STS_TMROF);
    }

    #[test]
    fn status_is_cleared_by_ones_only() {
        let mut block = PmBlock::default();
        block.press_power_button();
        block.write(1, 0x00);
        assert_eq!(word(&block, register::PM1_STS), STS_PWRBTN);
        block.write(1, 0x01);
        assert_eq!(word(&block, register::PM1_STS), 0);
    }

    #[test]
    fn only_sleep_enable_sleeps_and_it_reads_zero() {
        let mut block = PmBlock::default();
        assert_eq!(block.write(5, 0x14), None);
        assert_eq!(block.write(5, 0x34), Some(5));
        assert_eq!(word(&block, register::PM1_CNT), 0x1400);
        assert_eq!(block.write(5, 0x20), Some(S5_SLEEP_TYPE));
    }
}
