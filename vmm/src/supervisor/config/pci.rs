//! `addr=SLOT[.FUNCTION]`: where on PCI bus 0 the guest finds a device.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The slots that the chipset leaves.
pub const SLOTS: RangeInclusive<u8> = 2..=31;
/// Functions of a slot.
const FUNCTIONS: u8 = 8;

/// A place on PCI bus 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PciAddress {
    /// The slot (device number), 2–31.
    pub slot: u8,
    /// The function in it, 0–7.
    pub function: u8,
}

impl PciAddress {
    /// As one byte: the slot in bits 4:0, the function in bits 7:5.
    pub const fn place(self) -> u8 {
        self.slot | self.function << 5
    }

    /// From one byte.
    pub const fn from_place(place: u8) -> Self {
        Self { slot: place & 0x1F, function: place >> 5 }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:02x}.{:x}", self.slot, self.function)
    }
}

/// A text that is no place.
#[derive(Debug, PartialEq, Eq, Error)]
#[error(
    "addr={0}: write SLOT or SLOT.FUNCTION in hexadecimal, slots 2 to 1f and functions 0 to 7, such as addr=05.1"
)]
pub struct PciAddressError(String);

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<Self, PciAddressError> {
        let wrong = || PciAddressError(text.to_owned());
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let number = |text: &str| {
            let digits = text.strip_prefix("0x").unwrap_or(text);
            let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(digits, 16).ok().filter(|_| plain).ok_or_else(wrong)
        };
        let (slot, function) = (number(slot)?, number(function)?);
        if SLOTS.contains(&slot) && function < FUNCTIONS { Ok(Self { slot, function }) } else { Err(wrong()) }
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Places that do not fit together.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum PlacesError {
    /// Two devices in one place.
    #[error(
        "addr={address}: both {first} and {second} are to be there; give one of them another function or slot"
    )]
    Taken {
        /// Where.
        address: PciAddress,
        /// Who is there.
        first: String,
        /// Who wants to be.
        second: String,
    },
    /// A slot that no guest finds.
    #[error("addr={address} of {id}: guests find the functions of a slot only when function 0 is there; give a device addr={slot:02x}.0", slot = address.slot)]
    NoFunction0 {
        /// Where.
        address: PciAddress,
        /// Who.
        id: String,
    },
}

/// Checks the places that a user chose.
pub fn check<'a>(chosen: impl Iterator<Item = (&'a str, PciAddress)>) -> Result<(), PlacesError> {
    let mut places: Vec<(&str, PciAddress)> = Vec::new();
    for (id, address) in chosen {
        if let Some((first, _)) = places.iter().find(|(_, other)| *other == address) {
            return Err(PlacesError::Taken { address, first: (*first).to_owned(), second: id.to_owned() });
        }
        places.push((id, address));
    }
    let headless = places
        .iter()
        .find(|(_, address)| !places.iter().any(|(_, it)| (it.slot, it.function) == (address.slot, 0)));
    match headless {
        Some((id, address)) => Err(PlacesError::NoFunction0 { address: *address, id: (*id).to_owned() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_qemu_writes_them() {
        for (text, place) in [("5", 0x05), ("05.1", 0x25), ("0x1f.0x7", 0xFF), ("1f", 0x1F), ("a.0", 0x0A)] {
            let address: PciAddress = text.parse().unwrap();
            assert_eq!(address.place(), place, "{text}");
            assert_eq!(PciAddress::from_place(place), address);
            assert_eq!(address.to_string().parse(), Ok(address));
        }
        for text in ["", "0", "1", "20", "5.8", "5.", ".1", "+5", "05:00.0", "x"] {
            let error = text.parse::<PciAddress>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("addr={text}: write SLOT")), "{error}");
        }
    }

    #[test]
    fn clashes_and_slots_without_function_0_are_named() {
        let check = |list: &[(&'static str, &str)]| {
            check(list.iter().map(|(id, text)| (*id, text.parse().unwrap())))
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(&[("a", "5.1"), ("b", "5"), ("c", "6")]), Ok(()));
        let error = check(&[("a", "5"), ("b", "05.0")]).unwrap_err();
        assert!(error.contains("addr=05.0: both a and b"), "{error}");
        let error = check(&[("a", "5"), ("b", "6.2")]).unwrap_err();
        assert!(error.contains("addr=06.2 of b") && error.contains("addr=06.0"), "{error}");
    }
}
