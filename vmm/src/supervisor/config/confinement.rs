//! What a user says about the jail: layers that must be there, limits of single processes, users, the place of cgroups.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::str::FromStr;

use bulkhead_ipc::jail::Layer;
use bulkhead_ipc::jail::uids::{RangeError, UidRange};
use serde::Deserialize;
use serde::de::{self, Deserializer};
use thiserror::Error;

use super::nearest::hint;
use super::size::{Size, SizeError};

/// The keys of a limit.
const KEYS: [&str; 7] = ["memory", "pids", "cpu", "read", "write", "read-iops", "write-iops"];

/// What a user says about the jail.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfinementConfig {
    /// Layers without which the machine is not started.
    pub require: BTreeSet<Layer>,
    /// Limits by the name of the process.
    pub limits: BTreeMap<String, ProcessLimits>,
    /// Host users of the processes.
    pub uids: UidChoice,
    /// Where the cgroups of the machine are made.
    pub cgroup: CgroupChoice,
}

/// Limits of one process, where they differ from what is set by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProcessLimits {
    /// Memory of its own in bytes, guest RAM not counted.
    pub memory: Option<Size>,
    /// Threads.
    pub pids: Option<u64>,
    /// CPU time in percent of one CPU.
    pub cpu: Option<u32>,
    /// Bytes in a second that a disk may read.
    pub read: Option<Size>,
    /// Bytes in a second that a disk may write.
    pub write: Option<Size>,
    /// Reads in a second.
    pub read_iops: Option<u64>,
    /// Writes in a second.
    pub write_iops: Option<u64>,
}

impl ProcessLimits {
    /// Whether one of the limits of I/O is set.
    pub const fn has_io(&self) -> bool {
        self.read.is_some() || self.write.is_some() || self.read_iops.is_some() || self.write_iops.is_some()
    }

    /// A limit under which nothing at all would run.
    pub fn impossible(&self) -> Option<&'static str> {
        /// What a program needs to start.
        const LEAST_MEMORY: Size = Size(4 << 20);
        let zero = |limit: Option<u64>| limit == Some(0);
        if self.memory.is_some_and(|memory| memory < LEAST_MEMORY) {
            Some("memory: the least is 4M")
        } else if zero(self.pids) || self.cpu == Some(0) {
            Some("pids and cpu: the least is 1")
        } else if zero(self.read.map(|it| it.0))
            || zero(self.write.map(|it| it.0))
            || zero(self.read_iops)
            || zero(self.write_iops)
        {
            Some("0 would stop all I/O")
        } else {
            None
        }
    }
}

/// `--limit ID:KEY=VALUE[,KEY=VALUE]…`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitSpec {
    /// Name of the process.
    pub process: String,
    /// Its limits.
    pub limits: ProcessLimits,
}

/// Why a text is not a limit.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LimitError {
    /// No process or no pair.
    #[error("'{0}' is not a limit: write PROCESS:KEY=VALUE, such as disk0:memory=64M,cpu=50")]
    Syntax(String),
    /// A key that is none.
    #[error("unknown key '{key}' of a limit: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// A size that is none.
    #[error("{key}: {source}")]
    Size {
        /// The key.
        key: String,
        /// Why.
        source: SizeError,
    },
    /// A number that is none.
    #[error("{key}: '{value}' is not a whole number")]
    Number {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
}

impl FromStr for LimitSpec {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let syntax = || LimitError::Syntax(text.to_owned());
        let (process, pairs) = text.split_once(':').ok_or_else(syntax)?;
        let mut limits = ProcessLimits::default();
        for pair in pairs.split(',') {
            let (key, value) = pair.split_once('=').ok_or_else(syntax)?;
            let size =
                || value.parse().map(Some).map_err(|source| LimitError::Size { key: key.to_owned(), source });
            let wrong = || LimitError::Number { key: key.to_owned(), value: value.to_owned() };
            let number = || value.parse::<u64>().map(Some).map_err(|_| wrong());
            match key {
                "memory" => limits.memory = size()?,
                "pids" => limits.pids = number()?,
                "cpu" => limits.cpu = Some(value.trim_end_matches('%').parse().map_err(|_| wrong())?),
                "read" => limits.read = size()?,
                "write" => limits.write = size()?,
                "read-iops" => limits.read_iops = number()?,
                "write-iops" => limits.write_iops = number()?,
                _ => {
                    return Err(LimitError::UnknownKey { key: key.to_owned(), hint: hint(key, &KEYS) });
                }
            }
        }
        Ok(Self { process: process.to_owned(), limits })
    }
}

