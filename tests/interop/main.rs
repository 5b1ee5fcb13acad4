//! The interoperation suite: our device services under QEMU, and back ends of others under our core, with real peers only.
//!
//! `interop [--write] [WORD]…` runs the cases whose name contains one of the words. With `--write` the whole run goes into
//! `docs/interop.md`, with the versions of the peers. A peer that is not installed is a case that was not run, by name.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod foreign;
mod guest;
mod migration;
mod ours;
mod table;
mod traffic;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

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
    pub run: fn() -> Outcome,
}

/// A program of somebody else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub name: &'static str,
    pub program: &'static str,
    /// The package or crate that has it.
    pub package: &'static str,
}

pub const QEMU: Peer =
    Peer { name: "QEMU", program: "qemu-system-x86_64", package: "Debian qemu-system-x86" };
pub const STORAGE_DAEMON: Peer = Peer {
    name: "qemu-storage-daemon",
    program: "qemu-storage-daemon",
    package: "Debian qemu-system-common",
};

impl Peer {
    /// The first line of what it says of itself.
    pub fn version(self) -> Option<String> {
        let output = std::process::Command::new(self.program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit())).map(str::to_owned)
    }
}

/// A program of ours, beside this one.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name(name);
    assert!(path.exists(), "no program {}: build it first", path.display());
    path
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let write = arguments.iter().any(|argument| argument == "--write");
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let mut rows = Vec::new();
    for case in [ours::CASES, traffic::CASES, migration::CASES, foreign::CASES].concat() {
        let name = format!("{} / {}: {}", case.ours, case.peer.name, case.what);
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        let begin = Instant::now();
        let version = case.peer.version();
        let result = match &version {
            Some(_) => (case.run)(),
            None => Err(format!("not run: {} is not installed ({})", case.peer.program, case.peer.package)),
        };
        let seconds = begin.elapsed().as_secs_f32();
        match &result {
            Ok(text) => println!("{name} ... ok ({seconds:.1} s): {text}"),
            Err(text) => println!("{name} ... FAILED ({seconds:.1} s): {text}"),
        }
        rows.push(Row { case, version, result });
    }
    if write && words.is_empty() {
        table::write(&rows);
    }
    let failed = rows.iter().filter(|row| row.result.is_err()).count();
    println!("{} cases, {failed} failed", rows.len());
    if failed == 0 && !rows.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
