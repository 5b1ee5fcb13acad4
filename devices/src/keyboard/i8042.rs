//! The 8042 keyboard controller, ports 60 and 64, with a keyboard and without an auxiliary device. What resets the machine is
//! not its business: the core sees the writes that do so before it does.

use bulkhead_ipc::channel::message::Key;
use serde::{Deserialize, Serialize};

use super::keys::{Keyboard, Translation};

/// Status: there is a byte to read.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Status: the self-test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: the last write went to port 64.
const STATUS_COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Command byte: a full output buffer raises IRQ 1.
const CONTROL_INTERRUPT: u8 = 1 << 0;
/// Command byte: system flag.
const CONTROL_SYSTEM: u8 = 1 << 2;
/// Command byte: keyboard and auxiliary interface disabled. The latter always is.
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_AUX_OFF: u8 = 1 << 5;
/// Command byte: set 2 is translated to set 1.
const CONTROL_TRANSLATE: u8 = 1 << 6;

/// Output port: CPU runs (not held in reset), A20 passed, IRQ 1.
const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
const OUTPUT_IRQ1: u8 = 1 << 4;

/// Input port: the keyboard is not inhibited.
const INPUT_PORT: u8 = 0x80;
/// The auxiliary interface's test: its clock line is stuck low. A driver that hears so does not look for a device.
const AUX_STUCK: u8 = 0x01;

/// A port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// 60.
    Data,
    /// 64.
    Command,
}

/// The byte that waits to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    value: u8,
    from_keyboard: bool,
}

/// The controller with its keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042 {
    keyboard: Keyboard,
    translation: Translation,
    output: Option<Output>,
    /// A byte of the keyboard that an answer of the controller has displaced.
    displaced: Option<u8>,
    /// The byte read last: reading again without a new one repeats it.
    last: u8,
    control: u8,
    output_port: u8,
    /// The command that takes the next byte at port 60.
    pending: Option<u8>,
    last_was_command: bool,
    /// The interrupt has risen and nobody was told.
    edge: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        Self {
            keyboard: Keyboard::default(),
            translation: Translation::default(),
            output: None,
            displaced: None,
            last: 0,
            control: CONTROL_KEYBOARD_OFF | CONTROL_AUX_OFF | CONTROL_TRANSLATE,
            output_port: OUTPUT_NOT_RESET | OUTPUT_A20,
            pending: None,
            last_was_command: false,
            edge: false,
        }
    }
}

impl I8042 {
    /// The guest reads a port.
    pub fn read(&mut self, port: Port) -> u8 {
        match port {
            Port::Data => {
                if let Some(output) = self.output.take() {
                    self.last = output.value;
                }
                self.fill();
                self.last
            }
            Port::Command => {
                let mut status = STATUS_UNLOCKED;
                for (set, bit) in [
                    (self.output.is_some(), STATUS_OUTPUT_FULL),
                    (self.control & CONTROL_SYSTEM != 0, STATUS_SYSTEM),
                    (self.last_was_command, STATUS_COMMAND),
                ] {
                    status |= if set { bit } else { 0 };
                }
                status
            }
        }
    }

    /// The guest writes to a port.
    pub fn write(&mut self, port: Port, value: u8) {
        self.last_was_command = port == Port::Command;
        match port {
            Port::Data => self.data(value),
            Port::Command => self.command(value),
        }
        self.fill();
    }

    /// Keys are pressed or released.
    pub fn press(&mut self, keys: &[Key]) {
        keys.iter().for_each(|key| self.keyboard.press(*key));
        self.fill();
    }

    /// Whether the interrupt has risen since the last time.
    pub fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.edge)
    }

    /// Raises the interrupt anew, if its level says so.
    pub const fn raise(&mut self) {
        self.edge = self.interrupt();
    }

    /// The interrupt's level.
    pub const fn interrupt(&self) -> bool {
        self.output.is_some() && self.control & CONTROL_INTERRUPT != 0
    }

    fn command(&mut self, command: u8) {
        self.pending = None;
        match command {
            // Read command byte; the other 31 places of the RAM read zero.
            0x20 => self.answer(self.control),
            0x21..=0x3F => self.answer(0),
            // Take a byte: write command byte or RAM, output port, keyboard or aux buffer, aux device.
            0x60..=0x7F | 0xD1..=0xD4 => self.pending = Some(command),
            0xA9 => self.answer(AUX_STUCK),
            0xAA => {
                self.set_control(CONTROL_SYSTEM | CONTROL_KEYBOARD_OFF | CONTROL_TRANSLATE);
                self.answer(0x55);
            }
            0xAB => self.answer(0x00),
            0xAD => self.set_control(self.control | CONTROL_KEYBOARD_OFF),
            0xAE => self.set_control(self.control & !CONTROL_KEYBOARD_OFF),
            0xC0 => self.answer(INPUT_PORT),
            0xD0 => {
                let irq = if self.interrupt() { OUTPUT_IRQ1 } else { 0 };
                self.answer(self.output_port | irq);
            }
            // A20 off and on: only stored, as address line 20 is never masked here.
            0xDD => self.output_port &= !OUTPUT_A20,
            0xDF => self.output_port |= OUTPUT_A20,
            // Test inputs.
            0xE0 => self.answer(0),
            // No auxiliary interface to enable or disable; pulses of the output port; unknown.
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.pending.take() {
            Some(0x60) => self.set_control(value & 0x7F),
            Some(0xD1) => self.output_port = value | OUTPUT_NOT_RESET,
            // As if the keyboard had sent it.
            Some(0xD2) => self.load(Output { value, from_keyboard: false }),
            // The auxiliary interface loops nothing back: a driver need not wait to find that out.
            Some(0xD3) => self.answer(0),
            // Other places of the RAM, an auxiliary device.
            Some(_) => {}
            None => {
                self.set_control(self.control & !CONTROL_KEYBOARD_OFF);
                self.keyboard.receive(value);
            }
        }
    }

    fn set_control(&mut self, control: u8) {
        let before = self.interrupt();
        self.control = control | CONTROL_AUX_OFF;
        self.edge |= self.interrupt() && !before;
    }

    /// Puts an answer of the controller before what the keyboard has sent.
    fn answer(&mut self, value: u8) {
        if let Some(Output { value, from_keyboard: true }) = self.output {
            self.displaced = Some(value);
        }
        self.load(Output { value, from_keyboard: false });
    }

    fn load(&mut self, output: Output) {
        self.output = Some(output);
        self.edge |= self.interrupt();
    }

    /// Takes the keyboard's next byte when there is room for it.
    fn fill(&mut self) {
        if self.output.is_some() || self.control & CONTROL_KEYBOARD_OFF != 0 {
            return;
        }
        let mut next = self.displaced.take();
        while next.is_none() {
            let Some(byte) = self.keyboard.send() else { return };
            let translated = self.control & CONTROL_TRANSLATE != 0;
            next = if translated { self.translation.translate(byte) } else { Some(byte) };
        }
        if let Some(value) = next {
            self.load(Output { value, from_keyboard: true });
        }
    }
}

#[cfg(test)]
#[path = "i8042_tests.rs"]
mod tests;
