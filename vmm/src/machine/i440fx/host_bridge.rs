//! The host bridge as a function on its own bus, 00:00.0 (290549, section 3.2).

use std::sync::{Arc, Mutex};

use super::super::host::{Host, PowerEvent, ResetSource};
use super::super::pci::{
    ConfigError, ConfigSpace, ConfigSpaceBuilder, Identity, PciFunction, Register, header,
};
use super::super::sync::lock;
use super::super::tree::Topology;

/// System management RAM control.
const SMRAM: u16 = 0x72;
const SMRAM_D_OPEN: u8 = 0x40;
const SMRAM_D_LCK: u8 = 0x10;
const SMRAM_G_SMRAME: u8 = 0x08;
/// Fixed DRAM hole control.
const FDHC: u16 = 0x68;
/// Programmable attribute map: 13 areas, four bits each, of which bit 0 lets reads and bit 1 writes reach DRAM. The low
/// nibble of PAM0 is reserved.
const PAM0: u16 = 0x59;
const PAM6: u16 = 0x5F;
/// All areas are RAM.
const PAM_SHADOWED: [u8; 7] = [0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33];

/// Turbo reset control, 3.2.26; a rising edge of bit 2 resets, as in the PIIX3's register at port CF9.
const TRC: u16 = 0x93;
const TRC_RESET_CPU: u8 = 0x04;

/// The registers beyond the header: offset, value after reset, writable bits.
pub(in super::super) const REGISTERS: [Register; 8] = [
    // 3.2.11 PMCCFG low byte: EPTE, DDIM, IOQS.
    Register { offset: 0x50, reset: &[], writable: &[0x74] },
    // 3.2.12 DETURBO, 3.2.13 DBC, 3.2.14 AXC, 3.2.15 DRT
    Register { offset: 0x52, reset: &[0x00, 0x80], writable: &[0xFF, 0xFF, 0x82, 0xFF, 0xFF] },
    // 3.2.16 DRAMC, 3.2.17 DRAMT
    Register { offset: 0x57, reset: &[0x01, 0x10], writable: &[0x77, 0x7F] },
    // 3.2.18 PAM0–6
    Register { offset: PAM0, reset: &[], writable: &PAM_SHADOWED },
    // 3.2.19 DRB0–7, in units of 8 MiB; firmware's business.
    Register { offset: 0x60, reset: &[0x01; 8], writable: &[0xFF; 8] },
    // 3.2.20 FDHC
    Register { offset: FDHC, reset: &[], writable: &[0xC0] },
    // 3.2.21 MTT, 3.2.22 CLT
    Register { offset: 0x70, reset: &[0x00, 0x10], writable: &[0xF8, 0x1F] },
    // 3.2.24 ERRCMD
    Register { offset: 0x90, reset: &[], writable: &[0x1B] },
];

/// The host bridge.
pub(in super::super) struct HostBridge {
    config: ConfigSpace,
    host: Arc<dyn Host>,
    /// SMRAM and TRC as the guest wrote them last. Once D_LCK is set, it and D_OPEN are read-only until reset.
    last: Mutex<(u8, u8)>,
    /// What decides about RAM, as it was when the map followed it last.
    decided: Mutex<[u8; 9]>,
    topology: Arc<Topology>,
}

impl HostBridge {
    pub(in super::super) fn new(
        cpus: usize,
        host: Arc<dyn Host>,
        topology: Arc<Topology>,
    ) -> Result<Self, ConfigError> {
        let mut builder = ConfigSpaceBuilder::new(Identity {
            vendor: 0x8086,
            device: 0x1237,
            revision: 0x02,
            class: 0x06_00_00,
            // Firmware recognises the platform by this subsystem.
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        });
        // 3.2.4 PCICMD: always bus master and memory; SERR# and parity enable can be written.
        builder.register(header::COMMAND, &0x0006_u16.to_le_bytes(), &0x0140_u16.to_le_bytes())?;
        // 3.2.5 PCISTS: medium DEVSEL#, fast back-to-back.
        builder.register(header::STATUS, &0x0280_u16.to_le_bytes(), &[])?;
        builder.write_one_to_clear(header::STATUS, &0xF100_u16.to_le_bytes())?;
        // 3.2.8 MLT. There is no cache line size and no interrupt.
        builder.register(header::CACHE_LINE_SIZE, &[0, 0], &[0, 0xF8])?;
        builder.register(header::INTERRUPT_LINE, &[0], &[0])?;
        builder.registers(&REGISTERS)?;
        // 3.2.11 PMCCFG high byte: WPE, set with a second processor; HFS. The row select strap is zero.
        builder.register(0x51, &[u8::from(cpus > 1) << 7], &[0x83])?;
        // 3.2.23 SMRAM: C_BASE_SEG is fixed at 010 (A0000); D_OPEN, D_CLS, D_LCK, G_SMRAME.
        builder.register(SMRAM, &[0x02], &[0x78])?;
        // 3.2.25 ERRSTS
        builder.write_one_to_clear(0x91, &[0x11])?;
        builder.register(TRC, &[0x00], &[0x0F])?;
        let last = Mutex::new((0x02, 0));
        Ok(Self { config: builder.build(), host, last, decided: Mutex::default(), topology })
    }

