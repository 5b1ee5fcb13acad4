//! A host that has no descriptors left.
//!
//! Contains unsafe code: the limits of another process are changed.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Bench, Run, finish, signal, wait_for};
use crate::restart::count;

pub const CASES: &[(&str, fn())] = &[
    ("a_launch_without_descriptors_is_refused_clearly", launch),
    ("a_restart_without_descriptors_is_tried_again", restart),
];

fn launch() {
    let bench = Bench::new();
    let (mut refused, mut ran) = (0, 0);
    for descriptors in (4..64).step_by(3) {
        let mut command = bench.machine("--disk path=a.img --rng --console --serial attach", "poweroff");
        // SAFETY: setrlimit is async-signal-safe.
        unsafe {
            command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?));
        }
        let run: Run = finish(command.spawn().unwrap());
        if run.code == 0 {
            ran += 1;
        } else {
            refused += 1;
            let clear = run.err.contains("open files") || run.err.contains("descriptors");
            assert!(clear && run.code < 5, "{descriptors}: code {}, {}", run.code, run.err);
        }
        assert!(!run.err.contains("panicked"), "{descriptors}: {}", run.err);
        assert!(bench.left().is_empty(), "{descriptors}");
    }
    assert!(refused > 5 && ran > 1, "{refused} refused, {ran} ran");
}

fn limit(child: &Child, descriptors: u64) {
    let limit = libc::rlimit { rlim_cur: descriptors, rlim_max: 1024 };
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: the new limit is read, and no old one is asked for.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

/// Processor time of a process, in ticks of 10 ms.
fn ticks(child: &Child) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

fn restart() {
    let bench = Bench::new();
    let options = "--disk path=a.img --serial unix=s --restart always --log-file log";
    let child = bench.start(options, "");
    let disk = bench.pid("disk0");
    // One too few for each new one.
    limit(&child, 3);
    kill(Pid::from_raw(disk), Signal::SIGKILL).unwrap();
    wait_for("attempts", || count(&bench, "cannot start disk0: Too many open files") >= 3);
    // Who connects waits, and nobody spins.
    let before = ticks(&child);
    let mut peer = UnixStream::connect(bench.path("s")).unwrap();
    let ps = bench.bulkhead(&format!("ps {}", bench.name)).spawn().unwrap();
    sleep(Duration::from_millis(700));
    assert!(ticks(&child) - before < 20, "{} ticks", ticks(&child) - before);
    limit(&child, 1024);
    assert!(finish(ps).out.contains(": running"));
    let mut line = [0; 20];
    peer.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"attached to serial\r\n");
    wait_for("the successor", || count(&bench, "disk0 was replaced within") == 1);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}
