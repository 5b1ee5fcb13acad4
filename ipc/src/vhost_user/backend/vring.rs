//! A running split ring: requests out, completions in, notifications both ways. Owned by the worker that serves it.
//!
//! Chains are walked by [`Chain::walk`], which tells a malformed chain from a short one. A ring that the guest has broken is left alone until the front end sets it up anew.
//!
//! `virtio_queue::Queue` would show the driver each entry of the used ring at once and look up guest memory for each word. Here the
//! used ring's index, which the driver may be looking at all the time, is written once for several entries ([`Vring::publish`]),
//! and the available ring's is read again only when all that it showed is taken.
//! Follows virtio 1.2, 2.7, and vhost-user, "Ring states".

use std::collections::VecDeque;
use std::num::Wrapping;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use arc_swap::ArcSwapOption;
use nix::unistd::write;
use thiserror::Error;
use tracing::warn;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_bindings::bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::Bytes;

use super::chain::{Chain, ChainError};
use super::inflight::InflightQueue;
use crate::memory::{GuestRam, MemoryError, single};
use crate::metrics::{Meter, Metrics};

/// Why a ring cannot run (any longer).
#[derive(Debug, Error)]
pub enum VringError {
    /// Size, alignment or place of the ring.
    #[error("ring {index} cannot start: {reason}")]
    Setup {
        /// The queue.
        index: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// The available ring's index is more than a ring ahead, or the ring is no longer memory.
    #[error("the available ring is broken: {0}")]
    Available(&'static str),
    /// A ring is no longer memory.
    #[error("a ring is not guest memory at {0:#x}")]
    Ring(u64),
    /// A malformed chain.
    #[error("descriptor chain {head}: {source}")]
    Chain {
        /// First descriptor.
        head: u16,
        /// What is wrong.
        source: ChainError,
    },
    /// A descriptor names something that is not memory.
    #[error("a descriptor names what is not guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The request does not make sense to the device, which has no way to say so in the ring.
    #[error("{0}")]
    Request(&'static str),
}

/// `flags` of the used ring.
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY.to_le_bytes()[0] as u16;

/// Most entries of the used ring that the driver is shown at once: it can work on some while others are finished.
const BATCH: usize = 8;

/// Largest split ring there can be, entries (virtio 1.2, 2.7).
const MAX_SIZE: u16 = 32768;

/// The call or error descriptor of a ring, shared between its worker and the control thread.
pub type CallSlot = Arc<ArcSwapOption<OwnedFd>>;

/// What a ring needs to run. Addresses are guest-physical.
#[derive(Clone, Debug)]
pub struct VringSetup {
    /// The queue's number.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Index of the next entry of the available ring to take.
    pub next_available: u16,
    /// VIRTIO_F_RING_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The driver signals here that it made requests available.
    pub kick: Arc<OwnedFd>,
    /// The driver is interrupted through this; without it it polls. The control thread may change it at any time.
    pub call: CallSlot,
    /// The front end learns here that the ring is broken.
    pub error: CallSlot,
}

/// A running ring.
#[derive(Debug)]
pub struct Vring {
    setup: VringSetup,
    ram: GuestRam,
    /// Index of the next entry of the available ring to take.
    next_available: Wrapping<u16>,
    /// The available ring's index when it was last read.
    available: Wrapping<u16>,
    inflight: Option<InflightQueue>,
    /// Requests of a dead predecessor, oldest first: served before new ones.
    resubmit: VecDeque<u16>,
    /// Requests taken and not yet in the used ring.
    taken: u32,
    /// Index of the next entry of the used ring to write.
    next_used: Wrapping<u16>,
    /// The used ring's index as the driver sees it.
    published: Wrapping<u16>,
    /// The used ring's index when it was last decided whether to interrupt.
    signalled: Wrapping<u16>,
    /// It did not want to.
    driver_looks: bool,
    /// Heads of the entries that are written and not published.
    unpublished: Vec<u16>,
    broken: bool,
    meter: Option<Meter>,
}

impl Vring {
    /// Checks the set-up and starts the ring. With `inflight` the next entry to take follows from it.
    ///
    /// # Errors
    /// [`VringError::Setup`] when the ring is malformed or not in guest memory.
    pub fn start(
        setup: VringSetup,
        ram: GuestRam,
        mut inflight: Option<InflightQueue>,
    ) -> Result<Self, VringError> {
        let bad = |reason| VringError::Setup { index: setup.index, reason };
        if !setup.size.is_power_of_two() || setup.size > MAX_SIZE {
            return Err(bad("its size is not a power of two"));
        }
        for (address, alignment, reason) in [
            (setup.descriptors, 16, "the descriptor table is not aligned to 16 bytes"),
            (setup.available, 2, "the available ring is not aligned to 2 bytes"),
            (setup.used, 4, "the used ring is not aligned to 4 bytes"),
        ] {
            if !u64::is_multiple_of(address, alignment) {
                return Err(bad(reason));
            }
        }
        let entries = u64::from(setup.size);
        let in_memory = ram.contains(setup.descriptors, entries.saturating_mul(16))
            && ram.contains(setup.available, entries.saturating_mul(2).saturating_add(6))
            && ram.contains(setup.used, entries.saturating_mul(8).saturating_add(6));
        if !in_memory || setup.available == 0 {
            return Err(bad("it does not lie in guest memory"));
        }
        let used_idx: u16 = load(&ram, setup.used.saturating_add(2), Ordering::Acquire)
            .map_err(|_| bad("the used ring cannot be read"))?;
        let resubmit: VecDeque<u16> =
            inflight.as_mut().map(|inflight| inflight.recover(used_idx).into()).unwrap_or_default();
        let next = match (&inflight, u16::try_from(resubmit.len())) {
            (Some(_), Ok(count)) => used_idx.wrapping_add(count),
            _ => setup.next_available,
        };
        let used = Wrapping(used_idx);
        let ring = Self {
            setup,
            ram,
            next_available: Wrapping(next),
            available: Wrapping(next),
            inflight,
            resubmit,
            taken: 0,
            next_used: used,
            published: used,
            signalled: used,
            driver_looks: false,
            unpublished: Vec::with_capacity(BATCH),
            broken: false,
            meter: None,
        };
        // A predecessor may have died between the used ring and the interrupt.
        if ring.inflight.is_some() {
            ring.call();
        }
        Ok(ring)
    }

    /// Counts from here on.
    #[must_use]
    pub fn with_meter(mut self, metrics: &Metrics) -> Self {
        self.meter = Meter::new(metrics, self.setup.index, self.setup.size);
        self
    }

    /// A request that is about to be finished has failed.
    pub fn count_error(&self) {
        self.meter.iter().for_each(Meter::failed);
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.setup.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// Guest memory as it was when the ring started.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The descriptor that the driver's notifications arrive on. Watch it edge-triggered: it is never read.
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.setup.kick.as_fd()
    }

    /// Index of the next entry of the available ring, for GET_VRING_BASE. Requests of a dead predecessor that were not begun
    /// count as not taken.
    pub fn next_available(&self) -> u16 {
        let pending = u16::try_from(self.resubmit.len()).unwrap_or(0);
        self.next_available.0.wrapping_sub(pending)
    }

    /// Index of the used ring as the driver sees it.
    pub fn used_index(&self) -> u16 {
        self.published.0
    }

    /// Requests taken and not finished.
    pub fn in_flight(&self) -> u32 {
        self.taken
    }

    /// Whether the guest has broken the ring; nothing is taken from it any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Takes the next request, if there is one.
    /// A malformed one breaks the ring: that is logged, the front end is told, and no further request is found.
    pub fn next(&mut self, chain: &mut Chain) -> bool {
        if self.broken {
            return false;
        }
        match self.try_next(chain) {
            Ok(found) => found,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn try_next(&mut self, chain: &mut Chain) -> Result<bool, VringError> {
        let head = match self.resubmit.pop_front() {
            Some(head) => head,
            None => {
                let Some(head) = self.next_head()? else {
                    self.meter.iter_mut().for_each(Meter::idle);
                    return Ok(false);
                };
                if let Some(inflight) = self.inflight.as_mut() {
                    inflight.taken(head);
                }
                head
            }
        };
        chain
            .walk(self.ram.memory(), self.setup.descriptors, self.setup.size, head, self.setup.indirect)
            .map_err(|source| VringError::Chain { head, source })?;
        self.taken = self.taken.saturating_add(1);
        self.meter.iter_mut().for_each(|meter| meter.taken(head, chain.readable_bytes()));
        Ok(true)
    }

    /// The next entry of the available ring.
    fn next_head(&mut self) -> Result<Option<u16>, VringError> {
        if self.next_available == self.available {
            self.available = self.available_index(Ordering::Acquire)?;
            if (self.available - self.next_available).0 > self.setup.size {
                return Err(VringError::Available("its index is more than a ring ahead"));
            }
            if self.next_available == self.available {
                return Ok(None);
            }
        }
        let slot = u64::from(self.next_available.0 & self.setup.size.wrapping_sub(1));
        let entry = self.setup.available.saturating_add(4).saturating_add(slot.saturating_mul(2));
        let head: u16 = load(&self.ram, entry, Ordering::Relaxed)?;
        self.next_available += 1;
        Ok(Some(head))
    }

    fn available_index(&self, order: Ordering) -> Result<Wrapping<u16>, VringError> {
        load(&self.ram, self.setup.available.saturating_add(2), order).map(Wrapping)
    }

    /// Puts a request back that [`Self::next`] just returned, because the device cannot serve it yet.
    /// It stays marked in flight and is the next to be taken.
    pub fn put_back(&mut self, head: u16) {
        self.taken = self.taken.saturating_sub(1);
        self.meter.iter_mut().for_each(|meter| meter.put_back(head));
        self.resubmit.push_front(head);
    }

    /// Request `head` is done and has `written` bytes for the driver. Call [`Self::signal`] after a batch of these.
    pub fn finish(&mut self, head: u16, written: u32) {
        self.place_used(head, written);
        if self.unpublished.len() >= BATCH {
            self.publish();
        }
    }

    /// As [`Self::finish`] for several requests, which the driver sees all at once: a packet in several buffers is
    /// nothing to be seen in part (virtio 1.2, 5.1.6.4).
    pub fn finish_together(&mut self, done: &[(u16, u32)]) {
        done.iter().for_each(|&(head, written)| self.place_used(head, written));
        self.publish();
    }

    /// Writes an entry of the used ring without its index.
    fn place_used(&mut self, head: u16, written: u32) {
        self.taken = self.taken.saturating_sub(1);
        self.meter.iter_mut().for_each(|meter| meter.finished(head, written));
        if self.broken {
            return;
        }
        // The offset is below that of the ring's end, which was checked to be memory.
        let slot = u64::from(self.next_used.0 & self.setup.size.wrapping_sub(1));
        let entry = self.setup.used.saturating_add(4).saturating_add(slot.saturating_mul(8));
        let element = u64::from(head) | u64::from(written) << 32;
        let memory = self.ram.memory();
        if single(memory, entry, 8).is_none_or(|slice| slice.write_obj(element.to_le(), 0).is_err()) {
            return self.fail(&VringError::Ring(entry));
        }
        self.next_used += 1;
        self.unpublished.push(head);
    }

    /// Shows the driver what was finished.
    pub fn publish(&mut self) {
        if let Err(error) = self.try_publish() {
            self.fail(&error);
        }
    }

    fn try_publish(&mut self) -> Result<(), VringError> {
        if self.next_used == self.published || self.broken {
            return Ok(());
        }
        if let Some(inflight) = &self.inflight {
            self.unpublished.iter().for_each(|&head| inflight.about_to_finish(head));
        }
        store(&self.ram, self.setup.used.saturating_add(2), self.next_used.0, Ordering::Release)?;
        self.published = self.next_used;
        if let Some(inflight) = &self.inflight {
            inflight.finished(&self.unpublished, self.next_used.0);
        }
        self.unpublished.clear();
        Ok(())
    }

    /// Publishes, and interrupts the driver if it wants to hear of what was finished since the last time.
    pub fn signal(&mut self) {
        self.publish();
        if self.signalled != self.published && !self.broken {
            let wanted = self.wants_interrupt();
            self.signalled = self.published;
            let told = matches!(wanted, Ok(true));
            self.driver_looks = !told;
            match wanted {
                Ok(true) => self.call(),
                Ok(false) => {}
                Err(error) => self.fail(&error),
            }
            self.meter.iter_mut().for_each(|meter| meter.signalled(told));
        }
    }

    /// The driver did not want to hear of what was finished last: it looks at the used ring by itself, and waits no longer than the device does.
    pub fn driver_looks(&self) -> bool {
        self.driver_looks
    }

    /// Virtio 1.2, 2.7.7.2 and 2.7.10.
    fn wants_interrupt(&self) -> Result<bool, VringError> {
        // The driver must see the used ring before its wish is read.
        fence(Ordering::SeqCst);
        let wish = if self.setup.event_idx {
            u64::from(self.setup.size).saturating_mul(2).saturating_add(4)
        } else {
            0
        };
        let wish = load(&self.ram, self.setup.available.saturating_add(wish), Ordering::Relaxed)?;
        if self.setup.event_idx {
            return Ok(self.published - Wrapping(wish) - Wrapping(1) < self.published - self.signalled);
        }
        Ok(u32::from(wish) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Whether there is something to be taken.
    pub fn has_requests(&self) -> bool {
        if self.broken {
            return false;
        }
        let index = self.available_index(Ordering::Acquire);
        !self.resubmit.is_empty() || index.is_ok_and(|index| index != self.next_available)
    }

    fn call(&self) {
        if let Some(call) = self.setup.call.load().as_deref() {
            // A full counter means that the driver has a signal waiting.
            let _ = write(call, &1u64.to_ne_bytes());
        }
    }

    /// Asks the driver not to kick while its requests are being taken anyway.
    pub fn disable_kicks(&mut self) {
        // With EVENT_IDX it kicks once at the place that it was told, and that is behind it now.
        if !self.broken
            && !self.setup.event_idx
            && let Err(error) = store(&self.ram, self.setup.used, NO_NOTIFY, Ordering::Relaxed)
        {
            self.fail(&error);
        }
    }

    /// Asks the driver to kick. True if requests arrived meanwhile, for which it will not.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.try_enable_kicks() {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn try_enable_kicks(&self) -> Result<bool, VringError> {
        if self.setup.event_idx {
            let entries = u64::from(self.setup.size).saturating_mul(8);
            let place = self.setup.used.saturating_add(4).saturating_add(entries);
            store(&self.ram, place, self.next_available.0, Ordering::Relaxed)?;
        } else {
            store(&self.ram, self.setup.used, 0, Ordering::Relaxed)?;
        }
        // The driver must see the wish before the index is read: it looks at the wish after it has written the index.
        fence(Ordering::SeqCst);
        Ok(self.available_index(Ordering::Relaxed)? != self.next_available)
    }

    /// The guest broke the ring: says so once, in the log and to the front end.
    pub fn fail(&mut self, error: &VringError) {
        if self.broken {
            return;
        }
        // What was finished before was finished.
        let _ = self.try_publish();
        self.broken = true;
        warn!(queue = self.setup.index, %error, "the guest broke a ring; it stays stopped until it is set up anew");
        if let Some(descriptor) = self.setup.error.load().as_deref() {
            let _ = write(descriptor, &1u64.to_ne_bytes());
        }
    }
}

/// A little-endian word of a ring.
fn load(ram: &GuestRam, address: u64, order: Ordering) -> Result<u16, VringError> {
    let word: Option<u16> = single(ram.memory(), address, 2).and_then(|slice| slice.load(0, order).ok());
    word.map(u16::from_le).ok_or(VringError::Ring(address))
}

fn store(ram: &GuestRam, address: u64, word: u16, order: Ordering) -> Result<(), VringError> {
    let stored = single(ram.memory(), address, 2).and_then(|slice| slice.store(word.to_le(), 0, order).ok());
    stored.ok_or(VringError::Ring(address))
}
