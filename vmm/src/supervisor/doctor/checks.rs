//! The checks, one by one. Where it is cheap, the thing itself is tried and not only its setting read.
//!
//! Contains unsafe code: a child process that tries to make namespaces, and a system call without a safe wrapper
//! (`io_uring_setup`).

use std::ffi::c_long;
use std::fs::{self, OpenOptions};
use std::io;

use bulkhead_ipc::jail::cgroup::{Controller, Parent};
use bulkhead_ipc::jail::landlock_version;
use bulkhead_ipc::jail::uids::{UidBlock, UidRange};
use bulkhead_ipc::memory::{GuestRam, HUGE_PAGE_SIZE, HugePages};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, geteuid};

use super::Check;
use super::kvm::{self, CAPABILITIES};
use crate::supervisor::confinement::landlock_reason;

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// KVM, its capabilities, and what the CPU has.
pub(super) fn kvm_checks() -> Vec<Check> {
    let mut checks = Vec::new();
    match kvm::open() {
        Err(error) => checks.push(Check::needed("KVM", error.to_string(), "no machine runs")),
        Ok(device) => {
            let found = format!("{} opens, API version 12, up to {} CPUs", kvm::PATH, kvm::max_cpus(&device));
            checks.push(Check::ok("KVM", found));
            for capability in CAPABILITIES {
                let name = format!("KVM {}", capability.name);
                checks.push(match (capability.present(&device), capability.needed) {
                    (true, _) => Check::ok(&name, "present"),
                    (false, true) => Check::needed(&name, "absent", capability.purpose),
                    (false, false) => Check::missing(&name, "absent", capability.purpose),
                });
            }
        }
    }
    checks.push(hardware_virtualization());
    checks
}

fn hardware_virtualization() -> Check {
    let text = read("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let found = flags.split_whitespace().find(|flag| matches!(*flag, "vmx" | "svm"));
    match found {
        Some(flag) => Check::ok("hardware virtualization", format!("the CPU has {flag}")),
        None => Check::missing(
            "hardware virtualization",
            "the CPU shows neither vmx nor svm",
            "where KVM works all the same it may only emulate, and stock kernels may hang",
        ),
    }
}

/// What the jail is built from.
pub(super) fn jail_checks() -> Vec<Check> {
    vec![namespaces(), seccomp(), landlock(), cgroup(), distinct_uids(), memfd()]
}

/// Tries all namespaces of the jail at once, in a child.
fn namespaces() -> Check {
    const NAME: &str = "namespaces";
    let who = if geteuid().is_root() { "root" } else { "this user" };
    match try_namespaces() {
        Ok(()) => Check::ok(NAME, format!("{who} can make all namespaces of a jail")),
        Err(error) => {
            let without = "no process can be jailed, and none runs without a jail";
            Check::needed(NAME, format!("{who} cannot make them ({error}){}", namespace_setting()), without)
        }
    }
}

fn try_namespaces() -> Result<(), Errno> {
    let all = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    // SAFETY: the child makes two system calls and touches no memory, lock or allocator that another thread of the
    // parent could have held.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let code = unshare(all).err().map_or(0, |error| error as i32);
            // SAFETY: ends the child without running what the parent registered for its exit.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, code) => Err(Errno::from_raw(code)),
            _ => Err(Errno::EINTR),
        },
    }
}

/// The setting that forbids namespaces, if one does.
fn namespace_setting() -> String {
    let settings = [
        ("user.max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
        ("kernel.unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        (
            "kernel.apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bulkhead",
        ),
    ];
    for (name, bad, remedy) in settings {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        if read(&path).is_some_and(|value| value == bad) {
            return format!("; {name} is {bad}: as root, {remedy}");
        }
    }
    "; a container or security policy may forbid it".to_owned()
}

fn seccomp() -> Check {
    const NAME: &str = "seccomp";
    let without = "system calls of the processes cannot be limited";
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        None => Check::needed(NAME, "this kernel has no seccomp filters", without),
        Some(actions) => {
            let has = |wanted: &str| actions.split_whitespace().any(|action| action == wanted);
            if !has("kill_process") {
                Check::needed(NAME, "this kernel cannot kill a process on a violation", without)
            } else if has("user_notif") {
                Check::ok(NAME, "filters with user notification")
            } else {
                let without = "violations cannot be reported by name (Linux 5.5)";
                Check::needed(NAME, "this kernel has no user notification", without)
            }
        }
    }
}

