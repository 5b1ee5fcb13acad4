//! `--disk path=…[,readonly=on][,id=…][,restart=…][,addr=…][,…]` and the table `[[disk]]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bulkhead_ipc::channel::message::{ErrorAction, ImageFormat};
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use thiserror::Error;

use super::disk_options::{DiskOptionError, DiskOptions, Value};
use super::nearest::hint;
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};

/// A disk as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// An image or block device.
    pub path: PathBuf,
    /// The guest sees a disk that cannot be written; the image is opened and locked for reading only.
    pub readonly: bool,
    /// The name in messages, in `bulkhead ps`, and the serial number that the guest reads. Default: disk0, disk1, …
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0; default: the first free slot.
    pub addr: Option<PciAddress>,
    /// Everything else.
    pub options: DiskOptions,
    /// `path` is the socket of a vhost-user back end that is not ours.
    pub vhost_user: bool,
}

/// The keys, in the order in which help names them.
fn keys() -> Vec<&'static str> {
    [&["path", "readonly", "id", "restart", "addr", "vhost-user"][..], &DiskOptions::KEYS].concat()
}

impl<'de> Deserialize<'de> for DiskSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Table)
    }
}

/// A table `[[disk]]` in a file: the same keys, and errors at the line of the key that they are about.
struct Table;

impl<'de> Visitor<'de> for Table {
    type Value = DiskSpec;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table that describes a disk")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DiskSpec, A::Error> {
        let mut draft = Draft::default();
        while let Some(key) = map.next_key_seed(Key)? {
            for value in map.next_value::<Value>()?.texts() {
                draft.set(&key, &value).map_err(A::Error::custom)?;
            }
        }
        draft.finish().map_err(A::Error::custom)
    }
}

/// A key of the table.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        let key = String::deserialize(deserializer)?;
        if keys().contains(&key.as_str()) {
            return Ok(key);
        }
        Err(D::Error::custom(format!("unknown key '{key}': {}", hint(&key, &keys()))))
    }
}

/// Why a text is not a disk.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DiskSpecError {
    /// The `path` is missing.
    #[error(
        "a disk needs a path: path=FILE[,readonly=on][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION][,format=qcow2][,…]"
    )]
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
    /// A key that a disk of another program does not have.
    #[error("{0}= cannot be said of the back end behind vhost-user=SOCKET, which sees to it itself")]
    Elsewhere(String),
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// An option's value.
    #[error(transparent)]
    Option(#[from] DiskOptionError),
    /// O_DIRECT for an image in a format.
    #[error("cache=none is for raw images and block devices")]
    Direct,
    /// A VMDK image to be written.
    #[error("VMDK images can only be read: say readonly=on")]
    Vmdk,
    /// The guest would take anything for its data.
    #[error("read-error=ignore: errors of reads can be reported or waited for, and not ignored")]
    ReadError,
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A piece without `=`.
    #[error(
        "'{0}' is not KEY=VALUE; a disk is path=FILE[,readonly=on][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]; a path with a comma can only be given in --config FILE"
    )]
    NotAPair(String),
}

/// A disk of which not all is known.
#[derive(Default)]
struct Draft {
    given: Vec<String>,
    path: Option<PathBuf>,
    readonly: bool,
    id: Option<String>,
    restart: Option<RestartPolicy>,
    addr: Option<PciAddress>,
    options: DiskOptions,
    vhost_user: bool,
}

