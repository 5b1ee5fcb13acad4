//! A larger disk in a qcow2 image that is in use (docs/interop/qcow2.rst of QEMU).
//!
//! The L1 table says where everything else is; it lies in whole clusters, and what it does not use of them is room for more of the disk: a
//! cluster of 64 KiB for 4 TiB. So nothing is allocated or moved: entries that say "nothing is there" are written behind the table, then
//! its new length, then the disk's new size, each with the host's disk before the next. Whoever dies in between leaves an
//! image that is as before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

/// "QFI" and 0xfb.
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header that are read; those of version 2 end at 72.
const HEADER: usize = 80;
const CLUSTER_BITS: usize = 20;
const SIZE: usize = 24;
const L1_SIZE: usize = 36;
const L1_TABLE_OFFSET: usize = 40;
const SNAPSHOTS: usize = 60;
const INCOMPATIBLE_FEATURES: usize = 72;
/// Tables that may be wrong, the mark of corruption, and data in another file.
const REFUSED_FEATURES: u64 = 0b111;
/// Entries of L2 tables have 16 bytes instead of 8.
const EXTENDED_L2: u64 = 1 << 4;
/// Most bytes written at once.
const PIECE: usize = 4096;

/// Why a disk does not grow. The sentences follow the disk's id.
#[derive(Debug, Error)]
pub enum GrowError {
    /// The image.
    #[error("has an image of which this cannot be said: {0}")]
    Image(&'static str),
    /// It would not grow.
    #[error(
        "has {now} bytes now: an image in use only grows; `qemu-img resize` changes it otherwise while no machine uses it"
    )]
    Shrinks {
        /// Bytes now.
        now: u64,
    },
    /// Not in whole blocks.
    #[error("has blocks of {0} bytes, of which its size is a multiple")]
    Blocks(u64),
    /// The table has no room.
    #[error(
        "cannot have more than {most} bytes while it is in use, for which the image's table has room; `qemu-img resize` makes it larger while no machine uses it"
    )]
    Table {
        /// Bytes.
        most: u64,
    },
    /// Something would be seen that was not there.
    #[error(
        "has a backing image that is longer than it, whose end would appear in it: `qemu-img resize` changes it while no machine uses it"
    )]
    Backing,
    /// The host.
    #[error("cannot have that size: {0}")]
    Host(#[from] io::Error),
}

/// The fields that say how large a disk is.
struct Header {
    size: u64,
    l1_size: u32,
    l1_table_offset: u64,
    /// Bytes of a cluster.
    cluster: u64,
    /// Bytes of the disk for an entry of the L1 table.
    entry: u64,
}

fn be32(bytes: &[u8; HEADER], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u32::from_be_bytes(*field))
}

fn be64(bytes: &[u8; HEADER], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u64::from_be_bytes(*field))
}

impl Header {
    fn read(file: &File) -> Result<Self, GrowError> {
        let mut bytes = [0; HEADER];
        file.read_exact_at(&mut bytes, 0)?;
        let version = be32(&bytes, 4);
        if be32(&bytes, 0) != MAGIC || !(2..=3).contains(&version) {
            return Err(GrowError::Image("it is no qcow2 image"));
        }
        let features = if version == 2 { 0 } else { be64(&bytes, INCOMPATIBLE_FEATURES) };
        if features & REFUSED_FEATURES != 0 {
            return Err(GrowError::Image("it is marked as damaged, or has its data in another file"));
        }
        if version == 2 && be32(&bytes, SNAPSHOTS) != 0 {
            return Err(GrowError::Image("it has snapshots that do not note their size (compat=0.10)"));
        }
        let bits = be32(&bytes, CLUSTER_BITS);
        let per_table = bits.checked_sub(if features & EXTENDED_L2 != 0 { 4 } else { 3 });
        let (cluster, entry) = match per_table {
            Some(per_table) if (9..=21).contains(&bits) => (1 << bits, 1 << bits.saturating_add(per_table)),
            _ => return Err(GrowError::Image("its clusters have an impossible size")),
        };
        let (l1_size, l1_table_offset) = (be32(&bytes, L1_SIZE), be64(&bytes, L1_TABLE_OFFSET));
        if l1_table_offset == 0 || l1_table_offset % cluster != 0 {
            return Err(GrowError::Image("its table is at an impossible place"));
        }
        Ok(Self { size: be64(&bytes, SIZE), l1_size, l1_table_offset, cluster, entry })
    }

