//! RCR, the reset control register at CF9 (290550).

use std::sync::atomic::{AtomicU8, Ordering};

/// Its port.
pub(in super::super) const PORT: u64 = 0xCF9;
/// Bit 1: hard reset instead of soft.
const SYSTEM_RESET: u8 = 1 << 1;
/// Bit 2: a rising edge resets the CPU.
const RESET_CPU: u8 = 1 << 2;

/// The register.
#[derive(Debug, Default)]
pub(in super::super) struct ResetControl(AtomicU8);

impl ResetControl {
    /// The register as it reads.
    pub(in super::super) fn read(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }

    /// Writes the register. Says whether that resets the machine.
    pub(in super::super) fn write(&self, value: u8) -> bool {
        let value = value & (SYSTEM_RESET | RESET_CPU);
        let before = self.0.swap(value, Ordering::AcqRel);
        value & !before & RESET_CPU != 0
    }

    /// RST#.
    pub(in super::super) fn reset(&self) {
        self.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rising_edge_of_bit_2_resets() {
        let register = ResetControl::default();
        assert!(!register.write(0x02));
        assert_eq!(register.read(), 0x02);
        assert!(register.write(0x06));
        assert!(!register.write(0x06));
        assert!(!register.write(0x00));
        assert!(register.write(0xFF));
        assert_eq!(register.read(), 0x06);
    }
}
