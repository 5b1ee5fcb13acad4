//! virtio-blk over a raw image, a block device, or an image in a format (virtio 1.2, 5.2).
//!
//! - `config`: features and configuration space;
//! - `request`: what a request says;
//! - `queue`: a queue on its thread;
//! - `direct`: what the queue's thread moves without io_uring;
//! - `engine`: io_uring, restricted to a disk's operations;
//! - `pool` and `image`: threads that serve an image in a format;
//! - `errors`: what the log hears of failed requests;
//! - `service`: a disk for front ends that are not ours.

mod config;
mod direct;
mod engine;
mod errors;
mod image;
mod pool;
mod queue;
mod request;
mod service;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bulkhead_ipc::channel::message::{BlkConfig, Durability, ErrorAction, ImageFormat};
use bulkhead_ipc::vhost_user::backend::{EnterThread, QueueWorker, VirtioDevice};
use thiserror::Error;
use tracing::error;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use config::{ConfigSpace, WRITEBACK, bit};
pub use image::{Files, Layer};
use pool::Pool;
use queue::BlkQueue;
pub use service::SERVICE;

use crate::rate_limit::{Group, Limit};

/// Longest serial number, bytes.
const SERIAL: usize = 20;
/// Most request queues.
const MAX_QUEUES: u16 = 64;
/// Physical blocks unless something else is said: the page cache's unit, bytes.
const PHYSICAL_BLOCK: u32 = 4096;

/// Why a disk cannot be served.
#[derive(Debug, Error)]
pub enum BlkError {
    /// The number of queues.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// The logical block size.
    #[error("a logical block has 512 or 4096 bytes, not {0}")]
    BlockSize(u32),
    /// The physical block size.
    #[error("a physical block has a power of two of bytes, from the logical block's to 65536, not {0}")]
    PhysicalBlockSize(u32),
    /// The serial number.
    #[error("the serial number {0:?} is longer than {SERIAL} bytes")]
    Serial(String),
    /// Errors of reads cannot be ignored: the guest would take anything for its data.
    #[error("errors of reads can be reported or waited for, and not ignored")]
    Ignored,
    /// A format that cannot be written.
    #[error("VMDK images can only be read: the disk must be read-only")]
    Vmdk,
    /// The disk's size.
    #[error("the disk's size cannot be found: {0}")]
    Size(io::Error),
    /// The threads of an image.
    #[error("the threads that serve the image cannot start: {0}")]
    Threads(io::Error),
    /// The image.
    #[error("the image cannot be opened: {0}")]
    Image(String),
}

/// What the device and its queues share.
#[derive(Debug)]
struct Shared {
    /// A raw image or block device.
    raw: Option<File>,
    /// The same without O_DIRECT, if it is open with that.
    cached: Option<File>,
    /// What serves an image in a format.
    pool: Option<Arc<Pool>>,
    /// Sectors of 512 bytes.
    capacity: AtomicU64,
    read_only: bool,
    serial: [u8; SERIAL],
    /// Completed writes may wait for a flush.
    writeback: AtomicBool,
    durability: Durability,
    discards: bool,
    limit: Option<Limit>,
    read_error: ErrorAction,
    write_error: ErrorAction,
}

impl Shared {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Whether a write must be durable when it ends.
    fn writes_through(&self) -> bool {
        match self.durability {
            Durability::Flush => !self.writeback.load(Ordering::Relaxed),
            Durability::Write => true,
            Durability::Never => false,
        }
    }
}

/// What the control channel does to a disk.
#[derive(Debug)]
pub struct Controller {
    shared: Arc<Shared>,
    block_size: u32,
}

impl Controller {
    /// The file has this many bytes now. Requests beyond the end fail from here on; the front end is to be told. False: the disk is
    /// what it was. An image in a format says its size itself: it is made longer, and [`Self::grown`] has the answer.
    pub fn resize(&self, bytes: u64) -> bool {
        match &self.shared.pool {
            None => return self.set_size(bytes),
            Some(pool) if self.shared.read_only => pool.answer(Err("is read-only".into())),
            Some(pool) => pool.grow(bytes, u64::from(self.block_size)),
        }
        false
    }

    /// What became of making disks longer: the size in bytes, of which the front end is to be told, or a sentence for a person, which
    /// follows the disk's id.
    pub fn grown(&self) -> Vec<Result<u64, String>> {
        let grown = self.shared.pool.as_ref().map(|pool| pool.grown()).unwrap_or_default();
        for bytes in grown.iter().flatten() {
            self.set_size(*bytes);
        }
        grown
    }