fn memfd() -> Check {
    match memfd_create(c"bulkhead-doctor", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING) {
        Ok(_) => Check::ok("memfd", "sealed memory files can be made"),
        Err(error) => Check::needed("memfd", error.to_string(), "guest memory cannot be shared with devices"),
    }
}

/// What makes machines better.
pub(super) fn optional_checks() -> Vec<Check> {
    vec![io_uring(), huge_pages(), tun()]
}

fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    /// `struct io_uring_params`, 120 bytes, all zero for the defaults.
    const PARAMETERS: usize = 120;
    let without = "disks do not work";
    let mut parameters = [0u64; PARAMETERS / 8];
    // SAFETY: the second argument points at 120 aligned, writable bytes, which is the structure that the call fills.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1 as c_long, parameters.as_mut_ptr()) };
    if fd >= 0 {
        // SAFETY: the descriptor was just made and nobody else knows it.
        let _closed = unsafe { libc::close(i32::try_from(fd).unwrap_or(-1)) };
        return Check::ok(NAME, "rings can be made");
    }
    let error = io::Error::last_os_error();
    match read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Some(value @ ("1" | "2")) => {
            let found =
                format!("kernel.io_uring_disabled is {value}: as root, sysctl kernel.io_uring_disabled=0");
            Check::missing(NAME, found, without)
        }
        _ => Check::missing(NAME, error.to_string(), without),
    }
}

/// Looks where machines' groups would be made; makes none.
fn cgroup() -> Check {
    const NAME: &str = "cgroup";
    let without = "memory and threads of the processes are limited by rlimits only";
    let wanted = [Controller::Memory, Controller::Pids, Controller::Cpu, Controller::Io];
    match Parent::find(&wanted) {
        Err(error) => Check::missing(NAME, error.to_string(), without),
        Ok(parent) => {
            let names = |controllers: &[Controller]| {
                controllers.iter().map(|it| it.name()).collect::<Vec<_>>().join(", ")
            };
            let found = format!("{} below {}", names(&parent.controllers), parent.folder().display());
            let lacks: Vec<Controller> =
                wanted.into_iter().filter(|it| !parent.controllers.contains(it)).collect();
            if lacks.is_empty() {
                Check::ok(NAME, found)
            } else {
                Check::missing(NAME, format!("{found}, not {}", names(&lacks)), without)
            }
        }
    }
}

/// Takes users for a moment.
fn distinct_uids() -> Check {
    const NAME: &str = "distinct-uids";
    match UidBlock::claim(None, 2) {
        Ok(block) if block.is_subordinate() => {
            Check::ok(NAME, "each process gets one of this user's subordinate users")
        }
        Ok(_) => Check::ok(NAME, format!("each process gets a user of {}", UidRange::default())),
        Err(error) => {
            Check::missing(NAME, error.to_string(), "all processes of all machines share one host user")
        }
    }
}

/// Guest RAM is shared memory, of which the core makes huge pages by MADV_COLLAPSE.
fn huge_pages() -> Check {
    const NAME: &str = "huge pages";
    let sample = GuestRam::create(HUGE_PAGE_SIZE);
    if sample.is_ok_and(|ram| HugePages::new(&ram).is_some()) {
        Check::ok(NAME, "MADV_COLLAPSE is there")
    } else {
        let without = "guest memory uses small pages, which slows the guest down (Linux 6.1 with transparent huge pages)";
        Check::missing(NAME, "no MADV_COLLAPSE", without)
    }
}

fn tun() -> Check {
    const PATH: &str = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(PATH) {
        Ok(_) => Check::ok("tun", format!("{PATH} opens")),
        Err(error) => Check::missing("tun", format!("{PATH}: {error}"), "no network through tap interfaces"),
    }
}

fn landlock() -> Check {
    const NAME: &str = "landlock";
    match landlock_version() {
        Ok(version) => {
            let network = if version >= 4 { ", TCP" } else { "" };
            let scopes = if version >= 6 { ", abstract sockets, signals" } else { "" };
            Check::ok(NAME, format!("version {version}: paths{network}{scopes}"))
        }
        Err(errno) => {
            let without = "the empty root has no second wall behind it";
            Check::missing(NAME, landlock_reason(errno), without)
        }
    }
}
