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
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::jail::{
    Identity, JailError, JailSpec, JailedProcess, Limits, SharedDirectory, cgroup, spawn,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

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

/// Runs the suite again without root: from a copy, because the build folder need not be open to everybody, with subordinate
/// users in files of its own, and in a cgroup that was made over to it.
fn as_ordinary_user(word: Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::copy(std::env::current_exe().unwrap(), path("jail-test")).unwrap();
    std::fs::create_dir(path("run")).unwrap();
    std::os::unix::fs::chown(path("run"), Some(ORDINARY_USER), None).unwrap();
    let accounts = format!("ann:x:{ORDINARY_USER}:{ORDINARY_USER}:::\n");
    let files = [("passwd", accounts), ("subuid", "ann:300000:65536\n".to_owned())];
    for (name, text) in &files {
        std::fs::write(path(name), text).unwrap();
    }
    for (name, mode) in [(".", 0o755), ("jail-test", 0o755), ("passwd", 0o644), ("subuid", 0o644)] {
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let group = delegate();
    let joined = group.clone();
    let binds = files.map(|(name, _)| (path(name), format!("/etc/{name}")));
    let mut command = Command::new(path("jail-test"));
    command.args(word).arg("--ordinary-user").current_dir("/").env("XDG_RUNTIME_DIR", path("run"));
    let become_ordinary = move || {
        if let Some(group) = &joined {
            std::fs::write(group.join("cgroup.procs"), std::process::id().to_string())?;
        }
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        for (from, to) in &binds {
            // A host without subordinate users may lack the file.
            let _ = File::options().append(true).create(true).open(to)?;
            mount(Some(from), to.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        }
        setgroups(&[])?;
        setgid(Gid::from_raw(ORDINARY_USER))?;
        Ok(setuid(Uid::from_raw(ORDINARY_USER))?)
    };
    // SAFETY: this program has one thread, so its child may do whatever it could do.
    unsafe { command.pre_exec(become_ordinary) };
    let succeeded = command.status().unwrap().success();
    if let Some(group) = group {
        let _ = std::fs::remove_dir(group.join("bulkhead.supervisors"));
        std::fs::remove_dir(group).unwrap();
    }
    assert!(succeeded, "failed as user {ORDINARY_USER}");
}

/// A cgroup that belongs to the ordinary user, as service managers make it; `None` where none can be made.
fn delegate() -> Option<std::path::PathBuf> {
    let parent = cgroup::Parent::any().ok()?;
    let enable =
        |name: &str| std::fs::write(parent.folder().join("cgroup.subtree_control"), format!("+{name}"));
    let _may_be_missing = (enable("memory"), enable("pids"));
    let group = parent.folder().join(format!("jail-test-{}", std::process::id()));
    std::fs::create_dir(&group).unwrap();
    for name in [".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        std::os::unix::fs::chown(group.join(name), Some(ORDINARY_USER), None).unwrap();
    }
    Some(group)
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
    /// A directory to share, and whether for reading only and for all owners.
    pub shared: Option<(OwnedFd, bool, bool)>,
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
            shared: place.shared.as_ref().map(|(directory, read_only, all_owners)| SharedDirectory {
                directory: directory.as_fd(),
                read_only: *read_only,
                all_owners: *all_owners,
            }),
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
