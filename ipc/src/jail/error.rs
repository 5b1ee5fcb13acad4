//! What can go wrong on the way into a jail.

use std::fmt;
use std::fs;
use std::io;

use nix::errno::Errno;

use super::PolicyName;

/// A namespace or another part of the jail that a host can forbid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// New user, mount, pid, net, ipc, uts and cgroup namespaces.
    Namespaces,
    /// Empty read-only root.
    Root,
    /// seccomp filters.
    Seccomp,
}

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
}

impl Step {
    const ALL: [Self; 21] = [
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
        })
    }
}

/// Why a process was not jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// `clone3` failed because of the namespaces.
    #[error("this host does not let user {uid} create namespaces ({errno}){hint}", errno = .errno.desc())]
    NamespacesForbidden {
        /// Effective user of the supervisor.
        uid: u32,
        /// What `clone3` said.
        errno: Errno,
        /// What the host's settings say, each with its file; empty or starts with a colon.
        hint: String,
    },
    /// `clone3` failed for another reason.
    #[error("cannot create a process: {}", .0.desc())]
    Clone(Errno),
    /// The user or group map was refused.
    #[error("cannot map the process to host id {id} through /proc/PID/{file}: {source}")]
    Map {
        /// `uid_map`, `gid_map` or `setgroups`.
        file: &'static str,
        /// Host user or group id.
        id: u32,
        /// Why.
        source: io::Error,
    },
    /// The new process failed before its program ran.
    #[error("the new process could not {step}: {}", .errno.desc())]
    Step {
        /// Where.
        step: Step,
        /// Why.
        errno: Errno,
    },
    /// The new process ended before its program ran and did not say why.
    #[error("the new process was killed before its program ran")]
    Vanished,
    /// The program did not run in time.
    #[error("the new process did not execute its program in time")]
    Deadline,
    /// An argument holds a zero byte.
    #[error("a program argument holds a zero byte")]
    Argument,
    /// The identity is host root, or the supervisor's own limits do not allow it.
    #[error("a jailed process must not be host user or group 0")]
    RootIdentity,
    /// A system call of the supervisor or of the process's own preparation failed.
    #[error("cannot {what}: {source}")]
    Call {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A descriptor is open that the list does not name.
    #[error("descriptor {0} is open but not on the list of this process")]
    UnexpectedDescriptor(i32),
    /// A descriptor of the list is not open.
    #[error("descriptor {0} is on the list of this process but not open")]
    MissingDescriptor(i32),
    /// The kernel refused a filter.
    #[error("cannot load {}: {}", .policy.file(), .errno.desc())]
    Filter {
        /// The policy.
        policy: PolicyName,
        /// Why.
        errno: Errno,
    },
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
            _ => None,
        }
    }

    /// Turns a failed system call of this process into an error.
    pub(super) fn call(what: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Call { what, source: errno.into() }
    }

    /// Judges a failed `clone3`.
    pub(super) fn clone(errno: Errno) -> Self {
        match errno {
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
