//! The scheduling policy of the process. Contains `unsafe`: one system call that no safe wrapper at hand has.

use nix::errno::Errno;

/// Puts the calling thread under SCHED_BATCH, which every process may do.
///
/// # Errors
/// The host refuses.
pub fn batch() -> Result<(), Errno> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a live `sched_param`, which the call only reads.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    Errno::result(result).map(drop)
}
