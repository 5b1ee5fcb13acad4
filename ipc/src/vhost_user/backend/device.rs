//! What a device type gives to the daemon: its features and configuration space, and workers for its queues.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use super::vring::Vring;
use super::worker::HostCall;

/// A virtio device, seen by the daemon's message loop. Methods run on the control thread only; what the device shares with its
/// workers it shares by its own means.
pub trait VirtioDevice: Send {
    /// Short name for the log: `blk`, `rng`, …
    fn name(&self) -> &'static str;

    /// Feature bits of the device type. The daemon adds VERSION_1, RING_EVENT_IDX, RING_INDIRECT_DESC and vhost-user's own.
    fn features(&self) -> u64 {
        0
    }

    /// Number of virtqueues.
    fn queues(&self) -> u16 {
        1
    }

    /// Largest ring accepted, entries; a power of two.
    fn queue_max_size(&self) -> u16 {
        1024
    }

    /// Whether requests may be finished in another order than taken, so that a successor needs the in-flight memory to know
    /// which to repeat. A device that finishes in order needs none: what is not in the used ring was not done.
    fn tracks_inflight(&self) -> bool {
        false
    }

    /// Index, in what [`Self::workers`] returns, of the worker that serves `queue`.
    fn worker_of(&self, _queue: u16) -> usize {
        0
    }

    /// Whether requests of `queue` can be begun whenever there are some. Buffers for input that may never come cannot.
    fn serves_at_once(&self, _queue: u16) -> bool {
        true
    }

    /// The workers; called once, before the seal.
    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>>;

    /// Called once after the seal, before the supervisor is told READY: looks at what may be hostile.
    ///
    /// # Errors
    /// A sentence for a person: the device cannot be served.
    fn open(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Copies configuration space from `offset` to `data`; what lies beyond its end reads as zero.
    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    /// The driver writes configuration space. False: these bytes cannot be written.
    fn write_config(&mut self, _offset: u32, _data: &[u8]) -> bool {
        false
    }

    /// The driver accepted these features, all of them offered. Called while no queue runs that the change concerns.
    fn accept_features(&mut self, _features: u64) {}

    /// RESET_DEVICE or status 0: forget what the driver set. No queue runs.
    fn reset(&mut self) {}
}

/// Serves one or more queues on a thread of its own. All methods are called on that thread.
pub trait QueueWorker: Send {
    /// Sets up what must exist before the thread's seccomp filter: io_uring, epoll, buffers.
    /// `wake` is an eventfd that is written, and never read, when [`Self::turn`] must look at its rings and return: watch it edge-triggered.
    /// Returns the descriptors that the worker keeps open from now on, for the check of the seal.
    ///
    /// # Errors
    /// The worker cannot run; the process ends with the error.
    fn prepare(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<RawFd>>;

    /// Begins to serve a ring. Requests may be waiting in it already.
    ///
    /// # Errors
    /// The ring's kick descriptor cannot be watched; the daemon refuses the message.
    fn start(&mut self, ring: Vring) -> io::Result<()>;

    /// Stops serving ring `index` and returns it, after every request taken from it is in the used ring.
    /// `None` if it does not run.
    fn stop(&mut self, index: u16) -> Option<Vring>;

    /// Waits until something happens, serves it, returns.
    ///
    /// # Errors
    /// The worker cannot go on; the process ends with the error.
    fn turn(&mut self) -> io::Result<()>;

    /// Whether something that was taken from a ring waits for the host: for its disk, for a reader of its pipe.
    fn waits_for_host(&self) -> bool {
        false
    }

    /// Called once, before [`Self::prepare`]: with this the worker makes system calls that the host may keep it in.
    fn set_host_call(&mut self, _call: HostCall) {}
}
