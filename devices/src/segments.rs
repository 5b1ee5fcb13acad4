//! Bytes of a request, however it is cut into descriptors.

use bulkhead_ipc::memory::{GuestRam, MemoryError, single};
use bulkhead_ipc::vhost_user::backend::Segment;
use vm_memory::{Bytes, GuestAddress};

/// The parts of `segments` that hold bytes `skip` to `skip + len`.
pub fn part(segments: &[Segment], skip: u32, len: u32) -> impl Iterator<Item = Segment> {
    let (mut skip, mut left) = (skip, len);
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len);
        skip = skip.saturating_sub(skipped);
        let len = segment.len.saturating_sub(skipped).min(left);
        left = left.saturating_sub(len);
        let address = segment.address.checked_add(u64::from(skipped))?;
        (len > 0).then_some(Segment { address, len })
    })
}

/// Copies the bytes from `skip` on out of the segments; what they do not have stays as it is.
///
/// # Errors
/// A segment is not guest memory.
pub fn gather(segments: &[Segment], skip: u32, bytes: &mut [u8], ram: &GuestRam) -> Result<(), MemoryError> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut rest = bytes;
    for Segment { address, len } in part(segments, skip, len) {
        let (piece, after) = rest.split_at_mut_checked(usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        rest = after;
        // Nearly always a piece lies in one region.
        if single(ram.memory(), address, piece.len()).is_some_and(|slice| slice.read_slice(piece, 0).is_ok())
        {
            continue;
        }
        ram.memory()
            .read_slice(piece, GuestAddress(address))
            .map_err(|_| MemoryError::OutOfRange { address, len: u64::from(len) })?;
    }
    Ok(())
}

/// Copies bytes into the beginning of the segments; what has no room is left out.
///
/// # Errors
/// A segment is not guest memory.
pub fn scatter(segments: &[Segment], bytes: &[u8], ram: &GuestRam) -> Result<(), MemoryError> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut rest = bytes;
    for Segment { address, len } in part(segments, 0, len) {
        let (piece, after) = rest.split_at_checked(usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        ram.memory()
            .write_slice(piece, GuestAddress(address))
            .map_err(|_| MemoryError::OutOfRange { address, len: u64::from(len) })?;
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A part has the bytes asked for, as far as there are any, each where it belongs.
        #[test]
        fn a_part_is_the_same_bytes_as_a_slice(
            lengths in proptest::collection::vec(1u32..50, 0..8),
            skip in 0u32..200,
            len in 0u32..200,
        ) {
            let mut next = 1000;
            let mut segments = Vec::new();
            let mut bytes = Vec::new();
            for len in lengths {
                segments.push(Segment { address: next, len });
                bytes.extend((0..u64::from(len)).map(|index| next + index));
                next += u64::from(len) + 7;
            }
            let found: Vec<u64> = part(&segments, skip, len)
                .flat_map(|segment| (0..u64::from(segment.len)).map(move |index| segment.address + index))
                .collect();
            let expected: Vec<u64> = bytes.into_iter().skip(skip as usize).take(len as usize).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn bytes_are_found_whatever_the_cut() {
        let ram = GuestRam::create(1 << 20).unwrap();
        let cut = [
            Segment { address: 100, len: 3 },
            Segment { address: 50, len: 4 },
            Segment { address: 900, len: 9 },
        ];
        scatter(&cut, b"0123456789", &ram).unwrap();
        let mut bytes = [b'-'; 6];
        gather(&cut, 2, &mut bytes, &ram).unwrap();
        assert_eq!(&bytes, b"234567");
        let parts: Vec<Segment> = part(&cut, 3, 6).collect();
        assert_eq!(parts, [Segment { address: 50, len: 4 }, Segment { address: 900, len: 2 }]);
        assert!(gather(&[Segment { address: 1 << 30, len: 6 }], 0, &mut bytes, &ram).is_err());
    }
}
