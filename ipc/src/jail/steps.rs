//! What the supervisor and the new process know about its way into the jail, and what they say when it ends there. Nothing of
//! this runs in a program that is in its jail.

use std::fmt;
use std::fs;

use nix::errno::Errno;

use super::{JailError, Layer};

/// What the new process was doing between `clone3` and the first instruction of its program. The numbers cross the report
/// socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "each name is the system call; `Display` is the sentence")]
pub enum Step {
    Descriptors = 1,
    Signals,
    Unshare,
    WaitForMap,
    SetGroups,
    SetGid,
    SetUid,
    PrivateMounts,
    MountRoot,
    ChangeRoot,
    DetachOldRoot,
    Session,
    Limit,
    SecureBits,
    BoundingSet,
    AmbientSet,
    Capabilities,
    NoNewPrivileges,
    ParentDeathSignal,
    ParentGone,
    Execute,
    Share,
}

impl Step {
    const ALL: [Self; 22] = [
        Self::Descriptors,
        Self::Signals,
        Self::Unshare,
        Self::WaitForMap,
        Self::SetGroups,
        Self::SetGid,
        Self::SetUid,
        Self::PrivateMounts,
        Self::MountRoot,
        Self::ChangeRoot,
        Self::DetachOldRoot,
        Self::Session,
        Self::Limit,
        Self::SecureBits,
        Self::BoundingSet,
        Self::AmbientSet,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::ParentDeathSignal,
        Self::ParentGone,
        Self::Execute,
        Self::Share,
    ];

    /// The step that a number on the report socket stands for.
    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u8 == number)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Descriptors => "put its descriptors in order",
            Self::Signals => "reset its signals",
            Self::Unshare => "create its mount, net, ipc, uts and cgroup namespaces",
            Self::WaitForMap => "wait for its user map",
            Self::SetGroups => "drop its supplementary groups",
            Self::SetGid => "change its group",
            Self::SetUid => "change its user",
            Self::PrivateMounts => "make its mounts private",
            Self::MountRoot => "mount its empty root",
            Self::ChangeRoot => "move into its empty root",
            Self::DetachOldRoot => "detach the host's root",
            Self::Session => "start its own session",
            Self::Limit => "set its resource limits",
            Self::SecureBits => "lock its securebits",
            Self::BoundingSet => "empty its capability bounding set",
            Self::AmbientSet => "clear its ambient capabilities",
            Self::Capabilities => "drop its capabilities",
            Self::NoNewPrivileges => "set no_new_privs",
            Self::ParentDeathSignal => "set its parent-death signal",
            Self::ParentGone => "go on: the supervisor is gone",
            Self::Execute => "execute the program",
            Self::Share => "take the shared directory with it (as a mount of its own, with /proc/self/fd)",
        })
    }
}

impl JailError {
    /// The layer that the host lacks or forbids, if that is the reason.
    #[must_use]
    pub fn missing_layer(&self) -> Option<Layer> {
        match self {
            Self::NamespacesForbidden { .. } | Self::Step { step: Step::Unshare, .. } => {
                Some(Layer::Namespaces)
            }
            Self::Step { step: Step::MountRoot | Step::ChangeRoot | Step::DetachOldRoot, .. } => {
                Some(Layer::Root)
            }
            Self::Filter { .. } => Some(Layer::Seccomp),
            Self::Landlock(_) => Some(Layer::Landlock),
            Self::Cgroup(_) => Some(Layer::Cgroup),
            Self::Map { file: "uid_map" | "gid_map", .. } | Self::Subordinate { .. } => {
                Some(Layer::DistinctUids)
            }
            _ => None,
        }
    }

    /// Judges a failed `clone3`.
    pub(super) fn clone(errno: Errno, into_cgroup: bool) -> Self {
        match errno {
            Errno::EACCES | Errno::EBUSY | Errno::ENODEV | Errno::ENOENT | Errno::EOPNOTSUPP
                if into_cgroup =>
            {
                Self::Cgroup(errno)
            }
            Errno::EPERM | Errno::EACCES | Errno::ENOSPC | Errno::EUSERS | Errno::EINVAL | Errno::ENOSYS => {
                Self::NamespacesForbidden {
                    uid: nix::unistd::geteuid().as_raw(),
                    errno,
                    hint: namespace_hint(),
                }
            }
            _ => Self::Clone(errno),
        }
    }
}

/// What the host's settings say about user namespaces, only those that forbid them.
fn namespace_hint() -> String {
    let settings = [
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/user/max_pid_namespaces", "0"),
    ];
    let found: Vec<String> = settings
        .into_iter()
        .filter(|(file, forbids)| fs::read_to_string(file).is_ok_and(|value| value.trim() == *forbids))
        .map(|(file, forbids)| format!("{file} says {forbids}"))
        .collect();
    if found.is_empty() { String::new() } else { format!(": {}", found.join(", ")) }
}
