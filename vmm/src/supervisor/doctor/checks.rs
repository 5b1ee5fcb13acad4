//! The checks, one by one. Where it is cheap, the thing itself is tried and not only its setting read.
//!
//! Contains unsafe code: a child process that tries to make namespaces, and system calls without a safe wrapper
//! (`io_uring_setup`, `landlock_create_ruleset`).

use std::ffi::c_long;
use std::fs::{self, OpenOptions};
use std::io;
use std::ptr;

use bulkhead_ipc::memory::{GuestRam, HUGE_PAGE_SIZE, HugePages};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, geteuid};

use super::Check;
use super::kvm::{self, CAPABILITIES};

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
    vec![namespaces(), seccomp(), memfd()]
}

/// Tries all namespaces of the jail at once, in a child.
fn namespaces() -> Check {
    const NAME: &str = "user namespaces";
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
    vec![io_uring(), cgroup(), huge_pages(), tun(), landlock()]
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

fn cgroup() -> Check {
    const NAME: &str = "cgroup v2";
    let without = "memory and CPU time of the processes are limited by rlimits only";
    let mounts = read("/proc/mounts").unwrap_or_default();
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| path.to_owned())
    });
    let Some(mount) = mount else { return Check::missing(NAME, "not mounted", without) };
    match read(&format!("{mount}/cgroup.controllers")) {
        Some(controllers) if !controllers.is_empty() => {
            Check::ok(NAME, format!("mounted on {mount}, controllers {controllers}"))
        }
        _ => Check::missing(NAME, format!("mounted on {mount} without controllers"), without),
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
    const VERSION_FLAG: c_long = 1;
    // SAFETY: with this flag the call takes no pointer and returns the version of the interface.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<u8>(), 0 as c_long, VERSION_FLAG)
    };
    if version > 0 {
        Check::ok("Landlock", format!("version {version}"))
    } else {
        let without = "one layer fewer where a namespace is not enough";
        Check::missing("Landlock", io::Error::last_os_error().to_string(), without)
    }
}
