//! Which device is where on PCI bus 0.

use std::collections::BTreeMap;

use crate::supervisor::config::PciAddress;
use crate::supervisor::config::pci::SLOTS;

/// The places that are taken, by the ids of the devices.
#[derive(Debug, Default)]
pub struct Slots(BTreeMap<PciAddress, String>);

impl Slots {
    /// Gives a device the lowest empty slot; `None` when there is none left.
    pub fn take(&mut self, id: &str) -> Option<PciAddress> {
        let slot = SLOTS.into_iter().find(|slot| self.others(*slot, id).is_empty())?;
        let address = PciAddress { slot, function: 0 };
        self.0.insert(address, id.to_owned());
        Some(address)
    }

    /// Gives a device the place that it wants; `Err` with the id of the one that is there.
    pub fn take_at(&mut self, id: &str, address: PciAddress) -> Result<(), String> {
        match self.0.get(&address) {
            Some(other) => Err(other.clone()),
            None => {
                self.0.insert(address, id.to_owned());
                Ok(())
            }
        }
    }

    /// The place of a device, as one byte: see [`PciAddress::place`].
    pub fn of(&self, id: &str) -> Option<u8> {
        self.0.iter().find(|(_, taken)| *taken == id).map(|(address, _)| address.place())
    }

    /// The ids of all devices that have a place.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(String::as_str)
    }

    /// The other devices in a slot.
    pub fn others(&self, slot: u8, id: &str) -> Vec<&str> {
        let there = self.0.iter().filter(|(address, taken)| address.slot == slot && *taken != id);
        there.map(|(_, taken)| taken.as_str()).collect()
    }

    /// The place of a device is free again.
    pub fn release(&mut self, id: &str) {
        self.0.retain(|_, taken| taken != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_empty_slot_is_taken() {
        let mut slots = Slots::default();
        let ids: Vec<String> = (0..30).map(|index| format!("disk{index}")).collect();
        for (slot, id) in (2..).zip(&ids) {
            assert_eq!(slots.take(id), Some(PciAddress { slot, function: 0 }));
        }
        assert_eq!(slots.take("more"), None);
        slots.release("disk5");
        assert_eq!((slots.of("disk5"), slots.of("disk6")), (None, Some(8)));
        assert_eq!(slots.take("more").map(PciAddress::place), Some(7));
    }

    #[test]
    fn chosen_places_are_kept_free_of_others() {
        let mut slots = Slots::default();
        let at = |slot, function| PciAddress { slot, function };
        slots.take_at("a", at(2, 0)).unwrap();
        slots.take_at("b", at(2, 1)).unwrap();
        assert_eq!(slots.take_at("c", at(2, 1)), Err("b".to_owned()));
        assert_eq!(slots.take("c"), Some(at(3, 0)));
        assert_eq!(slots.of("b"), Some(0x22));
        assert_eq!((slots.others(2, "a"), slots.others(3, "c")), (vec!["b"], vec![]));
    }
}
