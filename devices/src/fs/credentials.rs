//! Whose files are made: the guest's user and group, for a directory whose owners are the guest's as they are.
//!
//! Contains unsafe code: `setfsuid(2)` and its kin, which change the calling thread alone and have no safe interface here.

use rustix::io::Errno;

/// While this lives, what the thread makes belongs to somebody else.
#[derive(Debug)]
pub(super) struct Credentials {
    assumed: bool,
}

impl Credentials {
    /// The process's own.
    pub(super) fn own() -> Self {
        Self { assumed: false }
    }

    /// The guest's user and group. EPERM for those that this jail does not have.
    pub(super) fn assume(uid: u32, gid: u32) -> Result<Self, Errno> {
        let this = Self { assumed: true };
        set(Which::Group, gid)?;
        set(Which::User, uid)?;
        Ok(this)
    }
}

impl Credentials {
    /// The process's own, and a group, if this jail has it.
    pub(super) fn join(gid: u32) -> Self {
        let _not_of_this_jail = set(Which::Group, gid);
        Self { assumed: true }
    }
}

impl Drop for Credentials {
    fn drop(&mut self) {
        if self.assumed {
            // The process is user 0 of its user namespace then, which may always go back.
            let _ = set(Which::User, 0);
            let _ = set(Which::Group, 0);
        }
    }
}

enum Which {
    User,
    Group,
}

/// Sets one of the two and looks whether it was set: the calls answer what was before, failed or not.
fn set(which: Which, id: u32) -> Result<(), Errno> {
    let call = match which {
        Which::User => libc::SYS_setfsuid,
        Which::Group => libc::SYS_setfsgid,
    };
    // SAFETY: no memory is involved; the calls concern this thread's file system accesses and nothing else.
    let now = unsafe {
        libc::syscall(call, id);
        libc::syscall(call, u32::MAX)
    };
    if now == i64::from(id) { Ok(()) } else { Err(Errno::PERM) }
}
