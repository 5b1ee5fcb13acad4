//! The supervisor's side of a policy: what a jailed thread tried.
//!
//! Contains unsafe code: `SECCOMP_IOCTL_NOTIF_RECV` and `pidfd_getfd`, which no safe interface offers.

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::{JailedProcess, PolicyName};

include!(concat!(env!("OUT_DIR"), "/syscalls.rs"));

/// Supervisor's end of one policy.
#[derive(Debug)]
pub struct ViolationListener {
    policy: PolicyName,
    listener: OwnedFd,
}

/// A system call that a policy forbids, as the kernel saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Thread id in the supervisor's pid namespace.
    pub thread: i32,
    /// Number of the system call (x86-64).
    pub number: i32,
    /// Its name; `unknown` for a number that has none and for a call of another architecture (32-bit, x32).
    pub name: &'static str,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// The policy.
    pub policy: PolicyName,
}

impl fmt::Display for Violation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.arguments;
        write!(
            out,
            "thread {} tried {} (system call {}) with {a:#x} {b:#x} {c:#x} {d:#x} {e:#x} {f:#x}, which {} does not allow",
            self.thread,
            self.name,
            self.number,
            self.policy.file()
        )
    }
}

impl ViolationListener {
    /// A listener that came with `Ready`. Take listeners from a process once, with its first `Ready`: a process that was broken
    /// into later must not be able to bring one of its own.
    #[must_use]
    pub fn new(policy: PolicyName, listener: OwnedFd) -> Self {
        Self { policy, listener }
    }

    /// The policy that it listens to.
    #[must_use]
    pub fn policy(&self) -> PolicyName {
        self.policy
    }

    /// Reads the violation after the descriptor ([`AsFd`]) polled readable; `None` when there is none (any more). The caller
    /// then kills the process through its pidfd and never answers the call. The descriptor polls `HUP` when the thread is gone.
    ///
    /// # Errors
    /// The error of the `ioctl`; a descriptor that is no listener.
    pub fn read(&self) -> io::Result<Option<Violation>> {
        // The ioctl waits when nothing is there.
        let mut poll = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut poll, PollTimeout::ZERO) {
            Ok(_) if poll.iter().any(|fd| fd.revents().is_some_and(|it| it.contains(PollFlags::POLLIN))) => {}
            Ok(_) | Err(Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        // SAFETY: the structure is plain data, and the kernel demands that it is zero.
        let mut notification: libc::seccomp_notif = unsafe { mem::zeroed() };
        // SAFETY: the request number carries the structure's size, so the kernel writes no more than that.
        let result = unsafe {
            libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notification)
        };
        match Errno::result(result) {
            // The thread was killed meanwhile.
            Err(Errno::ENOENT | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        let data = notification.data;
        Ok(Some(Violation {
            thread: notification.pid.cast_signed(),
            number: data.nr,
            name: if data.arch == AUDIT_ARCH_X86_64 { syscall_name(data.nr) } else { "unknown" },
            arguments: data.args,
            policy: self.policy,
        }))
    }
}

impl JailedProcess {
    /// What a thread tried after it entered its policy and before the process reported `Ready`, if it did: its listener is still
    /// in the process then, from where this takes a copy. `policy_of` knows the policies of the process: it is given the
    /// name of the thread, none for the main thread. The thread waits until the process is killed. `None` also where the host
    /// forbids to look.
    #[must_use]
    pub fn early_violation(&self, policy_of: impl Fn(Option<&str>) -> PolicyName) -> Option<Violation> {
        /// More descriptors than any process has before it is ready.
        const MOST: i32 = 1024;
        /// Numbers without a descriptor in a row, after which no more are looked for.
        const FREE: u32 = 64;
        let free = Cell::new(0);
        // By number: the process is not dumpable, so that an ordinary user cannot list what it has.
        (0..MOST).take_while(|_| free.get() < FREE).find_map(|number| {
            // SAFETY: no memory is involved.
            let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.as_fd().as_raw_fd(), number, 0) };
            free.set(if copy < 0 { free.get() + 1 } else { 0 });
            let copy = RawFd::try_from(Errno::result(copy).ok()?).ok()?;
            // SAFETY: the call returned a new descriptor, which nobody else owns.
            let copy = unsafe { OwnedFd::from_raw_fd(copy) };
            let is = fs::read_link(format!("/proc/self/fd/{}", copy.as_raw_fd())).ok()?;
            if is.as_os_str() != "anon_inode:seccomp notify" {
                return None;
            }
            let violation = ViolationListener::new(policy_of(None), copy).read().ok()??;
            if violation.thread == self.pid() {
                return Some(violation);
            }
            let name = fs::read_to_string(format!("/proc/{}/comm", violation.thread)).unwrap_or_default();
            Some(Violation { policy: policy_of(Some(name.trim_end())), ..violation })
        })
    }
}

/// <linux/audit.h>: EM_X86_64, 64-bit, little-endian.
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;

impl AsFd for ViolationListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Name of an x86-64 system call; `unknown` when the number has none.
#[must_use]
pub fn syscall_name(number: i32) -> &'static str {
    SYSCALLS
        .binary_search_by_key(&number, |&(known, ..)| i32::from(known))
        .ok()
        .and_then(|index| SYSCALLS.get(index))
        .and_then(|&(_, start, length)| {
            let start = usize::from(start);
            NAMES.get(start..start + usize::from(length))
        })
        .unwrap_or("unknown")
}
