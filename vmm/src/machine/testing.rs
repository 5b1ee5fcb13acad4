//! A host for tests that records what it is told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::host::{Host, MappedDoorbell, PowerEvent};
use super::memory_map::MemorySlot;
use super::sync::lock;

/// The recorder.
#[derive(Default)]
pub(crate) struct Recorder(Mutex<Recorded>);

/// What it was told.
#[derive(Clone, Default)]
pub(crate) struct Recorded {
    /// Bit n: IRQ n is high.
    pub(crate) irqs: u16,
    /// Every call of `set_irq`.
    pub(crate) edges: Vec<(u8, bool)>,
    /// Every power event.
    pub(crate) power: Vec<PowerEvent>,
    /// The doorbells told last.
    pub(crate) doorbells: Vec<MappedDoorbell>,
    /// Every slot and CPU that the guest ejected.
    pub(crate) ejected: Vec<u16>,
    /// The memory map told last.
    pub(crate) slots: Vec<MemorySlot>,
    /// The deadline told last.
    pub(crate) timer: Option<Duration>,
    monotonic: Duration,
    wall_clock: Duration,
}

impl Recorder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn recorded(&self) -> Recorded {
        lock(&self.0).clone()
    }

    pub(crate) fn set_wall_clock(&self, time: Duration) {
        lock(&self.0).wall_clock = time;
    }

    /// The timer that was armed runs out now: it is armed no more.
    pub(crate) fn take_timer(&self) -> Option<Duration> {
        lock(&self.0).timer.take()
    }

    pub(crate) fn set_monotonic(&self, time: Duration) {
        lock(&self.0).monotonic = time;
    }
}

impl Host for Recorder {
    fn set_irq(&self, gsi: u8, level: bool) {
        let mut recorded = lock(&self.0);
        recorded.edges.push((gsi, level));
        recorded.irqs = recorded.irqs & !(1 << gsi) | u16::from(level) << gsi;
    }

    fn power(&self, event: PowerEvent) {
        lock(&self.0).power.push(event);
    }

    fn topology_changed(&self, doorbells: &[MappedDoorbell]) {
        lock(&self.0).doorbells = doorbells.to_vec();
    }

    fn pci_ejected(&self, slot: u8) {
        lock(&self.0).ejected.push(slot.into());
    }

    fn cpu_ejected(&self, cpu: u16) {
        lock(&self.0).ejected.push(cpu);
    }

    fn memory_changed(&self, slots: &[MemorySlot]) {
        lock(&self.0).slots = slots.to_vec();
    }

    fn set_timer(&self, deadline: Option<Duration>) {
        lock(&self.0).timer = deadline;
    }

    fn monotonic(&self) -> Duration {
        lock(&self.0).monotonic
    }

    fn wall_clock(&self) -> Duration {
        lock(&self.0).wall_clock
    }
}
