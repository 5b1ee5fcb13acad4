//! virtio-blk over a raw image or a block device (virtio 1.2, 5.2).
//!
//! - `config`: features and configuration space;
//! - `request`: what a request says;
//! - `queue`: a queue on its thread, driven by io_uring;
//! - `engine`: io_uring, restricted to a disk's operations;
//! - `errors`: what the log hears of failed requests.

mod config;
mod engine;
mod errors;
mod queue;
mod request;
mod service;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_ipc::vhost_user::backend::{QueueWorker, VirtioDevice};
use thiserror::Error;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use config::{ConfigSpace, WRITEBACK, bit};
use queue::BlkQueue;

pub use service::SERVICE;

/// Longest serial number, bytes.
const SERIAL: usize = 20;
/// Most request queues.
const MAX_QUEUES: u16 = 64;

/// Why a disk cannot be served.
#[derive(Debug, Error)]
pub enum BlkError {
    /// The number of queues.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// The logical block size.
    #[error("a logical block has 512 or 4096 bytes, not {0}")]
    BlockSize(u32),
    /// The serial number.
    #[error("the serial number {0:?} is longer than {SERIAL} bytes")]
    Serial(String),
    /// The disk's size.
    #[error("the disk's size cannot be found: {0}")]
    Size(io::Error),
}

/// What the device and its queues share.
#[derive(Debug)]
struct Shared {
    disk: File,
    /// Sectors of 512 bytes.
    capacity: u64,
    read_only: bool,
    serial: [u8; SERIAL],
    /// Completed writes may wait for a flush.
    writeback: AtomicBool,
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    shared: Arc<Shared>,
    queues: u16,
    block_size: u32,
}

impl Blk {
    /// Serves `disk`, a raw image or a block device, open for what `read_only` says.
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn new(
        mut disk: File,
        read_only: bool,
        serial: &str,
        queues: u16,
        block_size: u32,
    ) -> Result<Self, BlkError> {
        if queues == 0 || queues > MAX_QUEUES {
            return Err(BlkError::Queues(queues));
        }
        if block_size != 512 && block_size != 4096 {
            return Err(BlkError::BlockSize(block_size));
        }
        let mut id = [0; SERIAL];
        id.get_mut(..serial.len())
            .ok_or_else(|| BlkError::Serial(serial.into()))?
            .copy_from_slice(serial.as_bytes());
        // The end of a block device is its size, like that of a file.
        let size = disk.seek(SeekFrom::End(0)).map_err(BlkError::Size)?;
        let whole_blocks = size & !u64::from(block_size.saturating_sub(1));
        let shared = Shared {
            disk,
            capacity: whole_blocks >> 9,
            read_only,
            serial: id,
            writeback: AtomicBool::new(true),
        };
        Ok(Self { shared: Arc::new(shared), queues, block_size })
    }

    /// The disk's descriptor, which stays open.
    pub fn disk(&self) -> &File {
        &self.shared.disk
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn features(&self) -> u64 {
        config::features(self.shared.read_only, self.queues)
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn tracks_inflight(&self) -> bool {
        true
    }

    fn worker_of(&self, queue: u16) -> usize {
        usize::from(queue)
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        (0..self.queues).map(|_| Box::new(BlkQueue::new(self.shared.clone())) as _).collect()
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = ConfigSpace {
            capacity: self.shared.capacity,
            block_size: self.block_size,
            queues: self.queues,
            writeback: self.shared.writeback.load(Ordering::Relaxed),
        };
        crate::copy_config(&space.bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> bool {
        match (offset, data) {
            (WRITEBACK, [value @ (0 | 1)]) => {
                self.shared.writeback.store(*value == 1, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    fn accept_features(&mut self, features: u64) {
        // A driver that knows of no cache gets none (virtio 1.2, 5.2.6.2).
        let knows = features & (bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE)) != 0;
        self.shared.writeback.store(knows, Ordering::Relaxed);
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
    }
}
