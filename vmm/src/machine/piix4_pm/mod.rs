//! PIIX4 function 3, 00:01.3: power management (290562, chapter 7).

mod cpu_hotplug;
mod pci_hotplug;
mod pm_block;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::host::{Host, PowerEvent, Space};
use super::isa::IrqLine;
use super::pci::{
    ConfigError, ConfigSpace, ConfigSpaceBuilder, Identity, PciFunction, Pin, Register, Window, header,
};
use super::sync::lock;
use super::timers::{Timer, Timers};

pub(super) use cpu_hotplug::CPU_HOTPLUG;
use cpu_hotplug::{CpuHotplug, GPE_CPU_HOTPLUG};
pub(super) use pci_hotplug::PCI_HOTPLUG;
use pci_hotplug::{GPE_PCI_HOTPLUG, PciHotplug, slot_bit};
pub(super) use pm_block::{PM_BLOCK_SIZE, PmBlock, S5_SLEEP_TYPE, register};

/// PMBA: base address of the PM register block.
pub(super) const PMBASE: u16 = 0x40;
/// PMREGMISC; bit 0 (PMIOSE) decodes the block.
pub(super) const PMREGMISC: u16 = 0x80;
/// SMBBA: base address of the SMBus controller.
pub(super) const SMBBA: u16 = 0x90;
/// SMBHSTCFG; bit 0 enables the SMBus controller.
pub(super) const SMBHSTCFG: u16 = 0xD2;
/// The system control interrupt.
pub(super) const SCI_IRQ: u8 = 9;
/// Where the general-purpose event block lies on this platform, and its length in bytes.
pub(super) const GPE0_BLOCK: (u16, u8) = (0xAFE0, 4);
/// The bit of GPE0 that tells of another generation id, which is QEMU's.
const GPE_GENERATION: u16 = 1 << 5;
/// Advanced power management control port; its status port follows.
pub(super) const APM_CONTROL: u16 = 0xB2;
/// Written to [`APM_CONTROL`]: firmware hands the PM registers to the operating system.
pub(super) const ACPI_ENABLE: u8 = 0xF1;
/// Written to [`APM_CONTROL`]: firmware takes them back.
pub(super) const ACPI_DISABLE: u8 = 0xF0;

/// The registers beyond the header: offset, value after reset, writable bits.
pub(super) const REGISTERS: [Register; 7] = [
    // 7.1.10 PMBA
    Register { offset: PMBASE, reset: &[0x01], writable: &[0xC0, 0xFF] },
    // 7.1.11 CNTA, 7.1.12 CNTB, 7.1.13 GPICTL, 7.1.14 DEVRESD
    Register {
        offset: 0x44,
        reset: &[],
        writable: &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x73, 0x01, 0xFF, 0xFF, 0xFF, 0x0F, 0x3F, 0x58, 0x7F],
    },
    // 7.1.16 DEVACTA, 7.1.17 DEVACTB. APMC_EN, bit 25 of the latter: set, as firmware leaves it; there is no SMM to prepare.
    Register {
        offset: 0x54,
        reset: &[0, 0, 0, 0, 0, 0, 0, 0x02],
        writable: &[0xFF, 0xFF, 0xFF, 0xFF, 0x77, 0xFF, 0xFF, 0x03],
    },
    // 7.1.18–25 DEVRESA–J: what device monitors watch. None does here.
    Register {
        offset: 0x5C,
        reset: &[],
        writable: &[
            0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xF7, 0xFF, 0xFF, 0xEF, 0xFF, 0xFF, 0xFF, 0x1F, 0x00,
            0xFF, 0x80, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x00, 0xFF, 0x80, 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0x00,
            0xFF, 0xFF, 0x1F,
        ],
    },
    // 7.1.26 PMREGMISC
    Register { offset: PMREGMISC, reset: &[], writable: &[0x01] },
    // 7.1.27 SMBBA
    Register { offset: SMBBA, reset: &[0x01], writable: &[0xF0, 0xFF] },
    // 7.1.28 SMBHSTCFG, 7.1.29–31 SMBSLVC, SMBSHDW1, SMBSHDW2
    Register { offset: SMBHSTCFG, reset: &[0x09], writable: &[0x0F, 0xFF, 0xFF, 0xFF] },
];

