//! virtio-vsock, streams only (virtio 1.2, 5.10), with Unix sockets on the host.
//!
//! A guest that connects to port P of the host reaches the socket at `PATH_P`. Who connects to the socket at `PATH` and says
//! `CONNECT P` reaches port P of the guest, and reads `OK` with the port that the guest sees, before anything else. Sockets come and are asked for through
//! [`bulkhead_ipc::connector`]: this process can make none.
//!
//! | file | what |
//! | --- | --- |
//! | `packet` | the header |
//! | `stream` | one connection: who may still speak, what waits, credit |
//! | `table` | all connections, and whose turn it is |
//! | `worker` | the thread: events, rings, time |
//! | `guest` | packets from the guest |
//! | `host` | packets to the guest |
//! | `sockets` | connections that come and go on the host |
//! | `service` | the device under other monitors |
//!
//! Memory is bounded: so many connections, so many bytes for each (`stream`), and no buffer at all for what flows. Connections
//! do not outlive the process. A successor finds rings that were used before and tells the guest so, by the event for a
//! transport that was reset (5.10.6.7).

mod guest;
mod host;
mod packet;
mod service;
mod sockets;
mod stream;
mod table;
mod worker;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::vhost_user::backend::{QueueWorker, VirtioDevice};
use nix::unistd::write;

pub use service::SERVICE;
use table::MAX_STREAMS;
use worker::Worker;

/// Packets to the guest.
const RX: u16 = 0;
/// Packets from the guest.
const TX: u16 = 1;
/// Events for the guest.
const EVENT: u16 = 2;
/// Number of queues.
const QUEUES: u16 = 3;

/// What the device and its worker share.
#[derive(Debug, Default)]
struct Shared {
    /// Increases when the driver has forgotten everything.
    resets: AtomicU32,
    /// Wakes the worker.
    wake: OnceLock<OwnedFd>,
}

/// A vsock.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

impl Vsock {
    /// A vsock for a guest with this context id, 3 or more; `connector` is the device's end of a connector's channel.
    pub fn new(guest_cid: u32, connector: OwnedFd) -> Self {
        let guest_cid = u64::from(guest_cid);
        let shared = Arc::new(Shared::default());
        let [a, b, c, d, ..] = RandomState::new().build_hasher().finish().to_le_bytes();
        let seed = u32::from_le_bytes([a, b, c, d]);
        let worker = Worker::new(guest_cid, Channel::from_fd(connector), shared.clone(), seed);
        Self { guest_cid, shared, worker: Some(worker) }
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn serves_at_once(&self, queue: u16) -> bool {
        queue == TX
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        self.worker.take().into_iter().map(|worker| Box::new(worker) as _).collect()
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        crate::copy_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn reset(&mut self) {
        self.shared.resets.fetch_add(1, Ordering::Release);
        if let Some(wake) = self.shared.wake.get() {
            let _full = write(wake, &1u64.to_ne_bytes());
        }
    }
}
