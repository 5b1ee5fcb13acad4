//! Messages about rings: set-up, start, stop ("Ring states" and the VRING messages of the vhost-user protocol).
//!
//! A ring runs while it is set up, has a kick descriptor and is enabled. Whatever changes under a running ring, apart from its
//! call descriptor, is changed by stopping it, which drains it, and starting it again.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::unistd::write;
use tracing::warn;

use super::daemon::{Answer, Daemon, RING_EVENT_IDX, RING_INDIRECT_DESC, Refusal, number, only};
use super::vring::{CallSlot, Vring, VringSetup};
use super::worker::{SharedFd, WorkerHandle};
use crate::channel::message::Progress;
use crate::memory::Direction;
use crate::vhost_user::message::{
    VHOST_USER_F_PROTOCOL_FEATURES, VRING_INDEX_MASK, VRING_NO_FD, VhostUserVringAddr, VhostUserVringState,
    decode, encode,
};

/// VHOST_VRING_F_LOG.
const F_LOG: u32 = 1;

/// What the front end said of a queue.
#[derive(Debug, Default)]
pub(super) struct QueueState {
    size: Option<u16>,
    base: u16,
    /// Where the ring stood at a reset. QEMU (7.2) resets the status of a device before it asks where its rings stand.
    stood: Option<u16>,
    /// User addresses of descriptor table, available ring, used ring.
    addresses: Option<[u64; 3]>,
    kick: Option<SharedFd>,
    call: CallSlot,
    error: CallSlot,
    enabled: bool,
    running: bool,
    /// What [`Daemon::progress`] saw last: the used ring's index, and the turns of the worker.
    seen: Option<(u16, u32)>,
}

impl Daemon {
    /// The index of a queue that exists.
    fn queue(&mut self, index: u32) -> Result<(u16, &mut QueueState), Refusal> {
        let no_queue = Refusal::NoQueue(index);
        let Ok(number) = u16::try_from(index) else { return Err(no_queue) };
        match self.queues.get_mut(usize::from(number)) {
            Some(queue) => Ok((number, queue)),
            None => Err(no_queue),
        }
    }

    fn stopped_queue(&mut self, index: u32) -> Result<&mut QueueState, Refusal> {
        let (_, queue) = self.queue(index)?;
        if queue.running {
            return Err(Refusal::State("the ring is running"));
        }
        Ok(queue)
    }

