//! Interrupt pins of PCI functions, on their way to the PIRQ# inputs of the PIIX3.

use std::sync::Arc;

use super::super::irq::InterruptRouter;

/// An interrupt pin of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// INTA#
    A = 0,
    /// INTB#
    B = 1,
    /// INTC#
    C = 2,
    /// INTD#
    D = 3,
}

impl Pin {
    /// From the interrupt pin register: 1 is INTA#.
    #[must_use]
    pub const fn from_register(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::A),
            2 => Some(Self::B),
            3 => Some(Self::C),
            4 => Some(Self::D),
            _ => None,
        }
    }
}

/// A function's INTx# pin. Level triggered: stays as it was last set. Clones drive the same pin.
#[derive(Clone)]
pub struct InterruptPin {
    router: Arc<InterruptRouter>,
    slot: u8,
    function: u8,
    /// How often a function was unplugged here before this one came.
    unplugged: u32,
    pin: Pin,
}

impl InterruptPin {
    pub(in super::super) fn new(router: Arc<InterruptRouter>, slot: u8, function: u8, pin: Pin) -> Self {
        let unplugged = router.unplugged(slot, function);
        Self { router, slot, function, unplugged, pin }
    }

    /// Asserts or releases the pin. While the command register disables INTx#, nothing is driven but the level is kept
    /// and shows in the interrupt status bit. Nothing happens once the function is unplugged.
    pub fn set(&self, asserted: bool) {
        self.router.set_pin((self.slot, self.function, self.unplugged), self.pin, asserted);
    }
}
