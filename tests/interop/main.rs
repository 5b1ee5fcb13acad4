//! The interoperation suite: our device services under QEMU, and back ends of others under our core, with real peers only.
//!
//! `interop [--write] [WORD]…` runs the cases whose name contains one of the words; `interop lab [WORD]…` a stock guest under our core
//! with the back ends of others whose name does, which needs hardware virtualization or the lab. With `--write` the run goes into `docs/interop.md`, with the versions of
//! the peers; rows of cases that were not run stay as they are. `interop --compare [ROUNDS] [net|fs|vsock-driver|vsock]…`
//! measures throughput beside that of others instead, for `tools/bench devices`. A peer that is not installed is a case that was not run, by name.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compare;
mod dpdk;
mod exercisers;
mod foreign;
mod foreign_guest;
mod foreign_peers;
mod guest;
mod migration;
mod ours;
mod table;
mod traffic;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use table::Row;

/// What a case found out, or why it failed.
pub type Outcome = Result<String, String>;

/// A case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Which of our parts.
    pub ours: &'static str,
    /// The peer.
    pub peer: Peer,
    /// What is shown.
    pub what: &'static str,
    pub run: fn(Peer) -> Outcome,
}

/// A program of somebody else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub name: &'static str,
    /// A name with a `/` is below the root of the repository.
    pub program: &'static str,
    /// The package or crate that has it.
    pub package: &'static str,
}

const fn peer(name: &'static str, program: &'static str, package: &'static str) -> Peer {
    Peer { name, program, package }
}

/// What `tools/make-peers` makes.
const MADE: &str = "tools/make-peers";
pub const QEMU: Peer = peer("QEMU", "qemu-system-x86_64", "Debian qemu-system-x86");
pub const NEW_QEMU: Peer = peer("QEMU", "build/peers/bin/qemu-system-x86_64", MADE);
pub const STORAGE_DAEMON: Peer =
    peer("qemu-storage-daemon", "qemu-storage-daemon", "Debian qemu-system-common");
pub const VIRTIOFSD: Peer = peer("virtiofsd", "/usr/lib/qemu/virtiofsd", "Debian qemu-system-common");
pub const NEW_VIRTIOFSD: Peer = peer("virtiofsd", "build/peers/bin/virtiofsd", MADE);
pub const DEVICE_RNG: Peer = peer("vhost-device-rng", "build/peers/bin/vhost-device-rng", MADE);
pub const DEVICE_VSOCK: Peer = peer("vhost-device-vsock", "build/peers/bin/vhost-device-vsock", MADE);
pub const PASST: Peer = peer("passt --vhost-user", "build/peers/bin/passt", MADE);
pub const TESTPMD: Peer = peer("DPDK testpmd", "dpdk-testpmd", "Debian dpdk-dev");

impl Peer {
    /// What to start it by.
    pub fn path(self) -> PathBuf {
        if self.program.contains('/') { root().join(self.program) } else { self.program.into() }
    }

    /// The number in what it says of itself; DPDK's programs say none, so its package is asked.
    pub fn version(self) -> Option<String> {
        let mut command = std::process::Command::new(self.path());
        command.arg("--version");
        if self.program == TESTPMD.program {
            command = std::process::Command::new("dpkg-query");
            command.args(["-W", "-f=${Version}", "dpdk-dev"]);
        }
        let output = command.output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit())).map(str::to_owned)
    }
}

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A program of ours, beside this one.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name(name);
    assert!(path.exists(), "no program {}: build it first", path.display());
    path
}

/// All cases that need no lab; those under QEMU for each of both.
fn cases() -> Vec<Case> {
    let by_new = |cases: Vec<Case>| {
        let new: Vec<Case> = cases.iter().map(|case| Case { peer: NEW_QEMU, ..*case }).collect();
        [cases, new].concat()
    };
    let quick = [ours::CASES, traffic::CASES, migration::CASES].concat();
    // What takes longest comes last: the time of a whole run is bounded.
    let slow = exercisers::CASES.to_vec();
    [dpdk::CASES.to_vec(), foreign::CASES.to_vec(), by_new(quick), by_new(slow)].concat()
}

/// After this no further case is begun: a whole run takes no longer than a quarter of an hour.
const LIMIT: Duration = Duration::from_secs(660);

fn run(case: Case, start: Instant) -> Row {
    let begin = Instant::now();
    let version = case.peer.version();
    let result = match &version {
        Some(_) if start.elapsed() > LIMIT => Err("not run: the time was used up".to_owned()),
        Some(_) => (case.run)(case.peer),
        None => Err(format!("not run: {} is not there ({})", case.peer.program, case.peer.package)),
    };
    let (ours, peer, what) = (case.ours.into(), case.peer.name.into(), case.what.into());
    let row = Row { ours, peer, version, what, result, time: begin.elapsed() };
    row.say();
    row
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    if has("--in-lab") {
        foreign_guest::run(&words);
        return ExitCode::SUCCESS;
    }
    if has("--compare") {
        let rounds = words.iter().find_map(|word| word.parse().ok()).unwrap_or(5);
        let parts: Vec<&String> =
            words.iter().copied().filter(|word| word.parse::<usize>().is_err()).collect();
        return if compare::run(rounds, &parts) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let wanted = |ours: &str, peer: &str, version: Option<&str>, what: &str| {
        let name = format!("{ours} / {peer} {}: {what}", version.unwrap_or_default());
        words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))
    };
    let wanted_case =
        |case: &Case| wanted(case.ours, case.peer.name, case.peer.version().as_deref(), case.what);
    let lab: Vec<&String> = words.iter().copied().filter(|word| *word != "lab").collect();
    let (start, mut rows) = (Instant::now(), Vec::new());
    if lab.len() == words.len() {
        rows.extend(cases().into_iter().filter(wanted_case).map(|case| run(case, start)));
    }
    if words.is_empty() || lab.len() < words.len() {
        rows.extend(foreign_guest::in_lab(&lab));
    }
    if has("--write") {
        table::write(&rows, words.is_empty());
    }
    let failed = rows.iter().filter(|row| row.result.is_err()).count();
    println!("{} cases, {failed} failed", rows.len());
    if failed == 0 && !rows.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
