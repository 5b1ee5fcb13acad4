//! The new process between `clone3` and `execveat`.
//!
//! Contains unsafe code: this code runs in the memory of a process whose threads go on meanwhile (`cradle`). So it makes system calls
//! only, directly, on data that was prepared before the clone and on its own stack: no allocation, no lock, no panic, no standard
//! library, no thread-local `errno`. It ends in the program or in a report (step and errno) to the supervisor.
//!
//! The order matters:
//! 1. descriptors first, so that this process holds nothing of its siblings (their report sockets in particular);
//! 2. the namespaces are created here and not by `clone3`, so that the supervisor starts the next process meanwhile;
//! 3. the network namespace comes after the root: detaching the old root waits until every CPU has left what it does in the
//!    kernel (an RCU grace period), and building a network namespace, as the siblings do, is the longest thing to wait for;
//! 4. the user change comes after the map, the root change before the capabilities go;
//! 5. the parent-death signal comes last, because every change of credentials clears it.

use std::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::os::fd::RawFd;
use std::ptr;

use super::Step;
use super::raw::syscall;

/// Number of resource limits.
pub(super) const LIMITS: usize = 11;

/// Everything that the new process needs, prepared before the clone.
#[derive(Debug)]
pub(super) struct Plan {
    /// Becomes descriptor 0.
    pub(super) null: RawFd,
    /// Becomes descriptors 1 and 2.
    pub(super) log: RawFd,
    /// Becomes descriptor 3.
    pub(super) channel: RawFd,
    /// The program.
    pub(super) program: RawFd,
    /// This process's end of the report socket: one byte comes when the user map is written, a report goes back.
    pub(super) report: RawFd,
    /// User and group to become, mapped by then.
    pub(super) uid: u32,
    /// Group to become.
    pub(super) gid: u32,
    /// The supervisor is privileged: supplementary groups can and must be dropped.
    pub(super) drop_groups: bool,
    /// Resources with their soft and hard limits.
    pub(super) limits: [(c_uint, u64, u64); LIMITS],
    /// Namespaces that are created here, the network's aside.
    pub(super) unshare: c_ulong,
    /// A directory that the process shares, and `MOUNT_ATTR_…` for it.
    pub(super) shared: Option<(RawFd, u64)>,
    /// Capabilities that stay, in the process's own user namespace: one bit each.
    pub(super) kept: u32,
}

/// First number above all descriptors with a fixed place.
const PROGRAM: c_int = 4;
const REPORT: c_int = 5;
const FREE: c_int = 6;
/// The shared directory, when there is one; `/proc/self/fd` is the next.
pub(super) const SHARED: c_int = 6;
/// Where descriptors wait while the fixed places are filled.
const PARKED: c_int = 16;

/// The namespace that is created after the others.
const NETWORK: c_ulong = libc::CLONE_NEWNET as c_ulong;

/// A failed step.
struct Failure(Step, c_int);

