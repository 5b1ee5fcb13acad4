//! `bulkhead ps`, `stop` and `console`.
//!
//! Contains unsafe code: a child gets a controlling terminal before it executes.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};

use crate::harness::{Bench, finish, signal, wait_for};

pub const CASES: &[(&str, fn())] = &[
    ("ps_shows_how_each_process_is_confined", ps),
    ("stop_presses_the_power_button", stop),
    ("stop_force_kills", force),
    ("no_such_machine_is_7", no_machine),
    ("console_attaches_and_survives_a_restart", console),
    ("the_terminal_is_raw_and_restored", terminal),
];

fn ps() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img --rng --console --serial attach", "");
    let text = bench.ask("ps NAME").out;
    assert_eq!(text.lines().count(), 2 + 1 + 6, "{text}");
    let value: serde_json::Value = serde_json::from_str(&bench.ask("ps NAME --json").out).unwrap();
    for process in value["processes"].as_array().unwrap().iter().skip(1) {
        assert_eq!(process["namespaces"].as_array().map(Vec::len), Some(7), "{process}");
        assert_eq!(process["seccomp"], 2, "{process}");
        assert_eq!(process["capabilities"], "0", "{process}");
        assert_eq!(process["no_new_privs"], true, "{process}");
        assert_ne!(process["user"], 0, "{process}");
    }
    assert!(bench.ask("ps").out.contains(&bench.name));
    assert!(bench.ask("ps --json").out.contains(&bench.name));
    signal(&child, Signal::SIGTERM);
    finish(child);
}

fn stop() {
    let bench = Bench::new();
    let child = bench.start("--disk path=a.img", "");
    let stop = bench.ask("stop NAME");
    assert_eq!(stop.code, 0, "{}", stop.err);
    let run = finish(child);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.err.contains("the power button was pressed"), "{}", run.err);
}

fn force() {
    let bench = Bench::new();
    let child = bench.machine("--disk path=a.img", "silent").spawn().unwrap();
    wait_for("the launch", || bench.ask("ps NAME").out.contains(": starting"));
    assert_eq!(bench.ask("stop --timeout 1 NAME").code, 7, "a machine without a guest does not stop");
    let start = Instant::now();
    assert_eq!(bench.ask("stop --force NAME").code, 0);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(finish(child).code, 6);
}

fn no_machine() {
    let bench = Bench::new();
    for command in ["ps none", "stop none", "console none"] {
        let run = bench.ask(command);
        assert_eq!(run.code, 7, "{command}");
        assert!(run.err.contains("no machine named 'none' runs"), "{}", run.err);
    }
}

/// Reads until `text` was seen.
fn expect(from: &mut impl Read, text: &str) {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(text) {
        assert_eq!(from.read(&mut byte).unwrap(), 1, "saw only {:?}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

fn console() {
    let bench = Bench::new();
    let child = bench.start("--console --serial attach --on-reboot restart", "reset-at-stop");
    let attach = |arguments: &str| -> Child {
        let mut command = bench.bulkhead(&arguments.replace("NAME", &bench.name));
        command.stdin(Stdio::piped()).spawn().unwrap()
    };
    let mut first = attach("console NAME");
    expect(first.stdout.as_mut().unwrap(), "attached to console");
    let mut serial = attach("console NAME serial");
    expect(serial.stdout.as_mut().unwrap(), "attached to serial");
    let mut second = attach("console NAME");
    expect(second.stdout.as_mut().unwrap(), "attached to console");
    let first = finish(first);
    assert!(first.err.contains("another terminal took over"), "{}", first.err);
    let wrong = bench.ask("console NAME disk0");
    assert_eq!(wrong.code, 7);
    assert!(wrong.err.contains("'disk0' cannot be attached; what can: console, serial"), "{}", wrong.err);
    assert_eq!(bench.ask("stop --timeout 0 NAME").code, 0);
    expect(second.stdout.as_mut().unwrap(), "attached to console");
    expect(serial.stdout.as_mut().unwrap(), "attached to serial");
    signal(&child, Signal::SIGTERM);
    finish(child);
    assert_eq!(finish(second).code, 0);
    assert_eq!(finish(serial).code, 0);
}

/// A machine on a pseudo terminal, as a person starts it.
fn terminal() {
    for end in ["keys", "term", "crash", "kill device"] {
        let bench = Bench::new();
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let mut command = bench.machine("--serial stdio --disk path=a.img --restart never", "");
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(slave()).stdout(slave()).stderr(slave());
        make_controlling(&mut command);
        let mut child = command.spawn().unwrap();
        let raw = || !tcgetattr(&pty.slave).unwrap().local_flags.contains(LocalFlags::ICANON);
        wait_for("raw mode", raw);
        let mut keys = File::from(pty.master.try_clone().unwrap());
        match end {
            // Ctrl-C belongs to the guest, Ctrl-A X does not.
            "keys" => keys.write_all(b"\x03ls\r\x01x").unwrap(),
            "term" => signal(&child, Signal::SIGTERM),
            "crash" => nix::sys::signal::kill(nix::unistd::Pid::from_raw(bench.pid("core")), Signal::SIGKILL)
                .unwrap(),
            _ => nix::sys::signal::kill(nix::unistd::Pid::from_raw(bench.pid("serial")), Signal::SIGKILL)
                .unwrap(),
        }
        let code = child.wait().unwrap().code();
        let expected = match end {
            "keys" => 6,
            "term" => 143,
            _ => 4,
        };
        assert_eq!(code, Some(expected), "{end}");
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before, "{end}");
        assert!(bench.left().is_empty());
    }
}

fn make_controlling(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: two system calls between fork and exec, without memory of the parent.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
