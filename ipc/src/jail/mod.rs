//! The jail: what a process may reach, from both sides.
//!
//! The supervisor calls [`spawn`]; the new process calls [`enter`] first, [`enter_thread`] on each of its threads and
//! [`seal`] last on its main thread, then answers `Ready` with the [`Sealed`] listeners. From then on every thread runs
//! under the policy of its own kind (`seccomp-policies/*.json`).
//!
//! ```text
//! supervisor                                   jailed process
//! spawn() ── clone3, user map ───────────────▶ namespaces, empty root, limits, capabilities, execveat
//! confirm() ◀── end of file, or failed step ── (close-on-exec)
//! send Start ────────────────────────────────▶ enter(); recv Start; set_enforcement()
//!                                              threads: enter_thread(BlkQueue); main: seal(BlkMain, &descriptors)
//! poll listeners ◀──────────── Ready + listeners
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The policies of `seccomp-policies/`, one for each kind of process and thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyName {
    /// Core: event loop, control channel, device connections.
    CoreMain,
    /// Core: a vCPU.
    CoreVcpu,
    /// virtio-blk: control channel and vhost-user messages.
    BlkMain,
    /// virtio-blk: a set of queues.
    BlkQueue,
    /// virtio-rng: control channel and vhost-user messages.
    RngMain,
    /// virtio-rng: its queue.
    RngQueue,
    /// virtio-console: control channel and vhost-user messages.
    ConsoleMain,
    /// virtio-console: its queues and its peer.
    ConsoleQueue,
    /// 16550A: control channel.
    UartMain,
    /// 16550A: registers and peer.
    UartWorker,
}

/// What a system call does that the policy does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Enforcement {
    /// The kernel kills the process (`SECCOMP_RET_KILL_PROCESS`, SIGSYS).
    Standalone,
    /// The thread stops, the supervisor is told what it tried and kills the process (`SECCOMP_RET_USER_NOTIF`).
    Supervised,
}

/// Host user and group that a process runs as when the supervisor is root; an ordinary user keeps its own.
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

/// Resource limits; soft and hard alike.
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
    /// `RLIMIT_MEMLOCK` in bytes.
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
            locked: 0,
        }
    }
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
}

/// A namespace or another part of the jail that a host can forbid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// New user, mount, pid, net, ipc, uts and cgroup namespaces.
    Namespaces,
    /// Empty read-only root.
    Root,
    /// seccomp filters.
    Seccomp,
}

/// Why a process was not jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// placeholder
    #[error("not built yet")]
    Unbuilt,
}

impl JailError {
    /// The layer that the host lacks or forbids, if that is the reason.
    #[must_use]
    pub fn missing_layer(&self) -> Option<Layer> {
        None
    }
}

/// A process that was started in a jail; killed and reaped on drop unless it was reaped before.
#[derive(Debug)]
pub struct JailedProcess {
    pid: i32,
    pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// `exit` with this code; [`PANIC_EXIT_CODE`] after a panic.
    Code(i32),
    /// Killed by this signal; `SIGSYS` by its own policy when nobody supervises.
    Signal(i32),
}

/// Exit code after a panic.
pub const PANIC_EXIT_CODE: i32 = 101;

/// Starts a process in a jail. Returns as soon as it exists: call [`JailedProcess::confirm`] after the others are started.
///
/// The thread that calls this must live as long as the supervisor: the parent-death signal follows the thread.
///
/// # Errors
/// [`JailError`] with the step that failed; no process is left.
pub fn spawn(spec: JailSpec<'_>) -> Result<JailedProcess, JailError> {
    let _ = spec;
    Err(JailError::Unbuilt)
}

impl JailedProcess {
    /// Process id as the supervisor sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until the program runs, that is until the whole jail is built.
    ///
    /// # Errors
    /// [`JailError`] with the step that failed in the new process, or that `deadline` passed.
    pub fn confirm(&mut self, deadline: Duration) -> Result<(), JailError> {
        let _ = deadline;
        Err(JailError::Unbuilt)
    }

