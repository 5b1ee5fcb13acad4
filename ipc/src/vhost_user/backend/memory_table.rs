//! The front end's memory table: guest RAM, and where each region lies in the front end's own address space, in which it
//! names the rings (vhost-user, "Memory regions description", VHOST_USER_SET_VRING_ADDR).

use std::os::fd::OwnedFd;

use crate::memory::{GuestRam, MemoryError, SharedRegion};
use crate::vhost_user::message::VhostUserMemoryRegion;

/// A region's place in the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    guest_address: u64,
    size: u64,
    user_address: u64,
}

/// Guest RAM as the front end described it.
#[derive(Debug)]
pub(super) struct MemoryTable {
    ram: GuestRam,
    places: Vec<Place>,
}

fn split(region: &VhostUserMemoryRegion, fd: OwnedFd) -> (Place, SharedRegion) {
    let (guest_address, size, offset) = (region.guest_phys_addr, region.memory_size, region.mmap_offset);
    let place = Place { guest_address, size, user_address: region.user_addr };
    (place, SharedRegion { guest_address, size, offset, fd })
}

impl MemoryTable {
    /// No memory yet.
    pub(super) fn new() -> Self {
        Self { ram: GuestRam::empty(), places: Vec::new() }
    }

    /// What the workers get.
    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// SET_MEM_TABLE: these regions and no others.
    pub(super) fn replace(
        &mut self,
        regions: Vec<(VhostUserMemoryRegion, OwnedFd)>,
    ) -> Result<(), MemoryError> {
        let (places, shared): (Vec<_>, Vec<_>) =
            regions.into_iter().map(|(region, fd)| split(&region, fd)).unzip();
        self.ram = self.ram.replace_regions(shared)?;
        self.places = places;
        Ok(())
    }

    /// ADD_MEM_REG.
    pub(super) fn add(&mut self, region: &VhostUserMemoryRegion, fd: OwnedFd) -> Result<(), MemoryError> {
        let (place, shared) = split(region, fd);
        self.ram = self.ram.insert_region(shared)?;
        self.places.push(place);
        Ok(())
    }

    /// REM_MEM_REG. The region is named by guest address, user address and size.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), MemoryError> {
        let (guest_address, size) = (region.guest_phys_addr, region.memory_size);
        let wanted = Place { guest_address, size, user_address: region.user_addr };
        let Some(position) = self.places.iter().position(|place| *place == wanted) else {
            return Err(MemoryError::NoSuchRegion { guest_address, size });
        };
        self.ram = self.ram.remove_region(guest_address, size)?;
        self.places.remove(position);
        Ok(())
    }

    /// The guest-physical address of a user address of the front end.
    pub(super) fn translate(&self, user_address: u64) -> Option<u64> {
        self.places.iter().find_map(|place| {
            let offset = user_address.checked_sub(place.user_address)?;
            if offset < place.size { place.guest_address.checked_add(offset) } else { None }
        })
    }
}
