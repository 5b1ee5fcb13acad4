//! What a PCI function is to the bus.

use super::super::host::Space;
use super::config_space::{Command, ConfigSpace};

/// A function's name for one of its doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DoorbellId(pub u64);

/// A place in a BAR where a write only has to wake somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// The function's name for it.
    pub id: DoorbellId,
    /// The BAR that it lies in, 0–5.
    pub bar: u8,
    /// Its offset there in bytes.
    pub offset: u64,
    /// The length of the write that rings it, in bytes; 0 stands for any length.
    pub length: u8,
    /// The value that rings it, if not any.
    pub datamatch: Option<u64>,
}

/// A range that a function decodes by other means than a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The function's name for it.
    pub id: u8,
    /// Its address space.
    pub space: Space,
    /// Its first address.
    pub address: u64,
    /// Its length in bytes, at least 1.
    pub length: u64,
}

/// One PCI function. The bus stores and decodes its configuration space; the function supplies what is behind its BARs.
///
/// Methods are called from vCPU threads, several at a time. `data` of a BAR or window access is 1, 2 or 4 bytes
/// long and the address is a multiple of the length: the bus has split everything else into such cycles.
pub trait PciFunction: Send + Sync {
    /// The function's configuration space. Always the same object.
    fn config(&self) -> &ConfigSpace;

    /// The guest is about to read `len` bytes of configuration space at `offset`: update what changes by itself.
    fn config_will_read(&self, _offset: u16, _len: usize) {}

    /// The guest wrote `len` bytes of configuration space at `offset`; shared code has stored what is writable there.
    fn config_written(&self, _offset: u16, _len: usize) {}

    /// The command register changed (I/O, memory or bus master enable, interrupt disable). Called after the map follows it.
    fn command_changed(&self, _command: Command) {}

    /// The guest reads from a BAR.
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    /// The guest writes to a BAR.
    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    /// The doorbells in the BARs.
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }

    /// Ranges decoded otherwise than by a BAR. When the answer changes, it may only change in
    /// [`config_written`](Self::config_written) or [`reset`](Self::reset).
    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }

    /// The guest reads from a window.
    fn window_read(&self, _window: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    /// The guest writes to a window.
    fn window_write(&self, _window: u8, _offset: u64, _data: &[u8]) {}

    /// RST#. Shared code has restored the configuration space to its reset values before;
    /// [`command_changed`](Self::command_changed) is not called for that.
    fn reset(&self);
}
