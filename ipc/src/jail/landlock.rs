//! Landlock (landlock(7), Documentation/userspace-api/landlock.rst): a second wall behind the empty root and the empty network.
//!
//! Contains unsafe code: its system calls have no safe interface here.
//!
//! Every right that this kernel can withhold is withheld, and no rule gives one back: no path of any file system, no TCP port, no
//! abstract socket and no signal to a process outside. Descriptors that the process was given keep their rights. The one exception
//! is a process that shares a directory: below that it may do what sharing takes, and neither execute nor make or drive devices.
//! It goes up in the program, at its start, and not before `execveat`: there a rule would have to allow the program's own file
//! for ever. The other threads do not exist then, so all inherit it.

use std::ffi::c_long;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;

use super::{JailError, shared};

/// `struct landlock_ruleset_attr` of <linux/landlock.h>.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}

/// What a version of the interface can withhold.
const fn withheld(version: c_long) -> Ruleset {
    Ruleset {
        // EXECUTE to MAKE_SYM; then REFER, TRUNCATE and IOCTL_DEV.
        files: match version {
            1 => (1 << 13) - 1,
            2 => (1 << 14) - 1,
            3 | 4 => (1 << 15) - 1,
            _ => (1 << 16) - 1,
        },
        // BIND_TCP, CONNECT_TCP.
        network: if version >= 4 { 0b11 } else { 0 },
        // ABSTRACT_UNIX_SOCKET, SIGNAL.
        scoped: if version >= 6 { 0b11 } else { 0 },
    }
}

/// Version of the interface that the kernel has.
///
/// # Errors
/// `ENOSYS` when the kernel has no Landlock, `EOPNOTSUPP` when it was switched off at its start.
pub fn landlock_version() -> Result<c_long, Errno> {
    const VERSION: c_long = 1;
    // SAFETY: with this flag the call takes no pointer.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<u8>(), 0 as c_long, VERSION) };
    Errno::result(version)
}

/// Puts the calling thread and all that it will create under it; nothing where the kernel has none, which the supervisor reports.
pub(super) fn restrict() -> Result<(), JailError> {
    let Ok(version) = landlock_version() else { return Ok(()) };
    let ruleset = withheld(version);
    let size: c_long = match version {
        1..=3 => 8,
        4 | 5 => 16,
        _ => mem::size_of::<Ruleset>() as c_long,
    };
    // SAFETY: the kernel reads as many bytes of the live structure as it is told.
    let fd =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size, 0 as c_long) };
    let fd = Errno::result(fd).map_err(JailError::Landlock)?;
    // SAFETY: the call returned a new descriptor, which nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).unwrap_or(-1)) };
    shared::allow(fd.as_fd(), ruleset.files).map_err(JailError::Landlock)?;
    // SAFETY: no memory is involved.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd.as_raw_fd(), 0 as c_long) };
    Errno::result(result).map(drop).map_err(JailError::Landlock)
}
