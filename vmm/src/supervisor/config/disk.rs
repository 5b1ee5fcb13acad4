//! `--disk path=…[,readonly=on][,id=…][,restart=…][,addr=…]` and the table `[[disk]]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};

/// A disk as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// A raw image or block device.
    pub path: PathBuf,
    /// The guest sees a disk that cannot be written; the image is opened and locked for reading only.
    #[serde(default)]
    pub readonly: bool,
    /// The name in messages, in `bulkhead ps`, and the serial number that the guest reads. Default: disk0, disk1, …
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0; default: the first free slot.
    pub addr: Option<PciAddress>,
}

/// Why a text is not a disk.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DiskSpecError {
    /// The `path` is missing.
    #[error("a disk needs a path: path=FILE[,readonly=on][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]")]
    NoPath,
    /// `addr` with something that is no place.
    #[error(transparent)]
    Address(#[from] PciAddressError),
    /// A key that is none of path, readonly, id, restart, addr.
    #[error("unknown key '{key}' of a disk: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// `readonly` with something other than on or off.
    #[error("readonly={0}: say readonly=on or readonly=off")]
    Readonly(String),
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A piece without `=`.
    #[error(
        "'{0}' is not KEY=VALUE; a disk is path=FILE[,readonly=on][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]; a path with a comma can only be given in --config FILE"
    )]
    NotAPair(String),
}

impl FromStr for DiskSpec {
    type Err = DiskSpecError;

    fn from_str(text: &str) -> Result<Self, DiskSpecError> {
        let (mut path, mut readonly, mut id, mut restart, mut addr) = (None, None, None, None, None);
        for piece in text.split(',') {
            let (key, value) = match piece.split_once('=') {
                Some(pair) => pair,
                None if piece == "readonly" => (piece, "on"),
                None => return Err(DiskSpecError::NotAPair(piece.to_owned())),
            };
            let twice = match key {
                "path" => path.replace(PathBuf::from(value)).is_some(),
                "readonly" => {
                    let on = match value {
                        "on" | "true" => true,
                        "off" | "false" => false,
                        _ => return Err(DiskSpecError::Readonly(value.to_owned())),
                    };
                    readonly.replace(on).is_some()
                }
                "id" => id.replace(value.to_owned()).is_some(),
                "restart" => restart.replace(value.parse()?).is_some(),
                "addr" => addr.replace(value.parse()?).is_some(),
                _ => {
                    let hint = hint(key, &["path", "readonly", "id", "restart", "addr"]);
                    return Err(DiskSpecError::UnknownKey { key: key.to_owned(), hint });
                }
            };
            if twice {
                return Err(DiskSpecError::Twice(key.to_owned()));
            }
        }
        let path = path.filter(|path| !path.as_os_str().is_empty()).ok_or(DiskSpecError::NoPath)?;
        Ok(Self { path, readonly: readonly.unwrap_or(false), id, restart, addr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<DiskSpec>().unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let disk: DiskSpec = "path=/a.img,readonly=on,id=root,restart=never,addr=5.1".parse().unwrap();
        let restart = Some(RestartPolicy::Never);
        let addr = Some(PciAddress { slot: 5, function: 1 });
        let expected =
            DiskSpec { path: "/a.img".into(), readonly: true, id: Some("root".into()), restart, addr };
        assert_eq!(disk, expected);
        let disk: DiskSpec = "path=a=b.img".parse().unwrap();
        assert_eq!(
            disk,
            DiskSpec { path: "a=b.img".into(), readonly: false, id: None, restart: None, addr: None }
        );
        assert!("readonly,path=a".parse::<DiskSpec>().unwrap().readonly);
    }

    #[test]
    fn refusals_say_what_to_write() {
        assert!(refusal("path=a,reedonly=on").contains("did you mean 'readonly'?"));
        assert!(refusal("readonly=on").contains("needs a path"));
        assert!(refusal("path=").contains("needs a path"));
        assert!(refusal("a.img").contains("'a.img' is not KEY=VALUE"));
        assert!(refusal("path=a,readonly=maybe").contains("readonly=maybe"));
        assert!(refusal("path=a,restart=often").contains("'often' is not a restart policy"));
        assert!(refusal("path=a,path=b").contains("given twice"));
    }
}