    /// Entries that the table has room for in its clusters.
    fn room(&self) -> u64 {
        let bytes = u64::from(self.l1_size).saturating_mul(8);
        bytes.checked_next_multiple_of(self.cluster).unwrap_or(0) / 8
    }
}

/// Makes the disk in this image, which nobody has open just now, `size` bytes long. What backs it has `backing` bytes.
///
/// # Errors
/// [`GrowError`]; the disk is as it was then.
pub fn grow(file: &File, size: u64, block: u64, backing: Option<u64>) -> Result<(), GrowError> {
    let header = Header::read(file)?;
    if size == header.size {
        return Ok(());
    }
    if size < header.size {
        return Err(GrowError::Shrinks { now: header.size });
    }
    if !size.is_multiple_of(block.max(1)) {
        return Err(GrowError::Blocks(block));
    }
    if backing.is_some_and(|backing| backing > header.size) {
        return Err(GrowError::Backing);
    }
    let full = GrowError::Table { most: header.room().saturating_mul(header.entry) };
    let entries = size.div_ceil(header.entry);
    let Some(entries) = u32::try_from(entries).ok().filter(|_| entries <= header.room()) else {
        return Err(full);
    };
    if entries > header.l1_size {
        write_empty(file, &header, entries)?;
        file.sync_all()?;
        file.write_all_at(&entries.to_be_bytes(), L1_SIZE as u64)?;
        file.sync_all()?;
    }
    file.write_all_at(&size.to_be_bytes(), SIZE as u64)?;
    file.sync_all()?;
    Ok(())
}

