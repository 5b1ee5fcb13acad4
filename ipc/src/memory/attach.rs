//! What a process received as guest memory, checked before it is mapped. The sender is taken as hostile.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use vm_memory::mmap::MmapRegionError;

use super::{MAX_REGIONS, MemoryError, PAGE_SIZE};

/// A region ends at or below this address: 52 bits, the most that x86-64 page tables can name.
const ADDRESS_LIMIT: u64 = 1 << 52;

/// One region of guest RAM as it crosses to another process: `size` bytes at `offset` of the file behind `fd`
/// are what the guest sees at `guest_address`.
#[derive(Debug)]
pub struct SharedRegion {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Bytes, a multiple of 4 KiB where seals are required.
    pub size: u64,
    /// Where in the file the region begins, a multiple of 4 KiB.
    pub offset: u64,
    /// The file that holds the memory.
    pub fd: OwnedFd,
}

/// Whether a region's file must be sealed against shrinking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seals {
    Required,
    NotRequired,
}

impl SharedRegion {
    /// First address beyond the region. Saturates; [`SharedRegion::check`] refuses what would.
    pub(super) fn end(&self) -> u64 {
        self.guest_address.saturating_add(self.size)
    }

    /// Checks the region by itself: alignment, overflow, the file's type, size and seals.
    pub(super) fn check(&self, seals: Seals) -> Result<(), MemoryError> {
        self.check_numbers(seals)?;
        const WHAT: &str = "guest memory region";
        let actual = file_size(&self.fd, WHAT)?;
        let needed = self.offset.saturating_add(self.size);
        if actual < needed {
            return Err(MemoryError::FileTooSmall { what: WHAT, actual, needed });
        }
        if seals == Seals::Required && !sealed_against_shrinking(&self.fd) {
            return Err(MemoryError::NotSealed(self.guest_address));
        }
        Ok(())
    }

    fn check_numbers(&self, seals: Seals) -> Result<(), MemoryError> {
        let Self { guest_address, size, offset, .. } = *self;
        for (field, value) in [("address", guest_address), ("file offset", offset)] {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(MemoryError::Unaligned { guest_address, field, value });
            }
        }
        // The memory of user-space drivers (libblkio's) may end within a page.
        if size == 0 || (seals == Seals::Required && !size.is_multiple_of(PAGE_SIZE)) {
            return Err(MemoryError::Unaligned { guest_address, field: "size", value: size });
        }
        let in_space = guest_address.checked_add(size).is_some_and(|end| end <= ADDRESS_LIMIT);
        let in_file = offset.checked_add(size).is_some_and(|end| i64::try_from(end).is_ok());
        if !in_space || !in_file {
            return Err(MemoryError::Overflow { guest_address, size, offset });
        }
        Ok(())
    }
}

/// Refuses too many ranges and ranges that overlap; each is (first address, first address beyond).
pub(super) fn check_set(ranges: &mut [(u64, u64)]) -> Result<(), MemoryError> {
    if ranges.len() > MAX_REGIONS {
        return Err(MemoryError::TooManyRegions(ranges.len()));
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let [(first, first_end), (second, _)] = *pair
            && first_end > second
        {
            return Err(MemoryError::Overlap(first, second));
        }
    }
    Ok(())
}

/// Size of a regular file in bytes, as the kernel says.
pub(super) fn file_size(fd: &impl AsFd, what: &'static str) -> Result<u64, MemoryError> {
    let status = fstat(fd).map_err(|errno| MemoryError::Examine { what, source: errno.into() })?;
    if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(MemoryError::NotAFile(what));
    }
    Ok(u64::try_from(status.st_size).unwrap_or(0))
}

fn sealed_against_shrinking(fd: &OwnedFd) -> bool {
    // A file that cannot have seals answers EINVAL.
    fcntl(fd, FcntlArg::F_GET_SEALS)
        .is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK))
}

/// Puts vm-memory's reason for a failed mapping into ours.
pub(super) fn map_error(what: &'static str, size: u64, error: MmapRegionError) -> MemoryError {
    let source = match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    };
    MemoryError::Map { what, size, source }
}
