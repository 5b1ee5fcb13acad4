//! Serial ports and consoles.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;

use crate::harness::{Bench, finish, signal, wait_for};

pub const CASES: &[(&str, fn())] = &[
    ("serial_on_stdio_and_in_a_file", stdio_and_file),
    ("serial_on_a_unix_socket", unix),
    ("serial_on_a_pseudo_terminal", pty),
];

fn stdio_and_file() {
    let bench = Bench::new();
    let run = bench.run("--serial stdio", "poweroff");
    assert_eq!((run.code, run.out.as_str()), (0, "hello from the serial port\r\n"), "{}", run.err);
    let run = bench.run("--serial file=out", "poweroff");
    assert_eq!((run.code, run.out.as_str()), (0, ""), "{}", run.err);
    assert_eq!(fs::read_to_string(bench.path("out")).unwrap(), "hello from the serial port\r\n");
    assert_eq!(bench.run("--serial off", "poweroff").out, "");
}

fn unix() {
    let bench = Bench::new();
    let child = bench.start("--serial unix=s", "");
    for _ in 0..2 {
        let mut line = String::new();
        let connection = UnixStream::connect(bench.path("s")).unwrap();
        BufReader::new(connection).read_line(&mut line).unwrap();
        assert_eq!(line, "attached to serial\r\n");
    }
    signal(&child, Signal::SIGTERM);
    finish(child);
    assert!(!bench.path("s").exists());
}

fn pty() {
    let bench = Bench::new();
    let child = bench.start("--serial pty --log-file log", "");
    let mut path = None;
    wait_for("the path", || {
        let log = fs::read_to_string(bench.path("log")).unwrap_or_default();
        path = log.split_whitespace().find(|word| word.starts_with("/dev/pts/")).map(str::to_owned);
        path.is_some()
    });
    let mut line = String::new();
    BufReader::new(fs::File::open(path.unwrap()).unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "hello from the serial port\r\n");
    signal(&child, Signal::SIGTERM);
    finish(child);
}
