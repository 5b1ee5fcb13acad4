//! virtio-pmem: flushes of persistent memory (virtio 1.2, 5.19). The guest reads and writes the file by a mapping that the core has
//! made; this process has the file open for reading, which is enough to flush it, and looks at no byte of it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_ipc::vhost_user::backend::{
    Chain, HostCall, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, VringError,
};
use nix::sys::epoll::Epoll;
use nix::unistd::fsync;
use tracing::warn;

use crate::segments::{gather, scatter};

/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// VIRTIO_PMEM_RESP_TYPE_OK and VIRTIO_PMEM_RESP_TYPE_EIO.
const OK: u32 = 0;
const EIO: u32 = 1;
/// Bytes of a request, and of its answer.
const WORD: u32 = 4;
/// Most requests before the control thread gets its turn.
const BATCH: u32 = 16;

/// Persistent memory.
#[derive(Debug)]
pub struct Pmem {
    file: Arc<File>,
    address: u64,
    size: u64,
}

impl Pmem {
    /// Flushes `file`, which the guest sees at `address` with so many bytes.
    pub fn new(file: File, address: u64, size: u64) -> Self {
        Self { file: Arc::new(file), address, size }
    }
}

impl VirtioDevice for Pmem {
    fn name(&self) -> &'static str {
        "pmem"
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let (file, chain, call) = (Arc::clone(&self.file), Chain::new(), HostCall::default());
        vec![Box::new(PollWorker::new(PmemQueue { file, chain, call, failed: false }, 1))]
    }

    /// `struct virtio_pmem_config` (5.19.4): start and size.
    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let bytes: Vec<u8> = [self.address, self.size].into_iter().flat_map(u64::to_le_bytes).collect();
        crate::copy_config(&bytes, offset, data);
    }
}

struct PmemQueue {
    file: Arc<File>,
    chain: Chain,
    call: HostCall,
    /// The log has heard that flushes fail.
    failed: bool,
}

impl PmemQueue {
    /// Serves the request in `self.chain`; the number of bytes written.
    fn flush(&mut self, ring: &Vring) -> Result<u32, VringError> {
        if self.chain.readable_bytes() < WORD || self.chain.writable_bytes() < WORD {
            return Err(VringError::Request("a flush without request or answer"));
        }
        let mut kind = [0; 4];
        gather(self.chain.readable(), 0, &mut kind, ring.ram())?;
        let result = match u32::from_le_bytes(kind) {
            FLUSH => self.call.during(|| fsync(self.file.as_fd())),
            _ => Err(nix::errno::Errno::EOPNOTSUPP),
        };
        let answer = if result.is_ok() { OK } else { EIO };
        if let Err(error) = result
            && !std::mem::replace(&mut self.failed, true)
        {
            warn!(%error, "a flush failed; the guest sees I/O errors");
        }
        scatter(self.chain.writable(), &answer.to_le_bytes(), ring.ram())?;
        Ok(WORD)
    }
}

impl QueueHandler for PmemQueue {
    fn serve(&mut self, rings: &mut [Option<Vring>], _epoll: &Epoll) -> io::Result<Next> {
        let Some(Some(ring)) = rings.first_mut() else { return Ok(Next::Event) };
        let mut budget = BATCH;
        ring.disable_kicks();
        loop {
            while ring.next(&mut self.chain) {
                let written = self.flush(ring).unwrap_or_else(|error| {
                    ring.fail(&error);
                    0
                });
                ring.finish(self.chain.head(), written);
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

    fn set_host_call(&mut self, call: HostCall) {
        self.call = call;
    }
}
