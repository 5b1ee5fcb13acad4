//! What a process tries once it is hostile.
//!
//! Contains unsafe code: raw system calls, which is what an attacker has.

mod bombs;
mod execution;
mod files;
mod kernel;
mod machine;
mod network;
mod processes;
mod sharing;

use std::os::fd::RawFd;

/// What an attempt came to: `Ok` when the attacker got what it wanted, else the errno that stopped it.
pub type Result<T = ()> = std::result::Result<T, i32>;

/// What a hostile process knows and has.
#[derive(Debug, Clone)]
pub struct Held {
    /// All its descriptors.
    pub descriptors: Vec<RawFd>,
    /// The directory that it shares, and its own `/proc/self/fd`.
    pub shared: Option<(RawFd, RawFd)>,
    /// Name of its machine.
    pub machine: String,
    /// Users that the supervisor may be.
    pub users: [u32; 2],
    /// A process of the host: the test itself. Processes of the machine were started soon after it.
    pub host_pid: i32,
}

/// One attempt.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// What the attacker wants.
    pub goal: &'static str,
    /// The system calls that a policy may stop it at.
    pub calls: &'static [&'static str],
    /// Tries it.
    pub run: fn(&Held) -> Result,
    /// What stops it where no policy does, or where the policy allows the call: errno and wall.
    pub walls: &'static [(i32, &'static str)],
    /// Why it works without a policy, when it does. The policy is the only wall then.
    pub gap: Option<&'static str>,
}

/// Attempts of one theme.
pub type Theme = (&'static str, &'static [Attempt]);

/// All attempts.
pub const THEMES: &[Theme] = &[
    ("Files and programs", files::ATTEMPTS),
    ("Out of a shared directory", sharing::ATTEMPTS),
    ("Network", network::ATTEMPTS),
    ("Other processes", processes::ATTEMPTS),
    ("Descriptors of others, KVM", machine::ATTEMPTS),
    ("Namespaces, rights, the kernel", kernel::ATTEMPTS),
    ("Code of its own", execution::ATTEMPTS),
    ("Bombs", bombs::ATTEMPTS),
];

/// What some may do and others may not: columns, goals, and why.
pub const MAY: &[(&[&str], &[&str], &str)] = &[
    (
        &["core-setup"],
        &[
            "KVM_CREATE_VM on every descriptor",
            "KVM_CREATE_VCPU on every descriptor",
            "KVM_SET_MSRS on every descriptor",
            "KVM_SET_REGS on every descriptor",
        ],
        "the core makes its machine, before a byte of the guest runs",
    ),
    (
        &["fs-main", "fs-queue", "fs"],
        &["all descriptors, by duplicates", "all descriptors, by eventfds"],
        "one for each file that the guest knows, 524,288 at most",
    ),
    (
        &["fs-queue", "fs"],
        &[
            "make its files 1 TiB long",
            "allocate disk space for them",
            "write far behind their end",
            "a memfd of 1 TiB",
        ],
        "as large as the shared directory's file system and its quota allow; what is memory, the cgroup counts",
    ),
    (
        &["fs"],
        &["become root", "become another user"],
        "where root shares the files of all owners; it counts in the directory alone",
    ),
    (
        &["fs"],
        &["fork without end", "the same by clone", "the same by clone3", "threads without end"],
        "where root shares the files of all owners: pids of the cgroup, where the host has one",
    ),
];

/// All attempts in one list; an attempt's place in it is its number.
pub fn all() -> impl Iterator<Item = &'static Attempt> {
    THEMES.iter().flat_map(|(_, attempts)| attempts.iter())
}

const EMPTY_ROOT: &str = "empty root";
const READ_ONLY: &str = "read-only root";
const LANDLOCK: &str = "Landlock";
const NO_CAPABILITY: &str = "no capability";
const PID_NAMESPACE: &str = "pid namespace";
const NOTHING_HELD: &str = "no such descriptor";
const HOST: &str = "the host's kernel or its settings";

/// A raw system call.
pub fn call(number: i64, arguments: [u64; 6]) -> Result<i64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: not provable: this is the attacker. Pointers given here lead to live memory or to none.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 { Err(nix::errno::Errno::last_raw()) } else { Ok(result) }
}

/// Address of a zero-terminated text, or of any other value.
fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

/// A descriptor, or a negative number, as an argument.
fn fd(number: i32) -> u64 {
    i64::from(number).cast_unsigned()
}

/// Tries it with each value: `Ok` as soon as one works, else the last refusal.
fn any<T>(values: impl IntoIterator<Item = T>, mut attempt: impl FnMut(T) -> Result) -> Result {
    let mut outcome = Err(libc::ENOENT);
    for value in values {
        outcome = attempt(value);
        if outcome.is_ok() || outcome == Err(super::hostile::STOPPED) {
            break;
        }
    }
    outcome
}
