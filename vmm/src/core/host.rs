//! What the machine tree asks of its host, answered with KVM and the kernel's clocks.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_ipc::channel::message::MachineEnd;
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};

use super::reports::{Ejected, Reports};
use crate::kvm::{Doorbells, Interrupts, KvmError, MemorySlots};
use crate::machine::{Host, MappedDoorbell, MemorySlot, PowerEvent};

/// The machine's host.
pub(super) struct CoreHost {
    interrupts: Arc<Interrupts>,
    doorbells: Arc<Doorbells>,
    memory: Arc<MemorySlots>,
    reports: Arc<Reports>,
    timer: Arc<TimerFd>,
    started: Instant,
}

impl CoreHost {
    pub(super) fn new(
        interrupts: Arc<Interrupts>,
        doorbells: Arc<Doorbells>,
        memory: Arc<MemorySlots>,
        reports: Arc<Reports>,
        timer: Arc<TimerFd>,
    ) -> Self {
        Self { interrupts, doorbells, memory, reports, timer, started: Instant::now() }
    }
}

impl CoreHost {
    fn followed(&self, update: Result<(), KvmError>) {
        if let Err(error) = update {
            self.reports
                .end(MachineEnd::Failed(format!("the memory map does not follow the chipset: {error}")));
        }
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

    fn pci_ejected(&self, slot: u8) {
        self.reports.ejected(Ejected::Slot(slot));
    }

    fn cpu_ejected(&self, cpu: u16) {
        self.reports.ejected(Ejected::Cpu(cpu));
    }

    fn memory_changed(&self, slots: &[MemorySlot]) {
        self.followed(self.memory.update(slots));
    }

    fn ram_written(&self, address: u64) {
        self.followed(self.memory.ram_written(address));
    }

    fn set_timer(&self, deadline: Option<Duration>) {
        // A deadline that has passed: zero would disarm.
        let after = deadline.map(|at| at.saturating_sub(self.started.elapsed()).max(Duration::from_nanos(1)));
        let set = match after {
            Some(after) => self.timer.set(Expiration::OneShot(after.into()), TimerSetTimeFlags::empty()),
            None => self.timer.unset(),
        };
        if let Err(error) = set {
            tracing::error!(%error, "timer not set");
        }
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}
