//! `--smbios KEY=VALUE,…` and the table `smbios`: what the machine says it is.

use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;

/// The longest text that is taken, in bytes (SMBIOS 2.8, section 6.1.3, has 64 as the limit for old readers).
const LONGEST: usize = 64;
const KEYS: [&str; 7] = ["uuid", "serial", "manufacturer", "product", "version", "sku", "family"];

/// What type 1 (System Information) holds; an empty text is "not specified".
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SmbiosSpec {
    /// As RFC 4122 writes it.
    pub uuid: Uuid,
    /// Serial number.
    pub serial: String,
    /// Who made it.
    pub manufacturer: String,
    /// What it is called.
    pub product: String,
    /// Which version of it.
    pub version: String,
    /// Its number in a list of goods.
    pub sku: String,
    /// To which family it belongs.
    pub family: String,
}

/// 128 bits in the order in which they are written; zeros stand for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Uuid(pub [u8; 16]);

/// Why a text describes no system.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SmbiosSpecError {
    /// Not a UUID.
    #[error("uuid: '{0}' is not a UUID such as 123e4567-e89b-12d3-a456-426614174000")]
    Uuid(String),
    /// A key that is none of those known.
    #[error("unknown key '{key}' of smbios: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// A piece without `=`.
    #[error("'{0}' is not KEY=VALUE; smbios takes {keys}; a value with a comma can only be given in --config FILE", keys = KEYS.join(", "))]
    NotAPair(String),
    /// A text that cannot stand in a table.
    #[error("smbios {key}: '{value}' must be at most {LONGEST} printable ASCII characters")]
    Text {
        /// Its key.
        key: String,
        /// The text.
        value: String,
    },
}

impl FromStr for Uuid {
    type Err = SmbiosSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || SmbiosSpecError::Uuid(text.escape_debug().to_string());
        let dashes: Vec<usize> = text.match_indices('-').map(|(at, _)| at).collect();
        let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
        if text.len() != 36 || dashes != [8, 13, 18, 23] || digits.len() != 32 {
            return Err(bad());
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair.iter().fold(0, |value, digit| value << 4 | u8::try_from(*digit).unwrap_or(0));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Uuid {
    type Error = SmbiosSpecError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl SmbiosSpec {
    fn texts(&mut self) -> [(&'static str, &mut String); 6] {
        [
            ("serial", &mut self.serial),
            ("manufacturer", &mut self.manufacturer),
            ("product", &mut self.product),
            ("version", &mut self.version),
            ("sku", &mut self.sku),
            ("family", &mut self.family),
        ]
    }

    /// Checks the texts.
    ///
    /// # Errors
    /// [`SmbiosSpecError::Text`].
    pub fn check(&mut self) -> Result<(), SmbiosSpecError> {
        for (key, value) in self.texts() {
            if value.len() > LONGEST || !value.bytes().all(|byte| (0x20..0x7F).contains(&byte)) {
                let value = value.escape_debug().to_string();
                return Err(SmbiosSpecError::Text { key: key.to_owned(), value });
            }
        }
        Ok(())
    }
}

impl FromStr for SmbiosSpec {
    type Err = SmbiosSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut spec = Self::default();
        for piece in text.split(',') {
            let (key, value) =
                piece.split_once('=').ok_or_else(|| SmbiosSpecError::NotAPair(piece.to_owned()))?;
            if key == "uuid" {
                spec.uuid = value.parse()?;
            } else if let Some((_, field)) = spec.texts().into_iter().find(|(name, _)| *name == key) {
                value.clone_into(field);
            } else {
                return Err(SmbiosSpecError::UnknownKey { key: key.to_owned(), hint: hint(key, &KEYS) });
            }
        }
        spec.check()?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<SmbiosSpec>().unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let text = "uuid=00112233-4455-6677-8899-aAbBcCdDeEfF,serial=s 1,manufacturer=m,product=p,version=v,sku=k,family=f";
        let spec: SmbiosSpec = text.parse().unwrap();
        assert_eq!(spec.uuid.0[..5], [0x00, 0x11, 0x22, 0x33, 0x44]);
        assert_eq!(spec.uuid.0[15], 0xFF);
        assert_eq!((spec.serial.as_str(), spec.family.as_str()), ("s 1", "f"));
    }

    #[test]
    fn refusals_say_what_to_write() {
        assert!(refusal("uuid=1").contains("'1' is not a UUID such as"));
        assert!(refusal("uuid=001122334455-6677-8899-aAbBcCdDeEfF-0").contains("not a UUID"));
        assert!(refusal("seriel=1").contains("did you mean 'serial'?"));
        assert!(refusal("serial").contains("not KEY=VALUE"));
        assert!(refusal(&format!("serial={}", "x".repeat(65))).contains("at most 64"));
        assert!(refusal("serial=\u{e9}").contains("printable"));
    }
}
