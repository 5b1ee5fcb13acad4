//! The ISA bus: what the PIIX3 forwards reaches the device that decodes the port.

use std::sync::Arc;

use super::super::irq::InterruptRouter;

/// A range of I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// How many ports, at least 1.
    pub count: u16,
}

/// A device on the ISA bus. Methods are called from vCPU threads, several at a time.
pub trait IsaDevice: Send + Sync {
    /// What to call it in messages.
    fn name(&self) -> &str;

    /// The ports that it decodes. Never changes.
    fn ports(&self) -> Vec<PortRange>;

    /// The ISA interrupt that it drives, if any.
    fn irq(&self) -> Option<u8> {
        None
    }

    /// The widest access that it takes in one cycle: 1, 2 or 4 bytes. Wider ones are split, as the bus does for 8-bit cards.
    fn width(&self) -> usize {
        1
    }

    /// The guest reads from `port`; `data` is at most [`width`](Self::width) bytes long and `port` a multiple of its length.
    fn read(&self, port: u16, data: &mut [u8]);

    /// The guest writes to `port`.
    fn write(&self, port: u16, data: &[u8]);

    /// RESETDRV.
    fn reset(&self);
}

/// An ISA interrupt line as one device drives it. Clones drive the same source.
#[derive(Clone)]
pub struct IrqLine {
    router: Arc<InterruptRouter>,
    index: usize,
    irq: u8,
}

impl IrqLine {
    pub(in super::super) fn new(router: Arc<InterruptRouter>, irq: u8) -> Self {
        Self { index: router.add_line(irq), router, irq }
    }

    /// Its number, 0–15.
    #[must_use]
    pub const fn irq(&self) -> u8 {
        self.irq
    }

    /// Drives the line high or low. The input is high while any source is.
    pub fn set(&self, level: bool) {
        self.router.set_line(self.index, level);
    }
}
