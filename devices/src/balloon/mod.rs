//! virtio-balloon (virtio 1.2, 5.5): pages that the guest does without go back to the host, as holes in the files of guest RAM.
//!
//! Pages come in two ways: the guest puts them into the balloon until that has the size that was asked for, or, with free page
//! reporting, it names whatever it does not use at the moment. A hole reads as zero and costs nothing; a page that the
//! guest takes again is a new one. Holes are made only where the guest said so, and marked as written.
//!
//! | file | what |
//! | --- | --- |
//! | `pages` | numbers and ranges of pages, as the guest gives them |
//! | `worker` | the queues |
//! | `controller` | what the control channel asks |

mod controller;
mod pages;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_ipc::vhost_user::backend::{PollWorker, QueueWorker, VirtioDevice};

pub use controller::Controller;
use controller::Shared;
use worker::Worker;

/// VIRTIO_BALLOON_F_STATS_VQ: the guest tells how it uses its memory.
const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: it may take pages back when it has none left.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING: it names free pages.
const F_PAGE_REPORTING: u64 = 1 << 5;
/// Most queues: inflateq, deflateq, statsq, reporting_vq.
const QUEUES: u16 = 4;
/// Offset of `actual`, the only field that the driver writes.
const ACTUAL: u32 = 4;

/// What a balloon is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Size that it is to have, pages of 4 KiB.
    pub target: u32,
    /// Size that it has; not 0 only after a predecessor.
    pub actual: u32,
    /// The guest may take pages back when it has none left.
    pub deflate_on_oom: bool,
    /// The guest names free pages.
    pub free_page_reporting: bool,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    shared: Arc<Shared>,
}

impl Balloon {
    /// A balloon.
    pub fn new(settings: Settings) -> Self {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let features = F_STATS_VQ
            | bit(settings.deflate_on_oom, F_DEFLATE_ON_OOM)
            | bit(settings.free_page_reporting, F_PAGE_REPORTING);
        Self { features, shared: Arc::new(Shared::new(settings.target, settings.actual)) }
    }

    /// A handle for the control channel's messages.
    pub fn controller(&self) -> Controller {
        Controller::new(self.shared.clone())
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn serves_at_once(&self, queue: u16) -> bool {
        // The buffer for statistics stays here until they are wanted.
        Some(queue) != self.shared.statistics_queue()
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        vec![Box::new(PollWorker::new(Worker::new(self.shared.clone()), QUEUES))]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_balloon_config: num_pages, actual, free_page_hint_cmd_id, poison_val.
        let fields = [&self.shared.target, &self.shared.actual].map(|field| field.load(Ordering::Relaxed));
        let mut bytes = [0; 16];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        crate::copy_config(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> bool {
        match (offset, <[u8; 4]>::try_from(data)) {
            (ACTUAL, Ok(bytes)) => {
                self.shared.actual.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    fn accept_features(&mut self, features: u64) {
        self.shared.features.store(features, Ordering::Relaxed);
    }

    fn reset(&mut self) {
        // What a predecessor knew counts until a driver has begun anew.
        if self.shared.features.swap(0, Ordering::Relaxed) != 0 {
            self.shared.actual.store(0, Ordering::Relaxed);
        }
    }
}