/// The windows, named.
const WINDOW_PM: u8 = 0;
const WINDOW_GPE0: u8 = 1;
const WINDOW_APM: u8 = 2;
const WINDOW_PCI_HOTPLUG: u8 = 4;
const WINDOW_CPU_HOTPLUG: u8 = 5;
const WINDOW_SMBUS: u8 = 3;

/// The SMBus controller's registers: ports, status, control (bit 6 starts), and a status bit: nobody acknowledged.
const SMBUS_SIZE: u64 = 16;
const SMBUS_STATUS: u64 = 0;
const SMBUS_CONTROL: u64 = 2;
const SMBUS_START: u8 = 1 << 6;
const SMBUS_NO_DEVICE: u8 = 1 << 2;

/// The function.
pub(super) struct Piix4Pm {
    config: ConfigSpace,
    host: Arc<dyn Host>,
    sci: IrqLine,
    timers: Arc<Timers>,
    state: Mutex<State>,
    /// Slots that the guest has ejected and the machine has yet to empty.
    ejected: AtomicU32,
}

#[derive(Default)]
struct State {
    pci: PciHotplug,
    cpus: CpuHotplug,
    pm: PmBlock,
    gpe_status: u16,
    gpe_enable: u16,
    apm: [u8; 2],
    /// The host side of the SMBus controller, on whose bus nothing is.
    smbus: [u8; 8],
}

impl State {
    fn write_smbus(&mut self, offset: u64, value: u8) {
        let index = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(register) = self.smbus.get_mut(index) {
            *register = match offset {
                SMBUS_STATUS => *register & !value,
                SMBUS_CONTROL => value & !SMBUS_START,
                _ => value,
            };
        }
        if let ([status, ..], SMBUS_CONTROL) = (&mut self.smbus, offset)
            && value & SMBUS_START != 0
        {
            *status |= SMBUS_NO_DEVICE;
        }
    }
}

impl Piix4Pm {
    /// `apic_ids` are those of all possible CPUs, of which the first `cpus` are there.
    pub(super) fn new(
        host: Arc<dyn Host>,
        sci: IrqLine,
        timers: Arc<Timers>,
        apic_ids: &[u32],
        cpus: u16,
    ) -> Result<Self, ConfigError> {
        let mut builder = ConfigSpaceBuilder::new(Identity {
            vendor: 0x8086,
            device: 0x7113,
            revision: 0x03,
            class: 0x06_80_00,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        });
        // 7.1.3 PCICMD: I/O (for the SMBus) and nothing else. 7.1.4 PCISTS: medium DEVSEL#, fast back-to-back.
        builder.register(header::COMMAND, &[0, 0], &0x0001_u16.to_le_bytes())?;
        builder.register(header::STATUS, &0x0280_u16.to_le_bytes(), &[])?;
        builder.write_one_to_clear(header::STATUS, &0xF900_u16.to_le_bytes())?;
        builder.register(header::CACHE_LINE_SIZE, &[0, 0], &[0, 0])?;
        builder.interrupt_pin(Pin::A);
        builder.registers(&REGISTERS)?;
        let state = State { cpus: CpuHotplug::new(apic_ids, cpus.into()), ..State::default() };
        let ejected = AtomicU32::new(0);
        Ok(Self { config: builder.build(), host, sci, timers, state: Mutex::new(state), ejected })
    }

