//! Hosts that lack something, and ordinary users. These cases need root to make such hosts, and are skipped without.
//!
//! Contains unsafe code: a child changes its own view of the host before it executes.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};

use crate::harness::{Bench, Run, skip};

pub const CASES: &[(&str, fn())] = &[
    ("no_kvm_is_3", no_kvm),
    ("no_permission_for_kvm_is_3", no_permission),
    ("forbidden_user_namespaces_are_3", no_namespaces),
    ("an_ordinary_user_of_group_kvm_runs_machines", ordinary_user),
];

/// Who the ordinary user is.
const ORDINARY_USER: u32 = 12345;
/// Cases that differ for an ordinary user.
const ORDINARY_CASES: [&str; 5] =
    ["power_off", "forbidden_system", "killed_supervisor", "ps_shows", "terminal"];

fn with(bench: &Bench, arguments: &str, prepare: fn() -> io::Result<()>) -> Run {
    let mut command = bench.bulkhead(arguments);
    // SAFETY: this program has one thread, so its child may do whatever it could do.
    unsafe { command.pre_exec(prepare) };
    command.output().unwrap().into()
}

const RUN: &str = "run --kernel kernel --memory 16M --serial off";

fn no_kvm() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let hide = || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some("tmpfs"), "/dev", Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        Ok(())
    };
    let bench = Bench::new();
    let run = with(&bench, RUN, hide);
    assert_eq!(run.code, 3, "{}", run.err);
    assert!(run.err.contains("no /dev/kvm: "), "{}", run.err);
    let doctor = with(&bench, "doctor", hide);
    assert_eq!(doctor.code, 3);
    assert!(doctor.out.contains("NEEDED") && doctor.out.contains("cannot run machines"), "{}", doctor.out);
}

fn no_permission() {
    if !geteuid().is_root() || fs::metadata("/dev/kvm").unwrap().permissions().mode() & 0o006 != 0 {
        return skip("needs root, and a /dev/kvm that is not open to everybody");
    }
    let bench = Bench::new();
    fs::set_permissions(bench.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    let run = with(&bench, RUN, || {
        setgroups(&[])?;
        setgid(Gid::from_raw(ORDINARY_USER))?;
        Ok(setuid(Uid::from_raw(ORDINARY_USER))?)
    });
    assert_eq!(run.code, 3, "{}", run.err);
    assert!(
        run.err.contains("no permission to open /dev/kvm: add your user to the group kvm"),
        "{}",
        run.err
    );
}

fn no_namespaces() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let forbid = || {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        fs::write("/proc/sys/user/max_user_namespaces", "0")
    };
    let bench = Bench::new();
    let run = with(&bench, RUN, forbid);
    assert_eq!(run.code, 3, "{}", run.err);
    assert!(run.err.contains("namespaces") && run.err.contains("bulkhead doctor"), "{}", run.err);
    let doctor = with(&bench, "doctor", forbid);
    assert_eq!(doctor.code, 3, "{}", doctor.out);
    assert!(doctor.out.contains("user.max_user_namespaces is 0"), "{}", doctor.out);
}

/// Runs this program again as an ordinary user, from a copy that everybody may read.
fn ordinary_user() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let kvm = Gid::from_raw(fs::metadata("/dev/kvm").unwrap().gid());
    let bench = Bench::new();
    fs::set_permissions(bench.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(bench.path("bulkhead-vmm"));
    command.args(ORDINARY_CASES).env("BULKHEAD_UNDER_TEST", bench.path("bulkhead")).current_dir("/");
    // SAFETY: this program has one thread, so its child may do whatever it could do.
    unsafe {
        command.pre_exec(move || {
            setgroups(&[kvm])?;
            setgid(Gid::from_raw(ORDINARY_USER))?;
            Ok(setuid(Uid::from_raw(ORDINARY_USER))?)
        })
    };
    assert!(command.status().unwrap().success());
}