/// Becomes the program, or reports and exits.
///
/// # Safety
/// Must run in the child of a `clone3`, as its only thread, with all signals blocked and none handled, on a stack of its own; `plan` and
/// `argv`, a list of strings that ends with a null pointer, stay as they are until it has executed its program or ended.
pub(super) unsafe extern "C" fn run(plan: *const Plan, argv: *const *const c_char) -> ! {
    // SAFETY: forwarded from this function's contract.
    let (plan, Failure(step, errno)) = unsafe { (&*plan, build(&*plan, argv)) };
    // The report socket is at its fixed place unless the very first step failed.
    let socket = if step as u8 == Step::Descriptors as u8 { plan.report } else { REPORT };
    let mut report = [0_u8; 5];
    report[0] = step as u8;
    report[1..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: the buffer is live; MSG_NOSIGNAL keeps a dead supervisor from mattering; exit_group does not return.
    unsafe {
        syscall!(
            libc::SYS_sendto,
            socket,
            report.as_ptr(),
            report.len(),
            libc::MSG_NOSIGNAL,
            ptr::null::<c_void>(),
            0,
        );
        loop {
            syscall!(libc::SYS_exit_group, 127);
        }
    }
}

/// Turns the result of a raw system call into a step's failure.
fn check(step: Step, result: c_long) -> Result<c_long, Failure> {
    match c_int::try_from(result.wrapping_neg()) {
        Ok(errno @ 1..) => Err(Failure(step, errno)),
        _ => Ok(result),
    }
}

/// All steps in order; returns only on failure.
///
/// # Safety
/// As [`run`].
unsafe fn build(plan: &Plan, argv: *const *const c_char) -> Failure {
    let steps = || -> Result<(), Failure> {
        // SAFETY: forwarded from this function's contract.
        unsafe {
            descriptors(plan)?;
            signals()?;
            check(Step::Unshare, syscall!(libc::SYS_unshare, plan.unshare))?;
            wait_for_map()?;
            identity(plan)?;
            private_mounts()?;
            share(plan)?;
            empty_root()?;
            check(Step::Unshare, syscall!(libc::SYS_unshare, NETWORK))?;
            check(Step::Session, syscall!(libc::SYS_setsid))?;
            syscall!(libc::SYS_umask, 0o077);
            limits(plan)?;
            privileges(plan.kept)?;
            parent_death()?;
            let environment: *const c_char = ptr::null();
            check(
                Step::Execute,
                syscall!(
                    libc::SYS_execveat,
                    PROGRAM,
                    c"".as_ptr(),
                    argv,
                    &raw const environment,
                    libc::AT_EMPTY_PATH,
                ),
            )?;
        }
        Ok(())
    };
    match steps() {
        Err(failure) => failure,
        Ok(()) => Failure(Step::Execute, 0),
    }
}

/// 0 null, 1 and 2 log, 3 channel; 4 program and 5 report, close-on-exec; nothing else.
unsafe fn descriptors(plan: &Plan) -> Result<(), Failure> {
    let step = Step::Descriptors;
    let park = |descriptor: RawFd| -> Result<c_long, Failure> {
        // SAFETY: no memory is involved.
        check(step, unsafe { syscall!(libc::SYS_fcntl, descriptor, libc::F_DUPFD_CLOEXEC, PARKED) })
    };
    let (null, log, channel) = (park(plan.null)?, park(plan.log)?, park(plan.channel)?);
    let (program, report) = (park(plan.program)?, park(plan.report)?);
    let shared = match plan.shared {
        Some((directory, _)) => Some(park(directory)?),
        None => None,
    };
    let places = [
        (null, 0, 0),
        (log, 1, 0),
        (log, 2, 0),
        (channel, 3, 0),
        (program, PROGRAM, libc::O_CLOEXEC),
        (report, REPORT, libc::O_CLOEXEC),
    ];
    for (from, to, flags) in places {
        // SAFETY: no memory is involved.
        check(step, unsafe { syscall!(libc::SYS_dup3, from, to, flags) })?;
    }
    if let Some(directory) = shared {
        // The new mount namespace has a copy of every mount, and moves the working directory to its copy: the way by which a
        // descriptor of the supervisor's namespace leads into this one.
        // SAFETY: no memory is involved.
        check(Step::Share, unsafe { syscall!(libc::SYS_fchdir, directory) })?;
    }
    // SAFETY: no memory is involved; nothing in this process uses a descriptor above.
    check(step, unsafe { syscall!(libc::SYS_close_range, FREE, c_uint::MAX, 0) })?;
    Ok(())
}

/// Default disposition for every signal (ignored ones survive an exec), nothing blocked.
unsafe fn signals() -> Result<(), Failure> {
    /// `struct kernel_sigaction`: handler, flags, restorer, mask; all zero is `SIG_DFL`.
    const DEFAULT: [u64; 4] = [0; 4];
    let nothing = 0_u64;
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: the kernel reads 32 bytes of a live constant and writes nothing.
        check(Step::Signals, unsafe {
            syscall!(libc::SYS_rt_sigaction, signal, DEFAULT.as_ptr(), ptr::null::<c_void>(), 8)
        })?;
    }
    // SAFETY: the kernel reads 8 bytes of a live variable and writes nothing.
    check(Step::Signals, unsafe {
        syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const nothing, ptr::null::<c_void>(), 8,)
    })?;
    Ok(())
}

