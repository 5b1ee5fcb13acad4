//! The jail, tried on real processes: this program starts itself in a jail and looks at the result from inside and from outside,
//! as root and as an ordinary user. It contains unsafe code: raw system calls, to see what the kernel makes of them.
//!
//! `cargo test -p bulkhead-ipc --test jail [WORD]` runs the cases whose name contains the word.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod inside;
mod layers;
mod measure;
mod outside;
mod policies;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::jail::{Identity, JailError, JailSpec, JailedProcess, Limits, spawn};

pub const DEADLINE: Duration = Duration::from_secs(5);
/// `argv[0]` of the jailed side.
pub const TITLE: &str = "jail-test: inside";
/// Who the suite runs as the second time.
const ORDINARY_USER: u32 = 12345;

type Case = (&'static str, fn());

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.first().is_some_and(|title| title == TITLE) {
        inside::main(&arguments[1]);
        return;
    }
    match arguments.get(1).map(String::as_str) {
        Some("--supervisor-to-kill") => return outside::supervisor_to_kill(),
        Some("--measure") => return measure::main(),
        Some("--without-namespaces") => return outside::without_namespaces(),
        _ => {}
    }
    let word = arguments.iter().skip(1).find(|argument| !argument.starts_with('-')).cloned();
    let ordinary = arguments.iter().any(|argument| argument == "--ordinary-user");
    let cases: Vec<Case> = [outside::CASES, layers::CASES, policies::CASES].concat();
    for (name, case) in cases {
        if word.as_ref().is_none_or(|word| name.contains(word.as_str())) {
            case();
            println!("{} {name} ... ok", if ordinary { "as an ordinary user:" } else { "as started:" });
        }
    }
    if nix::unistd::geteuid().is_root() {
        as_ordinary_user(word);
    }
}

/// Runs the suite again without root: from a copy, because the build folder need not be open to everybody.
fn as_ordinary_user(word: Option<String>) {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = folder.path().join("jail-test");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&copy);
    command.args(word).arg("--ordinary-user").current_dir("/").uid(ORDINARY_USER).gid(ORDINARY_USER);
    assert!(command.status().unwrap().success(), "failed as user {ORDINARY_USER}");
}

/// A process of this program in a jail, and the supervisor's ends.
pub struct Jailed {
    pub process: JailedProcess,
    pub channel: Channel,
    pub log: std::io::PipeReader,
}

/// Where a process runs: users and cgroup.
#[derive(Default)]
pub struct Place {
    pub identity: Identity,
    pub subordinate: Option<u32>,
    pub cgroup: Option<OwnedFd>,
}

impl Jailed {
    pub fn start(scenario: &str) -> Self {
        Self::start_at(scenario, Limits::default(), &Place::default())
    }

    pub fn start_at(scenario: &str, limits: Limits, place: &Place) -> Self {
        let program = File::open(std::env::current_exe().unwrap()).unwrap();
        let mut jailed = Self::try_start_at(scenario, program, limits, place).unwrap();
        if let Err(error) = jailed.process.release().and_then(|()| jailed.process.confirm(DEADLINE)) {
            panic!("{scenario}: {error}");
        }
        jailed
    }

    pub fn try_start(scenario: &str, program: File, limits: Limits) -> Result<Self, JailError> {
        Self::try_start_at(scenario, program, limits, &Place::default())
    }

    pub fn try_start_at(
        scenario: &str,
        program: File,
        limits: Limits,
        place: &Place,
    ) -> Result<Self, JailError> {
        let (channel, theirs) = Channel::pair().unwrap();
        let (log, log_writer) = std::io::pipe().unwrap();
        let null: OwnedFd = File::options().read(true).write(true).open("/dev/null").unwrap().into();
        let process = spawn(JailSpec {
            program: program.as_fd(),
            arguments: &[TITLE.into(), scenario.into()],
            channel: theirs.into_fd(),
            log: log_writer.as_fd(),
            null: null.as_fd(),
            limits,
            identity: place.identity,
            subordinate: place.subordinate,
            cgroup: place.cgroup.as_ref().map(AsFd::as_fd),
        })?;
        Ok(Self { process, channel, log })
    }

    /// What the process wrote, after it ended.
    pub fn log(&mut self) -> String {
        let mut text = String::new();
        self.log.read_to_string(&mut text).unwrap();
        text
    }
}
