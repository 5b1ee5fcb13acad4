//! Interrupts: from an event that the back end signals to the guest.
//!
//! Each source (the configuration, each queue) has an eventfd of its own for as long as the device lives. With MSI-X
//! and an unmasked vector it is connected to the host's interrupt routing (irqfd) and nobody else looks at it. Masked,
//! it is disconnected: an event stays in the eventfd, where the pending bit array finds it, and is delivered when the
//! vector is unmasked. Without MSI-X the core's event loop waits for it, sets the ISR status and asserts INTx#.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use vmm_sys_util::eventfd::EventFd;

use super::event::Event;
use super::events::Token;
use super::isr::{self, Isr};
use super::msix::Msix;
use super::queues::NO_VECTOR;
use crate::machine::InterruptPin;

/// What an MSI-X vector sends: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The host's way from an eventfd to an interrupt message. One for each function. Called with the device's lock held:
/// must not call back into the device.
pub trait MsiHost: Send + Sync {
    /// From now on each signal of `event` sends `message`. `source` is 0 for the configuration, 1 + n for queue n; it is not connected now.
    ///
    /// # Errors
    /// The host is out of routes, or KVM refuses.
    fn connect(&self, source: u16, event: &EventFd, message: MsiMessage) -> io::Result<()>;

    /// `event` sends nothing any more. When this returns, none is on its way.
    fn disconnect(&self, source: u16, event: &EventFd);
}

/// The INTx# pin. The machine's [`InterruptPin`] is one.
pub trait IntxPin: Send + Sync {
    /// Asserts or releases it.
    fn set(&self, asserted: bool);
}

impl IntxPin for InterruptPin {
    fn set(&self, asserted: bool) {
        Self::set(self, asserted);
    }
}

/// Where a source's events go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// Nowhere: they stay in the eventfd.
    Kept,
    /// To the host's routing.
    Message(MsiMessage),
    /// To the event loop.
    Polled,
}

struct Source {
    event: Event,
    vector: u16,
    route: Route,
}

/// All sources of a device, index 0 the configuration, 1 + n queue n.
pub(super) struct Interrupts {
    sources: Vec<Source>,
    pub msix: Msix,
    pub isr: Isr,
    /// The function may write to memory, which is what sending a message is.
    bus_master: bool,
    host: Arc<dyn MsiHost>,
    epoll: Arc<Epoll>,
    device: Arc<str>,
}

/// The source of a queue.
fn queue_source(queue: u16) -> u16 {
    queue.saturating_add(1)
}

impl Interrupts {
    pub fn new(
        device: &Arc<str>,
        queues: u16,
        host: Arc<dyn MsiHost>,
        epoll: Arc<Epoll>,
    ) -> io::Result<Self> {
        let source = |_| Event::new().map(|event| Source { event, vector: NO_VECTOR, route: Route::Kept });
        let mut interrupts = Self {
            sources: (0..=queues).map(source).collect::<io::Result<_>>()?,
            msix: Msix::new(queues.saturating_add(1)),
            isr: Isr::default(),
            bus_master: false,
            host,
            epoll,
            device: Arc::clone(device),
        };
        interrupts.update();
        Ok(interrupts)
    }

    /// The eventfd that a queue's device signals.
    pub fn queue_event(&self, queue: u16) -> Option<&Event> {
        self.sources.get(usize::from(queue_source(queue))).map(|source| &source.event)
    }

