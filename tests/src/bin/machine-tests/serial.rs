//! The serial port from outside: what a user types reaches the guest, what the guest prints reaches the user.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, Running, bulkhead, exit};
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bare", "serial port on a unix socket, one client after another", 60, unix_socket),
        Case::new("bare", "serial port on a pseudo-terminal", 60, pseudo_terminal),
        Case::new("bare", "bulkhead console attaches to the serial port", 60, console),
    ]
}

/// A guest that sends back what it receives, in capitals, and powers off at a 'q'.
fn echo(context: &Context, serial: &str) -> Outcome<Running> {
    let machine = Machine::bare(context, &context.places.payloads.join("echo.elf"))?;
    machine.arguments(&["--memory", "64M", "--serial", serial]).start()
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

/// Reads until `wanted` bytes are there or the other end closes.
fn read(from: &mut impl Read, wanted: usize) -> Outcome<Vec<u8>> {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    while all.len() < wanted {
        match from.read(&mut part) {
            Ok(0) => break,
            Ok(count) => all.extend_from_slice(part.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("after {} bytes: {error}", all.len())),
        }
    }
    Ok(all)
}

fn read_until(from: &mut impl Read, end: &str) -> Outcome<String> {
    let mut all = String::new();
    while !all.contains(end) {
        let byte = read(from, 1)?;
        ensure!(!byte.is_empty(), "closed before '{end}': '{all}'");
        all.push_str(&String::from_utf8_lossy(&byte));
    }
    Ok(all)
}

fn connect(context: &Context, path: &Path) -> Outcome<UnixStream> {
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(text)?;
                return Ok(stream);
            }
            Err(error) => ensure!(!context.left().is_zero(), "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn unix_socket(context: &Context) -> Outcome {
    let path = context.folder.join("serial.socket");
    let mut running = echo(context, &format!("unix={}", path.display()))?;
    let mut first = connect(context, &path)?;
    // Printed before anybody was there, and kept for the first who comes.
    read_until(&mut first, "echo begins\n")?;
    let sent: Vec<u8> = (b'a'..=b'p').cycle().take(20_000).collect();
    let mut writer = first.try_clone().map_err(text)?;
    let all = sent.clone();
    let writing = thread::spawn(move || writer.write_all(&all));
    let received = read(&mut first, sent.len())?;
    writing.join().map_err(|_| "the writer panicked")?.map_err(text)?;
    ensure!(received == sent.to_ascii_uppercase(), "{} bytes came back changed", received.len());
    drop(first);
    let mut second = connect(context, &path)?;
    second.write_all(b"second q").map_err(text)?;
    read_until(&mut second, "SECOND ")?;
    running.expect_exit(exit::SUCCESS)?;
    ensure!(!path.exists(), "{} is left", path.display());
    Ok(())
}

fn pseudo_terminal(context: &Context) -> Outcome {
    let mut running = echo(context, "pty")?;
    let path = loop {
        let line = running
            .messages()
            .into_iter()
            .find_map(|line| line.find("/dev/pts/").map(|at| line.split_at(at).1.to_owned()));
        if let Some(line) = line {
            break line
                .chars()
                .take_while(|letter| !letter.is_whitespace() && *letter != ',')
                .collect::<String>();
        }
        ensure!(!context.left().is_zero(), "no pseudo-terminal was named");
        thread::sleep(Duration::from_millis(5));
    };
    let mut terminal =
        File::options().read(true).write(true).open(&path).map_err(|error| format!("{path}: {error}"))?;
    read_until(&mut terminal, "echo begins\n")?;
    terminal.write_all(b"over a pty q").map_err(text)?;
    read_until(&mut terminal, "OVER A PTY ")?;
    running.expect_exit(exit::SUCCESS)
}

fn console(context: &Context) -> Outcome {
    let mut running = echo(context, "attach")?;
    let terminal = openpty(None, None).map_err(|error| error.to_string())?;
    let mut raw = tcgetattr(&terminal.slave).map_err(|error| error.to_string())?;
    cfmakeraw(&mut raw);
    tcsetattr(&terminal.slave, SetArg::TCSANOW, &raw).map_err(|error| error.to_string())?;
    let stdio = || terminal.slave.try_clone().map(Stdio::from).map_err(text);
    while !running.messages().iter().any(|line| line.contains("ready")) {
        ensure!(!context.left().is_zero(), "the machine is not ready");
        thread::sleep(Duration::from_millis(5));
    }
    let mut client = bulkhead(context)
        .args(["console", &running.name, "serial"])
        .stdin(stdio()?)
        .stdout(stdio()?)
        .stderr(stdio()?)
        .spawn()
        .map_err(text)?;
    let mut screen = File::from(terminal.master);
    read_until(&mut screen, "echo begins\n")?;
    // Ctrl-C belongs to the guest.
    screen.write_all(b"typed\x03 q").map_err(text)?;
    read_until(&mut screen, "TYPED\x03 ")?;
    running.expect_exit(exit::SUCCESS)?;
    let status = client.wait().map_err(text)?;
    ensure!(status.code().is_some(), "bulkhead console was killed: {status}");
    Ok(())
}
