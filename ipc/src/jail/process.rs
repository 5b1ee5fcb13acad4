//! The supervisor's side of a jailed process: start, confirmation, end.
//!
//! Contains unsafe code: `pidfd_send_signal`, `getrlimit64` and `prlimit64`, which have no safe interface here.

use std::ffi::{CString, c_long, c_uint, c_ulong};
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus};

use super::child::{LIMITS, Plan};
use super::cradle::Cradle;
use super::{JailError, Step, uids};

/// Host user and group that a process runs as when the supervisor is root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Host user id, never 0.
    pub uid: u32,
    /// Host group id, never 0.
    pub gid: u32,
}

impl Default for Identity {
    fn default() -> Self {
        Self { uid: 65534, gid: 65534 }
    }
}

/// Resource limits; soft and hard alike but for [`file_may_grow`](Self::file_may_grow), and never above the supervisor's own hard
/// limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `RLIMIT_AS` in bytes, mapped guest RAM included; `None`: not limited.
    pub address_space: Option<u64>,
    /// `RLIMIT_DATA` in bytes: heap, stacks and private mappings, guest RAM not included; `None`: not limited.
    pub data: Option<u64>,
    /// `RLIMIT_NOFILE`, highest descriptor number plus one.
    pub descriptors: u64,
    /// `RLIMIT_NPROC`, threads included, counted in the process's own user namespace.
    pub threads: u64,
    /// `RLIMIT_FSIZE` in bytes: largest file that it may write or create (a memfd too); `None`: not limited.
    pub file_size: Option<u64>,
    /// Its supervisor may raise `file_size` later ([`JailedProcess::set_file_size`]): the hard limit is its own. The process itself cannot: no
    /// policy has a call that sets limits.
    pub file_may_grow: bool,
    /// `RLIMIT_MEMLOCK` in bytes. Linux counts the rings of io_uring here, for all processes of one host user together: a
    /// process that uses it needs some, the default is none.
    pub locked: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            address_space: None,
            data: Some(256 << 20),
            descriptors: 256,
            threads: 64,
            file_size: Some(0),
            file_may_grow: false,
            locked: 0,
        }
    }
}

impl Limits {
    fn table(&self) -> [(c_uint, u64, u64); LIMITS] {
        let none = libc::RLIM64_INFINITY;
        [
            (libc::RLIMIT_AS, self.address_space.unwrap_or(none)),
            (libc::RLIMIT_DATA, self.data.unwrap_or(none)),
            (libc::RLIMIT_NOFILE, self.descriptors),
            (libc::RLIMIT_NPROC, self.threads),
            (libc::RLIMIT_FSIZE, self.file_size.unwrap_or(none)),
            (libc::RLIMIT_MEMLOCK, self.locked),
            (libc::RLIMIT_CORE, 0),
            (libc::RLIMIT_MSGQUEUE, 0),
            (libc::RLIMIT_RTPRIO, 0),
            (libc::RLIMIT_NICE, 0),
            (libc::RLIMIT_SIGPENDING, 64),
        ]
        .map(|(resource, value)| {
            let most = hard_limit(resource);
            let soft = value.min(most);
            let grows = self.file_may_grow && resource == libc::RLIMIT_FSIZE;
            (resource, soft, if grows { most } else { soft })
        })
    }
}

/// The supervisor's hard limit: a process cannot raise it, and outside its user namespace nobody has the right to.
fn hard_limit(resource: c_uint) -> u64 {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: libc::RLIM64_INFINITY };
    // SAFETY: the kernel writes to a live structure; on failure it stays as it is, and setting the limit reports the error.
    unsafe { libc::getrlimit64(resource, &raw mut limit) };
    limit.rlim_max
}

