//! `--vhost-user type=…,socket=…[,…]` and the table `[[vhost-user]]`: devices of back ends that are not ours.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;
use super::pairs::{PairError, Pairs};
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};

/// What a type of device is like (virtio 1.2, section 5).
#[derive(Debug, PartialEq, Eq)]
pub struct ForeignType {
    /// Its word.
    pub name: &'static str,
    /// Its device ID.
    pub id: u16,
    /// Its least number of queues.
    pub queues: u16,
    /// Bytes of its configuration space.
    pub config_size: u16,
    /// Its feature bits, of 0 to 23.
    pub features: u64,
}

const fn row(name: &'static str, id: u16, queues: u16, config_size: u16, features: u64) -> ForeignType {
    ForeignType { name, id, queues, config_size, features }
}

/// Sections 5.1 to 5.20 of virtio 1.2. The bits of legacy drivers count: back ends offer them.
const TYPES: &[ForeignType] = &[
    row("net", 1, 2, 12, 0xFF_FFEF),
    row("blk", 2, 1, 60, 0x3_FEF7),
    row("console", 3, 2, 12, 0x7),
    row("rng", 4, 1, 0, 0),
    row("balloon", 5, 2, 16, 0x3F),
    row("scsi", 8, 3, 36, 0xF),
    row("9p", 9, 1, 2, 0x1),
    row("gpu", 16, 2, 16, 0x1F),
    row("input", 18, 2, 136, 0),
    row("vsock", 19, 3, 8, 0x7),
    row("crypto", 20, 2, 56, 0x1F),
    row("sound", 25, 4, 12, 0),
    row("fs", 26, 2, 40, 0x1),
    row("pmem", 27, 1, 16, 0),
    row("i2c", 34, 1, 0, 0x1),
    row("gpio", 41, 2, 8, 0x1),
];

/// Types whose devices say nothing useful to a driver without a configuration space.
const NEED_CONFIG: &[&str] = &["net", "blk", "gpu", "input", "vsock", "fs", "pmem"];
/// Device IDs of what firmware can boot from.
const NET: u16 = 1;
const BLOCK: u16 = 2;
/// Any bit may mean something in a type that has no row.
const ANY_FEATURE: u64 = 0xFF_FFFF;
/// Bytes of the tag of a shared folder, in the configuration space of fs.
const TAG: usize = 36;
/// VIRTIO_NET_F_MAC.
const NET_MAC: u64 = 1 << 5;
/// The largest configuration space that vhost-user can carry, in bytes (VHOST_USER_MAX_CONFIG_SIZE).
const MOST_CONFIG: u16 = 256;
/// The most queues.
const MOST_QUEUES: u16 = 64;
/// Names of the device ids that virtio gives out, at most.
const MOST_ID: u16 = 63;

const SHAPE: &str = "type=TYPE|device-id=N,socket=PATH[,id=NAME][,queues=N][,config-size=N][,tag=NAME][,mac=ADDRESS][,addr=SLOT.FUNCTION][,restart=POLICY]";
/// How it is written on the command line.
const PAIRS: Pairs = Pairs {
    what: "a vhost-user device",
    shape: SHAPE,
    keys: &["type", "device-id", "socket", "id", "queues", "config-size", "tag", "mac", "addr", "restart"],
};

/// A device of a back end that is not ours, as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VhostUserSpec {
    /// The word for its type.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Its virtio device ID, for a type that has no word here.
    pub device_id: Option<u16>,
    /// Where the back end listens.
    pub socket: PathBuf,
    /// The name in messages and in `bulkhead ps`. Default: vhost-user0, vhost-user1, …
    pub id: Option<String>,
    /// Exactly so many queues. Default: as many as the back end has.
    pub queues: Option<u16>,
    /// Bytes of configuration space, for a type that has no word here.
    pub config_size: Option<u16>,
    /// Name of the folder, for a back end of fs that does not know it.
    pub tag: Option<String>,
    /// Address of a network card whose back end does not know it.
    pub mac: Option<String>,
    /// Where on PCI bus 0; default: the lowest empty slot.
    pub addr: Option<PciAddress>,
    /// What follows the loss of the back end; default: it is connected to again for ever.
    pub restart: Option<RestartPolicy>,
}

/// Why a text is no such device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VhostUserSpecError {
    /// The socket is missing.
    #[error("a vhost-user device needs a socket: {SHAPE}")]
    NoSocket,
    /// The type is missing, or given in two ways.
    #[error("a vhost-user device needs type= or device-id=, and not both: {SHAPE}")]
    Type,
    /// A type that has no word.
    #[error("there is no type '{0}': {1}; any other type has a device-id=N (virtio 1.2, section 5)")]
    UnknownType(String, String),
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// A number that cannot be.
    #[error("{key}={value}: say a number from {least} to {most}")]
    Number {
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// The least.
        least: u16,
        /// The most.
        most: u16,
    },
    /// A key for another type.
    #[error("{0}= is for type={1}")]
    Misplaced(&'static str, &'static str),
    /// A tag that cannot be one.
    #[error("tag={0}: a tag has 1 to {TAG} bytes")]
    Tag(String),
    /// An address that cannot be one.
    #[error("mac={0}: say six bytes such as 52:54:00:12:34:56, the first one even (no multicast)")]
    Mac(String),
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
}

