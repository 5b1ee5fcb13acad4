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

/// A place for a function.
#[derive(Clone, Copy, Default)]
struct Function {
    /// Bits 0–3: the asserted pins.
    pins: u8,
    /// INTx# is disabled by the command register.
    disabled: bool,
    /// How often a function was unplugged here. A pin of an earlier one drives nothing.
    unplugged: u32,
}

struct State {
    /// By slot × 8 + function.
    functions: [Function; FUNCTIONS],
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
        for (devfn, Function { pins, .. }) in
            self.functions.iter().enumerate().filter(|entry| !entry.1.disabled)
        {
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
            functions: [Function::default(); FUNCTIONS],
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
        let levels = state.levels();
        let changed = levels ^ state.driven;
        state.driven = levels;
        for irq in (0..LINES).filter(|irq| changed & bit(*irq) != 0) {
            self.host.set_irq(irq, levels & bit(irq) != 0);
        }
    }

    fn function(&self, slot: u8, function: u8) -> Function {
        lock(&self.state).functions.get(devfn(slot, function)).copied().unwrap_or_default()
    }

    fn update_function(&self, slot: u8, function: u8, change: impl FnOnce(&mut Function)) {
        self.update(|state| state.functions.get_mut(devfn(slot, function)).map_or((), change));
    }

    /// How often a function was unplugged there, for [`set_pin`](Self::set_pin).
    pub(super) fn unplugged(&self, slot: u8, function: u8) -> u32 {
        self.function(slot, function).unplugged
    }

    /// Drives a pin, unless its function was unplugged since.
    pub(super) fn set_pin(&self, (slot, function, unplugged): (u8, u8, u32), pin: Pin, asserted: bool) {
        self.update_function(slot, function, |function| {
            if function.unplugged == unplugged {
                function.pins = function.pins & !(1 << pin as u8) | u8::from(asserted) << pin as u8;
            }
        });
    }

    /// The command register of a function enables or disables its INTx#.
    pub(super) fn set_disabled(&self, slot: u8, function: u8, value: bool) {
        self.update_function(slot, function, |function| function.disabled = value);
    }

    /// Whether a function asserts a pin, driven or not: the interrupt status bit.
    pub(super) fn is_asserted(&self, slot: u8, function: u8) -> bool {
        self.function(slot, function).pins != 0
    }

    /// A function was unplugged: its pins float.
    pub(super) fn release(&self, slot: u8, function: u8) {
        self.update_function(slot, function, |function| {
            *function = Function { unplugged: function.unplugged.wrapping_add(1), ..Function::default() };
        });
    }

    /// RST#: command registers enable INTx# again, and no device drives anything.
    pub(super) fn reset(&self) {
        self.update(|state| {
            state.functions.iter_mut().for_each(|function| (function.pins, function.disabled) = (0, false));
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

    pub(super) fn set_line(&self, index: usize, level: bool) {
        self.update(|state| {
            if let Some(line) = state.isa.get_mut(index) {
                line.1 = level;
            }
        });
    }
}

fn devfn(slot: u8, function: u8) -> usize {
    usize::from(slot & 0x1F) << 3 | usize::from(function & 7)
}
