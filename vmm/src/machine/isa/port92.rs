//! System control port A, port 92: fast reset and A20.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::super::host::{Host, PowerEvent, ResetSource};
use super::{IsaDevice, PortRange};

const PORT: u16 = 0x92;
/// A rising edge resets the CPU.
const FAST_INIT: u8 = 1 << 0;
/// A20 is passed on. Only stored: address line 20 is never masked here.
const FAST_A20: u8 = 1 << 1;

/// The port.
pub(in super::super) struct Port92 {
    value: AtomicU8,
    host: Arc<dyn Host>,
}

impl Port92 {
    pub(in super::super) fn new(host: Arc<dyn Host>) -> Self {
        Self { value: AtomicU8::new(0), host }
    }
}

impl IsaDevice for Port92 {
    fn name(&self) -> &str {
        "port 92"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: PORT, count: 1 }]
    }

    fn read(&self, _port: u16, data: &mut [u8]) {
        data.fill(self.value.load(Ordering::Acquire));
    }

    fn write(&self, _port: u16, data: &[u8]) {
        let [value] = data else { return };
        let value = value & (FAST_INIT | FAST_A20);
        let before = self.value.swap(value, Ordering::AcqRel);
        if value & !before & FAST_INIT != 0 {
            self.host.power(PowerEvent::Reset(ResetSource::Port92));
        }
    }

    fn reset(&self) {
        self.value.store(0, Ordering::Release);
    }
}
