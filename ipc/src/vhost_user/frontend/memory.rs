//! The memory table: SET_MEM_TABLE, or ADD_MEM_REG and REM_MEM_REG where the back end has memory slots.

use std::os::fd::BorrowedFd;

use super::{Frontend, FrontendError, Problem};
use crate::memory::RegionRef;
use crate::vhost_user::connection::MAX_DESCRIPTORS;
use crate::vhost_user::message::{
    FrontendReq, VhostUserMemory, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserSingleMemoryRegion, encode,
};

/// A region of guest memory that a back end is to map.
#[derive(Debug, Clone, Copy)]
pub struct MemoryRegion<'a> {
    /// Guest-physical address.
    pub guest_address: u64,
    /// Size, bytes.
    pub size: u64,
    /// Where the region starts in the file.
    pub offset: u64,
    /// The shared memory file.
    pub file: BorrowedFd<'a>,
}

impl<'a> From<RegionRef<'a>> for MemoryRegion<'a> {
    fn from(region: RegionRef<'a>) -> Self {
        let RegionRef { guest_address, size, offset, fd } = region;
        Self { guest_address, size, offset, file: fd }
    }
}

/// A region as the back end has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapped {
    guest_address: u64,
    size: u64,
    offset: u64,
}

impl From<&MemoryRegion<'_>> for Mapped {
    fn from(region: &MemoryRegion<'_>) -> Self {
        Self { guest_address: region.guest_address, size: region.size, offset: region.offset }
    }
}

impl Mapped {
    /// On the wire; the user address is the guest-physical one.
    fn single(self) -> Vec<u8> {
        encode(&VhostUserSingleMemoryRegion::new(
            self.guest_address,
            self.size,
            self.guest_address,
            self.offset,
        ))
    }
}

impl Frontend {
    /// Makes `regions` the memory that the back end sees. Where it has memory slots, only the difference to what
    /// it has already is sent; regions are then recognised by address, size and offset.
    ///
    /// # Errors
    /// [`Problem::Parameter`] with more regions than slots, or than a message carries.
    pub fn set_memory(&mut self, regions: &[MemoryRegion<'_>]) -> Result<(), FrontendError> {
        let slots = self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let (request, limit) = if slots {
            (FrontendReq::ADD_MEM_REG, self.memory_slots)
        } else {
            (FrontendReq::SET_MEM_TABLE, MAX_DESCRIPTORS as u64)
        };
        let count = regions.len() as u64;
        if count > limit {
            let field = "number of memory regions";
            let value = count;
            return Err(self.error(request, Problem::Parameter { field, value }));
        }
        let table: Vec<Mapped> = regions.iter().map(Mapped::from).collect();
        if slots {
            self.change_slots(&table, regions)
        } else if table == self.table {
            Ok(())
        } else {
            self.set_table(table, regions)
        }
    }

    /// Makes the back end forget what it had mapped; the next [`Frontend::set_memory`] sends everything.
    pub fn forget_memory(&mut self) {
        self.table.clear();
    }

    fn set_table(&mut self, table: Vec<Mapped>, regions: &[MemoryRegion<'_>]) -> Result<(), FrontendError> {
        let count = u32::try_from(table.len()).unwrap_or(u32::MAX);
        let mut payload = encode(&VhostUserMemory::new(count));
        for region in &table {
            payload.extend_from_slice(&encode(&VhostUserMemoryRegion::new(
                region.guest_address,
                region.size,
                region.guest_address,
                region.offset,
            )));
        }
        let files: Vec<BorrowedFd<'_>> = regions.iter().map(|region| region.file).collect();
        self.command(FrontendReq::SET_MEM_TABLE, &payload, &files)?;
        self.table = table;
        Ok(())
    }

    fn change_slots(&mut self, table: &[Mapped], regions: &[MemoryRegion<'_>]) -> Result<(), FrontendError> {
        let gone: Vec<Mapped> = self.table.iter().filter(|mapped| !table.contains(mapped)).copied().collect();
        for region in gone {
            self.command(FrontendReq::REM_MEM_REG, &region.single(), &[])?;
            self.table.retain(|mapped| *mapped != region);
        }
        for region in regions {
            let mapped = Mapped::from(region);
            if !self.table.contains(&mapped) {
                self.command(FrontendReq::ADD_MEM_REG, &mapped.single(), &[region.file])?;
                self.table.push(mapped);
            }
        }
        Ok(())
    }
}
