//! virtio over PCI: a function whose registers are here and whose device is a vhost-user back end in another process.
//!
//! Modern only, after "Virtual I/O Device (VIRTIO) Version 1.2", section 4.1. One idea a file:
//!
//! - `device`: [`VirtioPci`], the function: what the bus and the core call;
//! - `capabilities`: identity, BARs and the capability list; `pci_cfg`: the window through configuration space;
//! - `common_config`, `device_config`, `isr`: the register blocks; `features`, `status`, `queues`: what they stand for;
//! - `msix`: table, masks and pending bits; `interrupts`: from an event of the back end to the guest;
//! - `backend`: starting and stopping queues through the front end; `failure`: what happens when it fails;
//! - `events`: what the core's event loop waits for;
//! - `event`: eventfds; `device_type`: what differs between types of devices.
//!
//! Queue notifications and interrupts do not pass through this code while they go by ioeventfd and irqfd.

mod backend;
mod capabilities;
mod common_config;
mod device;
mod device_config;
mod device_type;
mod event;
mod events;
mod failure;
mod features;
mod interrupts;
mod isr;
mod msix;
mod pci_cfg;
mod queues;
mod status;

pub use backend::{Backend, FromBackend, InflightSource};
pub use bulkhead_ipc::vhost_user::frontend::{Frontend, InflightMemory, Limits};
pub use device::{Settings, VirtioPci};
pub use device_type::DeviceType;
pub use event::Event;
pub use failure::{Observer, VirtioError};
pub use interrupts::{IntxPin, MsiHost, MsiMessage};

#[cfg(test)]
pub(crate) mod tests;
