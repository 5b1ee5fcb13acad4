//! A running split ring: requests out, completions in, notifications both ways. Owned by the worker that serves it.
//!
//! `virtio_queue::Queue` keeps the indices and reads the available ring; chains are walked by [`Chain::walk`], which tells a
//! malformed chain from a short one. A ring that the guest has broken is left alone until the front end sets it up anew.
//!
//! The used ring is written here: entries as requests finish, its index, which the driver may be looking at all the time, once for
//! several of them ([`Vring::publish`]).
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
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::chain::{Chain, ChainError};
use super::inflight::InflightQueue;
use crate::memory::{GuestRam, MemoryError};

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
    /// A ring is no longer memory.
    #[error("a ring cannot be reached: {0}")]
    Ring(GuestMemoryError),
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
    queue: Queue,
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
    /// Heads of the entries that are written and not published.
    unpublished: Vec<u16>,
    broken: bool,
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
        let resubmit: VecDeque<u16> =
            inflight.as_mut().map(|inflight| inflight.recover(used_idx).into()).unwrap_or_default();
        let next = match (&inflight, u16::try_from(resubmit.len())) {
            (Some(_), Ok(count)) => used_idx.wrapping_add(count),
            _ => setup.next_available,
        };
        queue.set_next_avail(next);
        let used = Wrapping(used_idx);
        let ring = Self {
            setup,
            ram,
            queue,
            inflight,
            resubmit,
            taken: 0,
            next_used: used,
            published: used,
            signalled: used,
            unpublished: Vec::with_capacity(BATCH),
            broken: false,
        };
        // A predecessor may have died between the used ring and the interrupt.
        if ring.inflight.is_some() {
            ring.call();
        }
        Ok(ring)
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
            let Some(found) = available.next() else { return Ok(false) };
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
        Ok(true)
    }

    /// Puts a request back that [`Self::next`] just returned, because the device cannot serve it yet.
    /// It stays marked in flight and is the next to be taken.
    pub fn put_back(&mut self, head: u16) {
        self.taken = self.taken.saturating_sub(1);
        self.resubmit.push_front(head);
    }

    /// Request `head` is done and has `written` bytes for the driver. Call [`Self::signal`] after a batch of these.
    pub fn finish(&mut self, head: u16, written: u32) {
        self.taken = self.taken.saturating_sub(1);
        if self.broken {
            return;
        }
        // The offset is below that of the ring's end, which was checked to be memory.
        let slot = u64::from(self.next_used.0 & self.setup.size.wrapping_sub(1));
        let entry = GuestAddress(self.setup.used.saturating_add(4).saturating_add(slot.saturating_mul(8)));
        let element = u64::from(head) | u64::from(written) << 32;
        if let Err(error) = self.ram.memory().write_obj(element.to_le(), entry) {
            return self.fail(&VringError::Ring(error));
        }
        self.next_used += 1;
        self.unpublished.push(head);
        if self.unpublished.len() >= BATCH {
            self.publish();
        }
    }

    /// Shows the driver what was finished.
    pub fn publish(&mut self) {
        if let Err(error) = self.try_publish() {
            self.fail(&VringError::Ring(error));
        }
    }

    fn try_publish(&mut self) -> Result<(), GuestMemoryError> {
        if self.next_used == self.published || self.broken {
            return Ok(());
        }
        if let Some(inflight) = &self.inflight {
            self.unpublished.iter().for_each(|&head| inflight.about_to_finish(head));
        }
        let index = GuestAddress(self.setup.used.saturating_add(2));
        self.ram.memory().store(self.next_used.0.to_le(), index, Ordering::Release)?;
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
            match wanted {
                Ok(true) => self.call(),
                Ok(false) => {}
                Err(error) => self.fail(&VringError::Ring(error)),
            }
        }
    }

    /// Virtio 1.2, 2.7.7.2 and 2.7.10.
    fn wants_interrupt(&self) -> Result<bool, GuestMemoryError> {
        let memory = self.ram.memory();
        // The driver must see the used ring before its wish is read.
        fence(Ordering::SeqCst);
        let wish = if self.setup.event_idx {
            u64::from(self.setup.size).saturating_mul(2).saturating_add(4)
        } else {
            0
        };
        let wish = GuestAddress(self.setup.available.saturating_add(wish));
        let wish = u16::from_le(memory.load(wish, Ordering::Relaxed)?);
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
        let index = self.queue.avail_idx(self.ram.memory(), Ordering::Acquire);
        !self.resubmit.is_empty() || index.is_ok_and(|index| index.0 != self.queue.next_avail())
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
        // What was finished before was finished.
        let _ = self.try_publish();
        self.broken = true;
        warn!(queue = self.setup.index, %error, "the guest broke a ring; it stays stopped until it is set up anew");
        if let Some(descriptor) = self.setup.error.load().as_deref() {
            let _ = write(descriptor, &1u64.to_ne_bytes());
        }
    }
}