    /// Changes what hot-plug registers say and, if that is to be told, raises their event.
    fn tell(&self, event: u16, change: impl FnOnce(&mut State) -> bool) -> bool {
        let mut state = lock(&self.state);
        let told = change(&mut state);
        if told {
            state.gpe_status |= event;
            self.update_sci(&state);
        }
        told
    }

    /// Tells the guest that the contents of a slot changed.
    pub(super) fn announce_slot(&self, slot: u8) {
        self.tell(GPE_PCI_HOTPLUG, |state| {
            state.pci.up |= slot_bit(slot);
            true
        });
    }

    /// Asks the guest to eject what is in a slot.
    pub(super) fn request_eject(&self, slot: u8) {
        self.tell(GPE_PCI_HOTPLUG, |state| {
            state.pci.down |= slot_bit(slot);
            true
        });
    }

    /// A slot was emptied.
    pub(super) fn slot_emptied(&self, slot: u8) {
        lock(&self.state).pci.forget(slot);
    }

    /// The slots that the guest has ejected since the last call, a bit for each. Cheap when there is none.
    pub(super) fn take_ejected(&self) -> u32 {
        if self.ejected.load(Ordering::Acquire) == 0 { 0 } else { self.ejected.swap(0, Ordering::AcqRel) }
    }

    /// Plugs a CPU in. False when there is no such possible CPU, or it is there.
    pub(super) fn insert_cpu(&self, index: u16) -> bool {
        self.tell(GPE_CPU_HOTPLUG, |state| state.cpus.insert(index))
    }

    /// Asks the guest to let a CPU go. False when it is not there, or is the boot processor.
    pub(super) fn request_cpu_removal(&self, index: u16) -> bool {
        self.tell(GPE_CPU_HOTPLUG, |state| state.cpus.request_removal(index))
    }

    /// Tells the guest that its generation id is another one.
    pub(super) fn announce_generation(&self) {
        self.tell(GPE_GENERATION, |_| true);
    }

    /// Where the register block is, whether or not it is decoded.
    pub(super) fn block(&self) -> u16 {
        self.config.get_u16(PMBASE) & 0xFFC0
    }

    /// The power button was pressed and released.
    pub(super) fn press_power_button(&self) {
        let mut state = lock(&self.state);
        state.pm.press_power_button();
        self.update_sci(&state);
    }

    /// A deadline of the machine has come, the timer's perhaps.
    pub(super) fn timer_expired(&self) {
        let mut state = lock(&self.state);
        state.pm.set_time(self.host.monotonic());
        self.update_sci(&state);
    }

    fn update_sci(&self, state: &State) {
        self.timers.set(Timer::Pm, state.pm.deadline());
        let gpe = state.gpe_status & state.gpe_enable != 0;
        self.sci.set(state.pm.sci_enabled() && (gpe || state.pm.has_event()));
    }

    fn read_byte(state: &mut State, window: u8, offset: u64) -> u8 {
        match window {
            WINDOW_CPU_HOTPLUG => state.cpus.read(offset),
            WINDOW_PM => state.pm.read(offset),
            WINDOW_GPE0 => {
                let [s0, s1] = state.gpe_status.to_le_bytes();
                let [e0, e1] = state.gpe_enable.to_le_bytes();
                byte(&[s0, s1, e0, e1], offset)
            }
            WINDOW_APM => byte(&state.apm, offset),
            WINDOW_SMBUS => {
                state.smbus.get(usize::try_from(offset).unwrap_or(usize::MAX)).copied().unwrap_or(0)
            }
            _ => 0xFF,
        }
    }

