//! The ISR status and the INTx# pin (section 4.1.4.5).

use std::sync::Arc;

use super::interrupts::IntxPin;

/// A queue was used.
pub(super) const QUEUE: u8 = 1;
/// The configuration changed.
pub(super) const CONFIGURATION: u8 = 2;

/// ISR status; the pin follows it.
#[derive(Default)]
pub(super) struct Isr {
    status: u8,
    pin: Option<Arc<dyn IntxPin>>,
}

impl Isr {
    pub fn connect(&mut self, pin: Arc<dyn IntxPin>) {
        pin.set(self.status != 0);
        self.pin = Some(pin);
    }

    /// Raises an interrupt.
    pub fn raise(&mut self, cause: u8) {
        let before = self.status;
        self.status |= cause;
        if before == 0 && self.status != 0 {
            self.drive();
        }
    }

    /// The driver reads the register, which clears it and releases the pin.
    pub fn read(&mut self) -> u8 {
        let status = self.status;
        self.clear();
        status
    }

    /// Releases the pin.
    pub fn clear(&mut self) {
        if self.status != 0 {
            self.status = 0;
            self.drive();
        }
    }

    fn drive(&self) {
        if let Some(pin) = &self.pin {
            pin.set(self.status != 0);
        }
    }
}