    /// The areas whose DRAM answers reads, or writes: first and last address, in ascending order.
    ///
    /// 290549, sections 3.2.18 (PAM), 3.2.20 (FDHC), 3.2.23 (SMRAM) and 4.1. D_OPEN counts only while G_SMRAME is set. DRB
    /// has no say: firmware for this platform does not size memory by it.
    pub(super) fn dram_areas(&self, write: bool) -> Vec<(u64, u64)> {
        let open = SMRAM_D_OPEN | SMRAM_G_SMRAME;
        let hole = self.config.get_u8(FDHC) >> 6;
        let smram = self.config.get_u8(SMRAM) & open == open;
        let fixed = [
            (0, 0x7_FFFF, true),
            (0x8_0000, 0x9_FFFF, hole != 1),
            (0xA_0000, 0xB_FFFF, smram),
            (0x10_0000, 0xEF_FFFF, true),
            (0xF0_0000, 0xFF_FFFF, hole != 2),
            (0x100_0000, u64::MAX, true),
        ];
        let mut areas: Vec<_> =
            fixed.into_iter().filter(|area| area.2).map(|(first, last, _)| (first, last)).collect();
        let bits = if write { 0x22 } else { 0x11 };
        let mut pam = |register, nibble, first, size: u64| {
            if self.config.get_u8(register) & bits & nibble != 0 {
                areas.push((first, first + (size - 1)));
            }
        };
        for (register, first) in (PAM0 + 1..=PAM6).zip((0xC_0000_u64..).step_by(0x8000)) {
            pam(register, 0x0F, first, 0x4000);
            pam(register, 0xF0, first + 0x4000, 0x4000);
        }
        pam(PAM0, 0xF0, 0xF_0000, 0x1_0000);
        areas.sort_unstable();
        areas
    }

    /// Lets all RAM below 1 MiB answer, as firmware leaves it where it has nothing to protect.
    pub(in super::super) fn shadow(&self) {
        self.config.set(PAM0, &PAM_SHADOWED);
        self.follow();
    }

    /// Makes the map follow PAM, SMRAM and FDHC.
    fn follow(&self) {
        let mut decided = [0; 9];
        let (pam, others) = decided.split_at_mut(7);
        self.config.read(PAM0, pam);
        others.copy_from_slice(&[self.config.get_u8(SMRAM), self.config.get_u8(FDHC)]);
        if std::mem::replace(&mut *lock(&self.decided), decided) != decided {
            self.topology.changed();
        }
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_written(&self, _offset: u16, _len: usize) {
        let mut last = lock(&self.last);
        let (mut new, trc) = (self.config.get_u8(SMRAM), self.config.get_u8(TRC));
        if (new | last.0) & SMRAM_D_LCK != 0 {
            new = new & !SMRAM_D_OPEN | SMRAM_D_LCK;
            self.config.set(SMRAM, &[new]);
        }
        let (_, before) = std::mem::replace(&mut *last, (new, trc));
        drop(last);
        self.follow();
        if trc & !before & TRC_RESET_CPU != 0 {
            self.host.power(PowerEvent::Reset(ResetSource::TurboResetControl));
        }
    }

    fn reset(&self) {
        *lock(&self.last) = (self.config.get_u8(SMRAM), 0);
        self.follow();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::Recorder;
    use super::*;

    #[test]
    fn locked_smram_stays_closed_and_locked_until_reset() {
        let bridge = HostBridge::new(1, Recorder::new(), Arc::default()).unwrap();
        let write = |value| {
            bridge.config.write(SMRAM, &[value]);
            bridge.config_written(SMRAM, 1);
        };
        write(SMRAM_D_OPEN | 0x08);
        assert_eq!(bridge.config.get_u8(SMRAM), 0x4A);
        write(SMRAM_D_OPEN | SMRAM_D_LCK | 0x08);
        assert_eq!(bridge.config.get_u8(SMRAM), 0x1A);
        write(SMRAM_D_OPEN);
        assert_eq!(bridge.config.get_u8(SMRAM), 0x12);
        bridge.config.reset();
        bridge.reset();
        write(SMRAM_D_OPEN);
        assert_eq!(bridge.config.get_u8(SMRAM), 0x42);
    }
}
