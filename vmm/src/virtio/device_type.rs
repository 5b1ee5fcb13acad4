//! What differs between types of virtio devices (section 5).

/// A type of virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType {
    /// Virtio device ID.
    pub id: u16,
    /// PCI class: base class, sub-class, programming interface.
    pub class: u32,
    /// Bytes of configuration space that the core asks the back end for.
    pub config_size: u16,
    /// Queues that every device of the type has.
    pub queues: u16,
    /// Whether a device may have more than `queues`.
    pub multi_queue: bool,
}

impl DeviceType {
    /// Network card, section 5.1.
    pub const NET: Self = Self { id: 1, class: 0x02_00_00, config_size: 12, queues: 2, multi_queue: true };
    /// Block device, section 5.2; up to `write_zeroes_may_unmap`.
    pub const BLOCK: Self = Self { id: 2, class: 0x01_00_00, config_size: 60, queues: 1, multi_queue: true };
    /// Console, section 5.3; with named ports it has more queues.
    pub const CONSOLE: Self =
        Self { id: 3, class: 0x07_80_00, config_size: 12, queues: 2, multi_queue: true };
    /// Entropy device, section 5.4.
    pub const ENTROPY: Self =
        Self { id: 4, class: 0x00_FF_00, config_size: 0, queues: 1, multi_queue: false };

    /// Balloon, section 5.5.
    pub const BALLOON: Self =
        Self { id: 5, class: 0x00_FF_00, config_size: 16, queues: 4, multi_queue: false };
    /// Sockets between guest and host, section 5.10.
    pub const VSOCK: Self = Self { id: 19, class: 0x00_FF_00, config_size: 8, queues: 3, multi_queue: false };

    /// File system, section 5.11: tag and number of request queues.
    pub const FS: Self = Self { id: 26, class: 0x01_80_00, config_size: 40, queues: 2, multi_queue: true };

    /// Persistent memory, section 5.19: start and size.
    pub const PMEM: Self = Self { id: 27, class: 0x00_FF_00, config_size: 16, queues: 1, multi_queue: false };

    /// The type with a virtio device ID. One that has no entry here gets class FF, no configuration space and one queue or more.
    #[must_use]
    pub const fn from_id(id: u16) -> Self {
        match id {
            1 => Self::NET,
            2 => Self::BLOCK,
            3 => Self::CONSOLE,
            4 => Self::ENTROPY,
            5 => Self::BALLOON,
            19 => Self::VSOCK,
            26 => Self::FS,
            27 => Self::PMEM,
            _ => Self { id, class: 0x00_FF_00, config_size: 0, queues: 1, multi_queue: true },
        }
    }
}
