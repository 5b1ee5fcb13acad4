//! The process's own side of its jail: what the supervisor cannot do for it across an exec.
//!
//! Contains unsafe code: `seccomp(2)` and `_exit`, which have no safe interface.
//!
//! Why a supervised process gets `SECCOMP_RET_USER_NOTIF` and not `TRAP` or `KILL_PROCESS`: after `KILL_PROCESS` the supervisor
//! sees SIGSYS and not which thread tried what, unless it may read the audit log. `TRAP` runs a handler inside the process that
//! just misbehaved, which reports what it likes, or nothing. With `USER_NOTIF` the kernel itself hands thread id, number and
//! arguments to the supervisor, the call does not run, and the thread waits until it is killed. The supervisor never answers, so
//! the well-known race (arguments change after they were checked) has nothing to win.
//! The price: the listener must leave the process before it reads a byte from guest or peer, since who holds it can let a call
//! through. [`Sealed`] closes its copies on drop; no policy allows `seccomp`, and no `ioctl` with a listener's request numbers.
//! A thread that breaks its policy before that waits until the supervisor looks (`JailedProcess::early_violation`).
//! One message has room for so many listeners ([`MAX_DESCRIPTORS`]). Threads beyond, of a machine with more CPUs, are under
//! `KILL_PROCESS`: what is forbidden ends the process all the same, and the supervisor tells SIGSYS.

use std::fmt::Write as _;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use super::{JailError, PolicyName, landlock, shared};
use crate::channel::MAX_DESCRIPTORS;
use crate::log::Line;

/// Exit code after a panic. Each process is number 1 of its pid namespace, where SIGABRT by itself does nothing.
pub const PANIC_EXIT_CODE: i32 = 101;

/// The control channel's descriptor.
const CHANNEL: RawFd = 3;

/// What a system call does that the policy does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Enforcement {
    /// The kernel kills the process (`SECCOMP_RET_KILL_PROCESS`, SIGSYS).
    Standalone,
    /// The thread stops, the supervisor is told what it tried and kills the process (`SECCOMP_RET_USER_NOTIF`).
    Supervised,
}

static SUPERVISED: AtomicBool = AtomicBool::new(false);
/// Threads that have asked for a listener; the main thread is not among them.
static ASKED: AtomicUsize = AtomicUsize::new(0);
static LISTENERS: Mutex<Vec<(PolicyName, OwnedFd)>> = Mutex::new(Vec::new());

/// Start of a jailed process: the first call in its `main`. Installs the panic hook, confines the allocator to one arena (the
/// C library opens a file in /proc when another one shrinks), makes the process not dumpable, puts it under Landlock and checks
/// that exactly descriptors 0 to 3 are open. Returns the control channel, descriptor 3; call it once.
///
/// # Errors
/// [`JailError`] naming what is not as it should be.
pub fn enter() -> Result<OwnedFd, JailError> {
    install_panic_hook();
    // SAFETY: only this thread runs yet, and no allocation of it is affected.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    nix::sys::prctl::set_dumpable(false).map_err(JailError::call("become not dumpable"))?;
    let open = open_descriptors()?;
    let given = [&[0, 1, 2, CHANNEL], shared::given(&open)].concat();
    landlock::restrict()?;
    compare(&open, &given)?;
    // SAFETY: descriptor 3 is open and by the contract of `spawn` it is ours; the check above would have failed in a program
    // that had opened it for something else before, since that program's own descriptor would then be number 4.
    Ok(unsafe { OwnedFd::from_raw_fd(CHANNEL) })
}

/// Says what a forbidden system call does, before the first [`enter_thread`] or [`seal`]; [`Enforcement::Standalone`] if
/// never called.
pub fn set_enforcement(enforcement: Enforcement) {
    SUPERVISED.store(enforcement == Enforcement::Supervised, Ordering::SeqCst);
}

/// Puts the calling thread under its policy, before it reads from guest or peer and before the main thread calls [`seal`].
///
/// A thread inherits the policy of the thread that creates it and could only narrow it further, and no policy allows to create
/// threads: all threads start before their creators enter.
///
/// # Errors
/// [`JailError::Filter`] when the filter cannot be loaded.
pub fn enter_thread(policy: PolicyName) -> Result<(), JailError> {
    // Room before the filter is in force, so that storing the listener needs no more than a futex.
    LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).reserve(1);
    let room = ASKED.fetch_add(1, Ordering::SeqCst) < MAX_DESCRIPTORS - 1;
    if let Some(listener) = load_final(policy, room)? {
        LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).push((policy, listener));
    }
    Ok(())
}

/// Puts the calling thread, and all that it creates later, under a first policy, while the process is still being set up. It has no
/// listener, since a thread's filters can have but one between them and that belongs to the last: what is forbidden fails with
/// ENOSYS, and is not reported. Once a thread has entered its own policy, that one judges first.
///
/// # Errors
/// [`JailError::Filter`] when the filter cannot be loaded.
pub fn enter_setup(policy: PolicyName) -> Result<(), JailError> {
    load(policy, libc::SECCOMP_RET_USER_NOTIF, 0).map(drop)
}

