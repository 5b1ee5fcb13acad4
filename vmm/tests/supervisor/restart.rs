//! Devices that die under a running machine.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Bench, finish, signal, wait_for};

pub const CASES: &[(&str, fn())] = &[
    ("a_killed_device_is_replaced", replaced),
    ("each_device_is_replaced_whatever_ended_it", whatever_ended_it),
    ("a_device_that_keeps_dying_is_given_up", given_up),
    ("a_device_that_the_core_gives_up_is_replaced", core_gives_up),
    ("a_device_that_talks_nonsense_is_replaced_and_disturbs_nobody", nonsense),
    ("a_hung_device_is_killed_and_replaced", hung),
    ("a_successor_that_dies_before_it_is_ready_is_followed_by_another", successor_dies),
    ("a_core_that_dies_while_a_successor_starts_ends_the_machine", core_dies_meanwhile),
    ("never_is_for_the_devices_it_is_said_of", never),
    ("peers_outlive_the_process_that_serves_them", peers),
    ("an_end_during_a_restart_leaves_nothing", end_meanwhile),
    ("keys_that_nobody_has_read_are_struck_at_the_successor", keys),
    ("a_keyboard_that_lies_about_its_keys_is_condemned_and_harms_nobody_else", lying_keyboard),
];

const OFTEN: &str = "kernel = 'kernel'\nrestart = { max = 1000, window = 1, backoff = 0 }\n";

pub fn count(bench: &Bench, text: &str) -> usize {
    fs::read_to_string(bench.path("log")).unwrap_or_default().matches(text).count()
}

pub fn murder(bench: &Bench, id: &str) {
    kill(Pid::from_raw(bench.pid(id)), Signal::SIGKILL).unwrap();
}

fn replaced() {
    let bench = Bench::new();
    fs::write(bench.path("often.toml"), OFTEN).unwrap();
    let options = "--config often.toml --disk path=a.img --rng --console --serial attach --log-file log";
    let child = bench.start(options, "");
    for round in 1..=10 {
        for id in ["disk0", "rng", "console", "serial"] {
            let before = bench.pid(id);
            kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
            wait_for("the successor", || count(&bench, &format!("{id} was replaced within")) == round);
            assert_ne!(bench.pid(id), before);
        }
    }
    assert_eq!(bench.left().len(), 5);
    assert_eq!(count(&bench, "was killed by SIGKILL"), 40);
    assert_eq!(count(&bench, "error: "), 0);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
    assert!(bench.left().is_empty());
}

fn whatever_ended_it() {
    for (id, text) in [
        ("late-crash", "was killed by SIGSEGV"),
        ("late-panic", "panicked (its message stands above)"),
        ("late-exit", "ended by itself with exit code 9"),
        ("late-violate", "sethostname"),
    ] {
        let bench = Bench::new();
        let options = format!("--disk path=a.img,id={id} --restart 2/60 --log-file log");
        let child = bench.machine(&options, "").spawn().unwrap();
        wait_for("the end of all attempts", || count(&bench, "after 3 such ends it is given up") == 1);
        assert_eq!(count(&bench, text), 3, "{id}");
        assert_eq!(count(&bench, "it is restarted"), 2);
        wait_for("the core's word", || count(&bench, &format!("{id} has no process")) == 1);
        assert!(bench.ask("ps NAME").out.contains(": running"));
        signal(&child, Signal::SIGTERM);
        assert_eq!(finish(child).code, 143);
    }
    // One that never served ends the launch, whatever the policy.
    let run = Bench::new().run("--disk path=a.img,id=early", "");
    assert_eq!(run.code, 4, "{}", run.err);
    assert!(run.err.contains("ended by itself with exit code 5"), "{}", run.err);
}

fn given_up() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --restart 3/60 --log-file log", "");
    for round in 1..=3 {
        murder(&bench, "disk0");
        wait_for("the successor", || count(&bench, "disk0 was replaced within") == round);
    }
    assert_eq!(count(&bench, "it is restarted in 10 ms"), 1);
    assert_eq!(count(&bench, "it is restarted in 100 ms"), 1);
    murder(&bench, "disk0");
    wait_for("the end of all attempts", || count(&bench, "disk0 has no process") == 1);
    assert_eq!(count(&bench, "after 4 such ends it is given up"), 1);
    assert_eq!(bench.left().len(), 3, "core, rng and serial go on");
    murder(&bench, "rng");
    wait_for("the successor", || count(&bench, "rng was replaced within") == 1);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn core_gives_up() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --log-file log", "device-failed");
    wait_for("the successor", || count(&bench, "disk0 was replaced within") == 1);
    assert_eq!(count(&bench, "device disk0 failed: no answer"), 1);
    assert_eq!(bench.left().len(), 3);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

/// One that is not even caught at it is killed by the test, so that its successor says something else.
fn nonsense() {
    let bench = Bench::new();
    fs::write(bench.path("often.toml"), OFTEN).unwrap();
    let options = "--config often.toml --disk path=a.img,id=babbler --rng --console --log-file log";
    let child = bench.start(options, "");
    let others = [bench.pid("rng"), bench.pid("console")];
    let replaced = || count(&bench, "babbler was replaced within");
    for _ in 0..30 {
        let before = replaced();
        let end = Instant::now() + Duration::from_millis(300);
        while replaced() == before && Instant::now() < end {
            sleep(Duration::from_millis(5));
        }
        if replaced() == before {
            murder(&bench, "babbler");
            wait_for("the successor", || replaced() > before);
        }
    }
    let log = fs::read_to_string(bench.path("log")).unwrap();
    assert!(count(&bench, "babbler sent nonsense on its control channel") > 5, "{log}");
    assert!(!log.contains('\u{1b}') && log.lines().all(|line| line.len() < 2000));
    assert_eq!([bench.pid("rng"), bench.pid("console")], others, "{log}");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
    assert!(bench.left().is_empty());
}

