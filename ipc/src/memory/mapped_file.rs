//! A file of the host that the guest sees as memory: persistent memory.
//!
//! It is no guest RAM: no view, buffer or back end reaches it, and the process that maps it keeps no descriptor of it and offers
//! nothing that looks into it. So whoever cuts the file ends an access of the guest, which KVM reports, and no process with SIGBUS.

use nix::sys::mman::ProtFlags;

use super::attach::Seals;
use super::mapping::{ACCESS, Mapping};
use super::{HUGE_PAGE_SIZE, HostMapping, MemoryError, SharedRegion};

/// A mapped file, at its guest-physical address.
#[derive(Debug)]
pub struct MappedFile {
    mapping: Mapping,
    address: u64,
    size: u64,
    writable: bool,
}

impl MappedFile {
    /// Maps a region whose address and size are multiples of 2 MiB.
    ///
    /// # Errors
    /// They are not, or overflow; the file is no regular one, smaller than the region, or not open for this.
    pub fn new(region: SharedRegion, writable: bool) -> Result<Self, MemoryError> {
        let SharedRegion { guest_address: address, size, offset, ref fd } = region;
        for (field, value) in [("address", address), ("size", size)] {
            if !value.is_multiple_of(HUGE_PAGE_SIZE) {
                return Err(MemoryError::Unaligned { guest_address: address, field, value });
            }
        }
        region.check(Seals::NotRequired)?;
        let access = if writable { ACCESS } else { ProtFlags::PROT_READ };
        let mapping = Mapping::new(fd, offset, size, address, access).map_err(|source| MemoryError::Map {
            what: "file for the guest",
            size,
            source,
        })?;
        Ok(Self { mapping, address, size, writable })
    }

    /// Guest-physical address of the first and of the last byte.
    pub fn ends(&self) -> (u64, u64) {
        (self.address, self.address.saturating_add(self.size.saturating_sub(1)))
    }

    /// Whether the guest may write.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where it lies in this process. For KVM_SET_USER_MEMORY_REGION and nothing else.
    pub fn host_mapping(&self) -> HostMapping {
        let host_address = self.mapping.start().addr() as u64;
        HostMapping { guest_address: self.address, size: self.size, host_address }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest_address: u64, size: u64, length: u64) -> SharedRegion {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        SharedRegion { guest_address, size, offset: 0, fd: file.into() }
    }

    #[test]
    fn whole_blocks_of_a_file_that_has_them_are_mapped() {
        let block = HUGE_PAGE_SIZE;
        let mapped = MappedFile::new(region(1 << 32, 2 * block, 2 * block), true).unwrap();
        assert_eq!(mapped.ends(), (1 << 32, (1 << 32) + 2 * block - 1));
        assert!(mapped.host_mapping().host_address.is_multiple_of(block));
        for (address, size, length) in [
            (4096, block, block),
            (block, 4096, block),
            (block, 0, block),
            (block, 2 * block, block),
            (u64::MAX - block + 1, block, block),
        ] {
            assert!(MappedFile::new(region(address, size, length), false).is_err(), "{address:#x} {size:#x}");
        }
        let mut readable = region(block, block, block);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&readable.fd));
        readable.fd = std::fs::File::open(path).unwrap().into();
        assert!(MappedFile::new(readable, true).is_err(), "open for reading only");
    }
}