/// Seals the process: last step of the main thread, after every other thread has called [`enter_thread`]. Checks that
/// exactly `expected` (borrowed descriptors or bare numbers, the control channel among them), descriptors 0 to 2 and the
/// listeners of other threads are open, loads the main thread's policy and hands out the listeners.
///
/// # Errors
/// [`JailError`] naming the descriptor that is too many or missing, or that the filter cannot be loaded.
pub fn seal(policy: PolicyName, expected: &[impl AsRawFd]) -> Result<Sealed, JailError> {
    let mut listeners = mem::take(&mut *LISTENERS.lock().unwrap_or_else(PoisonError::into_inner));
    let mut list: Vec<RawFd> = vec![0, 1, 2];
    list.extend(expected.iter().map(AsRawFd::as_raw_fd));
    list.extend(listeners.iter().map(|(_, listener)| listener.as_raw_fd()));
    list.sort_unstable();
    list.dedup();
    compare(&open_descriptors()?, &list)?;
    listeners.reserve(1);
    if let Some(listener) = load_final(policy, true)? {
        listeners.push((policy, listener));
    }
    Ok(Sealed { listeners })
}

/// Listeners of a sealed process, to be sent with `Ready` and then dropped.
#[derive(Debug, Default)]
pub struct Sealed {
    listeners: Vec<(PolicyName, OwnedFd)>,
}

impl Sealed {
    /// Policies for the `Ready` message.
    #[must_use]
    pub fn policies(&self) -> Vec<PolicyName> {
        self.listeners.iter().map(|(policy, _)| *policy).collect()
    }

    /// Descriptors for the `Ready` message, in the same order.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.listeners.iter().map(|(_, listener)| listener.as_fd()).collect()
    }
}

/// Numbers of all open descriptors in ascending order, by `poll`: there is no /proc in a jail. `poll` takes those opened with
/// `O_PATH` for closed; they are asked for one by one, a good way beyond the last open one: the kernel gives out the lowest number that
/// is free. A table for all numbers at once would stay in the heap.
///
/// # Errors
/// [`JailError::Call`] when the limit cannot be read or `poll` fails.
pub fn open_descriptors() -> Result<Vec<RawFd>, JailError> {
    /// More than any jailed process is allowed.
    const MOST: RawFd = 65536;
    const AT_ONCE: RawFd = 1024;
    const BEYOND: RawFd = 64;
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(JailError::call("read RLIMIT_NOFILE"))?;
    let end = RawFd::try_from(limit).map_or(MOST, |limit| limit.min(MOST));
    // SAFETY: F_GETFD takes any number and changes nothing.
    let is_path = |fd: RawFd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    let (mut open, mut table, mut asked) = (Vec::new(), Vec::new(), BEYOND);
    for first in (0..end).step_by(AT_ONCE as usize) {
        table.clear();
        table.extend((first..end.min(first + AT_ONCE)).map(|fd| libc::pollfd { fd, events: 0, revents: 0 }));
        // SAFETY: the table is live and its length is passed with it.
        let result = unsafe { libc::poll(table.as_mut_ptr(), table.len() as libc::nfds_t, 0) };
        Errno::result(result).map_err(JailError::call("list the open descriptors"))?;
        for &libc::pollfd { fd, revents, .. } in &table {
            if revents & libc::POLLNVAL == 0 || fd < asked && is_path(fd) {
                open.push(fd);
                asked = fd + BEYOND;
            }
        }
    }
    Ok(open)
}

/// Compares two ascending lists.
fn compare(open: &[RawFd], expected: &[RawFd]) -> Result<(), JailError> {
    if let Some(&extra) = open.iter().find(|fd| !expected.contains(fd)) {
        return Err(JailError::UnexpectedDescriptor(extra));
    }
    match expected.iter().find(|fd| !open.contains(fd)) {
        Some(&missing) => Err(JailError::MissingDescriptor(missing)),
        None => Ok(()),
    }
}

/// Loads the policy on the calling thread for good; the listener when supervised and there is room for it.
fn load_final(policy: PolicyName, room: bool) -> Result<Option<OwnedFd>, JailError> {
    if !room || !SUPERVISED.load(Ordering::SeqCst) {
        return load(policy, libc::SECCOMP_RET_KILL_PROCESS, 0).map(|_| None);
    }
    let result = load(policy, libc::SECCOMP_RET_USER_NOTIF, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    let listener = RawFd::try_from(result).map_err(|_| JailError::Filter { policy, errno: Errno::EBADF })?;
    // SAFETY: with NEW_LISTENER the call returns a new descriptor, which nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(listener) }))
}

/// Loads the policy on the calling thread; `refusal` is what the filter returns for what it does not allow.
fn load(policy: PolicyName, refusal: u32, flags: libc::c_ulong) -> Result<libc::c_long, JailError> {
    nix::sys::prctl::set_no_new_privs().map_err(JailError::call("set no_new_privs"))?;
    let mut program: Vec<libc::sock_filter> = policy
        .program()
        .iter()
        .map(|&(code, jt, jf, k)| {
            let refuses =
                u32::from(code) == libc::BPF_RET | libc::BPF_K && k == libc::SECCOMP_RET_KILL_PROCESS;
            libc::sock_filter { code, jt, jf, k: if refuses { refusal } else { k } }
        })
        .collect();
    let filter = |errno| JailError::Filter { policy, errno };
    let length = u16::try_from(program.len()).map_err(|_| filter(Errno::E2BIG))?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies a live program of the given length.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    Errno::result(result).map_err(filter)
}

/// A panic prints one line and ends the process at once: no unwinding, no backtrace (which opens files that do not exist
/// here), no SIGABRT.
fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let mut line = Line::new();
        let _ = write!(line, "ERROR panic: {info}");
        let bytes = line.finish();
        // SAFETY: the buffer is live; exit_group does not return and needs nothing of this process.
        unsafe {
            libc::write(2, bytes.as_ptr().cast(), bytes.len());
            libc::_exit(PANIC_EXIT_CODE);
        }
    }));
}
