//! The 8042 keyboard controller, ports 60 and 64, with nothing plugged in: it passes its self-test, gates A20 and resets
//! the machine; neither keyboard nor mouse ever answers.

use std::sync::{Arc, Mutex};

use super::super::host::{Host, PowerEvent, ResetSource};
use super::super::sync::lock;
use super::{IsaDevice, PortRange};

const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;

/// Status: there is a byte to read.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Status: the self-test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: the last write went to port 64.
const STATUS_COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Command byte: system flag.
const CONTROL_SYSTEM: u8 = 1 << 2;
/// Command byte: keyboard and auxiliary interface disabled.
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_AUX_OFF: u8 = 1 << 5;

/// Output port: CPU runs (not held in reset), A20 passed.
const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

#[derive(Debug)]
struct State {
    /// The byte that waits to be read.
    output: Option<u8>,
    /// The byte read last: reading again without a new one repeats it.
    last: u8,
    control: u8,
    output_port: u8,
    /// The command that takes the next byte at port 60.
    pending: Option<u8>,
    last_was_command: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            output: None,
            last: 0,
            control: CONTROL_KEYBOARD_OFF | CONTROL_AUX_OFF,
            output_port: OUTPUT_NOT_RESET | OUTPUT_A20,
            pending: None,
            last_was_command: false,
        }
    }
}

/// The controller.
pub(in super::super) struct I8042 {
    state: Mutex<State>,
    host: Arc<dyn Host>,
}

impl I8042 {
    pub(in super::super) fn new(host: Arc<dyn Host>) -> Self {
        Self { state: Mutex::default(), host }
    }

    /// Carries out a command; says whether it resets the machine.
    fn command(state: &mut State, command: u8) -> bool {
        state.last_was_command = true;
        state.pending = None;
        match command {
            // Read command byte; its copies in the other 31 places of the RAM read zero.
            0x20 => state.output = Some(state.control),
            0x21..=0x3F => state.output = Some(0),
            // Take a byte: write command byte or RAM, output port, keyboard or aux buffer, aux device.
            0x60..=0x7F | 0xD1..=0xD4 => state.pending = Some(command),
            // Auxiliary interface test: its clock is stuck, there is none. Keyboard interface test: passed.
            0xA9 => state.output = Some(0x01),
            0xAB => state.output = Some(0x00),
            0xAA => {
                state.control |= CONTROL_SYSTEM;
                state.output = Some(0x55);
            }
            0xAD => state.control |= CONTROL_KEYBOARD_OFF,
            0xAE => state.control &= !CONTROL_KEYBOARD_OFF,
            // Input port: keyboard not inhibited. Output port.
            0xC0 => state.output = Some(0x80),
            0xD0 => state.output = Some(state.output_port),
            // Pulse the low output bits: bit 0 low resets.
            0xF0..=0xFF => return command & OUTPUT_NOT_RESET == 0,
            _ => {}
        }
        false
    }

    /// Takes a data byte; says whether it resets the machine.
    fn data(state: &mut State, value: u8) -> bool {
        state.last_was_command = false;
        match state.pending.take() {
            Some(0x60) => state.control = value & 0x7F | CONTROL_AUX_OFF,
            Some(0xD1) => {
                state.output_port = value;
                return value & OUTPUT_NOT_RESET == 0;
            }
            // Loop back as if the keyboard had sent it. There is no auxiliary interface: a driver need not wait to hear so.
            Some(0xD2) => state.output = Some(value),
            Some(0xD3) => state.output = Some(0),
            // A byte for a keyboard or mouse that is not there.
            _ => {}
        }
        false
    }
}

impl IsaDevice for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: DATA, count: 1 }, PortRange { first: COMMAND, count: 1 }]
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        let mut state = lock(&self.state);
        let value = if port == DATA {
            if let Some(value) = state.output.take() {
                state.last = value;
            }
            state.last
        } else {
            let mut status = STATUS_UNLOCKED;
            if state.output.is_some() {
                status |= STATUS_OUTPUT_FULL;
            }
            if state.control & CONTROL_SYSTEM != 0 {
                status |= STATUS_SYSTEM;
            }
            if state.last_was_command {
                status |= STATUS_COMMAND;
            }
            status
        };
        data.fill(value);
    }

    fn write(&self, port: u16, data: &[u8]) {
        let [value] = data else { return };
        let mut state = lock(&self.state);
        let reset =
            if port == DATA { Self::data(&mut state, *value) } else { Self::command(&mut state, *value) };
        drop(state);
        if reset {
            self.host.power(PowerEvent::Reset(ResetSource::KeyboardController));
        }
    }

    fn reset(&self) {
        *lock(&self.state) = State::default();
    }
}
