//! Devices of back ends that are not ours, and what devices count.

use std::os::unix::net::UnixListener;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Bench, finish, signal, wait_for};

pub const CASES: &[(&str, fn())] = &[
    ("a_back_end_that_is_not_there_is_named", absent),
    ("a_back_end_is_connected_to_for_each_process", connected_again),
    ("stats_and_top_show_every_device", counted),
];

fn absent() {
    let bench = Bench::new();
    drop(UnixListener::bind(bench.path("stale")).unwrap());
    for (options, text) in [
        ("--vhost-user type=rng,socket=none", "'none': there is no such socket"),
        ("--vhost-user type=rng,socket=stale", "'stale': nobody listens there"),
        ("--disk vhost-user=none", "device vhost-user0: cannot connect to the back end"),
        ("--vhost-user type=rong,socket=none", "did you mean 'rng'?"),
        ("--disk path=a.img,id=x --vhost-user type=rng,socket=none,id=x", "already belongs to another"),
    ] {
        let run = bench.run(options, "poweroff");
        assert_eq!(run.code, 2, "{options}: {}", run.err);
        assert!(run.err.contains(text), "{options}: {}", run.err);
    }
}

fn connected_again() {
    let bench = Bench::new();
    let back_end = UnixListener::bind(bench.path("socket")).unwrap();
    let child = bench.start("--vhost-user type=rng,socket=socket,id=foreign", "run");
    let first = back_end.accept().unwrap();
    kill(Pid::from_raw(bench.pid("foreign")), Signal::SIGKILL).unwrap();
    let _second = back_end.accept().unwrap();
    drop(first);
    wait_for("the successor", || bench.ask("device list NAME").out.contains("relay    serving"));
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn counted() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --serial attach", "run");
    let table = bench.ask("stats NAME").out;
    for id in ["disk0", "rng", "serial"] {
        assert!(table.lines().any(|line| line.starts_with(id)), "{table}");
    }
    let json: serde_json::Value = serde_json::from_str(&bench.ask("stats NAME --json").out).unwrap();
    assert_eq!(json["devices"][0]["counters"]["requests"], 0);
    assert!(json["devices"][2]["counters"].is_null(), "the UART has no queue");
    assert!(bench.ask("stats NAME --prometheus").out.contains("bulkhead_device_requests_total{machine="));
    let top = bench.ask("top NAME --count 2 --interval 100").out;
    assert_eq!(top.lines().filter(|line| line.contains(" disk0 ")).count(), 2, "{top}");
    assert!(!top.contains('\u{1b}'), "no terminal, no escape");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
    assert_eq!(bench.ask("stats NAME").code, bench.ask("ps NAME").code, "a machine that does not run");
}
