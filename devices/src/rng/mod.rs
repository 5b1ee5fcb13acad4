//! virtio-rng: bytes of the host's entropy source (virtio 1.2, 5.4).

mod service;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::vhost_user::backend::{
    Chain, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, VringError,
};
use nix::sys::epoll::Epoll;
use tracing::warn;

pub use service::SERVICE;

/// Most bytes in one request; a driver that wants more asks again.
const MOST: u64 = 64 * 1024;
/// Most requests before the control thread gets its turn.
const BATCH: u32 = 64;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    source: Arc<File>,
}

impl Rng {
    /// Serves bytes of `source`, such as `/dev/urandom`.
    pub fn new(source: File) -> Self {
        Self { source: Arc::new(source) }
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn worker_of(&self, _queue: u16) -> usize {
        0
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let handler = RngQueue { source: self.source.clone(), chain: Chain::new(), failed: false };
        vec![Box::new(PollWorker::new(handler, 1))]
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }
}

struct RngQueue {
    source: Arc<File>,
    chain: Chain,
    /// The log has heard that the source fails.
    failed: bool,
}

impl RngQueue {
    /// Fills the request's buffers; returns the number of bytes.
    fn fill(&mut self, ring: &Vring) -> Result<u32, VringError> {
        let mut left = MOST;
        let mut written = 0u32;
        for segment in self.chain.writable() {
            let len = u64::from(segment.len).min(left);
            if len == 0 {
                break;
            }
            let buffer = ring.ram().lend(segment.address, len, Direction::Write)?;
            match buffer.read_from(self.source.as_fd()) {
                Ok(count) => written = written.saturating_add(u32::try_from(count).unwrap_or(0)),
                Err(error) => {
                    if !self.failed {
                        warn!(%error, "the entropy source failed; the guest gets fewer bytes");
                    }
                    self.failed = true;
                    break;
                }
            }
            left = left.saturating_sub(len);
        }
        Ok(written)
    }
}

impl QueueHandler for RngQueue {
    fn serve(&mut self, rings: &mut [Option<Vring>], _epoll: &Epoll) -> io::Result<Next> {
        let Some(Some(ring)) = rings.first_mut() else { return Ok(Next::Event) };
        let mut budget = BATCH;
        ring.disable_kicks();
        loop {
            while ring.next(&mut self.chain) {
                match self.fill(ring) {
                    Ok(written) => ring.finish(self.chain.head(), written),
                    Err(error) => {
                        ring.fail(&error);
                        ring.finish(self.chain.head(), 0);
                    }
                }
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    ring.signal();
                    return Ok(Next::Soon);
                }
            }
            ring.signal();
            if !ring.enable_kicks() {
                return Ok(Next::Event);
            }
            ring.disable_kicks();
        }
    }
}