    /// Can be read when [`Self::grown`] has something.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.shared.pool.as_ref().map(|pool| pool.wake())
    }

    /// True: it had another.
    fn set_size(&self, bytes: u64) -> bool {
        let capacity = sectors(bytes, self.block_size);
        self.shared.capacity.swap(capacity, Ordering::Relaxed) != capacity
    }
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    shared: Arc<Shared>,
    queues: u16,
    block_size: u32,
    physical_block_size: u32,
}

impl Blk {
    /// Serves `files`, open for what the configuration says. An image in a format gets threads, which have called `enter` when this
    /// returns, and is not looked at before [`VirtioDevice::open`].
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn new(
        config: &BlkConfig,
        files: Files,
        cached: Option<File>,
        group: Option<Arc<Group>>,
        enter: &EnterThread,
    ) -> Result<Self, BlkError> {
        let BlkConfig { queues, logical_block_size: block_size, read_only, ref serial, ref options, .. } =
            *config;
        if queues == 0 || queues > MAX_QUEUES {
            return Err(BlkError::Queues(queues));
        }
        if block_size != 512 && block_size != 4096 {
            return Err(BlkError::BlockSize(block_size));
        }
        let physical_block_size = match options.physical_block_size {
            0 => block_size.max(PHYSICAL_BLOCK),
            size if size.is_power_of_two() && size >= block_size && size <= 65536 => size,
            size => return Err(BlkError::PhysicalBlockSize(size)),
        };
        if options.read_error == ErrorAction::Ignore {
            return Err(BlkError::Ignored);
        }
        if options.format == ImageFormat::Vmdk && !read_only {
            return Err(BlkError::Vmdk);
        }
        let mut id = [0; SERIAL];
        id.get_mut(..serial.len())
            .ok_or_else(|| BlkError::Serial(serial.into()))?
            .copy_from_slice(serial.as_bytes());
        let mut raw = None;
        let (mut size, mut pool) = (0, None);
        if options.format == ImageFormat::Raw && files.chain.len() == 1 {
            let disk = raw.insert(files.chain.into_iter().next().ok_or(BlkError::Image("none".into()))?.file);
            // The end of a block device is its size, like that of a file.
            size = disk.seek(SeekFrom::End(0)).map_err(BlkError::Size)?;
        } else {
            pool = Some(Arc::new(Pool::start(files, enter).map_err(BlkError::Threads)?));
        }
        let shared = Shared {
            raw,
            cached,
            pool,
            capacity: AtomicU64::new(sectors(size, block_size)),
            read_only,
            serial: id,
            writeback: AtomicBool::new(true),
            durability: options.durability,
            discards: !options.no_discard,
            limit: Limit::new(options.rates.into(), group),
            read_error: options.read_error,
            write_error: options.write_error,
        };
        Ok(Self { shared: Arc::new(shared), queues, block_size, physical_block_size })
    }

    /// For the control channel.
    pub fn controller(&self) -> Controller {
        Controller { shared: Arc::clone(&self.shared), block_size: self.block_size }
    }

    /// The descriptors that stay open.
    pub fn cached(&self) -> Option<&File> {
        self.shared.cached.as_ref()
    }

    /// Opens an image in a format, anew.
    fn open_image(&self, write: bool) -> Result<(), BlkError> {
        let Some(pool) = &self.shared.pool else { return Ok(()) };
        let size = pool.open(write).map_err(BlkError::Image)?;
        self.shared.capacity.store(sectors(size, self.block_size), Ordering::Relaxed);
        Ok(())
    }
}

/// Sectors of a disk of `size` bytes, in whole logical blocks.
fn sectors(size: u64, block_size: u32) -> u64 {
    (size & !u64::from(block_size.saturating_sub(1))) >> 9
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn features(&self) -> u64 {
        let choice = self.shared.durability == Durability::Flush;
        config::features(self.shared.read_only, self.shared.discards, self.queues, choice)
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

    /// Only to see whether it can be read: a predecessor may still write to it.
    fn open(&mut self) -> Result<(), String> {
        self.open_image(false).map_err(|error| error.to_string())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let writeback = match self.shared.durability {
            Durability::Flush => self.shared.writeback.load(Ordering::Relaxed),
            Durability::Write => false,
            Durability::Never => true,
        };
        let space = ConfigSpace {
            capacity: self.shared.capacity(),
            block_size: self.block_size,
            physical_block_size: self.physical_block_size,
            queues: self.queues,
            writeback,
        };
        crate::copy_config(&space.bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> bool {
        match (offset, data) {
            (WRITEBACK, [value @ (0 | 1)]) if self.shared.durability == Durability::Flush => {
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
        // Only now has a predecessor let go of the image.
        if let Err(error) = self.open_image(!self.shared.read_only) {
            error!(%error, "the guest will see I/O errors");
        }
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
        if let Some(pool) = &self.shared.pool {
            pool.close();
        }
    }
}
