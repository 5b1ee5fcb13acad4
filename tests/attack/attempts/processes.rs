//! The core, sibling devices, the supervisor, and anything else on the host.

use super::*;

const NOBODY: &[(i32, &str)] = &[(libc::ESRCH, PID_NAMESPACE)];

/// Process ids that others have: of the supervisor's namespace, and small ones. Number 1 is this process itself.
fn others(held: &Held) -> impl Iterator<Item = u64> {
    let around = held.host_pid.saturating_sub(20).max(2)..held.host_pid.saturating_add(400);
    (2..200).chain(around).map(fd).filter(|pid| *pid != own())
}

fn own() -> u64 {
    u64::from(nix::unistd::getpid().as_raw().unsigned_abs())
}

fn trace(held: &Held) -> Result {
    any(others(held), |pid| {
        call(libc::SYS_ptrace, [fd(libc::PTRACE_ATTACH.cast_signed()), pid, 0, 0, 0, 0]).map(drop)
    })
}

fn seize(held: &Held) -> Result {
    any(others(held), |pid| {
        call(libc::SYS_ptrace, [u64::from(libc::PTRACE_SEIZE), pid, 0, 0, 0, 0]).map(drop)
    })
}

fn vector(held: &Held, number: i64) -> Result {
    let mut byte = 0_u8;
    let local = [&raw mut byte as u64, 1];
    let remote = [0x40_0000_u64, 1];
    any(others(held), |pid| call(number, [pid, address(&local), 1, address(&remote), 1, 0]).map(drop))
}

fn read_memory(held: &Held) -> Result {
    vector(held, libc::SYS_process_vm_readv)
}

fn write_memory(held: &Held) -> Result {
    vector(held, libc::SYS_process_vm_writev)
}

fn kill(held: &Held) -> Result {
    any(others(held), |pid| call(libc::SYS_kill, [pid, fd(libc::SIGKILL), 0, 0, 0, 0]).map(drop))
}

fn kill_all(_: &Held) -> Result {
    call(libc::SYS_kill, [u64::MAX, fd(libc::SIGKILL), 0, 0, 0, 0]).map(drop)
}

fn kill_thread(held: &Held) -> Result {
    any(others(held), |pid| call(libc::SYS_tgkill, [pid, pid, fd(libc::SIGKILL), 0, 0, 0]).map(drop))
}

/// The one signal that every policy lets through, for abort().
fn abort_others(held: &Held) -> Result {
    any(others(held), |pid| call(libc::SYS_tgkill, [pid, pid, fd(libc::SIGABRT), 0, 0, 0]).map(drop))
}

fn queue_signal(held: &Held) -> Result {
    let information = [0_u64; 16];
    any(others(held), |pid| {
        call(libc::SYS_rt_sigqueueinfo, [pid, fd(libc::SIGUSR1), address(&information), 0, 0, 0]).map(drop)
    })
}

fn pidfd(held: &Held) -> Result {
    any(others(held), |pid| call(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0]).map(drop))
}

fn signal_by_pidfd(held: &Held) -> Result {
    any(&held.descriptors, |number| {
        call(libc::SYS_pidfd_send_signal, [fd(*number), fd(libc::SIGKILL), 0, 0, 0, 0]).map(drop)
    })
}

fn limits(held: &Held) -> Result {
    let limit = [0_u64; 2];
    any(others(held), |pid| call(libc::SYS_prlimit64, [pid, 7, address(&limit), 0, 0, 0]).map(drop))
}

fn pages(held: &Held) -> Result {
    any(others(held), |pid| call(libc::SYS_move_pages, [pid, 0, 0, 0, 0, 0]).map(drop))
}

fn outlive(_: &Held) -> Result {
    call(libc::SYS_prctl, [fd(libc::PR_SET_PDEATHSIG), 0, 0, 0, 0, 0]).map(drop)
}

pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        goal: "attach to the core or a sibling with ptrace",
        calls: &["ptrace"],
        run: trace,
        walls: NOBODY,
        gap: None,
    },
    Attempt { goal: "the same with PTRACE_SEIZE", calls: &["ptrace"], run: seize, walls: NOBODY, gap: None },
    Attempt {
        goal: "read their memory",
        calls: &["process_vm_readv"],
        run: read_memory,
        walls: NOBODY,
        gap: None,
    },
    Attempt {
        goal: "write their memory",
        calls: &["process_vm_writev"],
        run: write_memory,
        walls: NOBODY,
        gap: None,
    },
    Attempt { goal: "kill them", calls: &["kill"], run: kill, walls: NOBODY, gap: None },
    Attempt { goal: "kill everything in sight", calls: &["kill"], run: kill_all, walls: NOBODY, gap: None },
    Attempt { goal: "kill their threads", calls: &["tgkill"], run: kill_thread, walls: NOBODY, gap: None },
    Attempt {
        goal: "abort them by the signal that policies allow",
        calls: &["tgkill"],
        run: abort_others,
        walls: NOBODY,
        gap: None,
    },
    Attempt {
        goal: "queue a forged signal to them",
        calls: &["rt_sigqueueinfo"],
        run: queue_signal,
        walls: &[(libc::ESRCH, PID_NAMESPACE), (libc::EPERM, PID_NAMESPACE)],
        gap: None,
    },
    Attempt {
        goal: "open a pidfd of them",
        calls: &["pidfd_open"],
        run: pidfd,
        walls: &[(libc::ESRCH, PID_NAMESPACE), (libc::EINVAL, PID_NAMESPACE), (libc::ENOENT, PID_NAMESPACE)],
        gap: None,
    },
    Attempt {
        goal: "signal by a held descriptor as if it were a pidfd",
        calls: &["pidfd_send_signal"],
        run: signal_by_pidfd,
        walls: &[(libc::EBADF, NOTHING_HELD)],
        gap: None,
    },
    Attempt { goal: "change their limits", calls: &["prlimit64"], run: limits, walls: NOBODY, gap: None },
    Attempt {
        goal: "move their pages",
        calls: &["move_pages"],
        run: pages,
        walls: &[(libc::ESRCH, PID_NAMESPACE), (libc::ENOSYS, HOST)],
        gap: None,
    },
    Attempt {
        goal: "outlive its supervisor",
        calls: &["prctl"],
        run: outlive,
        walls: &[],
        gap: Some("a process may clear its own parent-death signal"),
    },
];