/// What to start and in which jail.
#[derive(Debug)]
pub struct JailSpec<'a> {
    /// The static program, open with `O_PATH` or `O_RDONLY`; the process's host user must be allowed to execute it.
    pub program: BorrowedFd<'a>,
    /// `argv`; the first shows up as the process's title, so it says machine and device. No environment is passed.
    pub arguments: &'a [String],
    /// The process's end of the control channel; becomes descriptor 3.
    pub channel: OwnedFd,
    /// Write end of the log pipe; becomes descriptors 1 and 2.
    pub log: BorrowedFd<'a>,
    /// `/dev/null`; becomes descriptor 0.
    pub null: BorrowedFd<'a>,
    /// Resource limits.
    pub limits: Limits,
    /// Host user and group when the supervisor is root.
    pub identity: Identity,
    /// Host user when the supervisor is an ordinary one: one of its subordinate users, which `newuidmap` maps; `None`: its own.
    /// The group stays its own.
    pub subordinate: Option<u32>,
    /// The cgroup that the process is born in, a folder opened with `O_PATH`; `None`: the supervisor's.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// A directory that the process shares.
    pub shared: Option<SharedDirectory<'a>>,
}

/// A directory of the host that a process shares with its guest: all of the host's files that it reaches. It becomes a mount tree of
/// its own, which [`super::shared_directory`] takes.
#[derive(Debug, Clone, Copy)]
pub struct SharedDirectory<'a> {
    /// The directory, open with `O_PATH`; the process's host user must be allowed to search it.
    pub directory: BorrowedFd<'a>,
    /// Nothing in it can be changed.
    pub read_only: bool,
    /// The process acts for every user and group of the host, with the capabilities for that and in this directory alone: for a
    /// supervisor that is root. [`JailSpec::identity`] does not count then.
    pub all_owners: bool,
}

/// CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_SETGID and CAP_SETUID: to act for every user. Without CAP_FSETID, so that the kernel
/// takes set-user-ID bits from files that are written.
const ALL_OWNERS: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 7;
/// MOUNT_ATTR_RDONLY; and NOSUID, NODEV and NOEXEC: nothing in the directory gives rights or reaches a device.
const READ_ONLY: u64 = 1;
const HARMLESS: u64 = 2 | 4 | 8;

/// A process that was started in a jail; killed and reaped on drop unless it was reaped before.
#[derive(Debug)]
pub struct JailedProcess {
    pid: i32,
    pidfd: OwnedFd,
    /// Until confirmed: end of file means that the program runs.
    report: Option<OwnedFd>,
    /// `newuidmap` at work, and the user that it maps.
    helper: Option<(Child, u32)>,
    exit: Option<Exit>,
    /// Until it runs its program or has ended.
    cradle: Option<Box<Cradle>>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// `exit` with this code; [`super::PANIC_EXIT_CODE`] after a panic.
    Code(i32),
    /// Killed by this signal; `SIGSYS` by its own policy when nobody supervises.
    Signal(i32),
}

/// Namespaces that the child creates itself, in parallel with the supervisor; the network's follows later. The others must
/// exist from its first instruction: the user namespace because the supervisor maps it, the pid namespace because it only
/// counts for children.
const UNSHARED: c_ulong =
    (libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP) as c_ulong;

/// Starts a process in a jail. Returns as soon as it exists: call [`JailedProcess::release`], then [`JailedProcess::confirm`],
/// after the others are started.
///
/// The thread that calls this must live as long as the supervisor: the parent-death signal follows the thread.
///
/// # Errors
/// [`JailError`] with the step that failed; no process is left.
pub fn spawn(spec: JailSpec<'_>) -> Result<JailedProcess, JailError> {
    let arguments: Vec<CString> = spec
        .arguments
        .iter()
        .map(|argument| CString::new(argument.as_str()))
        .collect::<Result<_, _>>()
        .map_err(|_| JailError::Argument)?;
    let privileged = nix::unistd::geteuid().is_root();
    let identity = if privileged {
        spec.identity
    } else {
        let own = nix::unistd::geteuid().as_raw();
        Identity { uid: spec.subordinate.unwrap_or(own), gid: nix::unistd::getegid().as_raw() }
    };
    let all_owners = privileged && spec.shared.is_some_and(|shared| shared.all_owners);
    let identity = if all_owners { Identity { uid: 0, gid: 0 } } else { identity };
    if !all_owners && (identity.uid == 0 || identity.gid == 0) {
        return Err(JailError::RootIdentity);
    }
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(JailError::call("create a report socket"))?;
    let plan = Plan {
        null: spec.null.as_raw_fd(),
        log: spec.log.as_raw_fd(),
        channel: spec.channel.as_raw_fd(),
        program: spec.program.as_raw_fd(),
        report: theirs.as_raw_fd(),
        uid: identity.uid,
        gid: identity.gid,
        drop_groups: privileged,
        limits: spec.limits.table(),
        unshare: UNSHARED,
        shared: spec.shared.map(|shared| {
            (shared.directory.as_raw_fd(), if shared.read_only { HARMLESS | READ_ONLY } else { HARMLESS })
        }),
        kept: if all_owners { ALL_OWNERS } else { 0 },
    };
    let subordinate = spec.subordinate.filter(|_| !privileged);
    // A change of user makes the memory that it happens in not dumpable (prctl(2)), and the maps of all processes that share it root's.
    let shared = subordinate.is_none();
    let cradle = Cradle::new(plan, arguments)?;
    let (pid, pidfd) = cradle.clone(spec.cgroup, shared)?;
    let cradle = Some(cradle);
    let mut process = JailedProcess { pid, pidfd, report: Some(ours), helper: None, exit: None, cradle };
    // From here on dropping `process` kills the child.
    write_maps(pid, identity, privileged, subordinate.is_none())?;
    match subordinate {
        Some(uid) => process.helper = Some((start_helper(pid, uid)?, uid)),
        None => process.go()?,
    }
    Ok(process)
}

