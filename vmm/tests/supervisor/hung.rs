//! Processes that live and do nothing.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Bench, finish, signal, wait_for};
use crate::restart::count;

pub const CASES: &[(&str, fn())] = &[
    ("each_device_that_hangs_is_found_by_its_heartbeat", devices),
    ("a_device_that_hangs_ends_the_machine_when_the_policy_says_never", never),
    ("a_core_that_hangs_ends_the_machine", core),
    ("a_device_that_answers_and_does_nothing_is_replaced", stalls),
    ("a_device_that_waits_for_the_host_is_left_alone", waits),
    ("a_supervisor_that_was_stopped_blames_nobody", stopped_supervisor),
];

fn stop(bench: &Bench, id: &str) {
    kill(Pid::from_raw(bench.pid(id)), Signal::SIGSTOP).unwrap();
}

fn devices() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --console --hang-deadline 1 --log-file log", "");
    for id in ["disk0", "rng", "console", "serial"] {
        stop(&bench, id);
    }
    for id in ["disk0", "rng", "console", "serial"] {
        wait_for("the successor", || count(&bench, &format!("{id} was replaced within")) == 1);
        assert_eq!(count(&bench, &format!("{id} hangs: it did not answer within 1 s")), 1);
    }
    sleep(Duration::from_secs(2));
    assert_eq!(count(&bench, "hangs"), 4, "the successors answer");
    assert_eq!(bench.left().len(), 5);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn never() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --restart disk0=never --hang-deadline 1", "");
    stop(&bench, "disk0");
    let run = finish(child);
    assert_eq!(run.code, 4, "{}", run.err);
    assert!(run.err.contains("error: disk0 hangs: it did not answer within 1 s"), "{}", run.err);
    assert!(bench.left().is_empty());
}

fn core() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --restart always --hang-deadline 1", "");
    let start = Instant::now();
    stop(&bench, "core");
    let run = finish(child);
    assert_eq!(run.code, 4, "{}", run.err);
    assert!(run.err.contains("error: core hangs: it did not answer within 4 s"), "{}", run.err);
    assert!(start.elapsed() < Duration::from_secs(7));
    assert!(bench.left().is_empty());
}

fn stalls() {
    let bench = Bench::new();
    let options = "--disk path=a.img,id=stalls --restart 2/60 --stall-deadline 1 --log-file log";
    let child = bench.start(options, "");
    wait_for("the successor", || count(&bench, "stalls was replaced within") == 1);
    let text = "stalls hangs: it answers, but does nothing about the requests in queue 1 for 1 s";
    assert_eq!(count(&bench, text), 1);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn waits() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img,id=waits --stall-deadline 1 --log-file log", "");
    wait_for("the warning", || count(&bench, "waits waits for the host") == 1);
    sleep(Duration::from_millis(1500));
    assert_eq!(count(&bench, "waits waits for the host"), 1, "said once");
    assert_eq!(count(&bench, "hangs"), 0);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn stopped_supervisor() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --hang-deadline 1 --log-file log", "");
    signal(&child, Signal::SIGSTOP);
    // With the supervisor all of its processes are asleep, as when a host is frozen; they wake after it.
    let pids = ["disk0", "core", "serial"].map(|id| bench.left_named(id));
    pids.iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGSTOP).unwrap());
    sleep(Duration::from_millis(2500));
    signal(&child, Signal::SIGCONT);
    sleep(Duration::from_millis(300));
    pids.iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGCONT).unwrap());
    sleep(Duration::from_millis(1500));
    assert_eq!(count(&bench, "hangs"), 0);
    assert_eq!(pids[0], bench.pid("disk0"));
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}