impl FromStr for VhostUserSpec {
    type Err = VhostUserSpecError;

    fn from_str(text: &str) -> Result<Self, VhostUserSpecError> {
        let mut spec = Self::default();
        for (key, value) in PAIRS.read(text)? {
            let text = || Some(value.to_owned());
            match key {
                "type" => spec.kind = text(),
                "device-id" => spec.device_id = Some(number("device-id", value, 1, MOST_ID)?),
                "socket" => spec.socket = value.into(),
                "id" => spec.id = text(),
                "queues" => spec.queues = Some(number("queues", value, 1, MOST_QUEUES)?),
                "config-size" => spec.config_size = Some(number("config-size", value, 0, MOST_CONFIG)?),
                "tag" => spec.tag = text(),
                "mac" => spec.mac = text(),
                "addr" => spec.addr = Some(value.parse()?),
                _ => spec.restart = Some(value.parse()?),
            }
        }
        spec.resolve(String::new(), RestartPolicy::Never)?;
        Ok(spec)
    }
}

fn number(key: &'static str, value: &str, least: u16, most: u16) -> Result<u16, VhostUserSpecError> {
    let number = value.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| VhostUserSpecError::Number { key, value: value.to_owned(), least, most })
}

/// A device of a back end that is not ours, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserConfig {
    /// Unique among the processes of the machine.
    pub id: String,
    /// Where the back end listens.
    pub socket: PathBuf,
    /// What its type is called.
    pub kind: String,
    /// Its virtio device ID.
    pub device_id: u16,
    /// Exactly so many queues.
    pub queues: Option<u16>,
    /// The least number of queues that a device of its type has.
    pub least_queues: u16,
    /// Bytes of configuration space.
    pub config_size: u16,
    /// Whether no device of its type works without one.
    pub needs_config: bool,
    /// Its feature bits, of 0 to 23.
    pub features: u64,
    /// The configuration space, where it is the front end's.
    pub config: Option<Vec<u8>>,
    /// Features that go with it.
    pub own_features: u64,
    /// What follows the loss of the back end.
    pub restart: RestartPolicy,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

impl VhostUserSpec {
    /// A disk behind the socket at this path (`--disk vhost-user=PATH`).
    #[must_use]
    pub fn disk(socket: PathBuf, id: Option<String>, restart: Option<RestartPolicy>) -> Self {
        Self { kind: Some("blk".to_owned()), socket, id, restart, ..Self::default() }
    }

    /// Checks it and looks its type up.
    ///
    /// # Errors
    /// [`VhostUserSpecError`].
    pub fn resolve(&self, id: String, restart: RestartPolicy) -> Result<VhostUserConfig, VhostUserSpecError> {
        if self.socket.as_os_str().is_empty() {
            return Err(VhostUserSpecError::NoSocket);
        }
        let found = match (&self.kind, self.device_id) {
            (Some(name), None) => {
                let name = if name == "block" { "blk" } else { name };
                Some(TYPES.iter().find(|kind| kind.name == name).ok_or_else(|| {
                    let names: Vec<&str> = TYPES.iter().map(|kind| kind.name).collect();
                    VhostUserSpecError::UnknownType(name.escape_debug().to_string(), hint(name, &names))
                })?)
            }
            (None, Some(id)) => TYPES.iter().find(|kind| kind.id == id),
            _ => return Err(VhostUserSpecError::Type),
        };
        let unknown = row("", self.device_id.unwrap_or_default(), 1, 0, ANY_FEATURE);
        let kind = found.unwrap_or(&unknown);
        let mut config = VhostUserConfig {
            id,
            socket: self.socket.clone(),
            kind: found.map_or_else(|| format!("{}", kind.id), |kind| kind.name.to_owned()),
            device_id: kind.id,
            queues: self.queues,
            least_queues: kind.queues,
            config_size: self.config_size.unwrap_or(kind.config_size),
            needs_config: NEED_CONFIG.contains(&kind.name),
            features: kind.features,
            config: None,
            own_features: 0,
            restart: self.restart.unwrap_or(restart),
            addr: self.addr,
        };
        if let Some(queues) = self.queues.filter(|queues| *queues < kind.queues) {
            return Err(VhostUserSpecError::Number {
                key: "queues",
                value: queues.to_string(),
                least: kind.queues,
                most: MOST_QUEUES,
            });
        }
        if let Some(tag) = &self.tag {
            config.set_tag(tag)?;
        }
        if let Some(mac) = &self.mac {
            config.set_mac(mac)?;
        }
        Ok(config)
    }
}

impl VhostUserConfig {
    /// Whether it is a disk.
    pub const fn is_disk(&self) -> bool {
        self.device_id == BLOCK
    }

    /// Whether it is a network card.
    pub const fn is_card(&self) -> bool {
        self.device_id == NET
    }