/// `newuidmap(1)` at work on a process; several of them at once, for each takes longer than all else of a launch.
fn start_helper(pid: i32, uid: u32) -> Result<Child, JailError> {
    let failed = |error: io::Error| JailError::Subordinate { uid, reason: error.to_string() };
    let program = uids::newuidmap().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let mut command = Command::new(program);
    command.args([pid.to_string(), uid.to_string(), uid.to_string(), "1".to_owned()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)
}

/// Maps exactly one user and one group, each to its own number: id 0 does not exist in the jail. Or all of them, each to itself.
fn write_maps(pid: i32, identity: Identity, privileged: bool, user: bool) -> Result<(), JailError> {
    let write = |file: &'static str, id: u32, text: &str| {
        fs::write(format!("/proc/{pid}/{file}"), text).map_err(|source| JailError::Map { file, id, source })
    };
    if !privileged {
        // user_namespaces(7): an ordinary user may map its group only after giving up setgroups.
        write("setgroups", identity.gid, "deny")?;
    }
    // Id 0 is for processes that act for every user, which are user 0 of all.
    let map = |id| if id == 0 { "0 0 4294967295".to_owned() } else { format!("{id} {id} 1") };
    write("gid_map", identity.gid, &map(identity.gid))?;
    if user { write("uid_map", identity.uid, &map(identity.uid)) } else { Ok(()) }
}

