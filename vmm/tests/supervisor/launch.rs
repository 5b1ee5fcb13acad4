//! Launch, end, and what is said about it.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Bench, finish, signal, wait_for};

pub const CASES: &[(&str, fn())] = &[
    ("power_off_ends_with_0", power_off),
    ("a_guest_panic_ends_with_5", guest_panic),
    ("a_reset_restarts_or_ends", reset),
    ("a_failing_core_is_reported", core_failed),
    ("each_death_is_explained", deaths),
    ("a_forbidden_system_call_is_named", violation),
    ("a_jail_that_cannot_be_built_is_explained", no_program),
    ("a_flood_of_messages_is_cut", flood),
    ("a_stubborn_device_is_killed", stubborn),
    ("signals_end_everything", signals),
    ("a_signal_at_any_moment_leaves_nothing", signal_storm),
    ("a_killed_supervisor_leaves_nothing", killed_supervisor),
    ("a_disk_in_use_is_refused", disk_in_use),
    ("a_name_in_use_is_refused", name_in_use),
    ("refusals_have_code_2", refusals),
    ("ready_is_quick", ready_is_quick),
    ("a_service_manager_hears_of_start_and_end", service_manager),
];

const ALL: &str = "--disk path=a.img --rng --console --serial attach --log-level debug";

fn power_off() {
    let run = Bench::new().run(ALL, "poweroff");
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("all 5 processes are ready"), "{}", run.err);
    assert!(run.err.contains("the guest powered off"), "{}", run.err);
}

fn guest_panic() {
    let run = Bench::new().run(ALL, "panicked");
    assert_eq!(run.code, 5, "{}", run.err);
    assert!(run.err.contains("error: the guest panicked"), "{}", run.err);
}

fn reset() {
    assert_eq!(Bench::new().run("--on-reboot exit", "reset").code, 0);
    let bench = Bench::new();
    let child =
        bench.machine("--on-reboot restart --disk path=a.img --log-file log", "reset").spawn().unwrap();
    wait_for("three resets", || {
        fs::read_to_string(bench.path("log")).unwrap_or_default().matches("the guest reset").count() >= 3
    });
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).code, 143);
    assert!(bench.left().is_empty());
}

fn core_failed() {
    let run = Bench::new().run("", "failed");
    assert_eq!(run.code, 4);
    assert!(run.err.contains("core: KVM_RUN\\u{1b}[2J"), "{}", run.err);
    assert_eq!(run.err.matches("error: ").count(), 1, "{}", run.err);
    let run = Bench::new().run("", "bad-kernel");
    assert_eq!(run.code, 2);
    assert!(
        run.err.contains("error: kernel '") && run.err.contains("kernel': this is no kernel\n"),
        "{}",
        run.err
    );
    assert_eq!(run.err.matches("error: ").count(), 1, "{}", run.err);
    let run = Bench::new().run("--disk path=a.img", "device-failed");
    assert_eq!(run.code, 4);
    assert!(run.err.contains("device disk0 failed: no answer"), "{}", run.err);
}

fn deaths() {
    for (id, text) in [
        ("crash", "crash (process "),
        ("crash", "was killed by SIGSEGV"),
        ("panic", "panicked (its message stands above)"),
        ("panic", "as told"),
        ("exit", "ended by itself with exit code 9"),
        ("early", "ended by itself with exit code 5"),
        ("refuses", "device refuses failed: bad disk"),
    ] {
        let run = Bench::new().run(&format!("--disk path=a.img,id={id} --rng"), "");
        assert_eq!(run.code, 4, "{}", run.err);
        assert!(run.err.contains(text), "{id}: {}", run.err);
        assert_eq!(run.err.matches("error: ").count(), if id == "panic" { 2 } else { 1 }, "{}", run.err);
    }
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img", "");
    kill(Pid::from_raw(bench.pid("disk0")), Signal::SIGKILL).unwrap();
    let run = finish(child);
    assert_eq!(run.code, 4);
    assert!(run.err.contains("disk0 (process") && run.err.contains("was killed by SIGKILL"), "{}", run.err);
}

fn violation() {
    let run = Bench::new().run("--disk path=a.img,id=violate", "");
    assert_eq!(run.code, 4, "{}", run.err);
    assert!(run.err.contains("violate was killed: thread "), "{}", run.err);
    assert!(run.err.contains("sethostname") && run.err.contains("blk-main.json"), "{}", run.err);
    assert_eq!(run.err.matches("error: ").count(), 1, "{}", run.err);
}

fn no_program() {
    let bench = Bench::new();
    fs::remove_file(bench.path("bulkhead-device")).unwrap();
    let run = bench.run("--disk path=a.img", "");
    assert_eq!(run.code, 1);
    assert!(run.err.contains("bulkhead-device'") && run.err.contains("installed completely"), "{}", run.err);
    fs::write(bench.path("bulkhead-device"), "no program").unwrap();
    let run = bench.run("--disk path=a.img", "");
    assert_eq!(run.code, 1, "{}", run.err);
    assert!(run.err.contains("cannot start") && run.err.contains("execute"), "{}", run.err);
}

fn flood() {
    let run = Bench::new().run("--disk path=a.img,id=flood --log-level info", "poweroff");
    assert!(run.err.lines().count() < 1000, "{} lines", run.err.lines().count());
    assert!(run.err.len() < 200_000);
    assert!(!run.err.contains('\u{1b}'));
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img,id=flood", "");
    sleep(Duration::from_millis(300));
    signal(&child, Signal::SIGTERM);
    let run = finish(child);
    assert!(run.err.contains("messages dropped"), "{}", run.err);
}

