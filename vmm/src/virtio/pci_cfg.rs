//! The PCI configuration access capability: a window to the BARs through configuration space (section 4.1.4.9).

use super::capabilities::{MSIX_BAR, VIRTIO_BAR};
use super::device::VirtioPci;
use crate::machine::PciFunction;

/// Offsets in the capability.
const BAR: u16 = 4;
const OFFSET: u16 = 8;
const LENGTH: u16 = 12;
const DATA: u16 = 16;

/// Where the window looks.
struct Target {
    bar: u8,
    offset: u64,
    length: usize,
}

impl VirtioPci {
    /// Whether an access to configuration space touches the window's data.
    pub(super) fn touches_window(&self, offset: u16, length: usize) -> bool {
        let data = self.layout.pci_cfg.saturating_add(DATA);
        let end = usize::from(offset).saturating_add(length);
        offset < data.saturating_add(4) && end > usize::from(data)
    }

    fn window_target(&self) -> Option<Target> {
        let config = &self.layout.config;
        let at = |offset| self.layout.pci_cfg.saturating_add(offset);
        let bar = config.get_u8(at(BAR));
        let offset = u64::from(config.get_u32(at(OFFSET)));
        let length = config.get_u32(at(LENGTH));
        let known = bar == VIRTIO_BAR || bar == MSIX_BAR;
        // What a driver must not ask for, nothing answers: length 1, 2 or 4, offset a multiple of it.
        let sound = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length.into());
        (known && sound).then_some(Target { bar, offset, length: usize::try_from(length).unwrap_or(4) })
    }

    pub(super) fn read_window(&self) {
        let mut data = [0; 4];
        if let Some(target) = self.window_target()
            && let Some(bytes) = data.get_mut(..target.length)
        {
            self.bar_read(target.bar, target.offset, bytes);
        }
        self.layout.config.set(self.layout.pci_cfg.saturating_add(DATA), &data);
    }

    pub(super) fn write_window(&self) {
        let data = self.layout.config.get_u32(self.layout.pci_cfg.saturating_add(DATA)).to_le_bytes();
        if let Some(target) = self.window_target()
            && let Some(bytes) = data.get(..target.length)
        {
            self.bar_write(target.bar, target.offset, bytes);
        }
    }
}
