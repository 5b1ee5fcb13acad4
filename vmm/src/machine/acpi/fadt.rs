//! FADT, the fixed hardware (ACPI 6.5, section 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::super::isa::CENTURY_REGISTER;
use super::super::piix3::RESET_CONTROL_PORT;
use super::super::piix4_pm::{ACPI_DISABLE, ACPI_ENABLE, APM_CONTROL, GPE0_BLOCK, SCI_IRQ, register};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// A hard reset by RCR.
const RESET_VALUE: u8 = 0x06;
/// Latencies that say: there is no such C-state (C2 above 100 µs, C3 above 1000 µs).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// IAPC_BOOT_ARCH: there are devices on the ISA bus; there is no VGA. Without a keyboard bit 1 stays clear: a driver would wait
/// for answers.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2;
/// IAPC_BOOT_ARCH: there is an 8042 with a keyboard.
const BOOT_ARCH_8042: u16 = 1 << 1;

/// The table. The power button is a fixed one; there is no sleep button, and the RTC cannot wake the machine.
pub(super) fn table(facs: u32, dsdt: u32, pm_block: u16, keyboard: bool) -> FADT {
    let port = |offset: u64, bits, access| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(pm_block).saturating_add(offset))
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = u16::from(SCI_IRQ).into();
    fadt.smi_cmd = u32::from(APM_CONTROL).into();
    fadt.acpi_enable = ACPI_ENABLE;
    fadt.acpi_disable = ACPI_DISABLE;

    let event = port(register::PM1_STS, 32, AccessSize::WordAccess);
    let control = port(register::PM1_CNT, 16, AccessSize::WordAccess);
    let timer = port(register::PM_TMR, 32, AccessSize::DwordAccess);
    let (gpe0, gpe0_length) = GPE0_BLOCK;
    let gpe0_bits = gpe0_length.saturating_mul(8);
    let low = |gas: &GAS| u32::try_from(gas.address.get()).unwrap_or(0).into();
    fadt.pm1a_evt_blk = low(&event);
    fadt.pm1a_cnt_blk = low(&control);
    fadt.pm_tmr_blk = low(&timer);
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk = u32::from(gpe0).into();
    fadt.gpe0_blk_len = gpe0_length;
    fadt.x_pm1a_evt_blk = event;
    fadt.x_pm1a_cnt_blk = control;
    fadt.x_pm_tmr_blk = timer;
    fadt.x_gpe0_blk = GAS::new(AddressSpace::SystemIo, gpe0_bits, 0, AccessSize::ByteAccess, gpe0.into());

    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY_REGISTER;
    fadt.iapc_boot_arch = (BOOT_ARCH | if keyboard { BOOT_ARCH_8042 } else { 0 }).into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_CONTROL_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}
