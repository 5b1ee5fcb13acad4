//! Identity, BARs and the capability list of the function (sections 4.1.2 and 4.1.4).

use super::device_type::DeviceType;
use crate::machine::pci::{BarKind, ConfigError, ConfigSpace, ConfigSpaceBuilder, Identity, Pin, ROM_BAR};

/// The BAR with the virtio register blocks.
pub(super) const VIRTIO_BAR: u8 = 0;
/// Its size, bytes: a page for each block.
pub(super) const VIRTIO_BAR_SIZE: u64 = 0x4000;
/// Common configuration.
pub(super) const COMMON: u64 = 0;
/// Size of the common configuration, up to `queue_device`.
pub(super) const COMMON_SIZE: u64 = 0x38;
/// ISR status.
pub(super) const ISR: u64 = 0x1000;
/// Device-specific configuration.
pub(super) const DEVICE: u64 = 0x2000;
/// Notifications.
pub(super) const NOTIFY: u64 = 0x3000;
/// Distance of two queues' doorbells, bytes.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// What fits into the page of doorbells, and no more than vhost-user has indices for.
pub(super) const MAX_QUEUES: u16 = 256;

/// The BAR with MSI-X table and pending bits.
pub(super) const MSIX_BAR: u8 = 1;

const PCI_CAP_ID_VENDOR: u8 = 0x09;
const PCI_CAP_ID_MSIX: u8 = 0x11;

const CFG_TYPE_COMMON: u8 = 1;
const CFG_TYPE_NOTIFY: u8 = 2;
const CFG_TYPE_ISR: u8 = 3;
const CFG_TYPE_DEVICE: u8 = 4;
const CFG_TYPE_PCI: u8 = 5;

const VENDOR: u16 = 0x1AF4;
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
/// Non-transitional devices have revision 1 or higher (section 4.1.2.1).
const REVISION: u8 = 1;

/// The function's configuration space and where in it the function has to look.
#[derive(Debug)]
pub(super) struct Layout {
    pub config: ConfigSpace,
    /// Offset of the MSI-X capability.
    pub msix: u16,
    /// Offset of the PCI configuration access capability.
    pub pci_cfg: u16,
    /// Offset of the pending bits in the MSI-X BAR.
    pub pba: u64,
}

/// `struct virtio_pci_cap` without its first two bytes.
fn virtio_capability(kind: u8, length: u64, offset: u64, more: &[u8]) -> Vec<u8> {
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    // cap_len, cfg_type, bar, id, padding
    let size = u8::try_from(more.len()).unwrap_or(0).saturating_add(16);
    let mut body = vec![size, kind, VIRTIO_BAR, 0, 0, 0];
    body.extend(word(offset));
    body.extend(word(length));
    body.extend(more);
    body
}

/// Builds the configuration space of a function with `queues` queues, `vectors` MSI-X vectors and an expansion ROM of so many bytes.
pub(super) fn build(
    kind: &DeviceType,
    queues: u16,
    vectors: u16,
    rom: Option<u64>,
) -> Result<Layout, ConfigError> {
    let mut builder = ConfigSpaceBuilder::new(Identity {
        vendor: VENDOR,
        device: DEVICE_BASE.saturating_add(kind.id),
        revision: REVISION,
        class: kind.class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    });
    let table = u64::from(vectors) * 16;
    let pba = table.next_multiple_of(0x800);
    let bits = u64::from(vectors).div_ceil(64) * 8;
    let msix_bar_size = (pba + bits).next_power_of_two().max(0x1000);
    builder.bar(VIRTIO_BAR, BarKind::Memory32, VIRTIO_BAR_SIZE)?;
    builder.bar(MSIX_BAR, BarKind::Memory32, msix_bar_size)?;
    if let Some(size) = rom {
        builder.bar(ROM_BAR, BarKind::Rom, size)?;
    }
    let _ = builder.interrupt_pin(Pin::A);

    let notify = u64::from(queues) * u64::from(NOTIFY_MULTIPLIER);
    let vendor =
        |builder: &mut ConfigSpaceBuilder, body: Vec<u8>| builder.capability(PCI_CAP_ID_VENDOR, &body, &[]);
    vendor(&mut builder, virtio_capability(CFG_TYPE_COMMON, COMMON_SIZE, COMMON, &[]))?;
    vendor(&mut builder, virtio_capability(CFG_TYPE_ISR, 1, ISR, &[]))?;
    if kind.config_size > 0 {
        vendor(&mut builder, virtio_capability(CFG_TYPE_DEVICE, kind.config_size.into(), DEVICE, &[]))?;
    }
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    vendor(&mut builder, virtio_capability(CFG_TYPE_NOTIFY, notify, NOTIFY, &multiplier))?;
    // bar, id and padding: only bar; then offset, length and the data are writable.
    let mut writable = vec![0, 0, 0xFF, 0, 0, 0];
    writable.extend([0xFF; 12]);
    let pci_cfg =
        builder.capability(PCI_CAP_ID_VENDOR, &virtio_capability(CFG_TYPE_PCI, 0, 0, &[0; 4]), &writable)?;

    // Message control: table size less one; enable and function mask are writable. Then table and PBA, offset and BAR.
    let mut body = vectors.saturating_sub(1).to_le_bytes().to_vec();
    let place = |offset: u64| (u32::try_from(offset).unwrap_or(0) | u32::from(MSIX_BAR)).to_le_bytes();
    body.extend(place(0));
    body.extend(place(pba));
    let msix = builder.capability(PCI_CAP_ID_MSIX, &body, &[0x00, 0xC0])?;
    Ok(Layout { config: builder.build(), msix, pci_cfg, pba })
}