    /// Whether firmware can boot from it.
    pub const fn is_bootable(&self) -> bool {
        self.is_disk() || self.is_card()
    }

    /// Section 5.11.4: the tag and the number of request queues, all but the first.
    fn set_tag(&mut self, tag: &str) -> Result<(), VhostUserSpecError> {
        if self.kind != "fs" {
            return Err(VhostUserSpecError::Misplaced("tag", "fs"));
        }
        if tag.is_empty() || tag.len() > TAG {
            return Err(VhostUserSpecError::Tag(tag.escape_debug().to_string()));
        }
        let queues = *self.queues.get_or_insert(self.least_queues);
        let mut space = tag.as_bytes().to_vec();
        space.resize(TAG, 0);
        space.extend(u32::from(queues.saturating_sub(1)).to_le_bytes());
        self.config = Some(space);
        Ok(())
    }

    /// Section 5.1.4: the address, link up, one pair of queues.
    fn set_mac(&mut self, mac: &str) -> Result<(), VhostUserSpecError> {
        if self.kind != "net" {
            return Err(VhostUserSpecError::Misplaced("mac", "net"));
        }
        let wrong = || VhostUserSpecError::Mac(mac.escape_debug().to_string());
        let bytes: Result<Vec<u8>, _> = mac
            .split(':')
            .map(|byte| {
                let digits = byte.len() == 2 && byte.bytes().all(|byte| byte.is_ascii_hexdigit());
                if digits { u8::from_str_radix(byte, 16).map_err(|_| wrong()) } else { Err(wrong()) }
            })
            .collect();
        let mut space = bytes?;
        if space.len() != 6 || space.first().is_none_or(|first| first & 1 != 0) {
            return Err(wrong());
        }
        let pairs = self.queues.map_or(1, |queues| queues / 2);
        space.extend([1, 0]);
        space.extend(pairs.to_le_bytes());
        space.resize(self.config_size.into(), 0);
        (self.config, self.own_features) = (Some(space), NET_MAC);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str) -> Result<VhostUserConfig, String> {
        let spec: VhostUserSpec = text.parse().map_err(|error: VhostUserSpecError| error.to_string())?;
        spec.resolve("x".to_owned(), RestartPolicy::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_type_knows_what_its_devices_are_like() {
        let blk = resolve("type=blk,socket=/run/x,queues=4").unwrap();
        assert_eq!((blk.device_id, blk.queues, blk.least_queues, blk.config_size), (2, Some(4), 1, 60));
        assert_eq!(resolve("type=block,socket=/run/x").unwrap().device_id, 2);
        let same = resolve("device-id=2,socket=/run/x").unwrap();
        assert_eq!((same.kind.as_str(), same.config_size), ("blk", 60));
        let other = resolve("device-id=33,socket=/x,config-size=7,queues=2,restart=never,addr=1f.7").unwrap();
        assert_eq!(other.addr, "1f.7".parse().ok());
        assert_eq!((other.kind.as_str(), other.config_size, other.features), ("33", 7, ANY_FEATURE));
        assert_eq!(other.restart, RestartPolicy::Never);
    }

    #[test]
    fn a_tag_and_an_address_make_a_configuration_space() {
        let fs = resolve("type=fs,socket=/x,tag=home").unwrap();
        let space = fs.config.unwrap();
        assert_eq!((&space[..5], &space[36..], fs.queues), (&b"home\0"[..], &[1, 0, 0, 0][..], Some(2)));
        let net = resolve("type=net,socket=/x,mac=52:54:00:12:34:56").unwrap();
        let space = vec![0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 1, 0, 0, 0];
        assert_eq!((net.config, net.own_features), (Some(space), NET_MAC));
    }

    #[test]
    fn refusals_say_what_to_write() {
        for (text, word) in [
            ("type=blk", "needs a socket"),
            ("socket=/x", "type= or device-id="),
            ("type=blk,device-id=2,socket=/x", "not both"),
            ("type=blok,socket=/x", "did you mean 'blk'?"),
            ("type=blk,sokket=/x", "did you mean 'socket'?"),
            ("type=blk,socket=/x,socket=/y", "given twice"),
            ("/x", "KEY=VALUE"),
            ("type=blk,socket=/x,queues=0", "from 1 to 64"),
            ("type=net,socket=/x,queues=1", "from 2 to 64"),
            ("device-id=0,socket=/x", "from 1 to 63"),
            ("device-id=64,socket=/x", "from 1 to 63"),
            ("type=blk,socket=/x,config-size=257", "from 0 to 256"),
            ("type=blk,socket=/x,tag=a", "tag= is for type=fs"),
            ("type=fs,socket=/x,tag=", "1 to 36 bytes"),
            ("type=net,socket=/x,mac=53:54:00:12:34:56", "no multicast"),
            ("type=net,socket=/x,mac=52:54:00:12:34", "six bytes"),
            ("type=net,socket=/x,mac=+2:54:00:12:34:56", "six bytes"),
            ("type=blk,socket=/x,restart=often", "often"),
        ] {
            let error = resolve(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
