//! What the machine tree asks of its host, answered with KVM and the kernel's clocks.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_ipc::channel::message::MachineEnd;

use super::reports::Reports;
use crate::kvm::{Doorbells, Interrupts};
use crate::machine::{Host, MappedDoorbell, PowerEvent};

/// The machine's host.
pub(super) struct CoreHost {
    interrupts: Arc<Interrupts>,
    doorbells: Arc<Doorbells>,
    reports: Arc<Reports>,
    started: Instant,
}

impl CoreHost {
    pub(super) fn new(interrupts: Arc<Interrupts>, doorbells: Arc<Doorbells>, reports: Arc<Reports>) -> Self {
        Self { interrupts, doorbells, reports, started: Instant::now() }
    }
}

impl Host for CoreHost {
    fn set_irq(&self, gsi: u8, level: bool) {
        if let Err(error) = self.interrupts.set_line(gsi, level) {
            tracing::error!(gsi, level, %error, "interrupt line not set");
        }
    }

    fn power(&self, event: PowerEvent) {
        self.reports.end(match event {
            PowerEvent::PowerOff => MachineEnd::PowerOff,
            PowerEvent::Panicked => MachineEnd::Panicked,
            PowerEvent::DebugExit(value) => MachineEnd::DebugExit(value),
            PowerEvent::Reset(source) => {
                tracing::debug!(?source, "the guest resets the machine");
                MachineEnd::Reset
            }
        });
    }

    fn topology_changed(&self, doorbells: &[MappedDoorbell]) {
        if let Err(error) = self.doorbells.update(doorbells) {
            tracing::warn!(%error, "a doorbell stays on the slow path");
        }
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}
