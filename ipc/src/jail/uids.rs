//! Host users for the processes of a machine: a block of numbers that no other machine has.
//!
//! Numbers are claimed by locking bytes of a file, byte N for user N: a lock ends with its supervisor, however that ends, and
//! blocks of any size from any ranges never overlap.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{Uid, geteuid};

/// Numbers that systemd's list of users assigns to nobody ("Users, Groups, UIDs and GIDs on systemd systems"): from 0x70000000.
const DEFAULT: UidRange = UidRange { first: 0x7000_0000, count: 1 << 20 };
/// Blocks that are tried before the range counts as used up.
const ATTEMPTS: u32 = 65_536;

/// Consecutive user numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidRange {
    /// The first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Default for UidRange {
    /// The range for machines of root.
    fn default() -> Self {
        DEFAULT
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.first, self.count)
    }
}

/// A text that is no range.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a range of users: write FIRST:COUNT without user 0 and below 4294967295, such as 1879048192:1048576, or off"
)]
pub struct RangeError(String);

impl FromStr for UidRange {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let wrong = || RangeError(text.to_owned());
        let (first, count) = text.split_once(':').ok_or_else(wrong)?;
        let (first, count): (u32, u32) =
            (first.parse().map_err(|_| wrong())?, count.parse().map_err(|_| wrong())?);
        // (uid_t) -1 is none.
        let fits = first.checked_add(count).is_some_and(|end| end < u32::MAX);
        if first == 0 || count == 0 || !fits { Err(wrong()) } else { Ok(Self { first, count }) }
    }
}

/// Why each process cannot have a user of its own.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// An ordinary user without subordinate users.
    #[error("/etc/subuid gives user {0} no range of users (usermod --add-subuids FIRST-LAST USER)")]
    NoSubordinates(Uid),
    /// The helper is missing.
    #[error("newuidmap is not installed, or not set-user-id (Debian: package uidmap)")]
    NoHelper,
    /// The helper cannot gain its rights.
    #[error("no_new_privs is set here, so newuidmap cannot map users")]
    NoNewPrivileges,
    /// Numbers that this user namespace does not have.
    #[error("users {0} are not for this user or user namespace: name a range that is (--uids FIRST:COUNT)")]
    NotMapped(UidRange),
    /// All are taken, or the range is too small.
    #[error("users {range} have no block of {count} that is free: name a larger range (--uids FIRST:COUNT)")]
    UsedUp {
        /// The range.
        range: UidRange,
        /// How many are needed.
        count: u32,
    },
    /// No folder to keep account in.
    #[error("XDG_RUNTIME_DIR names no folder in which to keep account of users in use")]
    NoRuntimeFolder,
    /// The account cannot be kept.
    #[error("cannot keep account of users in use in {path}: {source}", path = path.display())]
    Account {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Users that belong to one machine, as long as this lives.
#[derive(Debug)]
pub struct UidBlock {
    range: UidRange,
    subordinate: bool,
    _account: File,
}

impl UidBlock {
    /// Claims `count` users: of root's range, or of the subordinate users of an ordinary user.
    ///
    /// # Errors
    /// [`UidError`]: each process cannot have its own.
    pub fn claim(range: Option<UidRange>, count: u32) -> Result<Self, UidError> {
        let subordinate = !geteuid().is_root();
        let range = if subordinate {
            let own = subordinates(geteuid()).ok_or(UidError::NoSubordinates(geteuid()))?;
            let range = range.unwrap_or(own);
            if !is_mapped(&format!("{} 0 {}", own.first, own.count), range) {
                return Err(UidError::NotMapped(range));
            }
            newuidmap().ok_or(UidError::NoHelper)?;
            if nix::sys::prctl::get_no_new_privs().unwrap_or(true) {
                return Err(UidError::NoNewPrivileges);
            }
            range
        } else {
            let range = range.unwrap_or_default();
            if !is_mapped(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default(), range) {
                return Err(UidError::NotMapped(range));
            }
            range
        };
        let path = account_path(subordinate)?;
        Self::claim_in(&path, range, count, subordinate)
    }

    fn claim_in(path: &Path, range: UidRange, count: u32, subordinate: bool) -> Result<Self, UidError> {
        let failed = |source: io::Error| UidError::Account { path: path.to_owned(), source };
        let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
        let account = options.open(path).or_else(|error| match (error.kind(), path.parent()) {
            // The first machine since the host started.
            (io::ErrorKind::NotFound, Some(folder)) => {
                let _exists = DirBuilder::new().mode(0o755).create(folder);
                options.open(path)
            }
            _ => Err(error),
        });
        let account = account.map_err(failed)?;
        let blocks = range.count / count.max(1);
        // Not always the first free one: processes of a supervisor that was killed end a moment after its locks.
        let start = std::process::id() % blocks.max(1);
        for block in (start..blocks).chain(0..start).take(ATTEMPTS as usize) {
            let claimed = UidRange { first: range.first.saturating_add(block.saturating_mul(count)), count };
            match lock(&account, claimed) {
                Ok(()) => return Ok(Self { range: claimed, subordinate, _account: account }),
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Err(UidError::UsedUp { range, count })
    }

    /// The user of the process with this number, from 0.
    #[must_use]
    pub fn uid(&self, number: u32) -> Option<u32> {
        (number < self.range.count).then(|| self.range.first.saturating_add(number))
    }

    /// Whether they are subordinate users of an ordinary one, which newuidmap maps.
    #[must_use]
    pub fn is_subordinate(&self) -> bool {
        self.subordinate
    }

    /// All of them.
    #[must_use]
    pub fn range(&self) -> UidRange {
        self.range
    }
}

/// `F_OFD_SETLK` (fcntl(2)): belongs to the open file and not to the process.
fn lock(account: &File, range: UidRange) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: range.first.into(),
        l_len: range.count.into(),
        l_pid: 0,
    };
    fcntl(account, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

/// The file whose bytes are locked.
fn account_path(subordinate: bool) -> Result<PathBuf, UidError> {
    if subordinate {
        let folder = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let own = |folder: &PathBuf| fs::metadata(folder).is_ok_and(|it| it.uid() == geteuid().as_raw());
        return Ok(folder.filter(own).ok_or(UidError::NoRuntimeFolder)?.join("bulkhead-uids"));
    }
    Ok(PathBuf::from("/run/bulkhead/uids"))
}

/// Whether a line of `uid_map` (user_namespaces(7)) holds the whole range.
fn is_mapped(map: &str, range: UidRange) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        let (first, end) = (u64::from(range.first), u64::from(range.first) + u64::from(range.count));
        first >= inside && end <= inside.saturating_add(count)
    })
}

