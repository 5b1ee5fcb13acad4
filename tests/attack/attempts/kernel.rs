//! Namespaces, mounts, users, limits, and the parts of the kernel that are famous for their faults.

use super::*;

const CAPABILITY: &[(i32, &str)] = &[(libc::EPERM, NO_CAPABILITY)];
const NESTED: Option<&str> =
    Some("a user namespace within its own: more kernel to attack, nothing of the host to reach");

fn unshare_user(_: &Held) -> Result {
    call(libc::SYS_unshare, [fd(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0]).map(drop)
}

fn unshare_others(_: &Held) -> Result {
    let kinds = [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWCGROUP,
        0x80, // CLONE_NEWTIME
    ];
    any(kinds, |kind| call(libc::SYS_unshare, [fd(kind), 0, 0, 0, 0, 0]).map(drop))
}

fn clone_namespace(_: &Held) -> Result {
    let pid = call(libc::SYS_clone, [fd(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0, 0, 0])?;
    if pid == 0 {
        let _ends = call(libc::SYS_exit_group, [0; 6]);
    }
    Ok(())
}

fn enter_namespace(held: &Held) -> Result {
    any(&held.descriptors, |number| call(libc::SYS_setns, [fd(*number), 0, 0, 0, 0, 0]).map(drop))
}

fn mount(_: &Held) -> Result {
    call(libc::SYS_mount, [address(c"none"), address(c"/"), address(c"tmpfs"), 0, 0, 0]).map(drop)
}

fn mount_proc(_: &Held) -> Result {
    call(libc::SYS_mount, [address(c"none"), address(c"/"), address(c"proc"), 0, 0, 0]).map(drop)
}

fn remount(_: &Held) -> Result {
    call(libc::SYS_mount, [address(c"none"), address(c"/"), 0, libc::MS_REMOUNT, 0, 0]).map(drop)
}

fn new_mount(_: &Held) -> Result {
    any([libc::SYS_fsopen, libc::SYS_open_tree], |number| {
        let arguments = if number == libc::SYS_fsopen {
            [address(c"tmpfs"), 0, 0, 0, 0, 0]
        } else {
            // OPEN_TREE_CLONE
            [fd(libc::AT_FDCWD), address(c"/"), 1, 0, 0, 0]
        };
        call(number, arguments).map(drop)
    })
}

fn unmount(_: &Held) -> Result {
    call(libc::SYS_umount2, [address(c"/"), fd(libc::MNT_DETACH), 0, 0, 0, 0]).map(drop)
}

fn pivot(_: &Held) -> Result {
    call(libc::SYS_pivot_root, [address(c"."), address(c"."), 0, 0, 0, 0]).map(drop)
}

fn become_root(_: &Held) -> Result {
    any([libc::SYS_setresuid, libc::SYS_setresgid], |number| call(number, [0; 6]).map(drop))
}

fn other_user(_: &Held) -> Result {
    call(libc::SYS_setresuid, [1, 1, 1, 0, 0, 0]).map(drop)
}

fn capabilities(_: &Held) -> Result {
    let header = [0x2008_0522_u32, 0];
    let sets = [u32::MAX; 6];
    call(libc::SYS_capset, [address(&header), address(&sets), 0, 0, 0, 0]).map(drop)
}

fn keys(_: &Held) -> Result {
    // KEYCTL_GET_KEYRING_ID of the session (-3): whose is it?
    call(libc::SYS_keyctl, [0, fd(-3), 0, 0, 0, 0]).map(drop)
}

fn add_key(_: &Held) -> Result {
    let arguments = [address(c"user"), address(c"bulkhead"), address(c"x"), 1, fd(-3), 0];
    call(libc::SYS_add_key, arguments).map(drop)
}

fn request_key(_: &Held) -> Result {
    call(libc::SYS_request_key, [address(c"user"), address(c"x"), address(c"y"), 0, 0, 0]).map(drop)
}

fn bpf(_: &Held) -> Result {
    // BPF_MAP_CREATE: an array of one value of 8 bytes.
    let map = [2_u32, 4, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    call(libc::SYS_bpf, [0, address(&map), 48, 0, 0, 0]).map(drop)
}

fn perf(_: &Held) -> Result {
    // struct perf_event_attr: hardware, 128 bytes, CPU cycles, of the whole first CPU.
    let mut attributes = [0_u32; 32];
    attributes[1] = 128;
    let outcome = call(libc::SYS_perf_event_open, [address(&attributes), u64::MAX, 0, u64::MAX, 0, 0]);
    outcome.map(drop)
}

fn userfaultfd(_: &Held) -> Result {
    call(libc::SYS_userfaultfd, [0; 6]).map(drop)
}

fn own_userfaultfd(_: &Held) -> Result {
    // UFFD_USER_MODE_ONLY
    call(libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]).map(drop)
}

fn ring(_: &Held) -> Result {
    let mut parameters = [0_u32; 30];
    call(libc::SYS_io_uring_setup, [8, parameters.as_mut_ptr() as u64, 0, 0, 0, 0]).map(drop)
}

fn register_with_ring(held: &Held) -> Result {
    let files = [0_i32];
    // IORING_REGISTER_FILES
    any(&held.descriptors, |number| {
        call(libc::SYS_io_uring_register, [fd(*number), 2, address(&files), 1, 0, 0]).map(drop)
    })
}

fn kernel_code(_: &Held) -> Result {
    any([libc::SYS_init_module, libc::SYS_kexec_load, libc::SYS_delete_module], |number| {
        call(number, [address(c"x"), 0, 0, 0, 0, 0]).map(drop)
    })
}

fn reboot(_: &Held) -> Result {
    // LINUX_REBOOT_CMD_CAD_OFF: harmless if it should work.
    call(libc::SYS_reboot, [0xFEE1_DEAD, 672_274_793, 0, 0, 0, 0]).map(drop)
}

fn clock(_: &Held) -> Result {
    let mut now = [0_u64; 2];
    call(libc::SYS_clock_gettime, [0, now.as_mut_ptr() as u64, 0, 0, 0, 0])?;
    call(libc::SYS_clock_settime, [0, address(&now), 0, 0, 0, 0]).map(drop)
}

fn kernel_log(_: &Held) -> Result {
    let mut text = [0_u8; 256];
    call(libc::SYS_syslog, [3, text.as_mut_ptr() as u64, 256, 0, 0, 0]).map(drop)
}

fn ports(_: &Held) -> Result {
    any([libc::SYS_iopl, libc::SYS_ioperm], |number| call(number, [3, 1, 1, 0, 0, 0]).map(drop))
}

fn swap(_: &Held) -> Result {
    any([libc::SYS_swapon, libc::SYS_acct], |number| call(number, [address(c"/x"), 0, 0, 0, 0, 0]).map(drop))
}

fn segments(_: &Held) -> Result {
    let mut table = [0_u8; 16];
    call(libc::SYS_modify_ldt, [0, table.as_mut_ptr() as u64, 16, 0, 0, 0]).map(drop)
}

fn raise_limits(_: &Held) -> Result {
    any([libc::RLIMIT_NOFILE, libc::RLIMIT_NPROC, libc::RLIMIT_DATA, libc::RLIMIT_CORE], |resource| {
        let limit = [u64::MAX; 2];
        call(libc::SYS_prlimit64, [0, resource.into(), address(&limit), 0, 0, 0]).map(drop)
    })
}

fn priority(_: &Held) -> Result {
    let parameter = 99_i32;
    // SCHED_FIFO
    call(libc::SYS_sched_setscheduler, [0, 1, address(&parameter), 0, 0, 0]).map(drop)
}

fn dumpable(_: &Held) -> Result {
    call(libc::SYS_prctl, [fd(libc::PR_SET_DUMPABLE), 1, 0, 0, 0, 0]).map(drop)
}

fn loosen(_: &Held) -> Result {
    // PR_SET_NO_NEW_PRIVS to 0, PR_SET_SECUREBITS to 0, PR_CAP_AMBIENT_RAISE of CAP_SYS_ADMIN
    any([[38, 0, 0], [28, 0, 0], [47, 2, 21]], |[option, second, third]| {
        call(libc::SYS_prctl, [option, second, third, 0, 0, 0]).map(drop)
    })
}

const fn attempt(
    goal: &'static str,
    calls: &'static [&'static str],
    run: fn(&Held) -> Result,
    walls: &'static [(i32, &'static str)],
    gap: Option<&'static str>,
) -> Attempt {
    Attempt { goal, calls, run, walls, gap }
}