    /// Writes a byte; says whether that powers the machine off.
    fn write_byte(state: &mut State, window: u8, offset: u64, value: u8) -> bool {
        match (window, offset) {
            (WINDOW_PM, _) => return state.pm.write(offset, value) == Some(S5_SLEEP_TYPE),
            (WINDOW_GPE0, 0) => state.gpe_status &= !u16::from(value),
            (WINDOW_GPE0, 1) => state.gpe_status &= !(u16::from(value) << 8),
            (WINDOW_GPE0, 2) => state.gpe_enable = state.gpe_enable & 0xFF00 | u16::from(value),
            (WINDOW_GPE0, 3) => state.gpe_enable = state.gpe_enable & 0x00FF | u16::from(value) << 8,
            (WINDOW_APM, 0) => {
                // What firmware's SMI handler does for these two commands.
                match value {
                    ACPI_ENABLE => state.pm.set_sci_enabled(true),
                    ACPI_DISABLE => state.pm.set_sci_enabled(false),
                    _ => {}
                }
                let [control, _] = &mut state.apm;
                *control = value;
            }
            (WINDOW_APM, 1) => {
                let [_, status] = &mut state.apm;
                *status = value;
            }
            (WINDOW_SMBUS, _) => state.write_smbus(offset, value),
            _ => {}
        }
        false
    }
}

fn byte(bytes: &[u8], offset: u64) -> u8 {
    let index = usize::try_from(offset).unwrap_or(usize::MAX);
    bytes.get(index).copied().unwrap_or(0xFF)
}

impl PciFunction for Piix4Pm {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn windows(&self) -> Vec<Window> {
        let fixed =
            |id, address: u16, length| Window { id, space: Space::Port, address: address.into(), length };
        let (gpe0, gpe0_length) = GPE0_BLOCK;
        let mut windows = Vec::with_capacity(5);
        if self.config.get_u8(PMREGMISC) & 1 != 0 {
            windows.push(fixed(WINDOW_PM, self.block(), PM_BLOCK_SIZE));
        }
        windows.push(fixed(WINDOW_GPE0, gpe0, gpe0_length.into()));
        windows.push(fixed(WINDOW_APM, APM_CONTROL, 2));
        for (id, (port, length)) in [(WINDOW_PCI_HOTPLUG, PCI_HOTPLUG), (WINDOW_CPU_HOTPLUG, CPU_HOTPLUG)] {
            windows.push(fixed(id, port, length.into()));
        }
        if self.config.command().io() && self.config.get_u8(SMBHSTCFG) & 1 != 0 {
            windows.push(fixed(WINDOW_SMBUS, self.config.get_u16(SMBBA) & 0xFFF0, SMBUS_SIZE));
        }
        windows
    }

    fn window_read(&self, window: u8, offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.state);
        if window == WINDOW_PCI_HOTPLUG {
            state.pci.read(offset, data);
            return;
        }
        // One look at the clock for all bytes of an access: the timer must not carry between them.
        state.pm.set_time(self.host.monotonic());
        for (offset, byte) in (offset..).zip(data) {
            *byte = Self::read_byte(&mut state, window, offset);
        }
    }

    fn window_write(&self, window: u8, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        match window {
            WINDOW_PCI_HOTPLUG => {
                self.ejected.fetch_or(state.pci.write(offset, data), Ordering::AcqRel);
                return;
            }
            WINDOW_CPU_HOTPLUG => {
                let gone = state.cpus.write(offset, data);
                drop(state);
                gone.into_iter().for_each(|cpu| self.host.cpu_ejected(cpu));
                return;
            }
            _ => {}
        }
        state.pm.set_time(self.host.monotonic());
        let mut off = false;
        for (offset, byte) in (offset..).zip(data) {
            off |= Self::write_byte(&mut state, window, offset, *byte);
        }
        self.update_sci(&state);
        drop(state);
        if off {
            self.host.power(PowerEvent::PowerOff);
        }
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        // What the guest was asked to let go of goes now.
        self.ejected.fetch_or(state.pci.down, Ordering::AcqRel);
        let gone = state.cpus.reset();
        let cpus = std::mem::take(&mut state.cpus);
        *state = State { cpus, ..State::default() };
        self.update_sci(&state);
        drop(state);
        gone.into_iter().for_each(|cpu| self.host.cpu_ejected(cpu));
    }
}
