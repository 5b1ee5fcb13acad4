//! What firmware does before it starts an operating system, for machines that start a kernel directly.

use super::Machine;
use super::config::MachineConfig;
use super::irq::swizzle;
use super::pci::{Bar, BarKind, Command, PciFunction, SlotFunction, header};
use super::piix3::PIRQRC;
use super::piix4_pm::{PMBASE, PMREGMISC, SCI_IRQ, SMBHSTCFG};

/// Where the PM register block goes, as SeaBIOS places it.
pub(super) const PM_BLOCK: u16 = 0x600;
/// Which IRQs PIRQA–D get, as SeaBIOS routes them.
const PIRQ_ROUTES: [u8; 4] = [10, 10, 11, 11];
/// I/O ports for BARs, first and last.
pub(super) const PORT_WINDOW: (u64, u64) = (0xC000, 0xFFFF);
/// Memory below 4 GiB for BARs, first and last: the end is where the APICs begin.
const BAR_WINDOW: (u64, u64) = (0xE000_0000, 0xFEBF_FFFF);
/// The 64-bit window's alignment and the most that it takes, in bytes.
const HIGH_ALIGN: u64 = 1 << 30;
const HIGH_SIZE: u64 = 64 << 30;

/// The window for 64-bit BARs: first and last address, above RAM and mapped files and within what the CPU can address.
pub(super) fn high_window(config: &MachineConfig, ram_end: u64) -> Option<(u64, u64)> {
    let files_end = config.files.iter().map(|file| file.ends().1).max().unwrap_or(0);
    let first = ram_end.max(1 << 32).max(files_end).checked_next_multiple_of(HIGH_ALIGN)?;
    let limit = 1_u64.checked_shl(config.address_bits.into())?;
    let end = first.checked_add(HIGH_SIZE)?.min(limit);
    (first < end).then(|| (first, end.saturating_sub(1)))
}

/// Hands out addresses of a window.
struct Window {
    next: u64,
    last: u64,
}

impl Window {
    fn new((first, last): (u64, u64)) -> Self {
        Self { next: first, last }
    }

    /// `size` bytes aligned to their size.
    fn take(&mut self, size: u64) -> Option<u64> {
        let address = self.next.checked_next_multiple_of(size)?;
        let next = address.checked_add(size)?;
        if next.checked_sub(1)? > self.last {
            return None;
        }
        self.next = next;
        Some(address)
    }
}

/// The windows of PCI bus 0.
struct Windows {
    ports: Window,
    low: Window,
    high: Option<Window>,
}

impl Windows {
    fn take(&mut self, bar: &Bar) -> Option<u64> {
        match bar.kind {
            BarKind::Io => self.ports.take(bar.size),
            BarKind::Memory32 | BarKind::Rom => self.low.take(bar.size),
            BarKind::Memory64 { .. } => {
                self.low.take(bar.size).or_else(|| self.high.as_mut().and_then(|high| high.take(bar.size)))
            }
        }
    }
}

impl Machine {
    /// Does what firmware does before it starts an operating system: gives every BAR an address, enables I/O and memory
    /// decode (bus mastering is left to drivers), routes PIRQs, fills in interrupt line registers, places the PM block, and lets
    /// RAM answer below 1 MiB. A BAR for which there is no room stays undecoded, which the log tells. No vCPU runs yet.
    pub fn assign_resources(&self) {
        self.shadow_ram();
        let bridge = SlotFunction { slot: 1, function: 0 };
        let pm = SlotFunction { slot: 1, function: 3 };
        self.write_register(bridge, PIRQRC, &PIRQ_ROUTES);
        self.write_register(pm, PMBASE, &u32::from(PM_BLOCK).to_le_bytes());
        self.write_register(pm, PMREGMISC, &[1]);
        self.write_register(pm, SMBHSTCFG, &[0x08]);
        self.write_register(pm, header::INTERRUPT_LINE, &[SCI_IRQ]);
        let mut windows = Windows {
            ports: Window::new(PORT_WINDOW),
            low: Window::new(BAR_WINDOW),
            high: high_window(&self.config, self.ram.end()).map(Window::new),
        };
        let functions = self.root.bus.functions_in_order();
        // Off while they move; then the largest first, so that alignment wastes nothing.
        let mut bars = Vec::new();
        for (at, function) in functions.iter().filter(|(at, _)| at.slot >= super::CHIPSET_SLOTS) {
            let command = function.config().command().0 & !(Command::IO | Command::MEMORY);
            self.write_register(*at, header::COMMAND, &command.to_le_bytes());
            bars.extend(function.config().bars().into_iter().map(|bar| (*at, bar)));
        }
        bars.sort_by_key(|(at, bar)| (std::cmp::Reverse(bar.size), *at, bar.index));
        let mut unplaced = Vec::new();
        for (at, bar) in bars {
            let Some(address) = windows.take(&bar) else {
                tracing::warn!(slot = at.slot, bar = bar.index, size = bar.size, "no room for a PCI BAR");
                unplaced.push((at, bar.kind.space()));
                continue;
            };
            self.place(at, &bar, address);
        }
        for (at, function) in functions.iter().filter(|(at, _)| at.slot >= super::CHIPSET_SLOTS) {
            let placed = |space| !unplaced.contains(&(*at, space));
            self.start(*at, function.as_ref(), &placed);
        }
    }

    fn place(&self, at: SlotFunction, bar: &Bar, address: u64) {
        let offset = header::BAR0.saturating_add(u16::from(bar.index).saturating_mul(4));
        let bytes = address.to_le_bytes();
        let width = if matches!(bar.kind, BarKind::Memory64 { .. }) { 8 } else { 4 };
        for (register, dword) in (offset..).step_by(4).zip(bytes.chunks(4).take(width / 4)) {
            self.write_register(at, register, dword);
        }
    }

    /// Enables decode and tells the interrupt line.
    fn start(&self, at: SlotFunction, function: &dyn PciFunction, placed: &dyn Fn(super::Space) -> bool) {
        let mut command = function.config().command().0;
        for bar in function.config().bars() {
            let space = bar.kind.space();
            if placed(space) {
                command |= match space {
                    super::Space::Port => Command::IO,
                    super::Space::Memory => Command::MEMORY,
                };
            }
        }
        self.write_register(at, header::COMMAND, &command.to_le_bytes());
        if let Some(pin) = function.config().interrupt_pin() {
            let line = PIRQ_ROUTES.get(swizzle(at.slot.into(), pin as usize)).copied().unwrap_or(0);
            self.write_register(at, header::INTERRUPT_LINE, &[line]);
        }
    }
}
