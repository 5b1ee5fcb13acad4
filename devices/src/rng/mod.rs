//! virtio-rng: bytes of the host's entropy source (virtio 1.2, 5.4), at most so many in a time.
//!
//! A request that the limit holds up stays in the ring: it was not taken, so that a successor finds it there. A request for
//! more than a period has gets what a period has, which is what a driver must expect of any request.

mod service;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::RngLimit;
use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::vhost_user::backend::{
    Chain, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, VringError,
};
use nix::sys::epoll::Epoll;
use tracing::warn;

use crate::rate_limit::{Bucket, Rate};

pub use service::SERVICE;

/// Most bytes in one request; a driver that wants more asks again.
const MOST: u64 = 64 * 1024;
/// Tokens of a byte: a slow rate has fractions of bytes a second.
const TOKENS: u64 = 1000;
/// Most requests before the control thread gets its turn.
const BATCH: u32 = 64;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    source: Arc<File>,
    limit: Option<RngLimit>,
}

impl Rng {
    /// Serves bytes of `source`, such as `/dev/urandom`.
    pub fn new(source: File, limit: Option<RngLimit>) -> Self {
        Self { source: Arc::new(source), limit }
    }
}

/// What a guest may have.
#[derive(Debug)]
struct Limit {
    bucket: Bucket,
    /// Most bytes of one request.
    most: u64,
}

impl Limit {
    fn new(limit: RngLimit, now: Instant) -> Option<Self> {
        let burst = limit.max_bytes.saturating_mul(TOKENS);
        let rate = burst.saturating_mul(1000) / u64::from(limit.period.max(1));
        let bucket = Bucket::new(Rate { rate: rate.max(1), burst }, now)?;
        Some(Self { bucket, most: limit.max_bytes })
    }

    /// Takes `bytes`.
    ///
    /// # Errors
    /// How long until they can be taken.
    fn try_take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let tokens = bytes.saturating_mul(TOKENS);
        if self.bucket.try_take(tokens, now) { Ok(()) } else { Err(self.bucket.time_until(tokens, now)) }
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let limit = self.limit.and_then(|limit| Limit::new(limit, Instant::now()));
        let source = self.source.clone();
        let handler = RngQueue { source, chain: Chain::new(), failed: false, limit, until: None };
        vec![Box::new(PollWorker::new(handler, 1))]
    }
}

struct RngQueue {
    source: Arc<File>,
    chain: Chain,
    /// The log has heard that the source fails.
    failed: bool,
    limit: Option<Limit>,
    /// Nothing is taken from the ring before.
    until: Option<Instant>,
}

impl RngQueue {
    /// Most bytes that the request in `chain` gets; `None`: it must wait.
    fn allowed(&mut self) -> Option<u64> {
        let Some(limit) = &mut self.limit else { return Some(MOST) };
        let now = Instant::now();
        let bytes = u64::from(self.chain.writable_bytes()).min(MOST).min(limit.most);
        match limit.try_take(bytes, now) {
            Ok(()) => Some(bytes),
            Err(wait) => {
                self.until = now.checked_add(wait);
                None
            }
        }
    }

    /// Fills the request's buffers with `left` bytes at most; returns the number of bytes.
    fn fill(&mut self, ring: &Vring, mut left: u64) -> Result<u32, VringError> {
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
        if let Some(next) = self.until.and_then(still) {
            return Ok(next);
        }
        self.until = None;
        let mut budget = BATCH;
        ring.disable_kicks();
        loop {
            while ring.next(&mut self.chain) {
                let Some(bytes) = self.allowed() else {
                    ring.put_back(self.chain.head());
                    ring.signal();
                    return Ok(self.until.and_then(still).unwrap_or(Next::Soon));
                };
                match self.fill(ring, bytes) {
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
    /// A request that the limit holds up is no sign of a thread that hangs.
    fn waits_for_host(&self) -> bool {
        self.until.is_some()
    }
}

/// How to wait for a moment, unless it is over.
fn still(until: Instant) -> Option<Next> {
    let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
    // Rounded up: a moment too early would be in vain.
    Some(Next::Within(u16::try_from(left.as_millis()).unwrap_or(u16::MAX).saturating_add(1)))
}
