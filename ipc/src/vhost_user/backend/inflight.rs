//! In-flight request tracking in memory that outlives this process (vhost-user, "Inflight I/O tracking", split rings).
//!
//! The front end keeps the memory and hands it to the next back end when this one dies. Every word may be changed by the
//! front end at any time, so nothing read here is used as an index without a check.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memfd::{FileSeal, MemfdOptions};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::memory::PAGE_SIZE;

/// Bytes before the descriptor states of a queue: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16.
const HEADER: usize = 16;
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

/// Bytes of one descriptor state: inflight u8, padding, next u16, counter u64.
const STATE: usize = 16;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Queue regions begin at multiples of this.
const ALIGNMENT: usize = 64;

/// Why an in-flight area is refused.
#[derive(Debug, Error)]
pub enum InflightError {
    /// No queues, no entries, or a size that cannot be.
    #[error(
        "an in-flight area for {queues} queues of {queue_size} entries in {size} bytes at offset {offset} cannot be"
    )]
    Shape {
        /// Number of queues.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
        /// Bytes as announced.
        size: u64,
        /// Offset as announced.
        offset: u64,
    },
    /// The descriptor's file is smaller than announced.
    #[error("the in-flight area's file has {actual} bytes where {needed} are announced")]
    FileTooSmall {
        /// Bytes of the file.
        actual: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// Creating or mapping failed.
    #[error("cannot set up the in-flight area: {0}")]
    Map(String),
}

/// The shared area: one region for each queue.
#[derive(Clone, Debug)]
pub struct InflightArea {
    mapping: Arc<MmapRegion<()>>,
    queues: u16,
    queue_size: u16,
}

fn stride(queue_size: u16) -> usize {
    HEADER.saturating_add(STATE.saturating_mul(usize::from(queue_size))).next_multiple_of(ALIGNMENT)
}

fn map(file: File, offset: u64, size: usize) -> Result<Arc<MmapRegion<()>>, InflightError> {
    MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .map(Arc::new)
        .map_err(|error| InflightError::Map(error.to_string()))
}

impl InflightArea {
    /// Bytes of an area.
    pub fn size(queues: u16, queue_size: u16) -> usize {
        stride(queue_size).saturating_mul(usize::from(queues))
    }

    /// Allocates an area, all zero but for its headers; the descriptor goes to the front end (GET_INFLIGHT_FD).
    ///
    /// # Errors
    /// [`InflightError`].
    pub fn create(queues: u16, queue_size: u16) -> Result<(Self, OwnedFd), InflightError> {
        let size = Self::size(queues, queue_size);
        let failed = |error: String| InflightError::Map(error);
        let memfd = MemfdOptions::default()
            .allow_sealing(true)
            .close_on_exec(true)
            .create("inflight")
            .map_err(|error| failed(error.to_string()))?;
        memfd.as_file().set_len(size as u64).map_err(|error| failed(error.to_string()))?;
        memfd
            .add_seals(&[FileSeal::SealGrow, FileSeal::SealShrink, FileSeal::SealSeal])
            .map_err(|error| failed(error.to_string()))?;
        let file = memfd.into_file();
        let mine = file.try_clone().map_err(|error| failed(error.to_string()))?;
        let area = Self::attach(mine.into(), 0, size as u64, queues, queue_size)?;
        Ok((area, file.into()))
    }

    /// Maps an area that came with SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// [`InflightError`].
    pub fn attach(
        fd: OwnedFd,
        offset: u64,
        size: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let shape = InflightError::Shape { queues, queue_size, size, offset };
        let needed = Self::size(queues, queue_size);
        let end = offset.checked_add(size);
        let (Some(end), true) =
            (end, needed > 0 && size >= needed as u64 && offset.is_multiple_of(PAGE_SIZE))
        else {
            return Err(shape);
        };
        let file = File::from(fd);
        let actual = file.metadata().map_err(|error| InflightError::Map(error.to_string()))?.len();
        if actual < end {
            return Err(InflightError::FileTooSmall { actual, needed: end });
        }
        Ok(Self { mapping: map(file, offset, needed)?, queues, queue_size })
    }

    /// The region of queue `index`, for a ring of `ring_size` entries. `None` when the area has no room for it.
    pub fn queue(&self, index: u16, ring_size: u16) -> Option<InflightQueue> {
        if index >= self.queues || ring_size > self.queue_size {
            return None;
        }
        let base = stride(self.queue_size).checked_mul(usize::from(index))?;
        let queue = InflightQueue { mapping: self.mapping.clone(), base, size: ring_size, counter: 0 };
        if queue.load::<u16>(VERSION) == 0 {
            queue.store(DESC_NUM, self.queue_size);
            queue.store(VERSION, 1u16);
        }
        Some(queue)
    }
}

/// The region of one queue, used by its worker.
#[derive(Debug)]
pub struct InflightQueue {
    mapping: Arc<MmapRegion<()>>,
    base: usize,
    size: u16,
    counter: u64,
}

impl InflightQueue {
    fn load<T: vm_memory::AtomicAccess + Default>(&self, offset: usize) -> T {
        // The area was mapped with room for every queue; a failure cannot happen and reads as zero.
        self.mapping
            .as_volatile_slice()
            .load(self.base.saturating_add(offset), Ordering::Relaxed)
            .unwrap_or_default()
    }

    fn store<T: vm_memory::AtomicAccess>(&self, offset: usize, value: T) {
        let _ = self.mapping.as_volatile_slice().store(
            value,
            self.base.saturating_add(offset),
            Ordering::Relaxed,
        );
    }

