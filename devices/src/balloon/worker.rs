//! The queues of a balloon.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_ipc::memory::MemoryError;
use bulkhead_ipc::vhost_user::backend::{Chain, Next, QueueHandler, Vring, VringError};
use nix::sys::epoll::Epoll;
use tracing::warn;

use super::controller::Shared;
use super::pages::{ranges, whole};
use crate::segments::gather;

/// inflateq.
const INFLATE: u16 = 0;
/// deflateq.
const DEFLATE: u16 = 1;
/// Most requests of a queue before the control thread gets its turn.
const BATCH: u32 = 16;
/// Most page numbers in a request; Linux sends 256.
const MOST_NUMBERS: usize = 16384;
/// Bytes of a statistic: a tag of 16 bits and a value of 64.
const STATISTIC: usize = 10;
/// Most statistics; the specification knows 10.
const MOST_STATISTICS: usize = 64;

/// The state of the queues' thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    chain: Chain,
    numbers: Vec<u32>,
    bytes: Vec<u8>,
    /// The buffer for statistics.
    held: Option<u16>,
    /// The log has heard that pages cannot be given back.
    complained: bool,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let (numbers, bytes) = (Vec::new(), Vec::new());
        Self { shared, chain: Chain::new(), numbers, bytes, held: None, complained: false }
    }

    /// Copies what the driver wrote, at most `most` bytes.
    fn read(&mut self, ring: &Vring, most: usize) -> Result<(), VringError> {
        let len = usize::try_from(self.chain.readable_bytes()).unwrap_or(usize::MAX);
        if len > most {
            return Err(VringError::Request("a balloon's request is too long"));
        }
        self.bytes.resize(len, 0);
        gather(self.chain.readable(), 0, &mut self.bytes, ring.ram())?;
        Ok(())
    }

    /// Pages that the guest has put into the balloon.
    fn inflate(&mut self, ring: &Vring) -> Result<(), VringError> {
        self.read(ring, MOST_NUMBERS.saturating_mul(4))?;
        self.numbers.clear();
        let numbers = self.bytes.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok());
        self.numbers.extend(numbers.map(u32::from_le_bytes));
        let mut numbers = std::mem::take(&mut self.numbers);
        for (address, len) in ranges(&mut numbers) {
            self.give_back(ring, address, len);
        }
        self.numbers = numbers;
        Ok(())
    }

    /// Pages that the guest does not use at the moment: the buffers themselves (5.5.6.7).
    fn report(&mut self, ring: &Vring) {
        let chain = std::mem::take(&mut self.chain);
        for segment in chain.writable() {
            if let Some((address, len)) = whole(segment.address, u64::from(segment.len)) {
                self.give_back(ring, address, len);
            }
        }
        self.chain = chain;
    }

    /// The guest can do without them whether or not the host gets them.
    fn give_back(&mut self, ring: &Vring, address: u64, len: u64) {
        let Err(error) = ring.ram().punch(address, len) else { return };
        if !std::mem::replace(&mut self.complained, true) {
            match error {
                MemoryError::OutOfRange { .. } => warn!(%error, "the guest gives what is not its memory"),
                error => warn!(%error, "pages of the guest cannot be given back to the host"),
            }
        }
    }

    fn statistics(&mut self, ring: &Vring) -> Result<(), VringError> {
        self.read(ring, MOST_STATISTICS.saturating_mul(STATISTIC))?;
        let values = self.bytes.chunks_exact(STATISTIC).filter_map(|bytes| {
            let (tag, value) = bytes.split_first_chunk::<2>()?;
            Some((u16::from_le_bytes(*tag), u64::from_le_bytes(value.try_into().ok()?)))
        });
        self.shared.store(values.collect());
        Ok(())
    }

    /// Takes the buffer of statistics that is there, and gives it back for new ones when they are wanted.
    fn serve_statistics(&mut self, ring: &mut Vring) {
        while ring.next(&mut self.chain) || ring.enable_kicks() && ring.next(&mut self.chain) {
            if let Err(error) = self.statistics(ring) {
                ring.fail(&error);
            }
            if let Some(other) = self.held.replace(self.chain.head()) {
                ring.finish(other, 0);
            }
        }
        if self.held.is_some() && self.shared.wanted.swap(false, Ordering::AcqRel) {
            self.held.take().into_iter().for_each(|head| ring.finish(head, 0));
        }
        ring.signal();
    }

    /// Serves a queue of pages. True: there is more.
    fn serve_pages(&mut self, ring: &mut Vring) -> bool {
        let mut budget = BATCH;
        ring.disable_kicks();
        loop {
            while ring.next(&mut self.chain) {
                let head = self.chain.head();
                let served = match ring.index() {
                    INFLATE => self.inflate(ring),
                    // A page that the guest takes back is there when it is touched.
                    DEFLATE => Ok(()),
                    _ => {
                        self.report(ring);
                        Ok(())
                    }
                };
                if let Err(error) = served {
                    ring.fail(&error);
                }
                ring.finish(head, 0);
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    ring.signal();
                    return true;
                }
            }
            ring.signal();
            if !ring.enable_kicks() {
                return false;
            }
            ring.disable_kicks();
        }
    }
}

impl QueueHandler for Worker {
    fn serve(&mut self, rings: &mut [Option<Vring>], _epoll: &Epoll) -> io::Result<Next> {
        let (statistics, reporting) = (self.shared.statistics_queue(), self.shared.reporting_queue());
        let mut more = false;
        for ring in rings.iter_mut().flatten() {
            match ring.index() {
                index if Some(index) == statistics => self.serve_statistics(ring),
                index if index <= DEFLATE || Some(index) == reporting => more |= self.serve_pages(ring),
                // A queue of a feature that the driver did not accept.
                _ => {}
            }
        }
        Ok(if more { Next::Soon } else { Next::Event })
    }

    fn release(&mut self, ring: &mut Vring) {
        if Some(ring.index()) == self.shared.statistics_queue()
            && let Some(head) = self.held.take()
        {
            ring.put_back(head);
        }
    }
}