    /// The eventfds of all sources.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.sources.iter().map(|source| &source.event)
    }

    /// `config_msix_vector`.
    pub fn config_vector(&self) -> u16 {
        self.vector(0)
    }

    /// `queue_msix_vector`.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.vector(queue_source(queue))
    }

    fn vector(&self, source: u16) -> u16 {
        self.sources.get(usize::from(source)).map_or(NO_VECTOR, |source| source.vector)
    }

    /// The driver writes `config_msix_vector`.
    pub fn set_config_vector(&mut self, vector: u16) {
        self.set_vector(0, vector);
    }

    /// The driver writes `queue_msix_vector`.
    pub fn set_queue_vector(&mut self, queue: u16, vector: u16) {
        self.set_vector(queue_source(queue), vector);
    }

    fn set_vector(&mut self, index: u16, vector: u16) {
        // A vector that does not exist reads back as "no vector" (section 4.1.5.1.2).
        let vector = if vector < self.msix.vectors() { vector } else { NO_VECTOR };
        let enabled = self.msix.enabled();
        let Some(source) = self.sources.get_mut(usize::from(index)) else { return };
        if source.vector == NO_VECTOR && enabled {
            // What happened without a vector interrupts nobody.
            source.event.take();
        }
        source.vector = vector;
        self.update_source(index);
    }

    /// The guest wrote the message control register.
    pub fn set_msix_control(&mut self, control: u16) {
        if self.msix.set_control(control) {
            if self.msix.enabled() {
                self.isr.clear();
            }
            self.update();
        }
    }

    /// The guest writes the MSI-X table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Some((first, last)) = self.msix.write(offset, data) else { return };
        for index in 0..u16::try_from(self.sources.len()).unwrap_or(u16::MAX) {
            if (first..=last).contains(&self.vector(index)) {
                self.update_source(index);
            }
        }
    }

    /// The pending bit array: a vector is pending while a source of its has an event that could not be sent.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(offset..) {
            *byte = 0;
            for bit in 0..8u16 {
                let vector = index.saturating_mul(8).saturating_add(bit.into());
                if self.pending(vector) {
                    *byte |= 1 << bit;
                }
            }
        }
    }

    fn pending(&self, vector: u64) -> bool {
        self.sources.iter().any(|source| {
            u64::from(source.vector) == vector
                && source.vector != NO_VECTOR
                && source.route == Route::Kept
                && source.event.is_signalled()
        })
    }

    /// The command register's bus master bit.
    pub fn set_bus_master(&mut self, bus_master: bool) {
        if self.bus_master != bus_master {
            self.bus_master = bus_master;
            self.update();
        }
    }

    /// Tells the driver that the configuration, or the device's ability to work, changed.
    pub fn configuration_changed(&mut self) {
        if !self.msix.enabled() {
            self.isr.raise(isr::CONFIGURATION);
        } else if let Some(source) = self.sources.first().filter(|source| source.vector != NO_VECTOR) {
            source.event.signal();
        }
    }

    /// Interrupts for a queue although its device did not ask: somebody may have died before it could.
    pub fn queue_used(&self, queue: u16) {
        if let Some(event) = self.queue_event(queue) {
            event.signal();
        }
    }

    /// The event loop found a queue's eventfd signalled.
    pub fn queue_polled(&mut self, queue: u16) {
        let source = self.sources.get(usize::from(queue_source(queue)));
        if source.is_some_and(|source| source.route == Route::Polled && source.event.take()) {
            self.isr.raise(isr::QUEUE);
        }
    }

    /// Device reset: no vectors, nothing pending. The MSI-X table is the PCI function's and stays.
    pub fn reset(&mut self) {
        self.isr.clear();
        for index in 0..u16::try_from(self.sources.len()).unwrap_or(u16::MAX) {
            if let Some(source) = self.sources.get_mut(usize::from(index)) {
                source.vector = NO_VECTOR;
                source.event.take();
            }
            self.update_source(index);
        }
    }

    /// RST#.
    pub fn reset_function(&mut self) {
        self.msix.reset();
        self.bus_master = false;
        self.reset();
    }

    fn update(&mut self) {
        for index in 0..u16::try_from(self.sources.len()).unwrap_or(u16::MAX) {
            self.update_source(index);
        }
    }

    /// Brings a source's route in line with the registers.
    fn update_source(&mut self, index: u16) {
        let Some(source) = self.sources.get_mut(usize::from(index)) else { return };
        let wanted = match self.msix.message(source.vector) {
            Some(message) if self.bus_master => Route::Message(message),
            _ if self.msix.enabled() => Route::Kept,
            // The configuration's event is signalled by this process alone, which then sets the ISR status instead.
            _ if index == 0 => Route::Kept,
            _ => Route::Polled,
        };
        if source.route == wanted {
            return;
        }
        match source.route {
            Route::Kept => {}
            Route::Message(_) => self.host.disconnect(index, source.event.eventfd()),
            Route::Polled => {
                let _ = self.epoll.delete(source.event.as_fd());
            }
        }
        source.route = Route::Kept;
        match wanted {
            Route::Kept => source.route = wanted,
            Route::Message(message) => {
                // An event from before must reach the connection as a new signal.
                let waiting = source.event.take();
                match self.host.connect(index, source.event.eventfd(), message) {
                    Ok(()) => source.route = wanted,
                    Err(error) => {
                        tracing::error!(device = &*self.device, source = index, %error, "no interrupt route");
                    }
                }
                if waiting {
                    source.event.signal();
                }
            }
            Route::Polled => {
                let token = Token::Queue(index.saturating_sub(1)).into();
                let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
                match self.epoll.add(source.event.as_fd(), event) {
                    Ok(()) => source.route = wanted,
                    Err(error) => {
                        tracing::error!(device = &*self.device, source = index, %error, "cannot wait for interrupts");
                    }
                }
            }
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        for (index, source) in (0u16..).zip(&self.sources) {
            if matches!(source.route, Route::Message(_)) {
                self.host.disconnect(index, source.event.eventfd());
            }
        }
    }
}