    pub(super) fn set_vring_num(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let VhostUserVringState { index, num } = state(payload)?;
        let most = self.device.queue_max_size();
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= most);
        let bad = Refusal::Value { what: "ring size", value: u64::from(num) };
        self.stopped_queue(index)?.size = Some(size.ok_or(bad)?);
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_base(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let VhostUserVringState { index, num } = state(payload)?;
        let bad = Refusal::Value { what: "ring base", value: u64::from(num) };
        let queue = self.stopped_queue(index)?;
        (queue.base, queue.stood) = (u16::try_from(num).map_err(|_| bad)?, None);
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_addr(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let message: VhostUserVringAddr = decode(payload).ok_or(Refusal::Payload(payload.len()))?;
        let VhostUserVringAddr { index, flags, descriptor, used, available, log } = message;
        if flags & !F_LOG != 0 {
            return Err(Refusal::Value { what: "ring flags", value: u64::from(flags) });
        }
        for (what, value, alignment) in
            [("descriptor table", descriptor, 16), ("used ring", used, 4), ("available ring", available, 2)]
        {
            if !u64::is_multiple_of(value, alignment) {
                return Err(Refusal::Value { what, value });
            }
        }
        // The used ring is logged by its guest address; another place for its marks would need an IOMMU.
        if flags & F_LOG != 0 && self.memory.translate(used).is_some_and(|address| address != log) {
            return Err(Refusal::Value { what: "log address of the used ring", value: log });
        }
        let addresses = Some([descriptor, available, used]);
        let (number, queue) = self.queue(index)?;
        if queue.addresses == addresses {
            return Ok(Answer::Done);
        }
        let running = queue.running;
        self.stop(number)?;
        self.queue(index)?.1.addresses = addresses;
        if running {
            self.start_if_ready(number)?;
        }
        Ok(Answer::Done)
    }

    pub(super) fn get_vring_base(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let VhostUserVringState { index, .. } = state(payload)?;
        let (number, _) = self.queue(index)?;
        self.stop(number)?;
        let (_, queue) = self.queue(index)?;
        // The ring stays stopped until it gets a kick descriptor again.
        queue.kick = None;
        let num = queue.stood.take().unwrap_or(queue.base).into();
        Ok(Answer::Reply(encode(&VhostUserVringState { index, num })))
    }

    pub(super) fn set_vring_kick(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let (index, descriptor) = vring_fd(payload, descriptors)?;
        let Some(kick) = descriptor else {
            return Err(Refusal::State("a ring without a kick descriptor would have to be polled"));
        };
        let (number, _) = self.queue(index)?;
        self.stop(number)?;
        self.queue(index)?.1.kick = Some(Arc::new(kick));
        self.start_if_ready(number)?;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_call(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let (index, descriptor) = vring_fd(payload, descriptors)?;
        let (_, queue) = self.queue(index)?;
        queue.call.store(descriptor.map(Arc::new));
        // What was signalled to the old descriptor meanwhile may be lost on the driver: an interrupt too many does no harm.
        if queue.running
            && let Some(call) = queue.call.load().as_deref()
        {
            let _ = write(call, &1u64.to_ne_bytes());
        }
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_err(
        &mut self,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let (index, descriptor) = vring_fd(payload, descriptors)?;
        self.queue(index)?.1.error.store(descriptor.map(Arc::new));
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_enable(&mut self, payload: &[u8]) -> Result<Answer, Refusal> {
        let VhostUserVringState { index, num } = state(payload)?;
        let (number, queue) = self.queue(index)?;
        match num {
            0 => {
                queue.enabled = false;
                self.stop(number)?;
            }
            1 => self.enable(usize::from(number))?,
            _ => return Err(Refusal::Value { what: "ring enable", value: u64::from(num) }),
        }
        Ok(Answer::Done)
    }

    /// Enables a ring and starts it if it is set up.
    pub(super) fn enable(&mut self, index: usize) -> Result<(), Refusal> {
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        let (_, queue) = self.queue(u32::from(number))?;
        queue.enabled = true;
        self.start_if_ready(number)
    }

    /// Disables every ring; part of a reset.
    pub(super) fn disable_all(&mut self) -> Result<(), Refusal> {
        self.stop_all()?;
        // A front end that did not negotiate protocol features has no message to enable them again.
        let enabled = self.features != 0 && self.features & VHOST_USER_F_PROTOCOL_FEATURES == 0;
        for queue in &mut self.queues {
            queue.enabled = enabled;
            queue.stood = queue.stood.or(Some(queue.base));
            queue.base = 0;
        }
        Ok(())
    }

    fn start_if_ready(&mut self, number: u16) -> Result<(), Refusal> {
        let Some(queue) = self.queues.get(usize::from(number)) else { return Ok(()) };
        let (Some(size), Some(addresses), Some(kick)) = (queue.size, queue.addresses, queue.kick.clone())
        else {
            return Ok(());
        };
        if queue.running || !queue.enabled {
            return Ok(());
        }
        let [descriptors, available, used] = addresses.map(|address| self.memory.translate(address));
        let (Some(descriptors), Some(available), Some(used)) = (descriptors, available, used) else {
            return Err(Refusal::State("the ring does not lie in guest memory"));
        };
        let setup = VringSetup {
            index: number,
            size,
            descriptors,
            available,
            used,
            next_available: queue.base,
            event_idx: self.features & RING_EVENT_IDX != 0,
            indirect: self.features & RING_INDIRECT_DESC != 0,
            kick,
            call: queue.call.clone(),
            error: queue.error.clone(),
        };
        let inflight = match &self.inflight {
            Some(area) => Some(
                area.queue(number, size)
                    .ok_or(Refusal::State("the in-flight area has no room for the ring"))?,
            ),
            None => None,
        };
        let ring = Vring::start(setup, self.memory.ram().clone(), inflight)?.with_meter(&self.metrics);
        let worker = self.device.worker_of(number);
        let worker = self.workers.get(worker).ok_or(Refusal::State("the queue has no worker"))?;
        worker.start(ring)?;
        if let Some(queue) = self.queues.get_mut(usize::from(number)) {
            (queue.running, queue.stood) = (true, None);
        }
        Ok(())
    }

    /// Stops a ring if it runs, after everything taken from it is finished, and keeps where it stands.
    fn stop(&mut self, number: u16) -> Result<(), super::WorkerError> {
        let worker = self.workers.get(self.device.worker_of(number));
        let (Some(queue), Some(worker)) = (self.queues.get_mut(usize::from(number)), worker) else {
            return Ok(());
        };
        if !queue.running {
            return Ok(());
        }
        queue.running = false;
        if let Some(ring) = worker.stop(number)? {
            queue.base = ring.next_available();
        }
        Ok(())
    }

    /// What became of the queues since the last call. It makes every worker look at its rings, in case a notification was
    /// lost, and look busy until the next call.
    pub fn progress(&mut self) -> Progress {
        let mut progress = Progress::Fine;
        for number in 0..self.device.queues() {
            let indices = self.indices(number);
            let pulse = self.workers.get(self.device.worker_of(number)).map(WorkerHandle::pulse);
            let Some(queue) = self.queues.get_mut(usize::from(number)) else { continue };
            let (Some((available, used)), Some(pulse)) = (indices, pulse) else {
                queue.seen = None;
                continue;
            };
            let before = queue.seen.replace((used, pulse.turns));
            let Some((_, turns_before)) = before.filter(|(before, _)| *before == used && available != used)
            else {
                continue;
            };
            let waits = pulse.waits || pulse.blocked;
            let hangs = turns_before == pulse.turns && !pulse.blocked;
            if hangs || !waits && self.device.serves_at_once(number) {
                progress = Progress::Stalled { queue: number };
            } else if waits && progress == Progress::Fine {
                progress = Progress::WaitsForHost { queue: number };
            }
        }
        self.wake_workers();
        progress
    }

    /// The indices of available and used ring, of a queue that runs.
    fn indices(&self, number: u16) -> Option<(u16, u16)> {
        let queue = self.queues.get(usize::from(number)).filter(|queue| queue.running)?;
        let [_, available, used] = queue.addresses?;
        let index = |ring: u64| {
            let address = self.memory.translate(ring)?.checked_add(2)?;
            let view = self.memory.ram().view(address, 2, Direction::Read).ok()?;
            view.load::<u16>(0, Ordering::Acquire).ok().map(u16::from_le)
        };
        Some((index(available)?, index(used)?))
    }

    /// Stops every ring.
    pub(super) fn stop_all(&mut self) -> Result<(), super::WorkerError> {
        (0..self.device.queues()).try_for_each(|number| self.stop(number))
    }

    /// Changes something while no ring runs, and starts those again that ran. One that cannot is stopped for good,
    /// and its error descriptor says so.
    pub(super) fn with_rings_stopped(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let ran: Vec<u16> = (0..self.device.queues())
            .filter(|&number| self.queues.get(usize::from(number)).is_some_and(|queue| queue.running))
            .collect();
        self.stop_all()?;
        let changed = change(self);
        for number in ran {
            if let Err(refusal) = self.start_if_ready(number) {
                warn!(queue = number, %refusal, "a ring cannot go on after a change of the set-up");
                let error = self.queues.get(usize::from(number)).map(|queue| queue.error.clone());
                if let Some(error) = error.and_then(|slot| slot.load_full()) {
                    let _ = write(&error, &1u64.to_ne_bytes());
                }
            }
        }
        changed
    }
}

fn state(payload: &[u8]) -> Result<VhostUserVringState, Refusal> {
    decode(payload).ok_or(Refusal::Payload(payload.len()))
}

/// Queue index and descriptor of SET_VRING_KICK, _CALL and _ERR.
fn vring_fd(payload: &[u8], descriptors: Vec<OwnedFd>) -> Result<(u32, Option<OwnedFd>), Refusal> {
    let value = number(payload)?;
    if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
        return Err(Refusal::Value { what: "ring descriptor message", value });
    }
    let index = u32::try_from(value & VRING_INDEX_MASK).unwrap_or(u32::MAX);
    if value & VRING_NO_FD == 0 {
        return Ok((index, Some(only(descriptors)?)));
    }
    match descriptors.len() {
        0 => Ok((index, None)),
        count => Err(Refusal::Descriptors(count)),
    }
}