/// Host users of the processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UidChoice {
    /// Root's default range, or the subordinate users of an ordinary one.
    #[default]
    Auto,
    /// This range.
    Range(UidRange),
    /// One user for all.
    Off,
}

impl FromStr for UidChoice {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => text.parse().map(Self::Range),
        }
    }
}

/// Where the cgroups of the machine are made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CgroupChoice {
    /// Below the nearest group, from the supervisor's own upwards, that it may use.
    #[default]
    Auto,
    /// Below this one.
    Path(PathBuf),
    /// Nowhere.
    Off,
}

/// A text that is no place of a cgroup.
#[derive(Debug, PartialEq, Eq, Error)]
#[error(
    "'{0}' is no place for cgroups: say auto, off, or the path of a group, such as /sys/fs/cgroup/machines"
)]
pub struct CgroupChoiceError(String);

impl FromStr for CgroupChoice {
    type Err = CgroupChoiceError;

    fn from_str(text: &str) -> Result<Self, CgroupChoiceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            path if path.starts_with('/') => Ok(Self::Path(path.into())),
            other => Err(CgroupChoiceError(other.to_owned())),
        }
    }
}

/// A word of the configuration file as on the command line.
pub fn word<'de, D: Deserializer<'de>, T: FromStr<Err: std::fmt::Display>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(de::Error::custom)
}

/// A list of words of the configuration file.
pub fn words<'de, D: Deserializer<'de>, T: FromStr<Err: std::fmt::Display>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    let words = Vec::<String>::deserialize(deserializer)?;
    words.iter().map(|word| word.parse().map_err(de::Error::custom)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<LimitSpec>().unwrap_err().to_string()
    }

    #[test]
    fn reads_all_keys() {
        let text = "disk0:memory=64M,pids=9,cpu=50%,read=1M,write=2M,read-iops=10,write-iops=20";
        let spec: LimitSpec = text.parse().unwrap();
        let expected = ProcessLimits {
            memory: Some(Size(64 << 20)),
            pids: Some(9),
            cpu: Some(50),
            read: Some(Size(1 << 20)),
            write: Some(Size(2 << 20)),
            read_iops: Some(10),
            write_iops: Some(20),
        };
        assert_eq!(spec, LimitSpec { process: "disk0".into(), limits: expected });
        assert!(spec.limits.has_io() && spec.limits.impossible().is_none());
    }

    #[test]
    fn refusals_say_what_to_write() {
        assert!(refusal("memory=64M").contains("PROCESS:KEY=VALUE"));
        assert!(refusal("disk0:memory").contains("disk0:memory=64M"));
        assert!(refusal("disk0:memroy=1M").contains("did you mean 'memory'?"));
        assert!(refusal("disk0:memory=much").contains("memory: 'much' is not a size"));
        assert!(refusal("disk0:cpu=half").contains("cpu: 'half' is not a whole number"));
    }

    #[test]
    fn limits_under_which_nothing_runs_are_impossible() {
        for text in ["x:memory=1M", "x:pids=0", "x:cpu=0", "x:read=0", "x:write-iops=0"] {
            assert!(text.parse::<LimitSpec>().unwrap().limits.impossible().is_some(), "{text}");
        }
    }

    #[test]
    fn places_and_users() {
        assert_eq!("off".parse(), Ok(UidChoice::Off));
        assert_eq!("5:10".parse(), Ok(UidChoice::Range(UidRange { first: 5, count: 10 })));
        assert!("0:10".parse::<UidChoice>().is_err());
        assert_eq!("/sys/fs/cgroup/x".parse(), Ok(CgroupChoice::Path("/sys/fs/cgroup/x".into())));
        assert!("x".parse::<CgroupChoice>().is_err());
    }
}