/// Waits until the supervisor has written the user map; its end of the socket closes when it dies.
unsafe fn wait_for_map() -> Result<(), Failure> {
    let mut byte = 0_u8;
    loop {
        // SAFETY: the kernel writes at most one byte to a live variable.
        let result = unsafe { receive(&raw mut byte, 0) };
        match check(Step::WaitForMap, result) {
            Ok(1) => return Ok(()),
            Ok(_) => return Err(Failure(Step::ParentGone, libc::EPIPE)),
            Err(Failure(_, libc::EINTR)) => {}
            Err(failure) => return Err(failure),
        }
    }
}

/// `recvfrom` of one byte from the report socket.
unsafe fn receive(byte: *mut u8, flags: c_int) -> c_long {
    // SAFETY: the caller passes a pointer to one writable byte.
    unsafe {
        syscall!(libc::SYS_recvfrom, REPORT, byte, 1, flags, ptr::null::<c_void>(), ptr::null::<c_void>(),)
    }
}

/// From the supervisor's user to the mapped one.
unsafe fn identity(plan: &Plan) -> Result<(), Failure> {
    // SAFETY: no memory is involved: the list of groups is empty.
    unsafe {
        if plan.drop_groups {
            check(Step::SetGroups, syscall!(libc::SYS_setgroups, 0, ptr::null::<c_void>()))?;
        }
        check(Step::SetGid, syscall!(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid))?;
        check(Step::SetUid, syscall!(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid))?;
    }
    Ok(())
}

/// No mount of this namespace shows up in another.
unsafe fn private_mounts() -> Result<(), Failure> {
    // SAFETY: the string is static and zero-terminated; the kernel only reads it.
    unsafe {
        check(
            Step::PrivateMounts,
            syscall!(
                libc::SYS_mount,
                ptr::null::<c_char>(),
                c"/".as_ptr(),
                ptr::null::<c_char>(),
                libc::MS_REC | libc::MS_PRIVATE,
                ptr::null::<c_void>(),
            ),
        )?;
    }
    Ok(())
}

