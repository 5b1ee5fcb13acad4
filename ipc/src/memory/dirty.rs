//! The dirty bitmap of one region: which of its pages this process has written.
//!
//! Contains unsafe code: the bitmap is allocated zeroed, so that the bitmap of a large guest costs no memory
//! until pages of it are marked.
//!
//! Order matters. A writer stores data, then looks at the page's bit; a harvester clears the bit, then reads the page.
//! Without a full fence between the two steps of the writer its store may become visible after it has seen the
//! old, still set bit: the harvester copies the old data, the bit stays clear, the page is lost. So a mark begins
//! with one sequentially consistent fence, then tests each bit and sets only those that are clear: pages that
//! are dirty already cost a load and no write to a shared cache line.

use std::alloc::{Layout, alloc_zeroed};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::log::LogSlot;
use super::mapping::Mapping;
use super::{MemoryError, PAGE_SIZE};

const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// Dirty pages of one region of guest RAM, one bit for each page of 4 KiB.
#[derive(Debug)]
pub struct RegionBitmap {
    words: Box<[AtomicU64]>,
    pages: usize,
    guest_address: u64,
    log: Arc<LogSlot>,
    /// What the bitmap is about. vm-memory drops a region's bitmap with the region, and unmaps only what it mapped itself.
    _mapping: Mapping,
}

impl RegionBitmap {
    /// A clean bitmap for `size` bytes at `guest_address`, which keeps their mapping.
    pub(super) fn new(
        guest_address: u64,
        size: u64,
        log: Arc<LogSlot>,
        mapping: Mapping,
    ) -> Result<Self, MemoryError> {
        let out_of_memory = || MemoryError::Create { size, source: io::ErrorKind::OutOfMemory.into() };
        let pages = usize::try_from(size.div_ceil(PAGE_SIZE)).map_err(|_| out_of_memory())?;
        let words = zeroed_words(pages.div_ceil(64)).ok_or_else(out_of_memory)?;
        Ok(Self { words, pages, guest_address, log, _mapping: mapping })
    }

    /// Marks the pages of `len` bytes at `offset` in the region. What lies beyond the region is ignored.
    fn mark(&self, offset: usize, len: usize) {
        let Some(last) = len.checked_sub(1).map(|rest| offset.saturating_add(rest) >> PAGE_SHIFT) else {
            return;
        };
        let first = offset >> PAGE_SHIFT;
        let end = self.pages.min(last.saturating_add(1));
        if first >= end {
            return;
        }
        fence(Ordering::SeqCst);
        self.set_pages(first, end);
        if self.log.is_active() {
            let base = self.guest_address >> PAGE_SHIFT;
            self.log.set_pages(base.saturating_add(first as u64), base.saturating_add(end as u64));
        }
    }

    /// Sets the bits of pages `first..end`.
    fn set_pages(&self, first: usize, end: usize) {
        let mut page = first;
        while page < end {
            let word_end = end.min((page | 63).saturating_add(1));
            if let Some(word) = self.words.get(page >> 6) {
                let mask = bits(page & 63, word_end.saturating_sub(page));
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Release);
                }
            }
            page = word_end;
        }
    }

    /// Whether the page that holds `offset` is marked.
    fn is_marked(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        self.words.get(page >> 6).is_some_and(|word| word.load(Ordering::Acquire) >> (page & 63) & 1 == 1)
    }

    /// Reads the bitmap, 64 pages a word, lowest page in the lowest bit.
    pub(super) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Reads and clears the bitmap; a page written later is marked anew.
    pub(super) fn take(&self) -> Vec<u64> {
        let words = self
            .words
            .iter()
            .map(|word| if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::SeqCst) })
            .collect();
        fence(Ordering::SeqCst);
        words
    }
}

/// `count` ones (1 to 64) from bit `low` (0 to 63) upwards; what does not fit is cut off.
fn bits(low: usize, count: usize) -> u64 {
    let ones = if count >= 64 { u64::MAX } else { (1u64 << count).wrapping_sub(1) };
    ones << (low & 63)
}

/// Allocates zeroed words, or nothing when the host has no memory left.
fn zeroed_words(count: usize) -> Option<Box<[AtomicU64]>> {
    if count == 0 {
        return Some(Box::default());
    }
    let layout = Layout::array::<AtomicU64>(count).ok()?;
    // SAFETY: the layout has a size above 0, since `count` is not 0 and an AtomicU64 has 8 bytes.
    let words = unsafe { alloc_zeroed(layout) }.cast::<AtomicU64>();
    if words.is_null() {
        return None;
    }
    // SAFETY: `words` was allocated by the global allocator with the layout of `[AtomicU64; count]`, is owned by
    // nobody else, and all-zero bytes are a valid AtomicU64; so a box may own it and free it with that layout.
    Some(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(words, count)) })
}

impl<'a> WithBitmapSlice<'a> for RegionBitmap {
    type S = DirtySlice<'a>;
}

impl Bitmap for RegionBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_marked(offset)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice { bitmap: self, offset }
    }
}

/// The part of a region's bitmap from an offset onwards; what a `VolatileSlice` of guest memory carries.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    bitmap: &'a RegionBitmap,
    offset: usize,
}

impl<'a> WithBitmapSlice<'_> for DirtySlice<'a> {
    type S = DirtySlice<'a>;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark(self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_marked(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { bitmap: self.bitmap, offset: self.offset.saturating_add(offset) }
    }
}
