//! Follows a command and all its descendants with ptrace(2).
//!
//! Contains unsafe code: fork, and loading a seccomp filter that stops a thread at `seccomp(2)` and nowhere else, so that
//! threads without a policy run at full speed.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;

use bulkhead_ipc::jail::PolicyName;
use bulkhead_tests::harness::Outcome;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::unistd::{ForkResult, Pid, fork, pipe, read, write};

use crate::rules::Policies;

/// What is known of a thread.
#[derive(Clone, Copy, Default)]
struct Thread {
    policy: Option<PolicyName>,
    /// The filter that it is loading.
    loading: Option<PolicyName>,
    /// Faults that it met.
    faults: u8,
}

/// Runs the command to its end; its exit code, or 128 and the signal.
pub fn run(arguments: &[String], policies: &mut Policies) -> Outcome<i32> {
    let told = |what: &'static str| move |errno: Errno| format!("{what}: {errno}");
    let (wait, go) = pipe().map_err(told("pipe"))?;
    let words: Vec<CString> = arguments.iter().filter_map(|word| CString::new(word.as_str()).ok()).collect();
    // SAFETY: this program has one thread.
    let child = match unsafe { fork() }.map_err(told("fork"))? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let _go = read(&wait, &mut [0]);
            stop_at_seccomp();
            let error = words.first().map(|program| nix::unistd::execvp(program, &words));
            eprintln!("unused-rules: {error:?}");
            std::process::exit(127);
        }
    };
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACESECCOMP
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(child, options).map_err(told("PTRACE_SEIZE"))?;
    write(&go, &[1]).map_err(told("write"))?;
    let mut threads: HashMap<Pid, Thread> = HashMap::new();
    let mut code = 0;
    loop {
        let mut status = 0;
        // Not the safe interface: it has no word for real-time signals, and vCPUs are kicked with one.
        // SAFETY: the kernel writes to a live integer.
        let pid = match Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) }) {
            Ok(pid) => Pid::from_raw(pid),
            Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) => return Ok(code),
            Err(errno) => return Err(format!("waitpid: {errno}")),
        };
        if libc::WIFSTOPPED(status) {
            stopped(status, pid, &mut threads, policies);
            continue;
        }
        threads.remove(&pid);
        if pid == child {
            code = if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                128 + libc::WTERMSIG(status)
            };
        }
    }
}

/// Lets a thread go on after whatever stopped it.
fn stopped(status: i32, pid: Pid, threads: &mut HashMap<Pid, Thread>, policies: &mut Policies) {
    let mut request = None;
    let mut deliver = 0;
    match (libc::WSTOPSIG(status), status >> 16) {
        (AT_SYSCALL, _) => at_syscall(pid, threads, policies),
        (libc::SIGTRAP, libc::PTRACE_EVENT_SECCOMP) => {
            threads.entry(pid).or_default().loading = filter_at(pid);
        }
        (libc::SIGTRAP, libc::PTRACE_EVENT_EXEC) => {
            threads.remove(&pid);
        }
        // A group stop: it stays stopped until SIGCONT.
        (signal, libc::PTRACE_EVENT_STOP) if signal != libc::SIGTRAP => request = Some(libc::PTRACE_LISTEN),
        (_, event) if event != 0 => {}
        (signal, _) => deliver = signal,
    }
    if matches!(deliver, libc::SIGSEGV | libc::SIGBUS) {
        let thread = threads.entry(pid).or_default();
        thread.faults = thread.faults.saturating_add(1);
        // The handler has had its turn. The kernel lets no fault kill process 1 of a pid namespace while it is traced.
        if thread.faults > 1 {
            request = Some(libc::PTRACE_DETACH);
        }
    }
    if !threads.contains_key(&pid) {
        threads.insert(pid, Thread { policy: inherited(pid, threads), ..Thread::default() });
    }
    let thread = threads.get(&pid).copied().unwrap_or_default();
    let watched = thread.policy.is_some() || thread.loading.is_some();
    let request = request.unwrap_or(if watched { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT });
    // A thread that was killed meanwhile says so itself.
    // SAFETY: no memory is involved.
    unsafe { libc::ptrace(request, pid.as_raw(), 0, deliver) };
}

