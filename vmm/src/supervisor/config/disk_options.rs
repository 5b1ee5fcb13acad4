//! What can be said of a disk beside its image and name: format and chain, cache, block sizes, limits, what follows errors.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use bulkhead_ipc::channel::message::{Durability, ErrorAction, ImageFormat};
use serde::de::{Deserialize, Deserializer, Error as _};
use thiserror::Error;

use super::nearest::hint;
use super::size::{Size, SizeError};

/// Why a value of a disk cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DiskOptionError {
    /// A word that is none of those that there are.
    #[error("{key}={word}: {hint}")]
    Word {
        /// The key.
        key: &'static str,
        /// What was written.
        word: String,
        /// What could be.
        hint: String,
    },
    /// A format that cannot be read.
    #[error(
        "format=vhdx: VHDX images cannot be served; `qemu-img convert -O qcow2` makes a qcow2 image of one"
    )]
    Vhdx,
    /// A backing image without its format, which is never guessed.
    #[error("backing={0}: write backing=FILE:FORMAT, such as base.qcow2:qcow2; a format is never guessed")]
    Backing(String),
    /// A rate.
    #[error("{0}: write a rate and, if you like, a burst, such as 100M or 100M:200M")]
    Rate(#[from] SizeError),
    /// A number.
    #[error("{key}={value}: a whole number is needed")]
    Number {
        /// The key.
        key: &'static str,
        /// What was written.
        value: String,
    },
}

/// The meaning of a word of a table.
fn word<T: Copy>(key: &'static str, text: &str, words: &[(&str, T)]) -> Result<T, DiskOptionError> {
    let found = words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning);
    found.ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        DiskOptionError::Word { key, word: text.to_owned(), hint: hint(text, &words) }
    })
}

/// What is in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Format(pub ImageFormat);

impl FromStr for Format {
    type Err = DiskOptionError;

    fn from_str(text: &str) -> Result<Self, DiskOptionError> {
        if text == "vhdx" {
            return Err(DiskOptionError::Vhdx);
        }
        let words = [("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2), ("vmdk", ImageFormat::Vmdk)];
        word("format", text, &words).map(Self)
    }
}

/// An image that backs another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its file.
    pub path: PathBuf,
    /// What is in it.
    pub format: ImageFormat,
}

impl FromStr for Backing {
    type Err = DiskOptionError;

    fn from_str(text: &str) -> Result<Self, DiskOptionError> {
        match text.rsplit_once(':') {
            Some((path, format)) if !path.is_empty() => {
                Ok(Self { path: path.into(), format: format.parse::<Format>()?.0 })
            }
            _ => Err(DiskOptionError::Backing(text.to_owned())),
        }
    }
}

/// What stands between the guest's writes and the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cache {
    /// When writes are durable.
    pub durability: Durability,
    /// The host's page cache is gone round (O_DIRECT).
    pub direct: bool,
}

impl FromStr for Cache {
    type Err = DiskOptionError;

    fn from_str(text: &str) -> Result<Self, DiskOptionError> {
        let words = [
            ("writeback", (Durability::Flush, false)),
            ("writethrough", (Durability::Write, false)),
            ("none", (Durability::Flush, true)),
            ("unsafe", (Durability::Never, false)),
        ];
        word("cache", text, &words).map(|(durability, direct)| Self { durability, direct })
    }
}

/// What follows a request that the host fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OnError(pub ErrorAction);

impl FromStr for OnError {
    type Err = DiskOptionError;

    fn from_str(text: &str) -> Result<Self, DiskOptionError> {
        let words = [
            ("report", ErrorAction::Report),
            ("wait", ErrorAction::Wait),
            ("wait-for-space", ErrorAction::WaitForSpace),
            ("ignore", ErrorAction::Ignore),
        ];
        word("read-error or write-error", text, &words).map(Self)
    }
}

/// A rate and its burst, both with the suffixes of sizes; a burst of 0 is a tenth of a second's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateSpec {
    /// A second; 0: no limit.
    pub rate: u64,
    /// At once.
    pub burst: u64,
}

