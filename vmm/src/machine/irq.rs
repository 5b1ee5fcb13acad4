//! Interrupt lines: PCI pins through the PIIX3's PIRQ routing, and ISA IRQ lines, to the host's interrupt controllers.

use std::sync::{Arc, Mutex};

use super::host::Host;
use super::pci::Pin;
use super::sync::lock;

/// The ISA interrupt lines, 0–15.
const LINES: u8 = 16;
/// Interrupts that PIRQRC must not select (290550, section 2.3.4): timer, keyboard, cascade, RTC, coprocessor.
const RESERVED: u16 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 13;
/// PCI functions on bus 0.
const FUNCTIONS: usize = 256;

/// Where each PCI pin and ISA line ends, and what is asserted now.
pub(super) struct InterruptRouter {
    host: Arc<dyn Host>,
    state: Mutex<State>,
}

struct State {
    /// By function (slot × 8 + function): bits 0–3 the asserted pins.
    pins: [u8; FUNCTIONS],
    /// By function: INTx# is disabled by the command register.
    disabled: [bool; FUNCTIONS],
    /// By function: how often one was unplugged. A pin of an earlier one drives nothing.
    unplugged: [u32; FUNCTIONS],
    /// PIRQRC A–D.
    routes: [u8; 4],
    /// By attached line: its IRQ and its level.
    isa: Vec<(u8, bool)>,
    /// The levels that the host was told last, a bit for each IRQ.
    driven: u16,
}

impl State {
    fn levels(&self) -> u16 {
        let isa = self.isa.iter().filter(|(_, level)| *level);
        let mut levels = isa.fold(0, |levels, (irq, _)| levels | bit(*irq));
        let mut pirqs = [false; 4];
        for (devfn, (pins, disabled)) in self.pins.iter().zip(&self.disabled).enumerate() {
            if *pins == 0 || *disabled {
                continue;
            }
            for pin in (0..4).filter(|pin| pins & (1 << pin) != 0) {
                if let Some(pirq) = pirqs.get_mut(swizzle(devfn >> 3, pin)) {
                    *pirq = true;
                }
            }
        }
        for (asserted, route) in pirqs.iter().zip(&self.routes) {
            if *asserted && route & 0x80 == 0 {
                levels |= bit(route & 0x0F) & !RESERVED;
            }
        }
        levels
    }
}

/// Which PIRQ# a slot's pin is wired to: (pin + slot − 1) & 3.
pub(super) const fn swizzle(slot: usize, pin: usize) -> usize {
    (slot + pin + 3) & 3
}

const fn bit(irq: u8) -> u16 {
    1 << (irq & 0x0F)
}

impl InterruptRouter {
    pub(super) fn new(host: Arc<dyn Host>) -> Arc<Self> {
        let state = State {
            pins: [0; FUNCTIONS],
            disabled: [false; FUNCTIONS],
            unplugged: [0; FUNCTIONS],
            routes: [0x80; 4],
            isa: Vec::new(),
            driven: 0,
        };
        Arc::new(Self { host, state: Mutex::new(state) })
    }

    /// Changes the state and tells the host each line that changed by it. The lock is held meanwhile: levels arrive in order.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        self.tell(&mut state);
    }

    fn tell(&self, state: &mut State) {
        let levels = state.levels();
        let changed = levels ^ state.driven;
        state.driven = levels;
        for irq in (0..LINES).filter(|irq| changed & bit(*irq) != 0) {
            self.host.set_irq(irq, levels & bit(irq) != 0);
        }
    }

    /// How often a function was unplugged there, for [`set_pin`](Self::set_pin).
    pub(super) fn unplugged(&self, slot: u8, function: u8) -> u32 {
        lock(&self.state).unplugged.get(devfn(slot, function)).copied().unwrap_or(0)
    }

    /// Drives a pin, unless its function was unplugged since.
    pub(super) fn set_pin(&self, (slot, function, unplugged): (u8, u8, u32), pin: Pin, asserted: bool) {
        self.update(|state| {
            if state.unplugged.get(devfn(slot, function)) != Some(&unplugged) {
                return;
            }
            if let Some(pins) = state.pins.get_mut(devfn(slot, function)) {
                *pins = *pins & !(1 << pin as u8) | u8::from(asserted) << pin as u8;
            }
        });
    }

    /// The command register of a function enables or disables its INTx#.
    pub(super) fn set_disabled(&self, slot: u8, function: u8, value: bool) {
        self.update(|state| {
            if let Some(disabled) = state.disabled.get_mut(devfn(slot, function)) {
                *disabled = value;
            }
        });
    }

    /// Whether a function asserts a pin, driven or not: the interrupt status bit.
    pub(super) fn is_asserted(&self, slot: u8, function: u8) -> bool {
        lock(&self.state).pins.get(devfn(slot, function)).is_some_and(|pins| *pins != 0)
    }

    /// A function was unplugged: its pins float.
    pub(super) fn release(&self, slot: u8, function: u8) {
        self.update(|state| {
            if let Some(pins) = state.pins.get_mut(devfn(slot, function)) {
                *pins = 0;
            }
            if let Some(disabled) = state.disabled.get_mut(devfn(slot, function)) {
                *disabled = false;
            }
            if let Some(count) = state.unplugged.get_mut(devfn(slot, function)) {
                *count = count.wrapping_add(1);
            }
        });
    }

    /// RST#: command registers enable INTx# again, and no device drives anything.
    pub(super) fn reset(&self) {
        self.update(|state| {
            state.pins.fill(0);
            state.disabled.fill(false);
            state.isa.iter_mut().for_each(|line| line.1 = false);
        });
    }

    /// PIRQRC A–D changed.
    pub(super) fn set_routes(&self, routes: [u8; 4]) {
        self.update(|state| state.routes = routes);
    }

    /// Adds a source to an ISA line.
    pub(super) fn add_line(&self, irq: u8) -> usize {
        let mut state = lock(&self.state);
        state.isa.push((irq, false));
        state.isa.len() - 1
    }

    /// Sets a source. Devices say again and again what they said before: that costs a look.
    pub(super) fn set_line(&self, index: usize, level: bool) {
        let mut state = lock(&self.state);
        if let Some(line) = state.isa.get_mut(index).filter(|line| line.1 != level) {
            line.1 = level;
            self.tell(&mut state);
        }
    }
}

fn devfn(slot: u8, function: u8) -> usize {
    usize::from(slot & 0x1F) << 3 | usize::from(function & 7)
}