fn hung() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --log-file log", "wait device-failed");
    kill(Pid::from_raw(bench.pid("disk0")), Signal::SIGSTOP).unwrap();
    wait_for("the successor", || count(&bench, "disk0 was replaced within") == 1);
    assert_eq!(bench.left().len(), 3);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn never() {
    let bench = Bench::new();
    let options = "--disk path=a.img,restart=never --disk path=b.img --log-file log";
    let child = bench.start(options, "");
    murder(&bench, "disk1");
    wait_for("the successor", || count(&bench, "disk1 was replaced within") == 1);
    murder(&bench, "disk0");
    assert_eq!(finish(child).code, 4);
    assert_eq!(count(&bench, "error: disk0 (process"), 1);
}

fn peers() {
    let bench = Bench::new();
    let child = bench.start("--serial unix=s --restart always --log-file log", "");
    let mut peer = UnixStream::connect(bench.path("s")).unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut expect = || {
        let mut line = [0; 20];
        peer.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"attached to serial\r\n");
    };
    expect();
    for _ in 0..3 {
        murder(&bench, "serial");
        expect();
    }
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn keys() {
    let bench = Bench::new();
    let child = bench.start("--keyboard --restart always --log-file log", "");
    let told = |number: u32| count(&bench, &format!("message {number} of 2 strokes for keyboard"));
    kill(Pid::from_raw(bench.pid("keyboard")), Signal::SIGSTOP).unwrap();
    let run = bench.ask("sendkey NAME a");
    assert_eq!(run.code, 0, "{}", run.err);
    murder(&bench, "keyboard");
    wait_for("the key", || told(1) == 1);
    assert_eq!(bench.ask("sendkey NAME b").code, 0);
    wait_for("another key", || told(2) == 1);
    wait_for("the first successor", || count(&bench, "keyboard was replaced within") == 1);
    murder(&bench, "keyboard");
    wait_for("the second successor", || count(&bench, "keyboard was replaced within") == 2);
    assert_eq!(bench.ask("sendkey NAME c").code, 0);
    wait_for("the last key", || told(3) == 1);
    assert_eq!([told(1), told(2)], [1, 1], "what was taken is not struck again");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn lying_keyboard() {
    let bench = Bench::new();
    let child = bench.start("--keyboard --disk path=a.img --restart 2/60/1 --log-file log", "");
    let others = ["core", "disk0"].map(|id| bench.pid(id));
    let first = bench.pid("keyboard");
    assert_eq!(bench.ask("sendkey NAME ctrl-alt-f1").code, 0);
    // A successor is told the same, since nobody has taken the keys, and lies again.
    wait_for("the end of all attempts", || count(&bench, "such ends it is given up") == 1);
    assert_eq!(count(&bench, "keyboard says that it took keys that nobody struck"), 3);
    assert!(kill(Pid::from_raw(first), None).is_err(), "it lives");
    assert_eq!(["core", "disk0"].map(|id| bench.pid(id)), others, "the others are the same");
    let run = bench.ask("sendkey NAME a");
    assert!(run.code != 0 && run.err.contains("does not serve"), "{}", run.err);
    let (machine, list) = (bench.ask("ps NAME").out, bench.ask("device list NAME").out);
    assert!(machine.contains(": running"), "{machine}");
    assert!(list.contains("failed") && list.contains("keys that nobody struck"), "{list}");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn end_meanwhile() {
    let bench = Bench::new();
    for delay in (0..12).chain([50, 80]) {
        let child = bench.start("--disk path=a.img --restart always", "");
        murder(&bench, "disk0");
        sleep(Duration::from_millis(delay));
        let start = Instant::now();
        signal(&child, Signal::SIGTERM);
        let run = finish(child);
        assert_eq!(run.code, 143, "{delay} ms: {}", run.err);
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(bench.left().is_empty(), "{delay} ms");
    }
}

fn successor_dies() {
    let bench = Bench::new();
    let options = "--disk path=a.img,id=counts --restart 5/60/1 --log-file log";
    let child = bench.start(options, "");
    murder(&bench, "counts");
    wait_for("the third successor", || count(&bench, "counts was replaced within") == 1);
    assert_eq!(count(&bench, "ended by itself with exit code 5; it is restarted"), 2);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

fn core_dies_meanwhile() {
    for delay in (0..12).chain([30]) {
        let bench = Bench::new();
        let child = bench.start("--disk path=a.img --rng --restart always", "");
        let (core, disk) = (bench.pid("core"), bench.pid("disk0"));
        kill(Pid::from_raw(disk), Signal::SIGKILL).unwrap();
        sleep(Duration::from_millis(delay));
        let start = Instant::now();
        kill(Pid::from_raw(core), Signal::SIGKILL).unwrap();
        let run = finish(child);
        assert_eq!(run.code, 4, "{delay} ms: {}", run.err);
        assert!(start.elapsed() < Duration::from_secs(1), "{delay} ms: {:?}", start.elapsed());
        assert!(run.err.contains("core (process"), "{delay} ms: {}", run.err);
        assert!(bench.left().is_empty(), "{delay} ms");
    }
}
