//! `--pmem path=…[,readonly=on][,id=…][,addr=…]` and the table `[[pmem]]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;
use super::pci::{PciAddress, PciAddressError};

/// Persistent memory as the user describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemSpec {
    /// The file.
    pub path: PathBuf,
    /// The guest cannot write; several machines may share the file.
    #[serde(default)]
    pub readonly: bool,
    /// The name in messages and in `bulkhead ps`. Default: pmem0, pmem1, …
    #[serde(default)]
    pub id: Option<String>,
    /// Where on PCI bus 0; default: the lowest empty slot.
    #[serde(default)]
    pub addr: Option<PciAddress>,
}

/// Persistent memory with its id settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PmemConfig {
    /// The file.
    pub path: PathBuf,
    /// The guest cannot write.
    pub readonly: bool,
    /// Unique among the processes of the machine.
    pub id: String,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// Why a text is no persistent memory.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PmemSpecError {
    /// The `path` is missing.
    #[error("persistent memory needs a file: path=FILE[,readonly=on][,id=NAME][,addr=SLOT.FUNCTION]")]
    NoPath,
    /// An unknown key.
    #[error("unknown key '{key}' of persistent memory: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// `readonly` with something other than on or off.
    #[error("readonly={0}: say readonly=on or readonly=off")]
    Readonly(String),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A piece without `=`.
    #[error(
        "'{0}' is not KEY=VALUE; persistent memory is path=FILE[,readonly=on][,id=NAME][,addr=SLOT.FUNCTION]; a path with a comma can only be given in --config FILE"
    )]
    NotAPair(String),
}

impl FromStr for PmemSpec {
    type Err = PmemSpecError;

    fn from_str(text: &str) -> Result<Self, PmemSpecError> {
        let (mut path, mut readonly, mut id, mut addr) = (None, None, None, None);
        for piece in text.split(',') {
            let not_a_pair = || PmemSpecError::NotAPair(piece.to_owned());
            let (key, value) = piece.split_once('=').ok_or_else(not_a_pair)?;
            let twice = match (key, value) {
                ("path", value) => path.replace(PathBuf::from(value)).is_some(),
                ("readonly", "on" | "true") => readonly.replace(true).is_some(),
                ("readonly", "off" | "false") => readonly.replace(false).is_some(),
                ("readonly", other) => return Err(PmemSpecError::Readonly(other.to_owned())),
                ("id", value) => id.replace(value.to_owned()).is_some(),
                ("addr", value) => addr.replace(value.parse()?).is_some(),
                (key, _) => {
                    let hint = hint(key, &["path", "readonly", "id", "addr"]);
                    return Err(PmemSpecError::UnknownKey { key: key.to_owned(), hint });
                }
            };
            if twice {
                return Err(PmemSpecError::Twice(key.to_owned()));
            }
        }
        let path = path.filter(|path| !path.as_os_str().is_empty()).ok_or(PmemSpecError::NoPath)?;
        Ok(Self { path, readonly: readonly.unwrap_or_default(), id, addr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_refusals() {
        let spec: PmemSpec = "path=/a,readonly=on,id=root,addr=9".parse().unwrap();
        let (id, addr) = (Some("root".into()), "09.0".parse().ok());
        assert_eq!(spec, PmemSpec { path: "/a".into(), readonly: true, id, addr });
        for (text, word) in [
            ("readonly=on", "needs a file"),
            ("path=", "needs a file"),
            ("path=a,readonly=yes", "readonly=yes: say"),
            ("path=a,path=b", "given twice"),
            ("path=a,readonyl=on", "did you mean 'readonly'?"),
            ("a", "is not KEY=VALUE"),
        ] {
            let error = text.parse::<PmemSpec>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
