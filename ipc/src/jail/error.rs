//! What can go wrong on the way into a jail.

use std::io;

use nix::errno::Errno;

use super::{PolicyName, Step};

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
    /// `clone3` failed because of the cgroup that the process was to start in.
    #[error("cannot start a process in its cgroup: {}", .0.desc())]
    Cgroup(Errno),
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
    /// `newuidmap` did not map the process to a subordinate user.
    #[error(
        "newuidmap does not map the process to the subordinate user {uid}: {reason} (--uids off does without)"
    )]
    Subordinate {
        /// Host user id.
        uid: u32,
        /// What it said.
        reason: String,
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
    /// Landlock is there and refused to be used.
    #[error("cannot put the process under Landlock: {}", .0.desc())]
    Landlock(Errno),
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
    /// Turns a failed system call of this process into an error.
    pub(super) fn call(what: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Call { what, source: errno.into() }
    }
}
