//! The generation id (Microsoft, "Virtual Machine Generation ID"): 128 bits in guest memory that no other run of a machine
//! has. A guest that is told of another one knows that it was copied, and makes new secrets.

use std::sync::Mutex;

use bulkhead_ipc::memory::{Direction, MemoryError};

use super::Machine;
use super::sync::lock;

/// Bytes of the id.
const SIZE: u64 = 16;

/// The id, and where a direct boot has it.
#[derive(Debug)]
pub(super) struct Generation(Mutex<([u8; 16], Option<u64>)>);

impl Generation {
    pub(super) const fn new(id: [u8; 16]) -> Self {
        Self(Mutex::new((id, None)))
    }

    pub(super) fn id(&self) -> [u8; 16] {
        lock(&self.0).0
    }

    /// Whoever asks places the id there.
    pub(super) fn placed_at(&self, address: u64) {
        lock(&self.0).1 = Some(address);
    }
}

impl Machine {
    /// Gives the machine another generation id and tells the guest, by GPE.5. Firmware that has not asked for the id yet
    /// will find this one.
    ///
    /// # Errors
    /// Firmware has named a place that is no RAM; then the guest is not told.
    pub fn renew_generation(&self, id: [u8; 16]) -> Result<(), MemoryError> {
        let mut generation = lock(&self.generation.0);
        generation.0 = id;
        let Some(address) = generation.1.or_else(|| self.fw_cfg.generation_address()) else { return Ok(()) };
        self.ram.view(address, SIZE, Direction::Write)?.write_bytes(0, &id)?;
        self.pm.announce_generation();
        Ok(())
    }
}