/// Entries behind the table that say that nothing is there.
fn write_empty(file: &File, header: &Header, entries: u32) -> io::Result<()> {
    let end = |entries: u32| header.l1_table_offset.saturating_add(u64::from(entries).saturating_mul(8));
    let (mut at, end) = (end(header.l1_size), end(entries));
    while at < end {
        let piece = usize::try_from(end.saturating_sub(at)).unwrap_or(PIECE).min(PIECE);
        file.write_all_at([0; PIECE].get(..piece).unwrap_or_default(), at)?;
        at = at.saturating_add(piece as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of 1 GiB with clusters of 64 KiB, a table of two entries at the third cluster, and rubbish behind it.
    fn image() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xEE; 1 << 18], 0).unwrap();
        let fields: [(usize, &[u8]); 8] = [
            (0, &MAGIC.to_be_bytes()),
            (4, &3_u32.to_be_bytes()),
            (CLUSTER_BITS, &16_u32.to_be_bytes()),
            (SIZE, &(1_u64 << 30).to_be_bytes()),
            (L1_SIZE, &2_u32.to_be_bytes()),
            (L1_TABLE_OFFSET, &0x2_0000_u64.to_be_bytes()),
            (SNAPSHOTS, &0_u32.to_be_bytes()),
            (INCOMPATIBLE_FEATURES, &0_u64.to_be_bytes()),
        ];
        fields.iter().for_each(|(at, field)| file.write_all_at(field, *at as u64).unwrap());
        file
    }

    fn field(file: &File, at: u64) -> u64 {
        let mut field = [0; 8];
        file.read_exact_at(&mut field, at).unwrap();
        u64::from_be_bytes(field)
    }

    #[test]
    fn the_table_grows_by_empty_entries_in_its_own_cluster() {
        let file = image();
        grow(&file, 5 << 29, 512, None).unwrap();
        assert_eq!((field(&file, 24), field(&file, 36) >> 32), (5 << 29, 5));
        assert_eq!(field(&file, 0x2_0008), 0xEEEE_EEEE_EEEE_EEEE, "the table's own entry");
        assert_eq!([2, 3, 4].map(|entry| field(&file, 0x2_0000 + entry * 8)), [0; 3]);
        assert_eq!(field(&file, 0x2_0028), 0xEEEE_EEEE_EEEE_EEEE, "behind it");
        // Within the last entry nothing but the size changes.
        grow(&file, (5 << 29) - 512, 512, None).unwrap_err();
        let file = image();
        grow(&file, (1 << 30) - (1 << 20), 512, None).unwrap_err();
        file.write_all_at(&((1_u64 << 30) - 512).to_be_bytes(), 24).unwrap();
        grow(&file, 1 << 30, 512, None).unwrap();
        assert_eq!((field(&file, 24), field(&file, 36) >> 32), (1 << 30, 2));
        // All that one cluster has room for.
        grow(&file, 4 << 40, 4096, Some(1 << 30)).unwrap();
        assert_eq!((field(&file, 24), field(&file, 36) >> 32), (4 << 40, 8192));
        assert_eq!(field(&file, 0x2_fff8), 0);
        assert_eq!(field(&file, 0x3_0000), 0xEEEE_EEEE_EEEE_EEEE, "the next cluster");
    }

    #[test]
    fn refusals_say_why_and_change_nothing() {
        let refused = |change: (usize, &[u8]), size: u64, backing, word: &str| {
            let file = image();
            file.write_all_at(change.1, change.0 as u64).unwrap();
            let (mut before, mut after) = (vec![0; 1 << 18], vec![0; 1 << 18]);
            file.read_exact_at(&mut before, 0).unwrap();
            let error = grow(&file, size, 4096, backing).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            file.read_exact_at(&mut after, 0).unwrap();
            assert!(before == after, "{word}");
        };
        let (none, large): ((usize, &[u8]), _) = ((0, &[]), 2 << 30);
        refused(none, 1 << 29, None, "only grows");
        refused(none, large + 512, None, "blocks of 4096");
        refused(none, (4 << 40) + 4096, None, "more than 4398046511104 bytes");
        refused(none, u64::MAX - 4095, None, "more than");
        refused(none, large, Some((1 << 30) + 512), "longer than it");
        refused((0, b"QFI\xfa"), large, None, "no qcow2");
        refused((4, &4_u32.to_be_bytes()), large, None, "no qcow2");
        for bits in [0_u32, 8, 22, u32::MAX] {
            refused((CLUSTER_BITS, &bits.to_be_bytes()), large, None, "impossible size");
        }
        refused((L1_TABLE_OFFSET, &0_u64.to_be_bytes()), large, None, "impossible place");
        refused((L1_TABLE_OFFSET, &0x1234_u64.to_be_bytes()), large, None, "impossible place");
        refused((L1_SIZE, &0_u32.to_be_bytes()), large, None, "more than 0 bytes");
        for feature in [1_u64, 2, 4] {
            refused((INCOMPATIBLE_FEATURES, &feature.to_be_bytes()), large, None, "damaged");
        }
        let file = image();
        file.write_all_at(&2_u32.to_be_bytes(), 4).unwrap();
        file.write_all_at(&1_u32.to_be_bytes(), SNAPSHOTS as u64).unwrap();
        assert!(grow(&file, large, 512, None).unwrap_err().to_string().contains("snapshots"));
        assert!(grow(&tempfile::tempfile().unwrap(), large, 512, None).is_err());
    }

    #[test]
    fn entries_of_sixteen_bytes_halve_what_a_table_holds() {
        let file = image();
        file.write_all_at(&EXTENDED_L2.to_be_bytes(), INCOMPATIBLE_FEATURES as u64).unwrap();
        file.write_all_at(&4_u32.to_be_bytes(), L1_SIZE as u64).unwrap();
        grow(&file, 5 << 28, 512, None).unwrap();
        assert_eq!(field(&file, 36) >> 32, 5);
    }
}
