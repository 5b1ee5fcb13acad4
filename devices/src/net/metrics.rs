//! What a network card counts. Each counter has its writers and is never reset.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters, shared by all pairs of queues.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Packets of the guest that were sent.
    pub packets_out: AtomicU64,
    /// Their bytes, Ethernet headers included.
    pub bytes_out: AtomicU64,
    /// Packets for the guest.
    pub packets_in: AtomicU64,
    /// Their bytes.
    pub bytes_in: AtomicU64,
    /// Packets of the guest that were not sent: filtered, malformed, without a peer or link, refused by the host.
    pub dropped_out: AtomicU64,
    /// Packets for the guest that it did not get: filtered, too large for its buffers, without a link.
    pub dropped_in: AtomicU64,
}

impl Metrics {
    /// A packet of `len` bytes left.
    pub fn sent(&self, len: usize) {
        self.packets_out.fetch_add(1, Ordering::Relaxed);
        self.bytes_out.fetch_add(len as u64, Ordering::Relaxed);
    }

    /// A packet of `len` bytes was placed.
    pub fn received(&self, len: usize) {
        self.packets_in.fetch_add(1, Ordering::Relaxed);
        self.bytes_in.fetch_add(len as u64, Ordering::Relaxed);
    }
}
