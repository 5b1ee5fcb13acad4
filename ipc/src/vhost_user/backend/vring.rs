//! A running split ring: requests out, completions in, notifications both ways. Owned by the worker that serves it.
//!
//! `virtio_queue::Queue` keeps the indices and the notification rules; chains are walked by [`Chain::walk`], which tells a
//! malformed chain from a short one. A ring that the guest has broken is left alone until the front end sets it up anew.
//! Follows virtio 1.2, 2.7, and vhost-user, "Ring states".

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::ArcSwapOption;
use nix::unistd::write;
use thiserror::Error;
use tracing::warn;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError};
use super::inflight::InflightQueue;
use crate::memory::{GuestRam, MemoryError};
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
    Available(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("the used ring is broken: {0}")]
    Used(virtio_queue::Error),
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
    queue: Queue,
    inflight: Option<InflightQueue>,
    /// Requests of a dead predecessor, oldest first: served before new ones.
    resubmit: VecDeque<u16>,
    /// Requests taken and not yet in the used ring.
    taken: u32,
    /// The used ring has entries of which the driver was not told.
    unsignalled: bool,
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
        let mut queue = Queue::new(MAX_SIZE).map_err(|_| bad("size"))?;
        queue.try_set_size(setup.size).map_err(|_| bad("its size is not a power of two"))?;
        queue
            .try_set_desc_table_address(GuestAddress(setup.descriptors))
            .map_err(|_| bad("the descriptor table is not aligned to 16 bytes"))?;
        queue
            .try_set_avail_ring_address(GuestAddress(setup.available))
            .map_err(|_| bad("the available ring is not aligned to 2 bytes"))?;
        queue
            .try_set_used_ring_address(GuestAddress(setup.used))
            .map_err(|_| bad("the used ring is not aligned to 4 bytes"))?;
        queue.set_event_idx(setup.event_idx);
        queue.set_ready(true);
        let entries = u64::from(setup.size);
        let in_memory = ram.contains(setup.descriptors, entries.saturating_mul(16))
            && ram.contains(setup.available, entries.saturating_mul(2).saturating_add(6))
            && ram.contains(setup.used, entries.saturating_mul(8).saturating_add(6));
        if !in_memory || setup.available == 0 {
            return Err(bad("it does not lie in guest memory"));
        }
        let used_idx = queue
            .used_idx(ram.memory(), Ordering::Acquire)
            .map_err(|_| bad("the used ring cannot be read"))?
            .0;
        queue.set_next_used(used_idx);
        let resubmit: VecDeque<u16> =
            inflight.as_mut().map(|inflight| inflight.recover(used_idx).into()).unwrap_or_default();
        let next = match (&inflight, u16::try_from(resubmit.len())) {
            (Some(_), Ok(count)) => used_idx.wrapping_add(count),
            _ => setup.next_available,
        };
        queue.set_next_avail(next);
        // A predecessor may have died between the used ring and the interrupt.
        let unsignalled = inflight.is_some();
        let (taken, broken, meter) = (0, false, None);
        let ring = Self { setup, ram, queue, inflight, resubmit, taken, unsignalled, broken, meter };
        if ring.unsignalled {
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
        self.queue.next_avail().wrapping_sub(pending)
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
        let head = if let Some(head) = self.resubmit.pop_front() {
            head
        } else {
            let memory = self.ram.memory();
            let mut available = self.queue.iter(memory).map_err(VringError::Available)?;
            let Some(found) = available.next() else {
                self.meter.iter_mut().for_each(Meter::idle);
                return Ok(false);
            };
            let head = found.head_index();
            if let Some(inflight) = self.inflight.as_mut() {
                inflight.taken(head);
            }
            head
        };
        chain
            .walk(self.ram.memory(), self.setup.descriptors, self.setup.size, head, self.setup.indirect)
            .map_err(|source| VringError::Chain { head, source })?;
        self.taken = self.taken.saturating_add(1);
        self.meter.iter_mut().for_each(|meter| meter.taken(head, chain.readable_bytes()));
        Ok(true)
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
        self.taken = self.taken.saturating_sub(1);
        self.meter.iter_mut().for_each(|meter| meter.finished(head, written));
        if self.broken {
            return;
        }
        if let Some(inflight) = &self.inflight {
            inflight.about_to_finish(head);
        }
        match self.queue.add_used(self.ram.memory(), head, written) {
            Ok(()) => self.unsignalled = true,
            Err(error) => return self.fail(&VringError::Used(error)),
        }
        if let Some(inflight) = &self.inflight {
            inflight.finished(head, self.queue.next_used());
        }
    }

    /// Interrupts the driver if it wants to hear of what was finished since the last time.
    pub fn signal(&mut self) {
        if self.unsignalled && !self.broken {
            self.unsignalled = false;
            let wanted = self.wants_interrupt();
            if wanted {
                self.call();
            }
            self.meter.iter_mut().for_each(|meter| meter.signalled(wanted));
        }
    }

    fn wants_interrupt(&mut self) -> bool {
        let memory = self.ram.memory();
        match self.queue.needs_notification(memory) {
            Ok(wanted) if self.setup.event_idx => wanted,
            Ok(_) => {
                let flags: u16 =
                    memory.load(GuestAddress(self.setup.available), Ordering::Relaxed).unwrap_or(0);
                u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
            }
            Err(error) => {
                self.fail(&VringError::Available(error));
                false
            }
        }
    }

    fn call(&self) {
        if let Some(call) = self.setup.call.load().as_deref() {
            // A full counter means that the driver has a signal waiting.
            let _ = write(call, &1u64.to_ne_bytes());
        }
    }

    /// Asks the driver not to kick while its requests are being taken anyway.
    pub fn disable_kicks(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(self.ram.memory())
        {
            self.fail(&VringError::Used(error));
        }
    }

    /// Asks the driver to kick. True if requests arrived meanwhile, for which it will not.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(self.ram.memory()) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&VringError::Used(error));
                false
            }
        }
    }

    /// The guest broke the ring: says so once, in the log and to the front end.
    pub fn fail(&mut self, error: &VringError) {
        if self.broken {
            return;
        }
        self.broken = true;
        warn!(queue = self.setup.index, %error, "the guest broke a ring; it stays stopped until it is set up anew");
        if let Some(descriptor) = self.setup.error.load().as_deref() {
            let _ = write(descriptor, &1u64.to_ne_bytes());
        }
    }
}
