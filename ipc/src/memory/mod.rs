//! Guest RAM and the mapping layer: the only way for a process of a machine to reach guest memory.
//!
//! RAM is one sealed memfd for each region ([`GuestRam::create`]); a device process maps what it received
//! ([`GuestRam::attach`]). Addresses are guest-physical throughout. Whoever writes guest memory reports it:
//!
//! | who writes | through | marks |
//! | --- | --- | --- |
//! | own code, typed or bytes | [`View`] | as it writes |
//! | `virtio-queue`, loaders | [`GuestRam::memory`], vm-memory's `Bytes` | as it writes |
//! | the kernel on our behalf (`io_uring`, `preadv`, `recvmsg`) | [`LentBuffer`], [`LentVector`] | when the operation completes, or when the buffer is dropped |
//!
//! A mark goes to the region's own bitmap, read by [`GuestRam::take_dirty`], and, while one is set, to the
//! vhost-user log ([`GuestRam::set_log`]).

mod attach;
mod dirty;
mod error;
mod harvest;
mod huge;
mod layout;
mod lent;
mod lent_vector;
mod log;
mod mapped_file;
mod mapping;
mod ram;
mod single;
mod view;

#[cfg(test)]
mod tests;

pub use attach::SharedRegion;
pub use dirty::{DirtySlice, RegionBitmap};
pub use error::MemoryError;
pub use harvest::{DirtyPages, DirtyRegion};
pub use huge::HUGE_PAGE_SIZE;
pub use layout::{HOLE_END, HOLE_START, RegionLayout, layout};
pub use lent::LentBuffer;
pub use lent_vector::LentVector;
pub use log::DirtyLog;
pub use mapped_file::MappedFile;
pub use ram::{GuestMemory, GuestRam, HostMapping, RegionRef};
pub use single::single;
pub use view::View;

/// Size of a page in bytes: the unit of regions, dirty bitmaps and logs.
pub const PAGE_SIZE: u64 = 4096;

/// The most regions that one [`GuestRam`] holds; a vhost-user front end asks for at most as many memory slots.
pub const MAX_REGIONS: usize = 32;

/// What may be done with a range of guest memory, seen from that memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Guest memory is read: data flows from the guest to the device.
    Read,
    /// Guest memory is written: data flows from the device to the guest.
    Write,
    /// Both.
    ReadWrite,
}

impl Direction {
    /// Whether guest memory may be read.
    pub const fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }

    /// Whether guest memory may be written.
    pub const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }
}