impl JailedProcess {
    /// Process id as the supervisor sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Changes `RLIMIT_FSIZE` of a process that was started with [`Limits::file_may_grow`].
    ///
    /// # Errors
    /// The kernel's, which forbids it beyond the supervisor's own hard limit.
    pub fn set_file_size(&self, bytes: u64) -> io::Result<()> {
        let limit = libc::rlimit64 { rlim_cur: bytes, rlim_max: hard_limit(libc::RLIMIT_FSIZE) };
        // SAFETY: the kernel reads a live structure and writes nothing. The process is a child that was not reaped, so that its number
        // is no other's.
        let result = unsafe {
            libc::syscall(
                libc::SYS_prlimit64,
                self.pid,
                libc::RLIMIT_FSIZE,
                &raw const limit,
                ptr::null::<libc::rlimit64>(),
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Lets a process go on that `newuidmap` was started for; nothing to do for others.
    ///
    /// # Errors
    /// [`JailError::Subordinate`]: it was not mapped.
    pub fn release(&mut self) -> Result<(), JailError> {
        let Some((helper, uid)) = self.helper.take() else { return Ok(()) };
        let failed = |reason: String| JailError::Subordinate { uid, reason };
        let output = helper.wait_with_output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(failed(words.trim().lines().next().unwrap_or("it failed without a word").to_owned()));
        }
        self.go()
    }

    /// Tells the process that it is mapped.
    fn go(&self) -> Result<(), JailError> {
        let ours = self.report.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        match send(ours, &[1], MsgFlags::MSG_NOSIGNAL) {
            // A child that failed before it waited has left its report.
            Ok(_) | Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(()),
            Err(errno) => Err(JailError::call("send to the new process")(errno)),
        }
    }

    /// Waits until the program runs, that is until the whole jail is built.
    ///
    /// # Errors
    /// [`JailError`] with the step that failed in the new process, or that `deadline` passed.
    pub fn confirm(&mut self, deadline: Duration) -> Result<(), JailError> {
        let Some(report) = self.report.take() else { return Ok(()) };
        let end = Instant::now().checked_add(deadline);
        loop {
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            let timeout = PollTimeout::try_from(left.saturating_add(Duration::from_micros(999)))
                .unwrap_or(PollTimeout::MAX);
            match nix::poll::poll(&mut [PollFd::new(report.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left.is_zero() => return Err(JailError::Deadline),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(errno) => return Err(JailError::call("wait for the new process")(errno)),
            }
        }
        let mut message = [0; 5];
        let mut receive = || recv(report.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT);
        // A child that failed before it read our byte has reset the socket: that comes before its report.
        let received =
            receive().or_else(|errno| if errno == Errno::ECONNRESET { receive() } else { Err(errno) });
        match received {
            Ok(5) => {
                let [step, errno @ ..] = message;
                let errno = Errno::from_raw(i32::from_ne_bytes(errno));
                Err(Step::from_number(step)
                    .map_or(JailError::Vanished, |step| JailError::Step { step, errno }))
            }
            // The kernel closes the socket on exec, or when the process ends.
            Ok(_) | Err(Errno::ECONNRESET) => {
                if self.has_ended().map_err(JailError::call("look at the new process"))? {
                    return Err(JailError::Vanished);
                }
                // It has memory of its own, or none any more: the kernel closes descriptors after it has changed that.
                self.cradle = None;
                Ok(())
            }
            Err(errno) => Err(JailError::call("hear from the new process")(errno)),
        }
    }

    /// Whether the process ended before it executed its program; does not reap.
    fn has_ended(&self) -> Result<bool, Errno> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match nix::sys::wait::waitid(Id::PIDFd(self.pidfd.as_fd()), flags)? {
            // A program that ran and ended quickly looks alike, and its own exit code tells more.
            WaitStatus::Signaled(..) | WaitStatus::Exited(_, 127) => Ok(true),
            _ => Ok(false),
        }
    }

    /// Sends SIGKILL.
    ///
    /// # Errors
    /// The error of `pidfd_send_signal`; a process that is gone already is not an error.
    pub fn kill(&self) -> io::Result<()> {
        let (pidfd, signal): (c_long, c_long) = (self.pidfd.as_raw_fd().into(), libc::SIGKILL.into());
        // SAFETY: no memory is involved; the signal information is absent.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, ptr::null::<libc::siginfo_t>(), 0)
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reaps the process if it has ended; the pidfd ([`AsFd`]) polls readable then.
    ///
    /// # Errors
    /// The error of `waitid`.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        self.reap(WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
    }

    /// Waits for the end of the process and reaps it.
    ///
    /// # Errors
    /// The error of `waitid`.
    pub fn wait(&mut self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = self.reap(WaitPidFlag::WEXITED)? {
                return Ok(exit);
            }
        }
    }

    fn reap(&mut self, flags: WaitPidFlag) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            self.exit = match nix::sys::wait::waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
                Ok(WaitStatus::Exited(_, code)) => Some(Exit::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::Signal(signal as i32)),
                Ok(_) | Err(Errno::EINTR) => None,
                Err(errno) => return Err(errno.into()),
            };
        }
        Ok(self.exit)
    }
}

impl AsFd for JailedProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for JailedProcess {
    fn drop(&mut self) {
        if let Some((mut helper, _)) = self.helper.take() {
            // It ends by itself within milliseconds.
            let _ = helper.wait();
        }
        if self.exit.is_none() && (self.kill().is_err() || self.wait().is_err()) {
            // Nobody knows whether it still stands there.
            mem::forget(self.cradle.take());
        }
    }
}