fn stubborn() {
    let start = Instant::now();
    let run = Bench::new().run("--disk path=a.img,id=stubborn", "poweroff");
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("killing what did not stop"), "{}", run.err);
    assert!(start.elapsed() < Duration::from_secs(5));
}

fn signals() {
    for (number, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let bench = Bench::new();
        let child = bench.start(ALL, "");
        let start = Instant::now();
        signal(&child, number);
        assert_eq!(finish(child).code, code);
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        assert!(bench.left().is_empty());
    }
    let bench = Bench::new();
    let child = bench.machine(ALL, "silent").spawn().unwrap();
    wait_for("the launch", || bench.ask("ps NAME").out.contains(": starting"));
    signal(&child, Signal::SIGINT);
    assert_eq!(finish(child).code, 130);
    assert!(bench.left().is_empty());
}

fn signal_storm() {
    let bench = Bench::new();
    for delay in (0..24_000).step_by(400) {
        let child = bench.machine("--disk path=a.img --rng --console --serial unix=s", "").spawn().unwrap();
        sleep(Duration::from_micros(delay));
        signal(&child, Signal::SIGTERM);
        let run = finish(child);
        // Before main the default action still holds.
        assert!(run.code == 143 || run.code == -1, "{delay} µs: {} {}", run.code, run.err);
        assert!(bench.left().is_empty(), "{delay} µs");
        assert!(!bench.path("s").exists(), "{delay} µs");
    }
}

fn killed_supervisor() {
    let bench = Bench::new();
    let child = bench.start(ALL, "");
    assert_eq!(bench.left().len(), 5);
    signal(&child, Signal::SIGKILL);
    drop(finish(child));
    wait_for("the end of all processes", || bench.left().is_empty());
    // The name and the disk are free again.
    assert_eq!(bench.run(ALL, "poweroff").code, 0);
}

fn disk_in_use() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img", "");
    let other = bench.ask("run --kernel kernel --name other-NAME --disk path=a.img,id=root");
    assert_eq!(other.code, 2);
    assert!(other.err.contains("disk root: 'a.img' is locked by another machine"), "{}", other.err);
    signal(&child, Signal::SIGTERM);
    finish(child);
}

fn name_in_use() {
    let bench = Bench::new();
    let child = bench.start("", "");
    let other = bench.ask("run --kernel kernel --name NAME");
    assert_eq!(other.code, 2);
    assert!(other.err.contains("runs already"), "{}", other.err);
    signal(&child, Signal::SIGTERM);
    finish(child);
}

fn refusals() {
    let bench = Bench::new();
    for (options, text) in [
        ("--kernel none", "kernel: cannot open 'none': no such file"),
        ("--kernel .", "kernel: '.' is a directory"),
        ("--kernel kernel --initrd none", "initrd: cannot open 'none'"),
        ("--kernel kernel --memory 0", "memory: 0 is too little"),
        ("--kernel kernel --memory 1K", "not a multiple of a page"),
        ("--kernel kernel --memory 512T", "memory: 512T is more than this host has"),
        ("--kernel kernel --cpus 0", "at least 1 CPU"),
        ("--kernel kernel --cpus 4000", "4000 is too many"),
        ("--kernal kernel", "--kernel"),
        ("--kernel kernel --disk path=none", "disk disk0: cannot open 'none'"),
        ("--kernel kernel --disk path=.", "'.' is a directory"),
        ("--kernel kernel --disk path=kernel", "has 6 bytes, which is not a multiple of 512"),
        ("--kernel kernel --disk path=a.img,id=x --disk path=b.img,id=x", "'x' already belongs"),
        ("--kernel kernel --disk path=a.img --disk path=a.img", "already the image of disk disk0"),
        ("--kernel kernel --serial file=none/x", "serial: cannot open 'none/x'"),
        ("--kernel kernel --name a/b", "'a/b' is not a possible name"),
        ("--config none.toml", "none.toml"),
    ] {
        let run = bench.ask(&format!("run {options}"));
        assert_eq!(run.code, 2, "{options}: {}", run.err);
        assert!(run.err.contains(text), "{options}: {}", run.err);
    }
    fs::write(bench.path("vm.toml"), "kernel = \"kernel\"\nmemroy = \"1G\"\n").unwrap();
    let run = bench.ask("run --config vm.toml");
    assert_eq!(run.code, 2);
    assert!(run.err.contains("vm.toml:2: unknown key 'memroy': did you mean 'memory'?"), "{}", run.err);
}

fn ready_is_quick() {
    // Generous: a debug build on a busy machine. The benchmark holds the real figure.
    let run = Bench::new().run(ALL, "poweroff");
    let line = run.err.lines().find(|line| line.contains("all 5 processes are ready after")).unwrap();
    let millis: f64 = line.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
    println!("{line}");
    assert!(millis < 1000.0, "{line}");
}

fn service_manager() {
    let bench = Bench::new();
    let manager = UnixDatagram::bind(bench.path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let heard = || {
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut command = bench.machine("--on-reboot restart", "reset");
    let child = command.env("NOTIFY_SOCKET", bench.path("notify")).spawn().unwrap();
    assert_eq!(heard(), "READY=1\n");
    // The guest resets the machine over and over, which is no end.
    manager.set_nonblocking(true).unwrap();
    sleep(Duration::from_millis(200));
    assert!(manager.recv(&mut [0; 1]).is_err());
    manager.set_nonblocking(false).unwrap();
    signal(&child, Signal::SIGTERM);
    assert_eq!(heard(), "STOPPING=1\n");
    assert_eq!(finish(child).code, 143);

    let mut deaf = bench.machine("", "poweroff");
    let run = finish(deaf.env("NOTIFY_SOCKET", bench.path("none")).spawn().unwrap());
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("the service manager does not listen"), "{}", run.err);
}
