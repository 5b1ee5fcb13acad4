//! Pages as the guest names them: numbers of 4 KiB each, in any order, or ranges of bytes.

/// Bytes of a page of the balloon, whatever the guest's pages are (VIRTIO_BALLOON_PFN_SHIFT).
pub const PAGE: u64 = 4096;

/// Ranges of bytes, address and length, that the page numbers make together. Sorts the numbers.
pub fn ranges(numbers: &mut [u32]) -> impl Iterator<Item = (u64, u64)> {
    numbers.sort_unstable();
    let joined = numbers.chunk_by(|a, b| *a == *b || a.checked_add(1) == Some(*b));
    joined.filter_map(|run| {
        let (first, last) = (u64::from(*run.first()?), u64::from(*run.last()?));
        let pages = last.checked_sub(first)?.checked_add(1)?;
        Some((first.checked_mul(PAGE)?, pages.checked_mul(PAGE)?))
    })
}

/// The whole pages within a range of bytes; `None`: there is none.
pub fn whole(address: u64, len: u64) -> Option<(u64, u64)> {
    let first = address.checked_next_multiple_of(PAGE)?;
    let end = address.checked_add(len)? & !(PAGE - 1);
    let len = end.checked_sub(first)?;
    (len > 0).then_some((first, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_given_back_together() {
        let mut numbers = [9, 3, 4, 5, 4, 100, u32::MAX, 101];
        let found: Vec<_> = ranges(&mut numbers).collect();
        let page = |first: u64, count: u64| (first * PAGE, count * PAGE);
        assert_eq!(found, [page(3, 3), page(9, 1), page(100, 2), page(u32::MAX.into(), 1)]);
        assert_eq!(ranges(&mut []).count(), 0);
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        assert_eq!(whole(4096, 8192), Some((4096, 8192)));
        assert_eq!(whole(4097, 8192), Some((8192, 4096)));
        assert_eq!(whole(4097, 4096), None);
        assert_eq!(whole(u64::MAX, 4096), None);
        assert_eq!(whole(0, u64::MAX), Some((0, u64::MAX - 4095)));
    }
}
