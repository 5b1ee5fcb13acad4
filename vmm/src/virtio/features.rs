//! Feature negotiation (sections 2.2 and 6).

/// VIRTIO_F_INDIRECT_DESC
const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX
const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1
pub(super) const VERSION_1: u64 = 1 << 32;
/// Bits that each type of device gives a meaning of its own: 0–23 and 50–63.
const DEVICE_SPECIFIC: u64 = 0x00FF_FFFF | !((1 << 50) - 1);

/// What a guest may be offered. Everything else needs something of the transport that it does not have (packed
/// rings, notification data, queue reset, an IOMMU) or is vhost-user's own (26, 30).
const GUEST_VISIBLE: u64 = DEVICE_SPECIFIC | INDIRECT_DESC | EVENT_IDX | VERSION_1;

/// The features as the two sides see them, and the windows through which the driver looks at them.
#[derive(Debug, Default)]
pub(super) struct Features {
    offered: u64,
    accepted: u64,
    /// The driver accepted bits beyond the first 64.
    beyond: bool,
    pub device_select: u32,
    pub driver_select: u32,
}

/// 32 of 64 bits.
fn window(bits: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// What a guest sees of the features that a back end offers.
pub(super) fn visible(backend: u64) -> u64 {
    backend & GUEST_VISIBLE
}

impl Features {
    pub fn new(backend: u64) -> Self {
        Self { offered: visible(backend), ..Self::default() }
    }

    /// Another back end took over.
    pub fn set_offered(&mut self, backend: u64) {
        self.offered = visible(backend);
    }

    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Whether a device can work with what the driver accepted.
    pub fn acceptable(&self) -> bool {
        !self.beyond && self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0
    }

    /// The register `device_feature`.
    pub fn device_window(&self) -> u32 {
        window(self.offered, self.device_select)
    }

    /// The register `driver_feature`.
    pub fn driver_window(&self) -> u32 {
        window(self.accepted, self.driver_select)
    }

    /// The driver writes the register `driver_feature`.
    pub fn set_driver_window(&mut self, value: u32) {
        let value = u64::from(value);
        match self.driver_select {
            0 => self.accepted = self.accepted & !0xFFFF_FFFF | value,
            1 => self.accepted = self.accepted & 0xFFFF_FFFF | value << 32,
            _ => self.beyond |= value != 0,
        }
    }

    /// Device reset.
    pub fn reset(&mut self) {
        *self = Self { offered: self.offered, ..Self::default() };
    }
}
