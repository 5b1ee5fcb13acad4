//! The shared directory in the process that shares it: what it was given, and its exception to Landlock. No other process runs this.
//!
//! Contains unsafe code: descriptors by their numbers, and a system call that has no safe interface here.

use std::ffi::c_long;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::child::SHARED;

/// That of `/proc/self/fd`, by which what is held of the directory is opened.
const DESCRIPTORS: RawFd = SHARED + 1;

/// What is withheld below the directory, too: EXECUTE, MAKE_CHAR, MAKE_BLOCK, IOCTL_DEV. Whether it may be written is said by its
/// mount.
const NEVER: u64 = 1 << 0 | 1 << 6 | 1 << 11 | 1 << 15;

static GIVEN: AtomicBool = AtomicBool::new(false);

/// `struct landlock_path_beneath_attr` of <linux/landlock.h>.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: RawFd,
}

/// Which of these open descriptors a process that shares a directory has beside the others; none in another.
pub(super) fn given(open: &[RawFd]) -> &'static [RawFd] {
    let given = open.contains(&SHARED);
    GIVEN.store(given, Ordering::SeqCst);
    if given { &[SHARED, DESCRIPTORS] } else { &[] }
}

/// Adds the one rule to a set that withholds `files`; nothing in a process that shares none.
pub(super) fn allow(ruleset: BorrowedFd<'_>, files: u64) -> Result<(), Errno> {
    const PATH_BENEATH: c_long = 1;
    if !GIVEN.load(Ordering::SeqCst) {
        return Ok(());
    }
    let rule = PathBeneath { allowed: files & !NEVER, parent: SHARED };
    // SAFETY: the kernel reads a live structure of the type that the constant names.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0 as c_long,
        )
    };
    Errno::result(result).map(drop)
}

/// The directory that [`super::SharedDirectory`] gave to this process, and its `/proc/self/fd`, each the root of a mount tree of its own;
/// once, after [`super::enter`]. `None`: it was given none.
#[must_use]
pub fn shared_directory() -> Option<(OwnedFd, OwnedFd)> {
    GIVEN.swap(false, Ordering::SeqCst).then(|| {
        // SAFETY: `enter` has seen that both are open, and nobody has taken them before.
        unsafe { (OwnedFd::from_raw_fd(SHARED), OwnedFd::from_raw_fd(DESCRIPTORS)) }
    })
}
