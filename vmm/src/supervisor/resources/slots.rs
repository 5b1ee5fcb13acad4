//! Which device is in which slot of PCI bus 0.

use std::collections::BTreeMap;

/// The slots that the chipset leaves.
const SLOTS: std::ops::RangeInclusive<u8> = 2..=31;

/// The slots that are taken, by the ids of the devices.
#[derive(Debug, Default)]
pub struct Slots(BTreeMap<u8, String>);

impl Slots {
    /// Gives a device the lowest free slot; `None` when there is none left.
    pub fn take(&mut self, id: &str) -> Option<u8> {
        let slot = SLOTS.into_iter().find(|slot| !self.0.contains_key(slot))?;
        self.0.insert(slot, id.to_owned());
        Some(slot)
    }

    /// The slot of a device.
    pub fn of(&self, id: &str) -> Option<u8> {
        self.0.iter().find(|(_, taken)| *taken == id).map(|(slot, _)| *slot)
    }

    /// The slot of a device is free again.
    pub fn release(&mut self, id: &str) {
        self.0.retain(|_, taken| taken != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_slot_is_taken() {
        let mut slots = Slots::default();
        let ids: Vec<String> = (0..30).map(|index| format!("disk{index}")).collect();
        for (slot, id) in (2..).zip(&ids) {
            assert_eq!(slots.take(id), Some(slot));
        }
        assert_eq!(slots.take("more"), None);
        slots.release("disk5");
        assert_eq!((slots.of("disk5"), slots.of("disk6")), (None, Some(8)));
        assert_eq!(slots.take("more"), Some(7));
    }
}