impl Draft {
    fn set(&mut self, key: &str, value: &str) -> Result<(), DiskSpecError> {
        if self.given.iter().any(|given| given == key) && !DiskOptions::repeats(key) {
            return Err(DiskSpecError::Twice(key.to_owned()));
        }
        self.given.push(key.to_owned());
        match key {
            "path" if self.vhost_user => return Err(DiskSpecError::Twice(key.to_owned())),
            "path" => self.path = Some(PathBuf::from(value)),
            "readonly" => {
                self.readonly = match value {
                    "on" | "true" => true,
                    "off" | "false" => false,
                    _ => return Err(DiskSpecError::Readonly(value.to_owned())),
                };
            }
            "id" => self.id = Some(value.to_owned()),
            "restart" => self.restart = Some(value.parse()?),
            "addr" => self.addr = Some(value.parse()?),
            "vhost-user" => {
                if self.path.replace(PathBuf::from(value)).is_some() {
                    return Err(DiskSpecError::Twice("path".to_owned()));
                }
                self.vhost_user = true;
            }
            _ => {
                if !self.options.set(key, value)? {
                    let hint = hint(key, &keys());
                    return Err(DiskSpecError::UnknownKey { key: key.to_owned(), hint });
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<DiskSpec, DiskSpecError> {
        let Self { given, path, readonly, id, restart, addr, options, vhost_user } = self;
        let path = path.filter(|path| !path.as_os_str().is_empty()).ok_or(DiskSpecError::NoPath)?;
        let own = |key: &&String| !["vhost-user", "id", "restart", "addr"].contains(&key.as_str());
        if let Some(key) = given.iter().find(own).filter(|_| vhost_user) {
            return Err(DiskSpecError::Elsewhere(key.clone()));
        }
        if options.cache.direct && options.format.0 != ImageFormat::Raw {
            return Err(DiskSpecError::Direct);
        }
        if options.format.0 == ImageFormat::Vmdk && !readonly {
            return Err(DiskSpecError::Vmdk);
        }
        if options.read_error.0 == ErrorAction::Ignore {
            return Err(DiskSpecError::ReadError);
        }
        Ok(DiskSpec { path, readonly, id, restart, addr, options, vhost_user })
    }
}

impl FromStr for DiskSpec {
    type Err = DiskSpecError;

    fn from_str(text: &str) -> Result<Self, DiskSpecError> {
        let mut draft = Draft::default();
        for piece in text.split(',') {
            let (key, value) = match piece.split_once('=') {
                Some(pair) => pair,
                None if piece == "readonly" => (piece, "on"),
                None => return Err(DiskSpecError::NotAPair(piece.to_owned())),
            };
            draft.set(key, value)?;
        }
        draft.finish()
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
        let (options, addr) = (DiskOptions::default(), Some(PciAddress { slot: 5, function: 1 }));
        let (id, vhost_user) = (Some("root".into()), false);
        let expected =
            DiskSpec { path: "/a.img".into(), readonly: true, id, restart, addr, options, vhost_user };
        assert_eq!(disk, expected);
        let disk: DiskSpec = "path=a=b.img".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("a=b.img"));
        let disk: DiskSpec = "vhost-user=/run/x,id=y".parse().unwrap();
        assert_eq!((disk.vhost_user, disk.path.to_str()), (true, Some("/run/x")));
        assert!("readonly,path=a".parse::<DiskSpec>().unwrap().readonly);
    }

    #[test]
    fn reads_every_option() {
        let text = "path=a,format=qcow2,backing=b:qcow2,backing=c:d:raw,data=e,cache=writethrough,discard=off,\
                    logical-block-size=4096,physical-block-size=16384,serial=x,queues=2,bps=1M:4M,iops=100,limit-group=g,\
                    read-error=wait,write-error=wait-for-space";
        let options = text.parse::<DiskSpec>().unwrap().options;
        assert_eq!(options.format.0, ImageFormat::Qcow2);
        let backing: Vec<_> =
            options.backing.iter().map(|it| (it.path.to_str().unwrap(), it.format)).collect();
        assert_eq!(backing, [("b", ImageFormat::Qcow2), ("c:d", ImageFormat::Raw)]);
        assert_eq!(options.data, [PathBuf::from("e")]);
        assert!(options.no_discard && !options.cache.direct);
        assert_eq!(
            (options.logical_block_size, options.physical_block_size, options.queues),
            (4096, 16384, 2)
        );
        assert_eq!((options.bps.rate, options.bps.burst, options.iops.rate), (1 << 20, 4 << 20, 100));
        assert_eq!(options.limit_group.as_deref(), Some("g"));
        assert_eq!(options.read_error.0, ErrorAction::Wait);
        assert_eq!(options.write_error.0, ErrorAction::WaitForSpace);
        let table: DiskSpec =
            toml::from_str("path='a'\nformat='qcow2'\nbacking=['b:raw']\ndiscard=false\nqueues=3").unwrap();
        assert_eq!((table.options.backing.len(), table.options.queues), (1, 3));
        assert!(table.options.no_discard);
    }

    #[test]
    fn refusals_say_what_to_write() {
        assert!(refusal("path=a,format=qcow").contains("format=qcow: did you mean 'qcow2'?"));
        assert!(refusal("path=a,format=vhdx").contains("qemu-img convert"));
        assert!(refusal("path=a,backing=b").contains("backing=FILE:FORMAT"));
        assert!(refusal("path=a,format=vmdk").contains("readonly=on"));
        assert!(refusal("path=a,format=qcow2,cache=none").contains("raw images"));
        assert!(refusal("path=a,cache=0123456789").contains("writeback, writethrough, none, unsafe"));
        assert!(refusal("path=a,bps=fast").contains("100M:200M"));
        assert!(refusal("path=a,queues=x").contains("whole number"));
        assert!(refusal("path=a,read-error=ignore").contains("not ignored"));
        assert!(refusal("path=a,cache=none,cache=none").contains("given twice"));
        assert!(refusal("path=a,reedonly=on").contains("did you mean 'readonly'?"));
        assert!(refusal("readonly=on").contains("needs a path"));
        assert!(refusal("path=").contains("needs a path"));
        assert!(refusal("a.img").contains("'a.img' is not KEY=VALUE"));
        assert!(refusal("path=a,readonly=maybe").contains("readonly=maybe"));
        assert!(refusal("path=a,restart=often").contains("'often' is not a restart policy"));
        assert!(refusal("path=a,path=b").contains("given twice"));
        assert!(refusal("path=a,vhost-user=b").contains("given twice"));
        assert!(refusal("vhost-user=b,readonly=on").contains("back end"));
        assert!(refusal("vhost-user=b,path=a").contains("given twice"));
        assert!(refusal("cache=none,vhost-user=b").contains("cache= cannot be said"));
    }
}