/// The first range that `/etc/subuid` (subuid(5)) gives a user, by name or number.
fn subordinates(user: Uid) -> Option<UidRange> {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    parse_subordinates(&fs::read_to_string("/etc/subuid").ok()?, &users, user)
}

fn parse_subordinates(ranges: &str, users: &str, user: Uid) -> Option<UidRange> {
    let number = user.to_string();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then_some(name)
    });
    ranges.lines().find_map(|line| {
        let (owner, range) = line.split_once(':')?;
        (owner == number || Some(owner) == name).then(|| range.parse().ok())?
    })
}

/// The helper that maps subordinate users, where it has the rights to.
pub(super) fn newuidmap() -> Option<PathBuf> {
    let folders = ["/usr/bin", "/bin", "/usr/local/bin", "/run/wrappers/bin"];
    folders.into_iter().map(|folder| Path::new(folder).join("newuidmap")).find(|path| {
        // File capabilities serve as well as the set-user-id bit; they are not visible without another call.
        fs::metadata(path).is_ok_and(|it| it.is_file() && it.mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_read_back_and_others_are_refused() {
        assert_eq!(UidRange::default().to_string().parse(), Ok(UidRange::default()));
        for text in ["", "5", "0:10", "5:0", "4294967290:10", "a:b", "1:-1", "1-5"] {
            let error = text.parse::<UidRange>().unwrap_err().to_string();
            assert!(error.contains("FIRST:COUNT"), "{error}");
        }
    }

    #[test]
    fn two_machines_never_share_a_user() {
        let folder = tempfile::tempdir().unwrap();
        let claim = |range, count| UidBlock::claim_in(&folder.path().join("uids"), range, count, false);
        let range = UidRange { first: 1000, count: 10 };
        let blocks: Vec<UidBlock> = (0..3).map(|_| claim(range, 3).unwrap()).collect();
        let mut uids: Vec<u32> =
            blocks.iter().flat_map(|block| (0..3).filter_map(|number| block.uid(number))).collect();
        uids.sort_unstable();
        assert_eq!(uids, (1000..1009).collect::<Vec<u32>>());
        assert!(blocks.iter().all(|block| block.uid(3).is_none()));
        assert!(matches!(claim(range, 3), Err(UidError::UsedUp { .. })));
        // Another range, of another block size, that overlaps.
        assert!(matches!(claim(UidRange { first: 1008, count: 2 }, 2), Err(UidError::UsedUp { .. })));
        drop(blocks);
        assert!(claim(range, 10).is_ok());
    }

    #[test]
    fn a_range_must_lie_within_the_namespace() {
        let all = "         0          0 4294967295\n";
        assert!(is_mapped(all, UidRange::default()));
        assert!(!is_mapped("0 100000 65536\n", UidRange::default()));
        assert!(is_mapped("0 1000 1\n1 100000 65536\n", UidRange { first: 1, count: 65536 }));
        assert!(!is_mapped("0 1000 1\n1 100000 65536\n", UidRange { first: 0, count: 2 }));
    }

    #[test]
    fn subordinate_users_are_found_by_name_and_number() {
        let users = "root:x:0:0:::\nann:x:1000:1000:::\n";
        let of = |ranges: &str| parse_subordinates(ranges, users, Uid::from_raw(1000));
        let expected = Some(UidRange { first: 100_000, count: 65536 });
        assert_eq!(of("bob:1:2\nann:100000:65536\nann:1:2\n"), expected);
        assert_eq!(of("1000:100000:65536"), expected);
        assert_eq!(of("root:100000:65536"), None);
        assert_eq!(of("ann:nonsense"), None);
    }
}