pub const ATTEMPTS: &[Attempt] = &[
    attempt(
        "make a user namespace",
        &["unshare"],
        unshare_user,
        &[(libc::EPERM, HOST), (libc::ENOSPC, "no further user namespaces")],
        NESTED,
    ),
    attempt("make any other namespace", &["unshare"], unshare_others, CAPABILITY, None),
    attempt(
        "make a process in a user namespace",
        &["clone"],
        clone_namespace,
        &[(libc::EPERM, HOST), (libc::ENOSPC, "no further user namespaces"), (libc::EAGAIN, "RLIMIT_NPROC")],
        NESTED,
    ),
    attempt(
        "enter a namespace",
        &["setns"],
        enter_namespace,
        &[(libc::EINVAL, NOTHING_HELD), (libc::EBADF, NOTHING_HELD)],
        None,
    ),
    attempt("mount a file system", &["mount"], mount, CAPABILITY, None),
    attempt("mount /proc", &["mount"], mount_proc, CAPABILITY, None),
    attempt("make its root writable", &["mount"], remount, CAPABILITY, None),
    attempt("mount by fsopen and open_tree", &["fsopen", "open_tree"], new_mount, CAPABILITY, None),
    attempt("unmount its root", &["umount2"], unmount, CAPABILITY, None),
    attempt("pivot_root", &["pivot_root"], pivot, CAPABILITY, None),
    attempt(
        "become root",
        &["setresuid", "setresgid"],
        become_root,
        &[(libc::EINVAL, "no root in its user namespace"), (libc::EPERM, NO_CAPABILITY)],
        None,
    ),
    attempt(
        "become another user",
        &["setresuid"],
        other_user,
        &[(libc::EINVAL, "no other user in its user namespace"), (libc::EPERM, NO_CAPABILITY)],
        None,
    ),
    attempt("raise capabilities", &["capset"], capabilities, CAPABILITY, None),
    attempt(
        "gain privileges by prctl",
        &["prctl"],
        loosen,
        &[(libc::EINVAL, "no way back"), (libc::EPERM, NO_CAPABILITY)],
        None,
    ),
    attempt(
        "become dumpable, for whoever may trace it",
        &["prctl"],
        dumpable,
        &[],
        Some("a process may make itself dumpable"),
    ),
    attempt(
        "find the session's keyring",
        &["keyctl"],
        keys,
        &[(libc::ENOKEY, "no keyring"), (libc::EACCES, "not its keyring"), (libc::ENOSYS, HOST)],
        Some(
            "the session's keyring of whoever started the machine comes along; its keys keep their own permissions",
        ),
    ),
    attempt(
        "add a key",
        &["add_key"],
        add_key,
        &[
            (libc::EACCES, "not its keyring"),
            (libc::ENOKEY, "no keyring"),
            (libc::ENOSYS, HOST),
            (libc::EDQUOT, HOST),
        ],
        Some("keys of its own user, within a quota"),
    ),
    attempt(
        "ask for a key",
        &["request_key"],
        request_key,
        &[
            (libc::ENOKEY, "no such key"),
            (libc::ENOENT, "no such key"),
            (libc::EACCES, "not its keyring"),
            (libc::ENOSYS, HOST),
        ],
        None,
    ),
    attempt("bpf", &["bpf"], bpf, CAPABILITY, Some("where the host lets ordinary users use BPF")),
    attempt(
        "watch a CPU by perf",
        &["perf_event_open"],
        perf,
        &[
            (libc::EACCES, NO_CAPABILITY),
            (libc::EPERM, NO_CAPABILITY),
            (libc::ENOENT, HOST),
            (libc::ENOSYS, HOST),
            (libc::EOPNOTSUPP, HOST),
        ],
        None,
    ),
    attempt(
        "userfaultfd",
        &["userfaultfd"],
        userfaultfd,
        &[(libc::EPERM, NO_CAPABILITY), (libc::ENOSYS, HOST)],
        Some("where the host lets ordinary users use it"),
    ),
    attempt(
        "userfaultfd for user-mode faults",
        &["userfaultfd"],
        own_userfaultfd,
        &[(libc::EPERM, HOST), (libc::ENOSYS, HOST), (libc::EINVAL, HOST)],
        Some("any user may have it"),
    ),
    attempt(
        "set up an io_uring",
        &["io_uring_setup"],
        ring,
        &[(libc::EPERM, HOST), (libc::ENOSYS, HOST), (libc::ENOMEM, "RLIMIT_MEMLOCK")],
        Some("any user may have one, unless the host says otherwise"),
    ),
    attempt(
        "register files with a held io_uring",
        &["io_uring_register"],
        register_with_ring,
        &[(libc::EOPNOTSUPP, NOTHING_HELD), (libc::EBADF, NOTHING_HELD)],
        None,
    ),
    attempt(
        "load code into the kernel",
        &["init_module", "kexec_load", "delete_module"],
        kernel_code,
        &[(libc::EPERM, NO_CAPABILITY), (libc::ENOSYS, HOST)],
        None,
    ),
    attempt("reboot", &["reboot"], reboot, CAPABILITY, None),
    attempt("set the clock", &["clock_settime"], clock, CAPABILITY, None),
    attempt(
        "read the kernel's log",
        &["syslog"],
        kernel_log,
        CAPABILITY,
        Some("where the host lets ordinary users read it"),
    ),
    attempt(
        "reach I/O ports",
        &["iopl", "ioperm"],
        ports,
        &[(libc::EPERM, NO_CAPABILITY), (libc::ENOSYS, HOST)],
        None,
    ),
    attempt(
        "swap, process accounting",
        &["swapon", "acct"],
        swap,
        &[(libc::EPERM, NO_CAPABILITY), (libc::ENOSYS, HOST)],
        None,
    ),
    attempt(
        "read its segment table",
        &["modify_ldt"],
        segments,
        &[(libc::ENOSYS, HOST)],
        Some("any process may"),
    ),
    attempt("raise its own limits", &["prlimit64"], raise_limits, CAPABILITY, None),
    attempt("run before everybody else (SCHED_FIFO)", &["sched_setscheduler"], priority, CAPABILITY, None),
];
