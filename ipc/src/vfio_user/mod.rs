//! The register protocol: a strict subset of vfio-user (QEMU, `docs/interop/vfio-user.rst`), for devices that are
//! not virtio. The core is the client and answers the CPU; the device model is the server and runs in its jail.
//!
//! Implemented: VERSION, DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS (eventfd,
//! trigger), REGION_READ, REGION_WRITE (also posted: No_reply), DEVICE_RESET. Everything else is answered with
//! ENOTSUP. Messages are small and bounded ([`MAX_MESSAGE`]); both sides keep one buffer of that size and allocate
//! nothing for an access.
//!
//! What an access costs:
//!
//! - a posted write is one `send`;
//! - a synchronous access is one `send` and one `recv` in the client;
//! - a read that the [`shadow`] page can answer is one atomic load.
//!
//! Neither side trusts the other: every length, index, offset, flag and descriptor is checked, every wait has a
//! deadline, and the first violation ends the connection with an error that names device, command and field.

mod capabilities;
mod client;
mod error;
mod mapping;
mod server;
pub mod shadow;
mod socket;
pub mod wire;

pub use client::Client;
pub use error::{AccessError, ClientError, DecodeError, Fault, ServerError};
pub use server::{Connection, Description, Region, RegisterDevice, Served};
pub use wire::{Command, DeviceInfo, IrqInfo, RegionInfo};

/// Most data bytes in one REGION_READ or REGION_WRITE; announced as `max_data_xfer_size`.
pub const MAX_DATA: usize = 4096;

/// Longest message, header included, that either side accepts.
pub const MAX_MESSAGE: usize = wire::HEADER_SIZE + wire::RegionAccess::SIZE + MAX_DATA;

/// Protocol version that is proposed and served (section VFIO_USER_VERSION): 0.1.
pub const VERSION: (u16, u16) = (0, 1);

#[cfg(test)]
mod tests;