impl FromStr for RateSpec {
    type Err = DiskOptionError;

    fn from_str(text: &str) -> Result<Self, DiskOptionError> {
        let (rate, burst) = text.split_once(':').unwrap_or((text, "0"));
        Ok(Self { rate: rate.parse::<Size>()?.0, burst: burst.parse::<Size>()?.0 })
    }
}

impl<'de> Deserialize<'de> for RateSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let [text] = <[String; 1]>::try_from(Value::deserialize(deserializer)?.texts())
            .map_err(|_| D::Error::custom("a rate is one text or number"))?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The options.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskOptions {
    /// What is in the image.
    pub format: Format,
    /// What backs it, from the top down.
    pub backing: Vec<Backing>,
    /// Files that hold data for it, in the order in which it names them.
    pub data: Vec<PathBuf>,
    /// The cache.
    pub cache: Cache,
    /// The guest cannot give space up.
    pub no_discard: bool,
    /// Logical block, bytes; 0: 512.
    pub logical_block_size: u32,
    /// Physical block, bytes; 0: 4096.
    pub physical_block_size: u32,
    /// The serial number; `None`: the id.
    pub serial: Option<String>,
    /// Request queues; 0: one for each CPU.
    pub queues: u16,
    /// Bytes.
    pub bps: RateSpec,
    /// Requests.
    pub iops: RateSpec,
    /// A limit that it shares with others.
    pub limit_group: Option<String>,
    /// What follows a read that the host fails.
    pub read_error: OnError,
    /// What follows anything else that it fails.
    pub write_error: OnError,
}

impl DiskOptions {
    /// The keys, as they are written.
    pub const KEYS: [&str; 14] = [
        "format",
        "backing",
        "data",
        "cache",
        "discard",
        "logical-block-size",
        "physical-block-size",
        "serial",
        "queues",
        "bps",
        "iops",
        "limit-group",
        "read-error",
        "write-error",
    ];

    /// Whether a key may be given several times.
    pub fn repeats(key: &str) -> bool {
        matches!(key, "backing" | "data")
    }

    /// Takes `key=value`; false: there is no such key.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, DiskOptionError> {
        match key {
            "format" => self.format = value.parse()?,
            "backing" => self.backing.push(value.parse()?),
            "data" => self.data.push(value.into()),
            "cache" => self.cache = value.parse()?,
            "discard" => self.no_discard = !word("discard", value, &[("on", true), ("off", false)])?,
            "logical-block-size" => self.logical_block_size = number("logical-block-size", value)?,
            "physical-block-size" => self.physical_block_size = number("physical-block-size", value)?,
            "serial" => self.serial = Some(value.to_owned()),
            "queues" => self.queues = number("queues", value)?,
            "bps" => self.bps = value.parse()?,
            "iops" => self.iops = value.parse()?,
            "limit-group" => self.limit_group = Some(value.to_owned()),
            "read-error" => self.read_error = value.parse()?,
            "write-error" => self.write_error = value.parse()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The same with relative paths below a folder.
    pub fn below(mut self, folder: &Path) -> Self {
        self.backing.iter_mut().for_each(|backing| backing.path = folder.join(&backing.path));
        self.data.iter_mut().for_each(|data| *data = folder.join(&data));
        self
    }
}

fn number<T: FromStr>(key: &'static str, value: &str) -> Result<T, DiskOptionError> {
    value.parse().map_err(|_| DiskOptionError::Number { key, value: value.to_owned() })
}

/// A value of a table in a file: a word, a number, a switch, or a list of words.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A word.
    Text(String),
    /// A number.
    Number(u64),
    /// A switch.
    Switch(bool),
    /// Several words.
    List(Vec<String>),
}

impl Value {
    /// As after `KEY=`, once for each.
    pub fn texts(self) -> Vec<String> {
        match self {
            Self::Text(text) => vec![text],
            Self::Number(number) => vec![number.to_string()],
            Self::Switch(on) => vec![if on { "on" } else { "off" }.to_owned()],
            Self::List(texts) => texts,
        }
    }
}