    /// Sends SIGKILL.
    ///
    /// # Errors
    /// The error of `pidfd_send_signal`; a process that is gone already is not an error.
    pub fn kill(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Reaps the process if it has ended; the pidfd ([`AsFd`]) polls readable then.
    ///
    /// # Errors
    /// The error of `waitid`.
    pub fn try_wait(&mut self) -> std::io::Result<Option<Exit>> {
        Ok(None)
    }

    /// Waits for the end of the process and reaps it.
    ///
    /// # Errors
    /// The error of `waitid`.
    pub fn wait(&mut self) -> std::io::Result<Exit> {
        Ok(Exit::Code(0))
    }
}

impl AsFd for JailedProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Start of a jailed process: the first call in its `main`. Installs the panic hook, makes the process not dumpable and checks
/// that exactly descriptors 0 to 3 are open. Returns the control channel, descriptor 3.
///
/// # Errors
/// [`JailError`] naming what is not as it should be.
pub fn enter() -> Result<OwnedFd, JailError> {
    Err(JailError::Unbuilt)
}

/// Says what a forbidden system call does, before the first [`enter_thread`] or [`seal`]; [`Enforcement::Standalone`] if
/// never called.
pub fn set_enforcement(enforcement: Enforcement) {
    let _ = enforcement;
}

/// Puts the calling thread under its policy, before it reads from guest or peer and before the main thread calls [`seal`]
/// (a thread that is created later inherits the main thread's policy).
///
/// # Errors
/// [`JailError`] when the filter cannot be loaded.
pub fn enter_thread(policy: PolicyName) -> Result<(), JailError> {
    let _ = policy;
    Err(JailError::Unbuilt)
}

/// Seals the process: last step of the main thread, after every other thread has called [`enter_thread`]. Checks that
/// exactly `expected` and descriptors 0 to 2 are open, loads the main thread's policy and hands out the listeners.
///
/// # Errors
/// [`JailError`] naming the descriptor that is too many or missing, or that the filter cannot be loaded.
pub fn seal(policy: PolicyName, expected: &[BorrowedFd<'_>]) -> Result<Sealed, JailError> {
    let _ = (policy, expected);
    Err(JailError::Unbuilt)
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

/// Supervisor's end of one thread's policy.
#[derive(Debug)]
pub struct ViolationListener {
    policy: PolicyName,
    listener: OwnedFd,
}

/// A system call that a policy forbids, as the kernel saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Thread id in the supervisor's pid namespace.
    pub thread: i32,
    /// Number of the system call (x86-64).
    pub number: i32,
    /// Its name; `unknown` for a number that has none.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// The policy.
    pub policy: PolicyName,
}

impl ViolationListener {
    /// A listener that came with `Ready`.
    #[must_use]
    pub fn new(policy: PolicyName, listener: OwnedFd) -> Self {
        Self { policy, listener }
    }

    /// The policy that it listens to.
    #[must_use]
    pub fn policy(&self) -> PolicyName {
        self.policy
    }

    /// Reads the violation after the descriptor ([`AsFd`]) polled readable; `None` when there is none (any more). The caller
    /// then kills the process through its pidfd and never answers the call.
    ///
    /// # Errors
    /// The error of the `ioctl`; a descriptor that is no listener.
    pub fn read(&self) -> std::io::Result<Option<Violation>> {
        Ok(None)
    }
}

impl AsFd for ViolationListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Size of an embedded policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicySummary {
    /// Which policy.
    pub name: PolicyName,
    /// Its file in `seccomp-policies/`.
    pub file: &'static str,
    /// Number of system calls that it allows, those with restricted arguments included.
    pub allowed: usize,
}

/// All embedded policies.
#[must_use]
pub fn policies() -> &'static [PolicySummary] {
    &[]
}
