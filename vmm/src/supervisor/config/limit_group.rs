//! `--limit-group id=…[,bps=…][,iops=…]` and the tables `[[limit-group]]`: a limit that several devices share.

use std::str::FromStr;

use bulkhead_ipc::limit_group::MEMBERS;
use serde::Deserialize;
use thiserror::Error;

use super::disk_options::{DiskOptionError, RateSpec};
use super::nearest::hint;
use super::pairs::{PairError, Pairs};
use super::{DiskConfig, NicConfig, check_name};

/// How it is written.
const PAIRS: Pairs = Pairs {
    what: "a limit group",
    shape: "id=NAME[,bps=RATE[:BURST]][,iops=RATE[:BURST]]",
    keys: &["id", "bps", "iops"],
};

/// A limit that several devices share.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Table")]
pub struct LimitGroupSpec {
    /// By which devices name it.
    pub id: String,
    /// Bytes, to and from the guest.
    pub bps: RateSpec,
    /// Requests and packets.
    pub iops: RateSpec,
}

/// The table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    id: String,
    bps: Option<RateSpec>,
    iops: Option<RateSpec>,
}

/// Why a group is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LimitGroupError {
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// Without a name nobody can join.
    #[error("a limit group needs a name: {}", PAIRS.shape)]
    NoName,
    /// A name that cannot be one.
    #[error("limit-group: '{0}' is not a possible name: letters, digits and . _ - from a letter or digit on")]
    Name(String),
    /// It limits nothing.
    #[error("limit-group {0}: it limits nothing: say bps=RATE or iops=RATE, or both")]
    Nothing(String),
    /// A rate.
    #[error("limit-group: {0}")]
    Rate(#[from] DiskOptionError),
    /// Two of a name.
    #[error("limit-group: two groups are called '{0}'")]
    SameName(String),
    /// A device that names none.
    #[error("{device}: there is no limit group '{name}': {hint}")]
    NoSuchGroup {
        /// The device.
        device: String,
        /// What it names.
        name: String,
        /// What there is.
        hint: String,
    },
    /// No place is left.
    #[error("{device}: the limit group '{name}' has {MEMBERS} members, which is the most")]
    Full {
        /// The device.
        device: String,
        /// The group.
        name: String,
    },
}

impl LimitGroupSpec {
    fn new(
        id: Option<String>,
        bps: Option<RateSpec>,
        iops: Option<RateSpec>,
    ) -> Result<Self, LimitGroupError> {
        let id = id.ok_or(LimitGroupError::NoName)?;
        let bad = LimitGroupError::Name(id.escape_debug().to_string());
        let id = check_name("limit-group", id).map_err(|_| bad)?;
        let (bps, iops) = (bps.unwrap_or_default(), iops.unwrap_or_default());
        if bps.rate == 0 && iops.rate == 0 {
            return Err(LimitGroupError::Nothing(id));
        }
        Ok(Self { id, bps, iops })
    }
}

impl TryFrom<Table> for LimitGroupSpec {
    type Error = LimitGroupError;

    fn try_from(Table { id, bps, iops }: Table) -> Result<Self, LimitGroupError> {
        Self::new(Some(id), bps, iops)
    }
}

impl FromStr for LimitGroupSpec {
    type Err = LimitGroupError;

    fn from_str(text: &str) -> Result<Self, LimitGroupError> {
        let (mut id, mut bps, mut iops) = (None, None, None);
        for (key, value) in PAIRS.read(text)? {
            match key {
                "id" => id = Some(value.to_owned()),
                "bps" => bps = Some(value.parse()?),
                _ => iops = Some(value.parse()?),
            }
        }
        Self::new(id, bps, iops)
    }
}

/// Refuses a device that joins a group that is not there.
///
/// # Errors
/// [`LimitGroupError::NoSuchGroup`].
pub fn check_member(groups: &[LimitGroupSpec], device: &str, name: &str) -> Result<(), LimitGroupError> {
    if groups.iter().any(|group| group.id == name) {
        return Ok(());
    }
    let names: Vec<&str> = groups.iter().map(|group| group.id.as_str()).collect();
    let name = name.escape_debug().to_string();
    let hint =
        if names.is_empty() { format!("--limit-group id={name},… makes one") } else { hint(&name, &names) };
    Err(LimitGroupError::NoSuchGroup { device: device.to_owned(), name, hint })
}

/// Checks the groups of a machine and who is in them.
///
/// # Errors
/// [`LimitGroupError`].
pub fn check(
    groups: &[LimitGroupSpec],
    disks: &[DiskConfig],
    nics: &[NicConfig],
) -> Result<(), LimitGroupError> {
    for (index, group) in groups.iter().enumerate() {
        if groups.iter().take(index).any(|other| other.id == group.id) {
            return Err(LimitGroupError::SameName(group.id.clone()));
        }
    }
    let disks = disks.iter().map(|disk| (&disk.id, &disk.options.limit_group));
    let members = disks.chain(nics.iter().map(|nic| (&nic.id, &nic.limit_group)));
    members
        .filter_map(|(id, group)| Some((id, group.as_ref()?)))
        .try_for_each(|(id, group)| check_member(groups, id, group))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<LimitGroupSpec>().unwrap_err().to_string()
    }

    #[test]
    fn options_and_file_say_the_same() {
        let group: LimitGroupSpec = "id=slow,bps=1M:4M,iops=100".parse().unwrap();
        assert_eq!((group.bps.rate, group.bps.burst, group.iops.rate), (1 << 20, 4 << 20, 100));
        assert_eq!(toml::from_str("id='slow'\nbps='1M:4M'\niops=100"), Ok(group));
        let error = toml::from_str::<LimitGroupSpec>("id='slow'").unwrap_err();
        assert!(error.to_string().contains("limits nothing"), "{error}");
    }

    #[test]
    fn refusals_say_what_to_write() {
        for (text, word) in [
            ("bps=1M", "needs a name"),
            ("id=a/b,bps=1M", "not a possible name"),
            ("id=a", "limits nothing"),
            ("id=a,bps=0", "limits nothing"),
            ("id=a,bps=fast", "100M:200M"),
            ("id=a,bsp=1M", "did you mean 'bps'?"),
            ("id=a,iops=1,iops=2", "given twice"),
            ("a", "is not KEY=VALUE"),
        ] {
            assert!(refusal(text).contains(word), "{text}: {}", refusal(text));
        }
    }

    #[test]
    fn a_device_joins_a_group_that_there_is() {
        let group = |text: &str| text.parse::<LimitGroupSpec>().unwrap();
        let groups = [group("id=slow,iops=1"), group("id=fast,iops=9")];
        assert_eq!(check_member(&groups, "disk0", "fast"), Ok(()));
        let refusal = |groups, name| check_member(groups, "disk0", name).unwrap_err().to_string();
        assert_eq!(refusal(&groups, "slwo"), "disk0: there is no limit group 'slwo': did you mean 'slow'?");
        assert!(refusal(&[], "slow").contains("--limit-group id=slow"));
        let twice = [group("id=a,iops=1"), group("id=a,iops=2")];
        assert_eq!(check(&twice, &[], &[]), Err(LimitGroupError::SameName("a".into())));
    }
}
