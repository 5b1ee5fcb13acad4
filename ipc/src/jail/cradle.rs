//! Where a new process lives between `clone3` and `execveat`: in this process's memory.
//!
//! As after `vfork(2)` nothing is copied; but this process goes on meanwhile. A copy costs both more than all system calls of building
//! a jail but the network namespace: page tables, a fault for each page that either writes, and the end of the copy at the exec.
//!
//! Contains unsafe code: a system call that returns twice, the second time on another stack.

use std::arch::asm;
use std::ffi::{CString, c_char, c_long, c_ulong, c_void};
use std::mem;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::JailError;
use super::child::{self, Plan};

/// Bytes, the guard below included: `child` needs a fraction of the rest.
const STACK: NonZeroUsize = NonZeroUsize::new(64 << 10).unwrap();
const GUARD: usize = 4 << 10;

const CLONED: c_ulong = (libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_PIDFD) as c_ulong;
/// <linux/sched.h>; these do not fit the type that `libc` gives them.
const CLEAR_HANDLERS: c_ulong = 0x1_0000_0000;
const INTO_CGROUP: c_ulong = 0x2_0000_0000;

/// What a new process uses of this one's memory; to be kept until it has executed its program or ended.
#[derive(Debug)]
pub(super) struct Cradle {
    plan: Plan,
    argv: Vec<*const c_char>,
    /// What `argv` points at.
    _arguments: Vec<CString>,
    stack: NonNull<c_void>,
}

// SAFETY: only the new process reads what the pointers lead to, and all of it belongs to this structure.
unsafe impl Send for Cradle {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl Sync for Cradle {}

impl Cradle {
    /// For a process with these arguments, which does as `plan` says.
    pub(super) fn new(plan: Plan, arguments: Vec<CString>) -> Result<Box<Self>, JailError> {
        let argv = arguments.iter().map(|argument| argument.as_ptr()).chain([ptr::null()]).collect();
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_STACK;
        // SAFETY: a new mapping; its lowest page, which nobody uses yet, becomes the guard.
        let stack = unsafe {
            let stack = mmap_anonymous(None, STACK, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags);
            let stack = stack.map_err(JailError::call("map the new process's stack"))?;
            mprotect(stack, GUARD, ProtFlags::PROT_NONE).map(|()| stack)
        };
        let stack = stack.map_err(JailError::call("guard the new process's stack"))?;
        Ok(Box::new(Self { plan, argv, _arguments: arguments, stack }))
    }

    /// `clone3`, into this cgroup. Without `shared` the new process has a copy of the memory after all.
    pub(super) fn clone(
        &self,
        cgroup: Option<BorrowedFd<'_>>,
        shared: bool,
    ) -> Result<(i32, OwnedFd), JailError> {
        let mut pidfd: i32 = -1;
        // SAFETY: clone_args is plain data for which all zero means "nothing".
        let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
        arguments.flags = CLONED | CLEAR_HANDLERS;
        if shared {
            arguments.flags |= libc::CLONE_VM as c_ulong;
        }
        arguments.pidfd = (&raw mut pidfd) as u64;
        arguments.exit_signal = libc::SIGCHLD as u64;
        (arguments.stack, arguments.stack_size) = (self.stack.as_ptr() as u64, STACK.get() as u64);
        if let Some(cgroup) = cgroup {
            arguments.flags |= INTO_CGROUP;
            arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or_default();
        }
        let mut before = SigSet::empty();
        nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
            .map_err(JailError::call("block signals"))?;
        // SAFETY: `child::run` has what its contract asks for: one thread, all signals blocked and none handled, and a plan that lives as
        // long as this structure.
        let pid = unsafe { clone3(&arguments, child::run, &raw const self.plan, self.argv.as_ptr()) };
        // It cannot fail with a mask that was in force; and an error would leave a process that nobody knows.
        let _restored = nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
        let pid = i32::try_from(pid).map_err(|_| JailError::Clone(Errno::ERANGE))?;
        if pid < 0 {
            return Err(JailError::clone(Errno::from_raw(-pid), cgroup.is_some()));
        }
        // SAFETY: clone3 succeeded with CLONE_PIDFD, so `pidfd` is a new descriptor that nobody else owns.
        Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
    }
}

impl Drop for Cradle {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; by the contract of the structure nobody stands on it any more.
        let _ = unsafe { munmap(self.stack, STACK.get()) };
    }
}

/// `clone3`; the new process begins in `first` on the stack that `arguments` names. A process id, or an error as a negative number.
///
/// # Safety
/// The stack is nobody else's, and `plan` and `argv` are what `first` asks for, until the new process has let go of this memory.
unsafe fn clone3(
    arguments: &libc::clone_args,
    first: unsafe extern "C" fn(*const Plan, *const *const c_char) -> !,
    plan: *const Plan,
    argv: *const *const c_char,
) -> c_long {
    let result;
    // SAFETY: the kernel leaves all registers but rax, rcx and r11 as they are, in both processes. The new one, where rax is 0, has an
    // aligned stack and no way back from `first`.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "mov rsi, r9",
            "call rdx",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") ptr::from_ref(arguments),
            in("rsi") size_of::<libc::clone_args>(),
            in("rdx") first as usize,
            in("r8") plan,
            in("r9") argv,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}
