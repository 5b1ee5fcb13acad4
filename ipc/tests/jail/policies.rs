//! Each policy: every call that a rule allows comes back, a forbidden one ends the process and is reported by name.

use std::os::fd::AsFd;

use bulkhead_ipc::jail::{Enforcement, Exit, PolicyName, Violation, ViolationListener, policies};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde_json::{Value, json};

use crate::inside::{Answer, Ask};
use crate::{Case, DEADLINE, Jailed};

#[path = "../../build/selectors.rs"]
mod selectors;

pub const CASES: &[Case] = &[
    ("every rule of every policy lets its call through", allowed),
    ("a forbidden call is reported by name under a supervisor", reported),
    ("a forbidden call kills without a supervisor", killed),
    ("a forbidden call fails during the set-up", set_up),
    ("nothing hangs when a process dies with its listeners", dies_with_listeners),
    ("policies are listed with their sizes", listed),
    ("rules that allow more than anybody means are refused by the build", refused_rules),
];

const ALL_ONES: u64 = u64::MAX;

/// Calls that no policy allows, with harmless arguments.
const FORBIDDEN: &[(&str, i64, [u64; 6])] = &[
    ("openat", libc::SYS_openat, [ALL_ONES, 0, 0, 0, 0, 0]),
    ("socket", libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
    ("execveat", libc::SYS_execveat, [ALL_ONES, 0, 0, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0, 0]),
    ("fork", libc::SYS_fork, [0; 6]),
    ("ptrace", libc::SYS_ptrace, [ALL_ONES, 0, 0, 0, 0, 0]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0, 0, 0, 0]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    ("tgkill", libc::SYS_tgkill, [1, 1, 9, 0, 0, 0]),
    ("unshare", libc::SYS_unshare, [0; 6]),
    ("setns", libc::SYS_setns, [ALL_ONES, 0, 0, 0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [ALL_ONES, 0, 0, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0; 6]),
    ("mmap", libc::SYS_mmap, [0, 4096, 4, 0x22, ALL_ONES, 0]),
    ("mprotect", libc::SYS_mprotect, [0, 4096, 5, 0, 0, 0]),
    ("madvise", libc::SYS_madvise, [0, 0, 12, 0, 0, 0]),
    ("ioctl", libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]),
    // Whoever shares an open file could be made to wait: F_SETFL without O_NONBLOCK, FIONBIO.
    ("fcntl", libc::SYS_fcntl, [ALL_ONES, 4, 0, 0, 0, 0]),
    ("ioctl", libc::SYS_ioctl, [ALL_ONES, 0x5421, 0, 0, 0, 0]),
    // A read that might wait, where only one that does not is meant.
    ("preadv2", libc::SYS_preadv2, [ALL_ONES, 0, 0, 0, 0, 0]),
    ("prctl", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
    // x32: getpid of another table.
    ("unknown", 0x4000_0000 | libc::SYS_getpid, [0; 6]),
    ("unknown", 5000, [0; 6]),
];

fn sealed(policy: PolicyName, enforcement: Enforcement) -> (Jailed, Vec<ViolationListener>) {
    let jailed = Jailed::start("serve");
    jailed.channel.send(&Ask::Seal(policy, enforcement), &[]).unwrap();
    let (answer, listeners) = jailed.channel.recv::<Answer>(Some(DEADLINE)).unwrap();
    let Answer::Ready(policies) = answer else { panic!("{answer:?}") };
    assert_eq!(policies.len(), listeners.len());
    let listeners =
        policies.into_iter().zip(listeners).map(|(it, fd)| ViolationListener::new(it, fd)).collect();
    (jailed, listeners)
}

fn ask(jailed: &mut Jailed, number: i64, arguments: [u64; 6]) -> i64 {
    jailed.channel.send(&Ask::Call(number, arguments), &[]).unwrap();
    match jailed.channel.recv(Some(DEADLINE)) {
        Ok((Answer::Returned(value), _)) => value,
        other => panic!("call {number} {arguments:x?}: {other:?}, {:?}", jailed.process.try_wait()),
    }
}

/// Every policy file, as the build script found them: an ordinary user need not reach the source tree.
const FILES: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/policy_files.rs"));

fn rules(file: &str) -> Vec<Value> {
    let (_, text) = FILES.iter().find(|(name, _)| *name == file).unwrap();
    let policy: Value = serde_json::from_str(text).unwrap();
    let entry = policy.as_object().unwrap().values().next().unwrap();
    entry["filter"].as_array().unwrap().clone()
}

/// Arguments that a rule accepts and that make the call fail or do nothing.
fn arguments(rule: &Value) -> [u64; 6] {
    let mut arguments = [ALL_ONES, 0, 0, 0, 0, 0];
    match rule["syscall"].as_str().unwrap() {
        // Without a wait: too many descriptors.
        "ppoll" | "poll" => arguments[1] = ALL_ONES,
        _ => {}
    }
    for condition in rule.get("args").and_then(Value::as_array).unwrap_or(&Vec::new()) {
        arguments[usize::try_from(condition["index"].as_u64().unwrap()).unwrap()] =
            condition["val"].as_u64().unwrap();
    }
    arguments
}

fn number(name: &str) -> i64 {
    (0..1024).find(|&number| bulkhead_ipc::jail::syscall_name(number) == name).unwrap().into()
}

fn allowed() {
    let common = rules("seccomp-policies/common.json");
    for policy in PolicyName::ALL {
        let (mut jailed, _listeners) = sealed(policy, Enforcement::Supervised);
        for rule in common.iter().chain(&rules(policy.file())) {
            let name = rule["syscall"].as_str().unwrap();
            // They end the thread or the process, change its registers, or make another thread on the same stack.
            if matches!(name, "exit" | "exit_group" | "rt_sigreturn" | "clone") {
                continue;
            }
            ask(&mut jailed, number(name), arguments(rule));
        }
    }
}

fn reported() {
    for policy in PolicyName::ALL {
        for &(name, number, arguments) in FORBIDDEN {
            let (mut jailed, listeners) = sealed(policy, Enforcement::Supervised);
            let listener = &listeners[0];
            assert_eq!(listener.read().unwrap(), None);
            jailed.channel.send(&Ask::Call(number, arguments), &[]).unwrap();
            let mut poll = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            assert_eq!(nix::poll::poll(&mut poll, PollTimeout::from(5000_u16)), Ok(1), "{policy:?} {name}");
            let violation = listener.read().unwrap().unwrap();
            let Violation { thread, .. } = violation;
            assert!(std::fs::exists(format!("/proc/{}/task/{thread}", jailed.process.pid())).unwrap());
            assert_ne!(thread, jailed.process.pid());
            let expected =
                Violation { thread, number: i32::try_from(number).unwrap(), name, arguments, policy };
            assert_eq!(violation, expected);
            let text = violation.to_string();
            assert!(text.contains(name) && text.contains(policy.file()), "{text}");
            jailed.process.kill().unwrap();
            assert_eq!(jailed.process.wait().unwrap(), Exit::Signal(libc::SIGKILL));
        }
    }
}

fn killed() {
    for policy in PolicyName::ALL {
        for &(name, number, arguments) in FORBIDDEN {
            let (mut jailed, listeners) = sealed(policy, Enforcement::Standalone);
            assert!(listeners.is_empty());
            jailed.channel.send(&Ask::Call(number, arguments), &[]).unwrap();
            assert_eq!(jailed.process.wait().unwrap(), Exit::Signal(libc::SIGSYS), "{policy:?} {name}");
        }
    }
}

/// What is forbidden before there is a listener does not happen, and the process learns it.
fn set_up() {
    let mut jailed = Jailed::start("serve");
    jailed.channel.send(&Ask::SetUp(PolicyName::CoreSetup), &[]).unwrap();
    let (answer, _) = jailed.channel.recv::<Answer>(Some(DEADLINE)).unwrap();
    assert!(matches!(answer, Answer::Ready(_)), "{answer:?}");
    for &(name, number, arguments) in FORBIDDEN {
        assert_eq!(ask(&mut jailed, number, arguments), -i64::from(libc::ENOSYS), "{name}");
    }
}

fn dies_with_listeners() {
    let (mut jailed, listeners) = sealed(PolicyName::UartMain, Enforcement::Supervised);
    jailed.channel.send(&Ask::Call(libc::SYS_socket, [0; 6]), &[]).unwrap();
    let mut poll = [PollFd::new(listeners[0].as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::from(5000_u16)).unwrap();
    jailed.process.kill().unwrap();
    jailed.process.wait().unwrap();
    // The notification is gone with the thread: reading it neither waits nor fails.
    assert_eq!(listeners[0].read().unwrap(), None);
    assert_eq!(listeners[1].read().unwrap(), None);
}

fn listed() {
    let names: Vec<_> = policies().iter().map(|policy| policy.name).collect();
    assert_eq!(names, PolicyName::ALL);
    for policy in policies() {
        assert!(policy.allowed > 10 && policy.allowed < 80, "{policy:?}");
        assert!(policy.instructions < 4096);
        println!(
            "    {:<40} {} system calls, {} instructions",
            policy.file, policy.allowed, policy.instructions
        );
    }
}

fn refused_rules() {
    let on = |index: u64, op: Value, val: u64| json!({"index": index, "type": "qword", "op": op, "val": val});
    let eq = |index: u64, val: u64| on(index, json!("eq"), val);
    let masked = |index: u64, mask: u64| on(index, json!({ "masked_eq": mask }), 0);
    for (syscall, arguments, refused) in [
        ("read", vec![], false),
        ("ioctl", vec![], true),
        ("ioctl", vec![eq(0, 3)], true),
        ("ioctl", vec![eq(1, 0xAE80)], false),
        ("setsockopt", vec![eq(1, 1)], true),
        ("mmap", vec![eq(2, 3)], true),
        ("mmap", vec![eq(2, 3), eq(3, 0x22)], false),
        ("mmap", vec![eq(2, 5), eq(3, 0x22)], true),
        ("mmap", vec![on(2, json!("le"), 3), eq(3, 0x22)], false),
        ("mmap", vec![on(2, json!("le"), 7), eq(3, 0x22)], true),
        ("mprotect", vec![masked(2, 4)], false),
        ("mprotect", vec![masked(2, 2)], true),
        ("mprotect", vec![on(2, json!("ge"), 0)], true),
        ("openat", vec![eq(0, 3)], true),
        ("io_uring_setup", vec![], true),
        ("clone", vec![], true),
        ("clone3", vec![], true),
    ] {
        let rule = json!({ "syscall": syscall, "comment": "for the test", "args": arguments });
        assert_eq!(selectors::fault("blk-main", &rule).is_some(), refused, "{rule}");
    }
    // Another filter can only forbid more, and one policy is there to go before another.
    let stricter = json!({ "syscall": "seccomp", "comment": "for the test", "args": [eq(0, 1)] });
    assert_eq!(selectors::fault("core-setup", &stricter), None);
    assert!(selectors::fault("core-main", &stricter).is_some());
    assert!(selectors::fault("core-setup", &json!({ "syscall": "seccomp", "args": [] })).is_some());
}
