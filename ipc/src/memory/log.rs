//! The vhost-user dirty log: a bitmap in memory shared with the front end (vhost-user, "Migration").
//!
//! One bit for each page of 4 KiB, counted from guest address 0, lowest page in the lowest bit of the first byte.
//! The front end reads and clears it with atomic exchanges while the back end sets bits.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use arc_swap::ArcSwapOption;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::attach::{file_size, map_error};
use super::{MemoryError, PAGE_SIZE};

/// A mapped vhost-user dirty log. Unmapped when dropped.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: MmapRegion<()>,
    /// Bytes between the start of the mapping and the start of the log.
    skip: usize,
    size: u64,
}

impl DirtyLog {
    /// Maps the log that SET_LOG_BASE describes: `size` bytes at `offset` of the file behind `fd`.
    ///
    /// # Errors
    /// The size is 0, the range overflows, the descriptor is no regular file or holds fewer bytes, or it cannot be mapped.
    pub fn map(fd: OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        const WHAT: &str = "dirty log";
        let bad = MemoryError::BadLog { size, offset };
        let needed = match offset.checked_add(size) {
            Some(end) if size > 0 && i64::try_from(end).is_ok() => end,
            _ => return Err(bad),
        };
        let actual = file_size(&fd, WHAT)?;
        if actual < needed {
            return Err(MemoryError::FileTooSmall { what: WHAT, actual, needed });
        }
        let skip = offset % PAGE_SIZE;
        let (Ok(length), Ok(skip_bytes)) =
            (usize::try_from(size.saturating_add(skip)), usize::try_from(skip))
        else {
            return Err(bad);
        };
        let mapping = MmapRegionBuilder::new(length)
            .with_file_offset(FileOffset::new(File::from(fd), offset.saturating_sub(skip)))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| map_error(WHAT, size, error))?;
        Ok(Self { mapping, skip: skip_bytes, size })
    }

    /// Bytes of the log.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Refuses a log that has no bit for the last page below `end`.
    pub(super) fn check_covers(&self, end: u64) -> Result<(), MemoryError> {
        let needed = end.div_ceil(PAGE_SIZE).div_ceil(8);
        if self.size < needed {
            return Err(MemoryError::LogTooSmall { size: self.size, end, needed });
        }
        Ok(())
    }

    /// Sets the bits of guest pages `first..end`, counted from guest address 0.
    fn set_pages(&self, first: u64, end: u64) {
        let mut page = first;
        while page < end {
            let byte_end = end.min((page | 7).saturating_add(1));
            let ones = (1u16 << byte_end.saturating_sub(page).min(8)).wrapping_sub(1).to_le_bytes()[0];
            self.set_bits(page >> 3, ones << (page & 7));
            page = byte_end;
        }
    }

    fn set_bits(&self, byte: u64, mask: u8) {
        if byte >= self.size {
            return;
        }
        let Some(offset) = usize::try_from(byte).ok().and_then(|byte| byte.checked_add(self.skip)) else {
            return;
        };
        #[expect(clippy::disallowed_methods, reason = "this is the dirty log itself, no guest memory")]
        let bits = self.mapping.get_atomic_ref::<AtomicU8>(offset);
        // The front end may share a byte with us, so both sides use atomic operations on it.
        if let Ok(bits) = bits
            && bits.load(Ordering::Relaxed) & mask != mask
        {
            bits.fetch_or(mask, Ordering::Release);
        }
    }
}

/// Where every region of a [`super::GuestRam`], and of those derived from it, finds the log.
///
/// While no log is set a write costs one load of a flag that nobody changes.
#[derive(Debug, Default)]
pub(super) struct LogSlot {
    active: AtomicBool,
    log: ArcSwapOption<DirtyLog>,
}

impl LogSlot {
    /// Whether a log is set. The caller has issued a sequentially consistent fence after writing data.
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Sets guest pages `first..end` in the log, if there is one.
    pub(super) fn set_pages(&self, first: u64, end: u64) {
        if let Some(log) = self.log.load().as_ref() {
            log.set_pages(first, end);
        }
    }

    /// Sets or removes the log. What is written after this returns is logged; what was written before is
    /// visible to whoever reads guest memory after this returned.
    pub(super) fn replace(&self, log: Option<DirtyLog>) {
        let active = log.is_some();
        if active {
            self.log.store(log.map(Arc::new));
            self.active.store(true, Ordering::SeqCst);
        } else {
            self.active.store(false, Ordering::SeqCst);
            self.log.store(None);
        }
    }

    /// Refuses regions that a log now set does not cover.
    pub(super) fn check_covers(&self, end: u64) -> Result<(), MemoryError> {
        self.log.load().as_ref().map_or(Ok(()), |log| log.check_covers(end))
    }
}
