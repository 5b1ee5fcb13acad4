//! PCI configuration mechanism #1: CONFADD at CF8 and CONFDATA at CFC (290549, section 3.1;
//! PCI Local Bus Specification 3.0, section 3.2.2.3.2).

use std::sync::atomic::{AtomicU32, Ordering};

use super::super::pci::SlotFunction;

/// The bits of CONFADD that exist: enable, bus, device, function, register.
const CONFADD_MASK: u32 = 0x80FF_FFFC;
/// The reserved bits 1:0. They read zero, but software written for QEMU (libqos among it) puts a register's low bits there and
/// reads a byte or word at CFC: they count like the port's own low bits.
const CONFADD_LANE: u32 = 0b11;

/// The two ports. Only aligned dwords reach CONFADD.
#[derive(Debug, Default)]
pub(in super::super) struct ConfigMechanism {
    address: AtomicU32,
}

impl ConfigMechanism {
    /// Reads CONFADD.
    pub(in super::super) fn address(&self) -> u32 {
        self.address.load(Ordering::Acquire) & CONFADD_MASK
    }

    /// Writes CONFADD.
    pub(in super::super) fn set_address(&self, value: u32) {
        self.address.store(value & (CONFADD_MASK | CONFADD_LANE), Ordering::Release);
    }

    /// Which register of which function an access to CONFDATA means, `lane` being the port's low two bits.
    /// Nothing while the mechanism is off, or when the bus is not bus 0: there is no other.
    pub(in super::super) fn target(&self, lane: u64) -> Option<(SlotFunction, u16)> {
        let [register, devfn, bus, enable] = self.address.load(Ordering::Acquire).to_le_bytes();
        if enable & 0x80 == 0 || bus != 0 {
            return None;
        }
        let at = SlotFunction { slot: devfn >> 3, function: devfn & 7 };
        let lane = u16::try_from(lane & 3).unwrap_or(0);
        Some((at, u16::from(register) | lane))
    }

    /// RST#.
    pub(in super::super) fn reset(&self) {
        self.set_address(0);
    }
}