/// The policy of a new thread: that of its process's set-up, if it has one.
fn inherited(pid: Pid, threads: &HashMap<Pid, Thread>) -> Option<PolicyName> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()?;
    let policy = threads.get(&Pid::from_raw(process))?.policy?;
    (policy == PolicyName::CoreSetup).then_some(policy)
}

/// `PTRACE_O_TRACESYSGOOD`.
const AT_SYSCALL: i32 = libc::SIGTRAP | 0x80;

fn at_syscall(pid: Pid, threads: &mut HashMap<Pid, Thread>, policies: &mut Policies) {
    let (Ok(info), Some(thread)) = (ptrace::syscall_info(pid), threads.get_mut(&pid)) else { return };
    match info.op {
        libc::PTRACE_SYSCALL_INFO_EXIT => {
            let Some(policy) = thread.loading.take() else { return };
            // SAFETY: `op` says which member the kernel has written.
            if unsafe { info.u.exit }.is_error == 0 {
                thread.policy = Some(policy);
                policies.loaded(policy);
            }
        }
        libc::PTRACE_SYSCALL_INFO_ENTRY => {
            // SAFETY: `op` says which member the kernel has written.
            let entry = unsafe { info.u.entry };
            if let (Some(policy), Ok(number)) = (thread.policy, i32::try_from(entry.nr)) {
                policies.call(policy, number, &entry.args);
            }
        }
        _ => {}
    }
}

/// Which of our policies a thread is about to load with `seccomp(2)`.
fn filter_at(pid: Pid) -> Option<PolicyName> {
    let info = ptrace::syscall_info(pid).ok()?;
    // SAFETY: this is a seccomp stop, for which the kernel writes this member.
    let [operation, _, program, ..] = unsafe { info.u.seccomp }.args;
    if operation != u64::from(libc::SECCOMP_SET_MODE_FILTER) {
        return None;
    }
    let word = |address: u64| {
        let address = usize::try_from(address).ok()? as ptrace::AddressType;
        ptrace::read(pid, address).ok().map(libc::c_long::cast_unsigned)
    };
    // struct sock_fprog: length, then after padding the address of the instructions.
    let length = usize::try_from(word(program)? & 0xFFFF).ok()?;
    let start = word(program + 8)?;
    let instruction = |index: usize| {
        let [a, b, jt, jf, k @ ..] = word(start + 8 * u64::try_from(index).ok()?)?.to_le_bytes();
        Some((u16::from_le_bytes([a, b]), jt, jf, u32::from_le_bytes(k)))
    };
    let loaded: Vec<_> = (0..length).map_while(instruction).collect();
    let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let title = String::from_utf8_lossy(&title).into_owned();
    let candidates = PolicyName::ALL.into_iter().filter(|policy| {
        // What a refusal does differs with the enforcement.
        let kills = |k| matches!(k, libc::SECCOMP_RET_KILL_PROCESS | libc::SECCOMP_RET_USER_NOTIF);
        let program = policy.program();
        program.len() == loaded.len()
            && program.iter().zip(&loaded).all(|(ours, theirs)| {
                ours == theirs || (ours.0 == theirs.0 && kills(ours.3) && kills(theirs.3))
            })
    });
    // Equal rules make equal filters: then the type of the device, its first argument, tells.
    let is_titled = |policy: &PolicyName| title.contains(&format!("\0{}", kind(*policy)));
    candidates.max_by_key(is_titled)
}

/// `blk` for `seccomp-policies/blk-main.json`.
fn kind(policy: PolicyName) -> &'static str {
    let name = policy.file().rsplit('/').next().unwrap_or_default();
    name.split('-').next().unwrap_or_default()
}

/// `SECCOMP_RET_TRACE` for `seccomp(2)`, `SECCOMP_RET_ALLOW` for the rest; inherited by all descendants.
fn stop_at_seccomp() {
    let statement =
        |code: u32, jt, jf, k| libc::sock_filter { code: code.try_into().unwrap_or(0), jt, jf, k };
    let number = u32::try_from(libc::SYS_seccomp).unwrap_or(0);
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_TRACE),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    let load = || {
        // SAFETY: the kernel copies a live program of the given length.
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) }
    };
    if load() != 0 {
        let _needed_without_root = nix::sys::prctl::set_no_new_privs();
        if load() != 0 {
            eprintln!("unused-rules: cannot watch for filters: {}", Errno::last());
        }
    }
}
