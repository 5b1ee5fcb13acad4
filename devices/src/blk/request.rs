//! What a virtio-blk request says (virtio 1.2, 5.2.6), whatever its layout over descriptors.

use bulkhead_ipc::memory::{GuestRam, MemoryError};
use bulkhead_ipc::vhost_user::backend::Chain;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::segments::gather;

/// Bytes of the header: type, reserved, sector.
pub const HEADER: u32 = 16;
/// Bytes of a range of discard and write-zeroes.
const RANGE: u32 = 16;
/// Unit of addresses and lengths.
pub const SECTOR: u64 = 512;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Serial number.
    GetId,
    /// These ranges are not needed.
    Discard,
    /// Fill ranges with zero.
    WriteZeroes,
    /// A type that this device does not know.
    Unknown(u32),
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Type.
    pub operation: Operation,
    /// First sector of read and write.
    pub sector: u64,
}

/// A range of the disk, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Write-zeroes: the space may be given up.
    pub unmap: bool,
}

/// Bytes that a read or write moves, for the rate limit.
pub fn moved_bytes(chain: &Chain, operation: Operation) -> u64 {
    match operation {
        Operation::Read => u64::from(chain.writable_bytes().saturating_sub(1)),
        Operation::Write => u64::from(chain.readable_bytes().saturating_sub(HEADER)),
        _ => 0,
    }
}

/// Why a request is refused, as its status says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// Where in the guest a request's status goes: the last writable byte. `None`: there is none, the request is malformed.
pub fn status_address(chain: &Chain) -> Option<u64> {
    let last = chain.writable().last()?;
    last.address.checked_add(u64::from(last.len))?.checked_sub(1)
}

/// Reads the header. `None`: it is not complete.
pub fn header(chain: &Chain, ram: &GuestRam) -> Result<Option<Header>, MemoryError> {
    if chain.readable_bytes() < HEADER {
        return Ok(None);
    }
    let mut bytes = [0; 16];
    gather(chain.readable(), 0, &mut bytes, ram)?;
    let [kind, sector] = [&bytes[..4], &bytes[8..]];
    let kind = kind.try_into().map_or(u32::MAX, u32::from_le_bytes);
    let sector = sector.try_into().map_or(u64::MAX, u64::from_le_bytes);
    let operation = match kind {
        VIRTIO_BLK_T_IN => Operation::Read,
        VIRTIO_BLK_T_OUT => Operation::Write,
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_GET_ID => Operation::GetId,
        VIRTIO_BLK_T_DISCARD => Operation::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
        other => Operation::Unknown(other),
    };
    Ok(Some(Header { operation, sector }))
}

/// Bytes of a read or write that lies in the disk and is made of whole sectors.
pub fn check_extent(sector: u64, len: u32, capacity: u64) -> Result<u64, Status> {
    if !u64::from(len).is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    let end = sector.checked_add(u64::from(len) >> 9);
    if end.is_none_or(|end| end > capacity) {
        return Err(Status::IoError);
    }
    sector.checked_mul(SECTOR).ok_or(Status::IoError)
}

/// Reads the ranges of a discard or write-zeroes request into `ranges`; empty ones are left out.
pub fn ranges(
    chain: &Chain,
    operation: Operation,
    capacity: u64,
    ram: &GuestRam,
    ranges: &mut Vec<Range>,
) -> Result<Result<(), Status>, MemoryError> {
    ranges.clear();
    let len = chain.readable_bytes().saturating_sub(HEADER);
    let count = len >> 4;
    if count == 0 || count > MAX_RANGES || !len.is_multiple_of(RANGE) {
        return Ok(Err(Status::IoError));
    }
    for index in 0..count {
        let mut bytes = [0; 16];
        let skip = HEADER.saturating_add(index.saturating_mul(RANGE));
        gather(chain.readable(), skip, &mut bytes, ram)?;
        match range(&bytes, operation, capacity) {
            Ok(range) if range.len == 0 => {}
            Ok(range) => ranges.push(range),
            Err(status) => return Ok(Err(status)),
        }
    }
    Ok(Ok(()))
}

/// `struct virtio_blk_discard_write_zeroes`: sector u64, number of sectors u32, flags u32.
fn range(bytes: &[u8; 16], operation: Operation, capacity: u64) -> Result<Range, Status> {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
    let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let sectors = u32::from_le_bytes([i, j, k, l]);
    let flags = u32::from_le_bytes([m, n, o, p]);
    // Bit 0 is unmap, which discard must not have; the others are reserved.
    if flags > 1 || (operation == Operation::Discard && flags != 0) {
        return Err(Status::Unsupported);
    }
    if sectors > MAX_RANGE_SECTORS {
        return Err(Status::IoError);
    }
    if sector.checked_add(u64::from(sectors)).is_none_or(|end| end > capacity) {
        return Err(Status::IoError);
    }
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    Ok(Range { offset, len: u64::from(sectors).saturating_mul(SECTOR), unmap: flags & 1 != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_extent_that_is_accepted_lies_on_the_disk(sector: u64, len: u32, capacity: u64) {
            if let Ok(offset) = check_extent(sector, len, capacity) {
                prop_assert_eq!(offset, sector * 512);
                prop_assert!(u128::from(offset) + u128::from(len) <= u128::from(capacity) * 512);
            }
        }
    }

    #[test]
    fn extents_at_the_edges() {
        assert_eq!(check_extent(7, 512, 8), Ok(7 * 512));
        assert_eq!(check_extent(8, 0, 8), Ok(8 * 512));
        assert_eq!(check_extent(8, 512, 8), Err(Status::IoError));
        assert_eq!(check_extent(0, 100, 8), Err(Status::IoError));
    }
}
