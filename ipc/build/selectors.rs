//! What a rule must say: the arguments that choose what a system call does, and the calls that no policy may allow.

use serde_json::Value;

/// Arguments, by index, that choose among operations or rights: a rule without a condition on each of them allows more than
/// anybody means. Descriptors, addresses and lengths are not here: their values are not known when a policy is written.
const SELECTORS: &[(&str, &[usize])] = &[
    ("clock_gettime", &[0]),
    ("clock_nanosleep", &[0, 1]),
    ("clone", &[0]),
    ("fadvise64", &[3]),
    ("fallocate", &[1]),
    ("fcntl", &[1]),
    ("futex", &[1]),
    ("getrandom", &[2]),
    ("getsockopt", &[1, 2]),
    ("io_uring_enter", &[3]),
    ("ioctl", &[1]),
    ("lseek", &[2]),
    ("madvise", &[2]),
    ("memfd_create", &[1]),
    ("mmap", &[2, 3]),
    ("mprotect", &[2]),
    ("mremap", &[3]),
    ("newfstatat", &[3]),
    ("prctl", &[0]),
    ("preadv2", &[5]),
    ("prlimit64", &[0, 1, 2]),
    ("pwritev2", &[5]),
    ("recvfrom", &[3, 4]),
    ("recvmmsg", &[2, 3, 4]),
    ("rt_sigaction", &[0]),
    ("seccomp", &[0]),
    ("sendmmsg", &[2, 3]),
    ("sendto", &[4]),
    ("setsockopt", &[1, 2]),
    ("shutdown", &[1]),
    ("socketpair", &[0, 1, 2]),
    ("statx", &[2]),
    ("tgkill", &[2]),
    ("timerfd_create", &[0, 1]),
    ("timerfd_settime", &[1]),
    ("writev", &[0]),
    ("fchownat", &[4]),
    ("linkat", &[4]),
    ("mknodat", &[2]),
    ("openat", &[2]),
    ("renameat2", &[4]),
    ("unlinkat", &[2]),
    ("utimensat", &[3]),
];

/// The thread that serves a shared directory: what it names lies in there, by its mount tree and by Landlock.
const SHARING: &str = "fs-queue";

/// What that thread may do, of the calls that no other policy may allow.
const SHARING_CALLS: &[&str] = &[
    "getdents64",
    "linkat",
    "mkdirat",
    "mknodat",
    "openat",
    "readlinkat",
    "renameat2",
    "symlinkat",
    "unlinkat",
];

/// Calls that make threads, processes, programs, sockets, rings, filters or namespaces, that name files or other processes,
/// or that widen what the kernel offers. Whatever a sealed thread needs of these is made before it is sealed.
const NEVER: &[&str] = &[
    "accept",
    "accept4",
    "acct",
    "add_key",
    "bind",
    "bpf",
    "capset",
    "chdir",
    "chmod",
    "chown",
    "chroot",
    "clone3",
    "connect",
    "creat",
    "delete_module",
    "execve",
    "execveat",
    "fanotify_init",
    "fchdir",
    "finit_module",
    "fork",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "getdents64",
    "init_module",
    "inotify_init1",
    "io_setup",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "kill",
    "link",
    "linkat",
    "listen",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "modify_ldt",
    "mount",
    "mount_setattr",
    "move_mount",
    "mq_open",
    "msgget",
    "name_to_handle_at",
    "open",
    "open_by_handle_at",
    "open_tree",
    "openat",
    "openat2",
    "perf_event_open",
    "personality",
    "pidfd_getfd",
    "pidfd_open",
    "pidfd_send_signal",
    "pivot_root",
    "pkey_mprotect",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "quotactl",
    "readlink",
    "readlinkat",
    "reboot",
    "rename",
    "renameat",
    "renameat2",
    "request_key",
    "rmdir",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "seccomp",
    "semget",
    "setgid",
    "setgroups",
    "setns",
    "setresgid",
    "setresuid",
    "setuid",
    "shmat",
    "shmget",
    "socket",
    "splice",
    "swapon",
    "symlink",
    "symlinkat",
    "syslog",
    "tee",
    "tkill",
    "umount2",
    "unlink",
    "unlinkat",
    "unshare",
    "userfaultfd",
    "vfork",
    "vmsplice",
];

/// What is refused to all others and allowed to one policy, which comes before a process is sealed: to go on with a stricter filter.
const BEFORE_THE_SEAL: (&str, &str) = ("core-setup", "seccomp");

/// `PROT_EXEC`.
const EXECUTABLE: u64 = 4;

/// What is wrong with a rule of the named policy, if anything is.
pub fn fault(policy: &str, rule: &Value) -> Option<String> {
    let syscall = rule.get("syscall").and_then(Value::as_str).unwrap_or("?");
    let shares = policy == SHARING && SHARING_CALLS.contains(&syscall);
    if NEVER.contains(&syscall) && (policy, syscall) != BEFORE_THE_SEAL && !shares {
        return Some("no policy may allow it: it must happen before the process is sealed".to_owned());
    }
    let conditions = rule.get("args").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let on = |index: usize| {
        let index = Some(index as u64);
        conditions.iter().find(|condition| condition.get("index").and_then(Value::as_u64) == index)
    };
    let (_, selectors) = SELECTORS.iter().find(|(name, _)| *name == syscall)?;
    if let Some(missing) = selectors.iter().find(|index| on(**index).is_none()) {
        return Some(format!("argument {missing} chooses what it does and must be restricted"));
    }
    let maps = matches!(syscall, "mmap" | "mprotect");
    (maps && !on(2).is_some_and(never_executable)).then(|| "may map executable memory".to_owned())
}

/// Whether a condition on a protection keeps `PROT_EXEC` out.
fn never_executable(condition: &Value) -> bool {
    let value = condition.get("val").and_then(Value::as_u64).unwrap_or(u64::MAX);
    match condition.get("op") {
        Some(Value::String(operator)) if operator == "eq" => value & EXECUTABLE == 0,
        Some(Value::String(operator)) if operator == "le" => value < EXECUTABLE,
        Some(Value::String(operator)) if operator == "lt" => value <= EXECUTABLE,
        Some(masked) => {
            let mask = masked.get("masked_eq").and_then(Value::as_u64).unwrap_or(0);
            mask & EXECUTABLE != 0 && value & EXECUTABLE == 0
        }
        None => false,
    }
}
