//! Queues as the driver sets them up (sections 2.7 and 4.1.4.3).

use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vhost_user::frontend::RingAddresses;

/// "No vector" in the vector registers.
pub(super) const NO_VECTOR: u16 = 0xFFFF;

/// One queue.
#[derive(Debug)]
pub(super) struct Queue {
    /// Largest size, entries.
    maximum: u16,
    /// Size as the driver chose it.
    pub size: u16,
    pub ring: RingAddresses,
    /// `queue_enable`: checked and ready to run.
    pub enabled: bool,
    /// The back end has it.
    pub running: bool,
    /// Where the back end goes on in the available ring.
    pub base: u16,
}

/// What is wrong with a queue that a driver enables.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum QueueError {
    #[error("its size of {0} is zero or no power of two")]
    Size(u16),
    #[error("its {part} at {address:#x} is not aligned to {alignment} bytes")]
    Alignment { part: &'static str, address: u64, alignment: u64 },
    #[error("its {part} at {address:#x} does not lie in guest memory")]
    Memory { part: &'static str, address: u64 },
}

impl Queue {
    pub fn new(maximum: u16) -> Self {
        Self {
            maximum,
            size: maximum,
            ring: RingAddresses::default(),
            enabled: false,
            running: false,
            base: 0,
        }
    }

    /// Device reset.
    pub fn reset(&mut self) {
        *self = Self::new(self.maximum);
    }

    /// The driver chooses a size; what no queue can have is ignored.
    pub fn set_size(&mut self, size: u16) {
        if !self.enabled && size.is_power_of_two() && size <= self.maximum {
            self.size = size;
        }
    }

    /// Whether the rings are such that a device can use them: split virtqueue layout, section 2.7.
    pub fn check(&self, ram: &GuestRam) -> Result<(), QueueError> {
        let size = u64::from(self.size);
        if !self.size.is_power_of_two() || self.size > self.maximum {
            return Err(QueueError::Size(self.size));
        }
        let parts = [
            ("descriptor table", self.ring.descriptors, 16, 16 * size),
            ("available ring", self.ring.available, 2, 6 + 2 * size),
            ("used ring", self.ring.used, 4, 6 + 8 * size),
        ];
        for (part, address, alignment, length) in parts {
            if address % alignment != 0 {
                return Err(QueueError::Alignment { part, address, alignment });
            }
            if !ram.contains(address, length) {
                return Err(QueueError::Memory { part, address });
            }
        }
        Ok(())
    }
}
