//! The attack suite: processes of a machine that turn hostile after start, under the real supervisor and in the real jail.
//!
//! ```text
//! attack [--write | --mishaps]
//! ```
//!
//! This program plays the core and the devices behind the real `bulkhead`, which it finds beside itself: a folder gets a copy of
//! `bulkhead`, and copies of this program as `bulkhead-vmm` and `bulkhead-device`. Started as these it behaves until it has
//! its descriptors and policies, and then tries everything in `attempts/` (see `hostile.rs`).
//!
//! Three things are shown, as root and as an ordinary user:
//! - under its policies, no thread of any kind gets anything: each attempt is stopped by the policy, at the call that was meant,
//!   or by a wall behind it, with the errno that was meant;
//! - without policies, the other walls hold by themselves, except where an attempt says that the policy is the only one;
//! - a forbidden call ends the process and is reported by process, thread, call, arguments and file, before READY too; panics,
//!   faults and the allocator's every path do not end in one.
//!
//! The policies are those of `PolicyName::ALL`, and the kinds of process all that a supervisor starts or that can be a service: one
//! that nobody attacked fails the suite. The outcomes are compared with the table in docs/security.md; `--write` writes it instead. `--mishaps` tries no attack: it is part of the workload of `unused-rules`.
//!
//! Contains unsafe code: this is the attacker, and it becomes another user.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attempts;
mod hostile;
mod machine;
mod mishaps;
mod sizes;
mod table;
mod watch;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use bulkhead_ipc::jail::PolicyName;
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};

use crate::hostile::{CORE, DEVICES};
use crate::machine::{Bench, Run};
use crate::table::Outcomes;

