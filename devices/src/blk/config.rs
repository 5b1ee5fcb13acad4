//! Features and configuration space of virtio-blk (virtio 1.2, 5.2.3 and 5.2.4).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Most segments of a request's data: what fits a ring of 256 entries beside header and status.
const SEG_MAX: u32 = 254;
/// Largest segment, bytes.
const SIZE_MAX: u32 = 4 << 20;
/// Most ranges in a discard or write-zeroes request.
pub const MAX_RANGES: u32 = 32;
/// Longest range of a discard or write-zeroes request, sectors: 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Offset of `writeback`, the only field that a driver writes.
pub const WRITEBACK: u32 = 32;

/// Feature bit number to feature bit.
pub const fn bit(number: u32) -> u64 {
    1 << number
}

/// The features of a disk.
pub fn features(read_only: bool, discards: bool, queues: u16, cache_choice: bool) -> u64 {
    let mut features = bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_SIZE_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_FLUSH);
    if cache_choice {
        features |= bit(VIRTIO_BLK_F_CONFIG_WCE);
    }
    if read_only {
        features |= bit(VIRTIO_BLK_F_RO);
    } else {
        features |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
        if discards {
            features |= bit(VIRTIO_BLK_F_DISCARD);
        }
    }
    if queues > 1 {
        features |= bit(VIRTIO_BLK_F_MQ);
    }
    features
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub struct ConfigSpace {
    /// Size of the disk, sectors of 512 bytes.
    pub capacity: u64,
    /// Logical block size, bytes.
    pub block_size: u32,
    /// Physical block size, bytes, at least the logical one.
    pub physical_block_size: u32,
    /// Number of request queues.
    pub queues: u16,
    /// The cache is in write-back mode.
    pub writeback: bool,
}

impl ConfigSpace {
    /// The bytes of `struct virtio_blk_config`, up to and without the secure-erase and zoned fields.
    pub fn bytes(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let alignment = self.physical_block_size >> 9;
        let blocks = self.physical_block_size.checked_div(self.block_size);
        let exponent = blocks.map_or(0, u32::trailing_zeros).to_le_bytes()[0];
        put(&mut bytes, 0, &self.capacity.to_le_bytes());
        put(&mut bytes, 8, &SIZE_MAX.to_le_bytes());
        put(&mut bytes, 12, &SEG_MAX.to_le_bytes());
        put(&mut bytes, 20, &self.block_size.to_le_bytes());
        put(&mut bytes, 24, &[exponent, 0]);
        put(&mut bytes, 26, &1u16.to_le_bytes());
        put(&mut bytes, 32, &[u8::from(self.writeback)]);
        put(&mut bytes, 34, &self.queues.to_le_bytes());
        put(&mut bytes, 36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(&mut bytes, 40, &MAX_RANGES.to_le_bytes());
        put(&mut bytes, 44, &alignment.to_le_bytes());
        put(&mut bytes, 48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(&mut bytes, 52, &MAX_RANGES.to_le_bytes());
        put(&mut bytes, 56, &[1]);
        bytes
    }
}

fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(offset..offset.saturating_add(field.len())) {
        place.copy_from_slice(field);
    }
}