/// The shared directory as descriptor 6 and `/proc/self/fd` as 7, each a mount tree of its own that nothing leads out of: it is attached
/// nowhere, and at its root `..` stays where it is.
unsafe fn share(plan: &Plan) -> Result<(), Failure> {
    /// `struct mount_attr` of <linux/mount.h>: what to set, what to clear, propagation, user namespace.
    type Attributes = [u64; 4];
    const RECURSIVE: c_uint = 0x8000;
    const EMPTY_PATH: c_uint = 0x1000;
    let Some((_, set)) = plan.shared else { return Ok(()) };
    let attributes: Attributes = [set, 0, 0, 0];
    let tree = |path: *const c_char, flags: c_uint| -> Result<(), Failure> {
        // The lowest descriptors from 6 on are free, and stay open across the exec.
        // SAFETY: the callers pass static strings that end with a zero, which the kernel only reads.
        check(Step::Share, unsafe { syscall!(libc::SYS_open_tree, libc::AT_FDCWD, path, flags) }).map(drop)
    };
    tree(c".".as_ptr(), libc::OPEN_TREE_CLONE | RECURSIVE)?;
    // SAFETY: the kernel reads a live structure of the given size and an empty static string.
    check(Step::Share, unsafe {
        syscall!(
            libc::SYS_mount_setattr,
            SHARED,
            c"".as_ptr(),
            EMPTY_PATH | RECURSIVE,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    })?;
    tree(c"/proc/self/fd".as_ptr(), libc::OPEN_TREE_CLONE)
}

/// An empty, read-only, tiny tmpfs becomes the root; the host's is detached. /proc is only the place where it is mounted for
/// a moment: `pivot_root(".", ".")` puts the old root on top of the new one, and unmounting the top leaves the new one.
unsafe fn empty_root() -> Result<(), Failure> {
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: all strings are static and zero-terminated; the kernel only reads them.
    unsafe {
        check(
            Step::MountRoot,
            syscall!(
                libc::SYS_mount,
                c"none".as_ptr(),
                c"/proc".as_ptr(),
                c"tmpfs".as_ptr(),
                flags,
                c"size=4k,nr_inodes=1,mode=555".as_ptr(),
            ),
        )?;
        check(Step::ChangeRoot, syscall!(libc::SYS_chdir, c"/proc".as_ptr()))?;
        check(Step::ChangeRoot, syscall!(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        check(Step::DetachOldRoot, syscall!(libc::SYS_umount2, c".".as_ptr(), libc::MNT_DETACH))?;
        check(Step::ChangeRoot, syscall!(libc::SYS_chdir, c"/".as_ptr()))?;
    }
    Ok(())
}

unsafe fn limits(plan: &Plan) -> Result<(), Failure> {
    for (resource, soft, hard) in plan.limits {
        let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
        // SAFETY: the kernel reads a live structure and writes nothing.
        check(Step::Limit, unsafe {
            syscall!(libc::SYS_prlimit64, 0, resource, &raw const limit, ptr::null::<c_void>())
        })?;
    }
    Ok(())
}

/// Securebits locked, bounding and ambient sets empty, all sets empty, `no_new_privs`; but for capabilities that are to stay, which
/// are inherited and ambient.
unsafe fn privileges(kept: u32) -> Result<(), Failure> {
    // <linux/securebits.h>: NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE set and locked; KEEP_CAPS clear and locked.
    const SECUREBITS: c_ulong = 0b1110_1111;
    /// The same without the lock on ambient capabilities, to set which is the next step.
    const FIRST: c_ulong = 0b0010_1111;
    /// CAP_SETPCAP, which changing the securebits takes; the exec ends it.
    const SETPCAP: u32 = 1 << 8;
    // <linux/capability.h>: version 3 with two 32-bit halves of effective, permitted and inheritable.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    // SAFETY: prctl's arguments here are integers; capset reads two live structures.
    unsafe {
        check(Step::SecureBits, prctl(libc::PR_SET_SECUREBITS, FIRST, 0))?;
        for capability in 0..64 {
            if capability < 32 && kept >> capability & 1 == 1 {
                continue;
            }
            match check(Step::BoundingSet, prctl(libc::PR_CAPBSET_DROP, capability, 0)) {
                Ok(_) => {}
                // The first number that this kernel has no capability for.
                Err(Failure(_, libc::EINVAL)) => break,
                Err(failure) => return Err(failure),
            }
        }
        check(Step::AmbientSet, prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong, 0))?;
        let first: [u32; 6] = [kept | SETPCAP, kept | SETPCAP, kept, 0, 0, 0];
        check(Step::Capabilities, syscall!(libc::SYS_capset, HEADER.as_ptr(), first.as_ptr()))?;
        for capability in (0..32).filter(|capability| kept >> capability & 1 == 1) {
            let raise = libc::PR_CAP_AMBIENT_RAISE as c_ulong;
            check(Step::AmbientSet, prctl(libc::PR_CAP_AMBIENT, raise, capability))?;
        }
        check(Step::SecureBits, prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0))?;
        let last: [u32; 6] = [kept, kept, kept, 0, 0, 0];
        check(Step::Capabilities, syscall!(libc::SYS_capset, HEADER.as_ptr(), last.as_ptr()))?;
        check(Step::NoNewPrivileges, prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0))?;
    }
    Ok(())
}

unsafe fn prctl(option: c_int, second: c_ulong, third: c_ulong) -> c_long {
    // SAFETY: the callers pass options whose arguments are integers.
    unsafe { syscall!(libc::SYS_prctl, option, second, third, 0_u64, 0_u64) }
}

/// SIGKILL when the supervisor dies. If it died before this call, its end of the report socket is closed already: the kernel
/// closes a dying process's descriptors before it sends parent-death signals.
unsafe fn parent_death() -> Result<(), Failure> {
    let mut byte = 0_u8;
    // SAFETY: the kernel writes at most one byte to a live variable; prctl's argument is an integer.
    unsafe {
        check(Step::ParentDeathSignal, prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong, 0))?;
        match receive(&raw mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT) {
            0 => Err(Failure(Step::ParentGone, libc::EPIPE)),
            _ => Ok(()),
        }
    }
}