/// The only step that honest programs make too.
const MISHAPS: &str = "mishaps end as they are meant to";
/// Who the ordinary user is.
const ORDINARY_USER: u32 = 12345;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.first() {
        Some(title) if title.starts_with("bulkhead-vmm[") => {
            hostile::core();
            return ExitCode::SUCCESS;
        }
        Some(title) if title.starts_with("bulkhead-device[") => {
            hostile::device();
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let bench = Bench::new();
    let who = if geteuid().is_root() { "root" } else { "an ordinary user" };
    let step = |name: &str, case: &dyn Fn(&Bench) -> Result<(), String>| {
        let start = Instant::now();
        let outcome = case(&bench);
        let seconds = start.elapsed().as_secs_f64();
        match &outcome {
            Ok(()) => println!("started by {who}: {name} ... ok ({seconds:.1} s)"),
            Err(text) => println!("started by {who}: {name} ... FAILED ({seconds:.1} s)\n{text}"),
        }
        outcome.is_ok()
    };
    if has("--mishaps") {
        return if step(MISHAPS, &mishaps_end_well) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    // The other user has copies, of this program for the most.
    let mut good =
        has("--ordinary-user") || step("every service is a kind of process here", &every_service_is_a_kind);
    good &= step("every attempt fails", &|bench| every_attempt_fails(bench, has("--write")));
    good &= step("a forbidden call ends the process and is reported", &violations);
    good &= step("a forbidden call before READY is reported", &early_violations);
    good &= step("a death before READY ends the machine, which says whose", &early_deaths);
    good &= step(MISHAPS, &mishaps_end_well);
    if geteuid().is_root() && !has("--write") {
        good &= as_ordinary_user(&bench);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn every_attempt_fails(bench: &Bench, write: bool) -> Result<(), String> {
    let mut outcomes = Outcomes::default();
    for mode in ["sealed", "open"] {
        let run = bench.run(mode);
        run.expect_exit(0)?;
        outcomes.read(&run.messages)?;
    }
    outcomes.check()?;
    bench.beside_is_untouched()?;
    if geteuid().is_root() { outcomes.compare_with_docs(bench, write) } else { Ok(()) }
}

/// A type that can be a service has the policies of the device of the same name, in the same code.
fn every_service_is_a_kind(_: &Bench) -> Result<(), String> {
    let program = machine::real_program("bulkhead-device");
    let output = Command::new(program).arg("--help").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let types = text.lines().find_map(|line| line.strip_prefix("types that can be services: "));
    let types: Vec<&str> = types.ok_or(format!("no types in {text:?}"))?.split(", ").collect();
    match types.iter().find(|name| DEVICES.iter().all(|kind| kind.name != **name)) {
        None => Ok(()),
        Some(name) => Err(format!("nobody attacked: the service {name}")),
    }
}

/// A thread of the hostile program.
struct Sealed {
    policy: PolicyName,
    thread: &'static str,
    /// Of its process.
    id: &'static str,
    /// The word for it in a machine's name. The same number on several devices is one word: they all do it in one machine.
    word: String,
}

fn threads() -> Vec<Sealed> {
    let mut threads = Vec::new();
    for kind in DEVICES.iter().chain([&CORE]) {
        let group = if kind.name == CORE.name { "core" } else { "devices" };
        let all = [(kind.main, "bulkhead")].into_iter().chain(kind.others.iter().copied());
        for ((policy, thread), number) in all.zip(0..) {
            threads.push(Sealed { policy, thread, id: kind.id, word: format!("{group}_{number}") });
        }
    }
    threads
}

/// All words once.
fn words() -> BTreeSet<String> {
    threads().into_iter().map(|thread| thread.word).collect()
}

fn violations(bench: &Bench) -> Result<(), String> {
    for word in words() {
        let run = bench.run(&format!("violate-{word}"));
        for thread in threads().into_iter().filter(|thread| thread.word == word) {
            expect_report(&run, &thread)?;
        }
    }
    Ok(())
}

/// One line with process, thread, call, arguments and file.
fn expect_report(run: &Run, of: &Sealed) -> Result<(), String> {
    let wanted = ["sethostname (system call 170)", "0x1234 0x7", of.policy.file(), of.id, of.thread];
    let found = run.messages.lines().any(|line| wanted.iter().all(|word| line.contains(word)));
    if found { Ok(()) } else { Err(format!("no line with {wanted:?} in\n{}", run.messages)) }
}

/// The machine ends with the first of them, long before the deadline for READY.
fn early_violations(bench: &Bench) -> Result<(), String> {
    for word in words() {
        let start = Instant::now();
        let run = bench.run(&format!("violate-early_{word}"));
        let mut of_word = threads().into_iter().filter(|thread| thread.word == word);
        let found = of_word.any(|thread| expect_report(&run, &thread).is_ok());
        if !found || run.code != 4 || start.elapsed().as_secs() > 10 {
            return Err(format!(
                "{word}: exit code {} after {:?}\n{}",
                run.code,
                start.elapsed(),
                run.messages
            ));
        }
    }
    Ok(())
}

/// Of each kind: the machine ends at once with a message that names the process and says how it ended.
fn early_deaths(bench: &Bench) -> Result<(), String> {
    for kind in DEVICES.iter().chain([&CORE]) {
        let start = Instant::now();
        let run = bench.run(&format!("die-{}", kind.name));
        let end = format!("exit code {}", hostile::DIES);
        let named = run.messages.lines().any(|line| {
            line.contains("error: ") && line.contains(&format!("{} ", kind.id)) && line.contains(&end)
        });
        if !named || run.code != 4 || start.elapsed().as_secs() > 5 {
            return Err(format!(
                "{}: exit code {} after {:?}\n{}",
                kind.name,
                run.code,
                start.elapsed(),
                run.messages
            ));
        }
    }
    Ok(())
}

fn mishaps_end_well(bench: &Bench) -> Result<(), String> {
    for (mishap, end, says) in mishaps::ENDS {
        for word in words() {
            let run = bench.run(&format!("mishap-{mishap}_{word}"));
            let failed = |what: &str| Err(format!("{mishap} on {word}: {what} in\n{}", run.messages));
            let devices = DEVICES.map(|kind| kind.id);
            let processes = if word.starts_with("core") { &[CORE.id][..] } else { &devices };
            for process in processes {
                let ended = |line: &str| line.contains(&format!("{process} (process ")) && line.contains(end);
                if !run.messages.lines().any(ended) {
                    return failed(&format!("no \"{process} … {end}\""));
                }
            }
            if run.messages.matches(says).count() < processes.len() || run.messages.contains("does not allow")
            {
                return failed(&format!("not {says:?} for each, or a forbidden call"));
            }
        }
    }
    Ok(())
}

/// Runs the suite again without root, from the folder that holds copies of the programs.
fn as_ordinary_user(bench: &Bench) -> bool {
    fs::set_permissions(bench.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let kvm = Gid::from_raw(fs::metadata("/dev/kvm").unwrap().gid());
    let mut command = Command::new(bench.folder().join("bulkhead-vmm"));
    command.arg("--ordinary-user").current_dir("/");
    // SAFETY: this program has one thread, so its child may do whatever it could do.
    unsafe {
        command.pre_exec(move || {
            setgroups(&[kvm])?;
            setgid(Gid::from_raw(ORDINARY_USER))?;
            Ok(setuid(Uid::from_raw(ORDINARY_USER))?)
        })
    };
    command.status().unwrap().success()
}
