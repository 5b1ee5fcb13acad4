//! What can go wrong with guest memory.

use std::io;

use super::{Direction, MAX_REGIONS};

/// An error of the mapping layer. Addresses are guest-physical, sizes are bytes.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A machine without memory was asked for.
    #[error("a machine needs memory: its size is 0")]
    NoMemory,
    /// The size of guest RAM is not a multiple of a page.
    #[error("memory size {0} bytes is not a multiple of 4096")]
    UnalignedSize(u64),
    /// More guest RAM than an address space holds.
    #[error("memory size {size} bytes is more than {limit}, the most that a machine can have")]
    TooMuchMemory {
        /// The size asked for.
        size: u64,
        /// The most that can be had.
        limit: u64,
    },
    /// A region's file could not be created.
    #[error("cannot create {size} bytes of guest memory")]
    Create {
        /// Size of the region.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// No regions where some are needed.
    #[error("no memory region was given")]
    NoRegions,
    /// Too many regions.
    #[error("{0} memory regions are more than {MAX_REGIONS}")]
    TooManyRegions(usize),
    /// A region's address, size or offset is not a multiple of a page, or its size is 0.
    #[error("memory region at {guest_address:#x}: {field} {value:#x} is not a positive multiple of 4096")]
    Unaligned {
        /// Where the region begins.
        guest_address: u64,
        /// Which field is wrong.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A region reaches beyond the guest's address space or its file offsets overflow.
    #[error("memory region at {guest_address:#x}, {size:#x} bytes at file offset {offset:#x}, overflows")]
    Overflow {
        /// Where the region begins.
        guest_address: u64,
        /// Its size.
        size: u64,
        /// Its offset in the file.
        offset: u64,
    },
    /// Two regions cover the same guest addresses.
    #[error("memory regions at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
    /// No region begins at this address with this size.
    #[error("there is no memory region of {size:#x} bytes at {guest_address:#x}")]
    NoSuchRegion {
        /// Where it should begin.
        guest_address: u64,
        /// Its size.
        size: u64,
    },
    /// A descriptor's file is smaller than the region that it is said to hold.
    #[error("{what}: the descriptor holds {actual} bytes, {needed} are needed")]
    FileTooSmall {
        /// What the descriptor is for.
        what: &'static str,
        /// The file's size.
        actual: u64,
        /// Offset plus size of what should be in it.
        needed: u64,
    },
    /// A descriptor is not a regular file in memory.
    #[error("{0}: the descriptor is not a regular file")]
    NotAFile(&'static str),
    /// A descriptor may be shrunk by its owner, which would end this process with SIGBUS.
    #[error("memory region at {0:#x}: the descriptor is not sealed against shrinking")]
    NotSealed(u64),
    /// A descriptor could not be examined.
    #[error("{what}: cannot examine the descriptor")]
    Examine {
        /// What the descriptor is for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be mapped.
    #[error("{what}: cannot map {size} bytes")]
    Map {
        /// What the mapping is for.
        what: &'static str,
        /// Its size.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A range is not (wholly) guest RAM.
    #[error("{len:#x} bytes at {address:#x} are not guest memory")]
    OutOfRange {
        /// Start of the range.
        address: u64,
        /// Its length.
        len: u64,
    },
    /// An access leaves the range that its view is bound to.
    #[error("{len} bytes at offset {offset} leave a view of {view_len} bytes")]
    OutOfView {
        /// Offset of the access in the view.
        offset: u64,
        /// Length of the access.
        len: u64,
        /// Length of the view.
        view_len: u64,
    },
    /// An access goes against the direction that its view or buffer is bound to.
    #[error("guest memory is bound to {bound:?}, {wanted:?} was tried")]
    WrongDirection {
        /// What is allowed.
        bound: Direction,
        /// What was tried.
        wanted: Direction,
    },
    /// An atomic access to an address that is not a multiple of its size.
    #[error("an atomic access of {size} bytes at {address:#x} is not aligned")]
    UnalignedAccess {
        /// Address of the access.
        address: u64,
        /// Its size.
        size: usize,
    },
    /// Reading from or writing to a file failed.
    #[error("input/output between guest memory and a file failed")]
    Io(#[source] io::Error),
    /// A file ended before a range of guest memory was filled.
    #[error("the file ends {missing} bytes early")]
    EndOfFile {
        /// Bytes that were not there.
        missing: u64,
    },
    /// The dirty log is empty or its offset overflows.
    #[error("dirty log of {size} bytes at file offset {offset:#x} is empty or overflows")]
    BadLog {
        /// Its size.
        size: u64,
        /// Its offset.
        offset: u64,
    },
    /// The dirty log has no bit for the end of guest memory: pages there would be lost in a migration.
    #[error("dirty log of {size} bytes is too small: guest memory ends at {end:#x} and needs {needed} bytes")]
    LogTooSmall {
        /// Size of the log.
        size: u64,
        /// First address beyond guest memory.
        end: u64,
        /// Size that covers it.
        needed: u64,
    },
}
