//! Upwards: what a PCI function may reach of memory, and when.

use std::sync::Arc;

use bulkhead_ipc::memory::GuestRam;

use super::pci::PciFunction;

/// A function's way to memory. It passes the function's command register each time; an IOMMU would stand here as well.
#[derive(Clone)]
pub struct DmaView {
    function: Arc<dyn PciFunction>,
    ram: GuestRam,
}

/// The function is not bus master.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the function is not bus master")]
pub struct NotBusMaster;

impl DmaView {
    pub(super) fn new(function: Arc<dyn PciFunction>, ram: GuestRam) -> Self {
        Self { function, ram }
    }

    /// Whether the function is bus master now. A queue must not run while it is not.
    #[must_use]
    pub fn is_bus_master(&self) -> bool {
        self.function.config().command().bus_master()
    }

    /// Guest RAM, for one transfer: ask again for the next.
    ///
    /// # Errors
    /// [`NotBusMaster`].
    pub fn memory(&self) -> Result<&GuestRam, NotBusMaster> {
        if self.is_bus_master() { Ok(&self.ram) } else { Err(NotBusMaster) }
    }
}