    fn state(head: u16) -> usize {
        HEADER.saturating_add(STATE.saturating_mul(usize::from(head)))
    }

    /// The driver's request `head` is now ours.
    pub fn taken(&mut self, head: u16) {
        if head >= self.size {
            return;
        }
        let state = Self::state(head);
        self.store(state.saturating_add(COUNTER), self.counter);
        self.counter = self.counter.wrapping_add(1);
        fence(Ordering::Release);
        self.store(state, 1u8);
    }

    /// Request `head` is about to enter the used ring.
    pub fn about_to_finish(&self, head: u16) {
        if head >= self.size {
            return;
        }
        let last: u16 = self.load(LAST_BATCH_HEAD);
        self.store(Self::state(head).saturating_add(NEXT), last);
        self.store(LAST_BATCH_HEAD, head);
        fence(Ordering::Release);
    }

    /// Requests `heads` are in the used ring, whose index is now `used_idx`.
    pub fn finished(&self, heads: &[u16], used_idx: u16) {
        fence(Ordering::Release);
        for &head in heads.iter().filter(|head| **head < self.size) {
            self.store(Self::state(head), 0u8);
        }
        fence(Ordering::Release);
        self.store(USED_IDX, used_idx);
    }

    /// At the start of a ring: the requests that a previous back end took and did not finish, oldest first.
    /// `used_idx` is the used ring's.
    pub fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        // Entries of the last batch may be in the used ring and still be marked.
        let batch = used_idx.wrapping_sub(self.load(USED_IDX));
        if batch <= self.size {
            let mut head: u16 = self.load(LAST_BATCH_HEAD);
            for _ in 0..batch {
                if head >= self.size {
                    break;
                }
                self.store(Self::state(head), 0u8);
                head = self.load(Self::state(head).saturating_add(NEXT));
            }
        }
        self.store(USED_IDX, used_idx);

        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.load::<u8>(Self::state(head)) == 1)
            .map(|head| (self.load(Self::state(head).saturating_add(COUNTER)), head))
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (InflightQueue, InflightArea, OwnedFd) {
        let (area, fd) = InflightArea::create(2, 8).unwrap();
        (area.queue(1, 8).unwrap(), area, fd)
    }

    fn finish(queue: &InflightQueue, head: u16, used: u16) {
        queue.about_to_finish(head);
        queue.finished(&[head], used);
    }

    #[test]
    fn what_was_taken_and_not_finished_comes_back_in_the_order_of_taking() {
        let (mut queue, area, fd) = pair();
        assert!(queue.recover(0).is_empty());
        for head in [5, 1, 7, 0] {
            queue.taken(head);
        }
        finish(&queue, 1, 1);

        drop((queue, area));
        let size = InflightArea::size(2, 8) as u64;
        let area = InflightArea::attach(fd, 0, size, 2, 8).unwrap();
        assert_eq!(area.queue(1, 8).unwrap().recover(1), [5, 7, 0]);
        assert!(area.queue(0, 8).unwrap().recover(0).is_empty());
    }

    #[test]
    fn a_request_that_reached_the_used_ring_just_before_death_is_not_repeated() {
        let (mut queue, area, _fd) = pair();
        queue.recover(0);
        queue.taken(3);
        queue.taken(4);
        queue.about_to_finish(3); // the used ring's index became 1, then the process died
        drop(queue);
        assert_eq!(area.queue(1, 8).unwrap().recover(1), [4]);
    }

    #[test]
    fn a_batch_is_done_as_a_whole_or_not_at_all() {
        let (mut queue, area, _fd) = pair();
        queue.recover(0);
        for head in [1, 2, 3, 4] {
            queue.taken(head);
        }
        for head in [2, 3] {
            queue.about_to_finish(head);
        }
        // Died before the used ring's index moved.
        assert_eq!(area.queue(1, 8).unwrap().recover(0), [1, 2, 3, 4]);
        for head in [2, 3] {
            queue.about_to_finish(head);
        }
        // Died after it moved, half way through taking the marks away.
        queue.store(InflightQueue::state(2), 0u8);
        assert_eq!(area.queue(1, 8).unwrap().recover(2), [1, 4]);
    }

    #[test]
    fn an_area_that_does_not_fit_its_file_is_refused() {
        let (_, _, fd) = pair();
        let size = InflightArea::size(2, 8) as u64;
        let again = || fd.try_clone().unwrap();
        assert!(InflightArea::attach(again(), 0, size, 3, 8).is_err());
        assert!(InflightArea::attach(again(), 0, size, 2, 64).is_err());
        assert!(InflightArea::attach(again(), 4096, size, 2, 8).is_err());
        assert!(InflightArea::attach(again(), 1, size, 2, 8).is_err());
        assert!(InflightArea::attach(again(), 0, u64::MAX, 2, 8).is_err());
        assert!(InflightArea::attach(again(), u64::MAX - 4095, size, 2, 8).is_err());
        assert!(InflightArea::attach(again(), 0, size, 0, 8).is_err());
        let area = InflightArea::attach(again(), 0, size, 2, 8).unwrap();
        assert!(area.queue(2, 8).is_none());
        assert!(area.queue(0, 16).is_none());
    }

    #[test]
    fn garbage_in_the_area_does_no_harm() {
        let (mut queue, _area, _fd) = pair();
        let slice = queue.mapping.as_volatile_slice();
        for offset in 0..slice.len() {
            slice.write_obj(0xffu8, offset).unwrap();
        }
        let _ = queue.recover(0x1234);
        let _ = queue.recover(6);
        queue.taken(u16::MAX);
        finish(&queue, u16::MAX, 1);
    }
}
