//! `--pmem path=…[,readonly=on][,id=…][,addr=…]` and the table `[[pmem]]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::pairs::{PairError, Pairs};
use super::pci::{PciAddress, PciAddressError};

/// How it is written.
const PAIRS: Pairs = Pairs {
    what: "persistent memory",
    shape: "path=FILE[,readonly=on][,id=NAME][,addr=SLOT.FUNCTION]; a path with a comma can only be given in --config FILE",
    keys: &["path", "readonly", "id", "addr"],
};

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
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// `readonly` with something other than on or off.
    #[error("readonly={0}: say readonly=on or readonly=off")]
    Readonly(String),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
}

impl FromStr for PmemSpec {
    type Err = PmemSpecError;

    fn from_str(text: &str) -> Result<Self, PmemSpecError> {
        let (mut path, mut readonly, mut id, mut addr) = (None, false, None, None);
        for (key, value) in PAIRS.read(text)? {
            match (key, value) {
                ("path", value) => path = Some(PathBuf::from(value)),
                ("readonly", "on" | "true") => readonly = true,
                ("readonly", "off" | "false") => readonly = false,
                ("readonly", other) => return Err(PmemSpecError::Readonly(other.to_owned())),
                ("id", value) => id = Some(value.to_owned()),
                (_, value) => addr = Some(value.parse()?),
            }
        }
        let path = path.filter(|path| !path.as_os_str().is_empty()).ok_or(PmemSpecError::NoPath)?;
        Ok(Self { path, readonly, id, addr })
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
