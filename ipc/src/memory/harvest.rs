//! Dirty pages once they were read: the one type in which the sources of dirty pages meet.

use super::PAGE_SIZE;

/// Dirty pages of one region, 64 pages a word, lowest page in the lowest bit (the layout of KVM_GET_DIRTY_LOG).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyRegion {
    guest_address: u64,
    size: u64,
    words: Vec<u64>,
}

impl DirtyRegion {
    pub(super) fn new(guest_address: u64, size: u64, words: Vec<u64>) -> Self {
        Self { guest_address, size, words }
    }

    /// Guest-physical address of the region's first byte.
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// Bytes of the region.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bitmap.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Guest-physical addresses of the dirty pages, lowest first.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.words.iter().zip((0u64..).step_by(64)).flat_map(move |(&word, first)| {
            (0u64..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| {
                self.guest_address.saturating_add(first.saturating_add(bit).saturating_mul(PAGE_SIZE))
            })
        })
    }
}

/// Dirty pages of guest RAM, by region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    regions: Vec<DirtyRegion>,
}

impl DirtyPages {
    pub(super) fn new(regions: Vec<DirtyRegion>) -> Self {
        Self { regions }
    }

    /// The regions, lowest address first.
    pub fn regions(&self) -> &[DirtyRegion] {
        &self.regions
    }

    /// Guest-physical addresses of the dirty pages, lowest first.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.regions.iter().flat_map(DirtyRegion::pages)
    }

    /// How many pages are dirty.
    pub fn count(&self) -> u64 {
        self.regions.iter().flat_map(|region| &region.words).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(|region| region.words.iter().all(|&word| word == 0))
    }

    /// Adds what another source found in the region at `guest_address`, as words in the same layout. Words
    /// and bits beyond the region are ignored. Answers whether there is such a region.
    pub fn merge_words(&mut self, guest_address: u64, words: &[u64]) -> bool {
        let Some(region) = self.regions.iter_mut().find(|region| region.guest_address == guest_address)
        else {
            return false;
        };
        let mut left = region.size.div_ceil(PAGE_SIZE);
        for (own, &other) in region.words.iter_mut().zip(words) {
            let mask = if left >= 64 { u64::MAX } else { (1u64 << left).wrapping_sub(1) };
            *own |= other & mask;
            left = left.saturating_sub(64);
        }
        true
    }

    /// Adds the pages of `other`; regions that this has not are ignored, which the answer says (`false`).
    pub fn merge(&mut self, other: &Self) -> bool {
        let mut all = true;
        for region in &other.regions {
            all &= self.merge_words(region.guest_address, &region.words);
        }
        all
    }
}
