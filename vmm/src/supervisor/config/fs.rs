//! `--fs tag=…,path=…|vhost-user=…[,readonly=on][,cache=…][,submounts=on][,xattr=on][,owner=…][,others=…][,id=…][,restart=…][,addr=…]` and the table `[[fs]]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};
use super::vhost_user::VhostUserSpec;

/// The longest tag, bytes (virtio 1.2, 5.11.4).
const TAG: usize = 36;
const KEYS: &[&str] = &[
    "tag",
    "path",
    "readonly",
    "cache",
    "submounts",
    "xattr",
    "owner",
    "others",
    "id",
    "restart",
    "addr",
    "vhost-user",
];

/// What the guest may keep of a shared directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Names and attributes for a second, contents until a file is opened again and has changed.
    #[default]
    Auto,
    /// Everything: nobody else changes the directory.
    Always,
    /// Names and attributes, no contents.
    Metadata,
    /// Nothing.
    Never,
}

/// Whose files are whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Owner {
    /// The guest's users are the host's: for machines of root.
    All,
    /// One user and group of the host, whose files are those of root in the guest.
    One(u32, u32),
}

/// A shared directory as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsSpec {
    /// The name that the guest mounts it by.
    pub tag: String,
    /// The directory, or the socket of a back end that is not ours.
    pub path: PathBuf,
    /// `path` is such a socket.
    #[serde(skip)]
    pub vhost_user: bool,
    /// The guest cannot change anything in it.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest may keep.
    #[serde(default)]
    pub cache: Cache,
    /// What is mounted below it is shared, too.
    #[serde(default)]
    pub submounts: bool,
    /// Extended attributes are shared.
    #[serde(default)]
    pub xattr: bool,
    /// Whose files are whose; default: all for machines of root, else the user's own.
    pub owner: Option<Owner>,
    /// Whom the guest sees as the owner of files of others than the one user.
    #[serde(default = "nobody")]
    pub others: u32,
    /// The name in messages and in `bulkhead ps`. Default: fs0, fs1, …
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0; default: the lowest empty slot.
    pub addr: Option<PciAddress>,
}

/// The kernel's overflow user.
pub const fn nobody() -> u32 {
    65534
}

/// Why a text is not a shared directory.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FsSpecError {
    /// The `tag` or the `path` is missing.
    #[error(
        "a shared directory needs a tag and a path, or the socket of another back end: tag=TAG,path=DIR|vhost-user=SOCKET[,readonly=on][,cache=auto|always|metadata|never][,submounts=on][,xattr=on][,owner=all|UID:GID][,others=UID][,id=NAME][,restart=POLICY]"
    )]
    Missing,
    /// A key that is none.
    #[error("unknown key '{key}' of a shared directory: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// A switch with something other than on or off.
    #[error("{0}={1}: say {0}=on or {0}=off")]
    Switch(String, String),
    /// A way of caching that is none.
    #[error("cache={value}: {hint}")]
    Cache {
        /// What was written.
        value: String,
        /// The nearest valid word, or all.
        hint: String,
    },
    /// An owner that is none.
    #[error(
        "owner={0}: say owner=all, or the numbers of a user and a group that are not root's: owner=1000:1000"
    )]
    Owner(String),
    /// Others that are none.
    #[error("others={0}: say the number of the user that owns the files of others in the guest")]
    Others(String),
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
    /// Something that only our own processes heed.
    #[error("{0}= cannot be said of the back end behind vhost-user=SOCKET, which sees to it itself")]
    Elsewhere(String),
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A piece without `=`.
    #[error(
        "'{0}' is not KEY=VALUE; a shared directory is tag=TAG,path=DIR[,readonly=on]…; a path with a comma can only be given in --config FILE"
    )]
    NotAPair(String),
}

/// What is wrong with a tag, if anything is.
pub fn tag_fault(tag: &str) -> Option<String> {
    let len = tag.len();
    if len == 0 {
        Some("the tag is empty: the guest mounts by it".to_owned())
    } else if len > TAG {
        Some(format!("the tag '{}' has {len} bytes; it may have at most {TAG}", tag.escape_debug()))
    } else {
        tag.contains('\0').then(|| "the tag contains a zero byte".to_owned())
    }
}

impl FromStr for Cache {
    type Err = FsSpecError;

    fn from_str(text: &str) -> Result<Self, FsSpecError> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "metadata" => Ok(Self::Metadata),
            "never" => Ok(Self::Never),
            _ => {
                let hint = hint(text, &["auto", "always", "metadata", "never"]);
                Err(FsSpecError::Cache { value: text.to_owned(), hint })
            }
        }
    }
}

impl FromStr for Owner {
    type Err = FsSpecError;

