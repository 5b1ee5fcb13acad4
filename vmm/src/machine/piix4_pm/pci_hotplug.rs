//! PCI hot-plug by ACPI, in QEMU's register layout at AE00 (QEMU, docs/specs/acpi_pci_hotplug): the handler of GPE.1
//! asks which slots of bus 0 were filled or are to be emptied, and `_EJ0` lets go of one.

/// Where the registers lie, and their length in bytes.
pub(in super::super) const PCI_HOTPLUG: (u16, u8) = (0xAE00, 0x14);
/// The bit of GPE0 that tells of them.
pub(super) const GPE_PCI_HOTPLUG: u16 = 1 << 1;

/// Offsets of the registers, 32 bits each.
const UP: u64 = 0x00;
const DOWN: u64 = 0x04;
const EJECT: u64 = 0x08;
const REMOVABLE: u64 = 0x0C;
const SELECT: u64 = 0x10;

/// The registers. A bit stands for a slot.
#[derive(Debug, Default)]
pub(super) struct PciHotplug {
    /// Slots whose contents changed since the guest looked.
    pub(super) up: u32,
    /// Slots that the guest is asked to let go of.
    pub(super) down: u32,
    /// Which bus the other registers are about: there is bus 0 alone, and all others read zero.
    select: u32,
}

impl PciHotplug {
    /// Reads a part of a register. To read all of UP clears it, so that each event is told once.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            SELECT => self.select,
            _ if self.select != 0 => 0,
            UP if data.len() == 4 => std::mem::take(&mut self.up),
            UP => self.up,
            DOWN => self.down,
            // What the chipset occupies stays.
            REMOVABLE => !0b11,
            // EJECT reads as the set of features beyond the first: none.
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().skip((offset & 3) as usize)) {
            *to = from;
        }
    }

    /// Writes a register, which dwords alone do. Returns the slots to be emptied.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let [a, b, c, d] = data else { return 0 };
        let value = u32::from_le_bytes([*a, *b, *c, *d]);
        match offset {
            EJECT if self.select == 0 => return value,
            SELECT => self.select = value,
            _ => {}
        }
        0
    }

    /// A slot was emptied, on whatever way: nothing waits for it any more.
    pub(super) fn forget(&mut self, slot: u8) {
        let bit = slot_bit(slot);
        self.up &= !bit;
        self.down &= !bit;
    }
}

/// The bit of a slot.
pub(super) fn slot_bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}
