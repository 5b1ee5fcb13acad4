//! What stands under the tree instead of KVM: a clock that the test moves, and a record of interrupt lines and power events.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::machine::{Host, MappedDoorbell, MemorySlot, PowerEvent};

/// The machine's host.
pub struct VirtualHost {
    /// Nanoseconds since power-on.
    now: AtomicU64,
    /// The time of day at power-on.
    power_on: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A bit for each interrupt line: what the tree drives, and what the test forces on top.
    driven: u16,
    forced: u16,
    /// Changes of a line that nobody has asked for yet.
    edges: Vec<(u8, bool)>,
    power: Vec<PowerEvent>,
    /// When the tree wants to be woken, in time since power-on.
    timer: Option<Duration>,
}

impl State {
    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.driven | self.forced;
        change(self);
        let after = self.driven | self.forced;
        for line in (0..16).filter(|line| (before ^ after) & 1 << line != 0) {
            self.edges.push((line, after & 1 << line != 0));
        }
    }
}

fn with_bit(bits: u16, line: u8, level: bool) -> u16 {
    let bit = 1 << (line & 15);
    if level { bits | bit } else { bits & !bit }
}

impl VirtualHost {
    /// A host whose time of day is `power_on` (since 1970, UTC) when its clock stands at zero.
    pub fn new(power_on: Duration) -> Self {
        Self { now: AtomicU64::new(0), power_on, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtual clock in nanoseconds.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    /// Moves the clock. It never goes back.
    pub fn advance_to(&self, nanoseconds: u64) {
        self.now.fetch_max(nanoseconds, Ordering::AcqRel);
    }

    /// Takes what the tree was to be woken for by now.
    pub fn take_expired(&self) -> bool {
        let now = self.monotonic();
        self.state().timer.take_if(|deadline| *deadline <= now).is_some()
    }

    /// When the tree wants to be woken next, in nanoseconds since power-on.
    pub fn next_timer(&self) -> Option<u64> {
        let timer = self.state().timer?;
        u64::try_from(timer.as_nanos()).ok()
    }

    /// Drives an interrupt line from outside of the tree.
    pub fn force(&self, line: u8, level: bool) {
        self.state().change(|state| state.forced = with_bit(state.forced, line, level));
    }

    /// The changes of interrupt lines since the last call, in order.
    pub fn take_edges(&self) -> Vec<(u8, bool)> {
        std::mem::take(&mut self.state().edges)
    }

    /// The power events since the last call, in order.
    pub fn take_power(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.state().power)
    }
}

impl Host for VirtualHost {
    fn set_irq(&self, gsi: u8, level: bool) {
        self.state().change(|state| state.driven = with_bit(state.driven, gsi, level));
    }

    fn power(&self, event: PowerEvent) {
        self.state().power.push(event);
    }

    /// There is no KVM to ring doorbells for: every write reaches the tree.
    fn topology_changed(&self, _doorbells: &[MappedDoorbell]) {}

    /// There is no KVM to change slots of: every access reaches the tree.
    fn memory_changed(&self, _slots: &[MemorySlot]) {}

    fn set_timer(&self, deadline: Option<Duration>) {
        self.state().timer = deadline;
    }

    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.now())
    }

    fn wall_clock(&self) -> Duration {
        self.power_on.saturating_add(self.monotonic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_high_while_tree_or_test_drives_it() {
        let host = VirtualHost::new(Duration::ZERO);
        host.set_irq(8, true);
        host.force(8, true);
        host.set_irq(8, false);
        assert_eq!(host.take_edges(), [(8, true)]);
        host.force(8, false);
        assert_eq!(host.take_edges(), [(8, false)]);
    }

    #[test]
    fn the_clock_never_goes_back() {
        let host = VirtualHost::new(Duration::from_secs(1000));
        host.advance_to(5_000_000_000);
        host.advance_to(1);
        assert_eq!(host.wall_clock(), Duration::from_secs(1005));
    }
}