    fn from_str(text: &str) -> Result<Self, FsSpecError> {
        if text == "all" {
            return Ok(Self::All);
        }
        let numbers = text.split_once(':').and_then(|(uid, gid)| uid.parse().ok().zip(gid.parse().ok()));
        match numbers {
            Some((uid @ 1..=0xFFFF_FFFE, gid @ 1..=0xFFFF_FFFE)) => Ok(Self::One(uid, gid)),
            _ => Err(FsSpecError::Owner(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Owner {
    type Error = FsSpecError;

    fn try_from(text: String) -> Result<Self, FsSpecError> {
        text.parse()
    }
}

fn switch(key: &str, value: &str) -> Result<bool, FsSpecError> {
    match value {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err(FsSpecError::Switch(key.to_owned(), value.to_owned())),
    }
}

impl FsSpec {
    /// It as a device of another back end; none: it is our own.
    #[must_use]
    pub fn foreign(&self) -> Option<VhostUserSpec> {
        let Self { tag, path, id, restart, addr, .. } = self.clone();
        let (kind, tag) = (Some("fs".to_owned()), Some(tag));
        let spec = VhostUserSpec { kind, socket: path, tag, id, restart, addr, ..VhostUserSpec::default() };
        self.vhost_user.then_some(spec)
    }
}

impl FromStr for FsSpec {
    type Err = FsSpecError;

    fn from_str(text: &str) -> Result<Self, FsSpecError> {
        let mut given: Vec<(&str, &str)> = Vec::new();
        for piece in text.split(',') {
            let (key, value) = match piece.split_once('=') {
                Some(pair) => pair,
                None if matches!(piece, "readonly" | "submounts" | "xattr") => (piece, "on"),
                None => return Err(FsSpecError::NotAPair(piece.to_owned())),
            };
            if !KEYS.contains(&key) {
                return Err(FsSpecError::UnknownKey { key: key.to_owned(), hint: hint(key, KEYS) });
            }
            if given.iter().any(|(other, _)| *other == key) {
                return Err(FsSpecError::Twice(key.to_owned()));
            }
            given.push((key, value));
        }
        let value = |key| given.iter().find(|(given, _)| *given == key).map(|(_, value)| *value);
        let on = |key| value(key).map_or(Ok(false), |value| switch(key, value));
        let vhost_user = value("vhost-user").is_some();
        let own = |key: &&str| !["tag", "id", "restart", "addr", "vhost-user"].contains(key);
        if let Some(key) = given.iter().map(|(key, _)| *key).find(own).filter(|_| vhost_user) {
            return Err(FsSpecError::Elsewhere(key.to_owned()));
        }
        let path = value("vhost-user").or_else(|| value("path"));
        let path = path.filter(|path| !path.is_empty()).ok_or(FsSpecError::Missing)?;
        Ok(Self {
            tag: value("tag").ok_or(FsSpecError::Missing)?.to_owned(),
            path: path.into(),
            vhost_user,
            readonly: on("readonly")?,
            cache: value("cache").map(str::parse).transpose()?.unwrap_or_default(),
            submounts: on("submounts")?,
            xattr: on("xattr")?,
            owner: value("owner").map(str::parse).transpose()?,
            others: value("others")
                .map_or(Ok(nobody()), |it| it.parse().map_err(|_| FsSpecError::Others(it.to_owned())))?,
            id: value("id").map(str::to_owned),
            restart: value("restart").map(str::parse).transpose()?,
            addr: value("addr").map(str::parse).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<FsSpec>().unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let text = "tag=home,path=/home/x,readonly,cache=always,submounts=on,xattr=on,owner=1000:100,id=h,restart=never,addr=8.1";
        let expected = FsSpec {
            tag: "home".into(),
            path: "/home/x".into(),
            vhost_user: false,
            readonly: true,
            cache: Cache::Always,
            submounts: true,
            xattr: true,
            owner: Some(Owner::One(1000, 100)),
            others: 65534,
            id: Some("h".into()),
            restart: Some(RestartPolicy::Never),
            addr: "08.1".parse().ok(),
        };
        assert_eq!(text.parse(), Ok(expected));
        let plain: FsSpec = "tag=t,path=.".parse().unwrap();
        assert!(!plain.readonly && !plain.submounts && plain.cache == Cache::Auto && plain.owner.is_none());
    }

    #[test]
    fn refusals_say_what_to_write() {
        assert!(refusal("path=a").contains("needs a tag and a path"));
        assert!(refusal("tag=a,path=").contains("needs a tag and a path"));
        assert!(refusal("tag=a,path=b,readonly=maybe").contains("readonly=on or readonly=off"));
        assert!(refusal("tag=a,path=b,cach=never").contains("did you mean 'cache'?"));
        assert!(refusal("tag=a,path=b,cache=alwys").contains("did you mean 'always'?"));
        assert!(refusal("tag=a,path=b,owner=0:0").contains("owner=1000:1000"));
        assert!(refusal("tag=a,path=b,tag=c").contains("given twice"));
        assert!(refusal("tag=a,vhost-user=s,cache=never").contains("cache= cannot be said"));
        assert!(refusal("tag=a,vhost-user=s,path=b").contains("path= cannot be said"));
        assert!(refusal("vhost-user=s").contains("needs a tag"));
        assert!(refusal("/srv").contains("'/srv' is not KEY=VALUE"));
        assert!(tag_fault("").is_some_and(|fault| fault.contains("empty")));
        assert!(tag_fault(&"t".repeat(37)).is_some_and(|fault| fault.contains("at most 36")));
        assert_eq!(tag_fault(&"t".repeat(36)), None);
    }
}
