//! What the machine tree asks of its host, answered with KVM and the kernel's clocks.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_ipc::channel::message::MachineEnd;

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{Doorbells, Interrupts};
use crate::machine::{Host, MappedDoorbell, PowerEvent};

/// The first reason for which the machine ends; later ones do not count. Any thread may give it.
pub(super) struct EndSignal {
    reason: OnceLock<MachineEnd>,
    event: EventFd,
}

impl EndSignal {
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { reason: OnceLock::new(), event })
    }

    /// Ends the machine. The event loop reports it and the process exits.
    pub(super) fn raise(&self, reason: MachineEnd) {
        if self.reason.set(reason).is_ok() {
            // A full counter would mean that it has been signalled already.
            let _ = self.event.write(1);
        }
    }

    pub(super) fn reason(&self) -> Option<&MachineEnd> {
        self.reason.get()
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}

/// The machine's host.
pub(super) struct CoreHost {
    interrupts: Arc<Interrupts>,
    doorbells: Arc<Doorbells>,
    end: Arc<EndSignal>,
    started: Instant,
}

impl CoreHost {
    pub(super) fn new(interrupts: Arc<Interrupts>, doorbells: Arc<Doorbells>, end: Arc<EndSignal>) -> Self {
        Self { interrupts, doorbells, end, started: Instant::now() }
    }
}

impl Host for CoreHost {
    fn set_irq(&self, gsi: u8, level: bool) {
        if let Err(error) = self.interrupts.set_line(gsi, level) {
            tracing::error!(gsi, level, %error, "interrupt line not set");
        }
    }

    fn power(&self, event: PowerEvent) {
        self.end.raise(match event {
            PowerEvent::PowerOff => MachineEnd::PowerOff,
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
