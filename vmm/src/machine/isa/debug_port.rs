//! The firmware's debug port, 402.

use std::sync::Mutex;

use super::super::sync::lock;
use super::{IsaDevice, PortRange};

const DEBUG: u16 = 0x402;
/// What the debug port reads, so that firmware finds it.
const PRESENT: u8 = 0xE9;
/// A longer line is logged in pieces.
const LINE: usize = 160;
/// Bytes that the guest may have logged in all: beyond, it is not listened to.
const BUDGET: usize = 1 << 20;

/// The debug port: what is written goes to the log, a line an event.
pub(in super::super) struct DebugPort {
    state: Mutex<DebugState>,
}

struct DebugState {
    line: Vec<u8>,
    budget: usize,
}

impl DebugPort {
    pub(in super::super) fn new() -> Self {
        Self { state: Mutex::new(DebugState { line: Vec::with_capacity(LINE), budget: BUDGET }) }
    }
}

impl IsaDevice for DebugPort {
    fn name(&self) -> &str {
        "debug port"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: DEBUG, count: 1 }]
    }

    fn read(&self, _port: u16, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _port: u16, data: &[u8]) {
        let mut state = lock(&self.state);
        for byte in data {
            let Some(left) = state.budget.checked_sub(1) else { return };
            state.budget = left;
            match byte {
                b'\n' => {}
                0x20..=0x7E | b'\t' => state.line.push(*byte),
                _ => state.line.push(b'.'),
            }
            if *byte == b'\n' || state.line.len() >= LINE {
                tracing::debug!(target: "firmware", "{}", String::from_utf8_lossy(&state.line));
                state.line.clear();
            }
        }
    }

    fn reset(&self) {
        lock(&self.state).line.clear();
    }
}
