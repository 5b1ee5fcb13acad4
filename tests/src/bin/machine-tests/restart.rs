//! Device processes that die while the guest runs: the guest sees a pause and nothing else.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, exit};
use bulkhead_tests::pattern::Stream;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::disk::expect_digest;
use crate::serial;

/// Within this time the supervisor finds a process that hangs; the guest of these tests is answered without it.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often the process of a bare guest's device is killed, the processes of a stock guest's devices are, and one is
/// replaced in order.
const KILLS: usize = 50;
const STOCK_KILLS: usize = 20;
const ORDERS: usize = 20;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "bare",
            "killed serial process: what is typed meanwhile comes back, each character once",
            60,
            serial_killed,
        ),
        Case::new("bare", "killed serial process loses nothing that the guest prints", 60, prints_on),
        Case::new("bare", "hung serial process is found and replaced", 60, serial_hung),
        Case::new("bare", "stopped device processes are found and replaced", 60, stopped),
        Case::new(
            "bare",
            "serial process restarted and upgraded in order: no character is lost or comes twice",
            60,
            in_order,
        ),
        Case::new("bare", "device that keeps dying is given up, and brought back by a user", 60, given_up),
        Case::new("stock", "disk holds random I/O while the device processes are killed", 400, disk_killed),
        Case::new("stock", "disk holds random I/O while its program is upgraded", 400, disk_upgraded),
        Case::new("stock", "disk that was given up under I/O is brought back", 300, disk_brought_back),
    ]
}

/// Runs `bulkhead` with a command for this machine; returns what it printed.
fn ask(context: &Context, running: &Running, command: &[&str], rest: &[&str]) -> Outcome<String> {
    let output = bulkhead(context).args(command).arg(&running.name).args(rest).output();
    let output = output.map_err(|error| error.to_string())?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "bulkhead {command:?} {rest:?} ended with {}: {error}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A configuration file that allows any number of restarts, and all at once.
fn often(context: &Context) -> Outcome<String> {
    let path = context.folder.join("often.toml");
    fs::write(&path, "restart = { max = 1000, window = 1, backoff = 0 }\n")
        .map_err(|error| error.to_string())?;
    Ok(path.display().to_string())
}

/// Sends a signal to the process of a device.
fn signal(running: &Running, device: &str, signal: Signal) -> Outcome {
    let title = format!("/{device}]");
    let found = running.processes().into_iter().find(|process| process.title().contains(&title));
    let process = found.ok_or_else(|| format!("no process of {device}"))?;
    let pid = i32::try_from(process.pid).map_err(|error| error.to_string())?;
    kill(Pid::from_raw(pid), signal).map_err(|error| format!("kill: {error}"))
}

/// Each time that a device was replaced: how long it took, ms.
fn replaced(running: &Running, device: &str) -> Vec<f64> {
    let text = format!("{device} was replaced within ");
    let messages = running.messages();
    let rest = messages.iter().filter_map(|line| line.split_once(&text).map(|(_, rest)| rest));
    rest.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

fn wait_until(context: &Context, what: &str, condition: impl Fn() -> bool) -> Outcome {
    while !condition() {
        ensure!(!context.left().is_zero(), "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn report(context: &Context, what: &str, times: &[f64]) {
    let longest = times.iter().copied().fold(0.0, f64::max);
    let mean = times.iter().sum::<f64>() / f64::from(u32::try_from(times.len().max(1)).unwrap_or(1));
    context.log(&format!("{what}: {} times, mean {mean:.1} ms, longest {longest:.1} ms", times.len()));
}

/// A guest that sends back in capitals what it receives, and a connection to its serial port.
fn echo(context: &Context, arguments: &[&str]) -> Outcome<(Running, UnixStream)> {
    let path: PathBuf = context.folder.join("serial.socket");
    let target = format!("unix={}", path.display());
    let machine = Machine::bare(context, &context.places.payloads.join("echo.elf"))?;
    let running = machine
        .arguments(&["--memory", "64M", "--rng", "--console", "--serial", &target])
        .arguments(arguments)
        .start()?;
    let mut stream = serial::connect(context, &path)?;
    serial::read_until(&mut stream, "echo begins\n")?;
    wait_until(context, "the machine", || running.messages().iter().any(|line| line.contains("are ready")))?;
    Ok((running, stream))
}

/// Types a text and reads until it has come back; returns what came before it.
fn exchange(stream: &mut UnixStream, text: &str) -> Outcome<String> {
    stream.write_all(text.as_bytes()).map_err(|error| error.to_string())?;
    let wanted = text.to_ascii_uppercase();
    let mut all = String::new();
    while !all.ends_with(&wanted) {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1..) => all.push(char::from(byte[0])),
            Ok(0) => return Err(format!("closed after '{all}'")),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("'{all}' came back of '{text}': {error}")),
        }
    }
    all.truncate(all.len().saturating_sub(wanted.len()));
    Ok(all)
}

fn finish(mut running: Running, mut stream: UnixStream) -> Outcome {
    stream.write_all(b"q").map_err(|error| error.to_string())?;
    running.expect_exit(exit::SUCCESS)
}

fn serial_killed(context: &Context) -> Outcome {
    let (running, mut stream) = echo(context, &["--config", &often(context)?])?;
    let (mut pauses, mut random, mut said) = (Vec::new(), Stream::new(3), 0);
    for round in 0..KILLS {
        let (wait, before) = (Duration::from_micros(random.below(4000)), said + 3);
        thread::scope(|scope| {
            let killer = scope.spawn(|| {
                thread::sleep(wait);
                signal(&running, "serial", Signal::SIGKILL)
            });
            while !killer.is_finished() || said < before {
                said += 1;
                let start = Instant::now();
                let before = exchange(&mut stream, &format!("text {said} of the test;"))?;
                ensure!(before.is_empty(), "round {round}: '{before}' came twice or out of nowhere");
                pauses.push(start.elapsed().as_secs_f64() * 1e3);
            }
            killer.join().map_err(|_| "panicked")?
        })?;
        wait_until(context, "the successor", || replaced(&running, "serial").len() == round + 1)?;
    }
    report(context, "a text there and back, with what it waited", &pauses);
    wait_until(context, "the messages", || replaced(&running, "serial").len() == KILLS)?;
    report(context, "serial", &replaced(&running, "serial"));
    finish(running, stream)
}

/// The guest prints numbers to a file that the machine appends to: each character once.
fn prints_on(context: &Context) -> Outcome {
    let machine = Machine::bare(context, &context.places.payloads.join("count.elf"))?;
    let path = context.folder.join("printed");
    let target = format!("file={}", path.display());
    let often = often(context)?;
    let mut running =
        machine.arguments(&["--memory", "64M", "--serial", &target, "--config", &often]).start()?;
    // One that dies before it has ever served ends the machine.
    wait_until(context, "the machine", || running.messages().iter().any(|line| line.contains("are ready")))?;
    let printed = || fs::read(&path).unwrap_or_default();
    wait_until(context, "the machine", || running.messages().iter().any(|line| line.contains("are ready")))?;
    let mut random = Stream::new(2);
    let mut kills = 0;
    // Not to the last: what it prints at once before it powers off ends with a process that is killed just then.
    while printed().len() < 18_000 && kills < KILLS {
        thread::sleep(Duration::from_millis(5 + random.below(30)));
        if signal(&running, "serial", Signal::SIGKILL).is_ok() {
            kills += 1;
            wait_until(context, "the successor", || {
                replaced(&running, "serial").len() == kills || running.processes().len() < 2
            })?;
        }
    }
    running.expect_exit(exit::SUCCESS)?;
    let printed = printed();
    let expected: String = (0..4000).map(|number| format!("{number:04x}\n")).collect();
    let expected = expected + "count ends\n";
    let different = printed.iter().zip(expected.bytes()).position(|(found, wanted)| *found != wanted);
    ensure!(different.is_none(), "character {different:?} of what the guest printed is lost or comes twice");
    ensure!(printed.len() == expected.len(), "{} characters, not {}", printed.len(), expected.len());
    context.log(&format!("killed {kills} times"));
    ensure!(kills > 3, "the guest was too quick: {kills} kills");
    report(context, "serial", &replaced(&running, "serial"));
    Ok(())
}

fn serial_hung(context: &Context) -> Outcome {
    let (running, mut stream) = echo(context, &[])?;
    signal(&running, "serial", Signal::SIGSTOP)?;
    let start = Instant::now();
    stream.set_read_timeout(Some(HEARTBEAT)).map_err(|error| error.to_string())?;
    exchange(&mut stream, "after the deadline;")?;
    let took = start.elapsed();
    ensure!(took > Duration::from_millis(500), "it was not hung: {took:?}");
    ensure!(took < HEARTBEAT, "it took {took:?}");
    // The answer may be here before the message is.
    wait_until(context, "the message", || replaced(&running, "serial").len() == 1)?;
    finish(running, stream)
}

fn given_up(context: &Context) -> Outcome {
    let (running, mut stream) = echo(context, &["--restart", "2/60"])?;
    for round in 1..=2 {
        signal(&running, "rng", Signal::SIGKILL)?;
        wait_until(context, "the successor", || replaced(&running, "rng").len() == round)?;
    }
    signal(&running, "rng", Signal::SIGKILL)?;
    let said = || running.messages().iter().filter(|line| line.contains("is given up")).count();
    wait_until(context, "the end of all attempts", || said() == 1)?;
    exchange(&mut stream, "the machine goes on;")?;
    ensure!(signal(&running, "rng", Signal::SIGKILL).is_err(), "there is a third successor");
    let list = ask(context, &running, &["device", "list"], &[])?;
    ensure!(list.contains("failed"), "the list of devices says {list}");
    ask(context, &running, &["device", "restart"], &["rng"])?;
    wait_until(context, "the message", || replaced(&running, "rng").len() == 3)?;
    let events = ask(context, &running, &["events"], &[])?;
    context.log(&events);
    ensure!(events.lines().filter(|line| line.contains("\"given-up\"")).count() == 1, "no event says so");
    finish(running, stream)
}

fn stopped(context: &Context) -> Outcome {
    let disk = context.folder.join("disk.img");
    fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).map_err(|error| error.to_string())?;
    let disk = format!("path={},id=data", disk.display());
    let (running, mut stream) = echo(context, &["--disk", &disk, "--hang-deadline", "1"])?;
    let devices = ["data", "rng", "console", "serial"];
    for device in devices {
        signal(&running, device, Signal::SIGSTOP)?;
    }
    for device in devices {
        wait_until(context, "the successor", || replaced(&running, device).len() == 1)?;
    }
    exchange(&mut stream, "the machine goes on;")?;
    finish(running, stream)
}

/// Characters go both ways all the time; what the process had received and the guest had not read goes to the successor.
fn in_order(context: &Context) -> Outcome {
    let (running, mut stream) = echo(context, &["--restart", "never"])?;
    let mut said = 0;
    for round in 1..=ORDERS {
        thread::scope(|scope| {
            let order = scope.spawn(|| {
                if round % 4 == 0 {
                    ask(context, &running, &["device", "upgrade"], &["--all"])
                } else {
                    ask(context, &running, &["device", "restart"], &["serial"])
                }
            });
            while !order.is_finished() || said % 8 != 0 {
                said += 1;
                let before = exchange(&mut stream, &format!("text {said} of the test;"))?;
                ensure!(before.is_empty(), "'{before}' came twice or out of nowhere");
            }
            order.join().map_err(|_| "panicked")??;
            Ok::<(), String>(())
        })?;
    }
    context.log(&format!("{said} texts went both ways"));
    wait_until(context, "the messages", || replaced(&running, "serial").len() == ORDERS)?;
    report(context, "serial", &replaced(&running, "serial"));
    let bad = |line: &String| line.contains("killed") || line.contains("it is restarted");
    ensure!(!running.messages().iter().any(bad), "a process did not end in order");
    finish(running, stream)
}

fn disk_upgraded(context: &Context) -> Outcome {
    let (machine, disk) = Machine::stock(context, Kernel::Elf, "iotest")?
        .words("bulkhead.io=verify,--mib,256,--depth,32")
        .empty_disk(64)?;
    let arguments = ["--cpus", "2", "--memory", "512M", "--rng", "--console", "--restart", "never"];
    let mut running = machine.arguments(&arguments).start()?;
    running.wait_for("guest: io filled", 1)?;
    let over = || running.serial().iter().any(|line| line.contains("guest: io moved"));
    let mut rounds = 0;
    while rounds < ORDERS / 2 && !over() {
        if rounds % 2 == 0 {
            ask(context, &running, &["device", "upgrade"], &["--all"])?;
        } else {
            ask(context, &running, &["device", "restart"], &["data"])?;
        }
        rounds += 1;
    }
    ensure!(rounds > 2, "the I/O was over after {rounds} rounds");
    report(context, "data", &replaced(&running, "data"));
    running.expect_exit(exit::SUCCESS)?;
    expect_digest(&running, &disk)
}

fn disk_brought_back(context: &Context) -> Outcome {
    let (machine, disk) = Machine::stock(context, Kernel::Elf, "iotest")?
        .words("bulkhead.io=verify,--mib,128,--depth,32")
        .empty_disk(64)?;
    let mut running = machine.arguments(&["--memory", "512M", "--restart", "data=0/60"]).start()?;
    running.wait_for("guest: io filled", 1)?;
    thread::sleep(Duration::from_millis(300));
    signal(&running, "data", Signal::SIGKILL)?;
    let said = || running.messages().iter().any(|line| line.contains("is given up"));
    wait_until(context, "the end of all attempts", said)?;
    thread::sleep(Duration::from_secs(2));
    let over = running.serial().iter().any(|line| line.contains("guest: io moved"));
    ensure!(!over, "the I/O was over before");
    ask(context, &running, &["device", "restart"], &["data"])?;
    running.expect_exit(exit::SUCCESS)?;
    expect_digest(&running, &disk)
}

fn disk_killed(context: &Context) -> Outcome {
    let (machine, disk) = Machine::stock(context, Kernel::Elf, "iotest")?
        .words("bulkhead.io=verify,--mib,256,--depth,32")
        .empty_disk(64)?;
    let often = often(context)?;
    let mut running = machine
        .arguments(&["--cpus", "2", "--memory", "512M", "--rng", "--console", "--config", &often])
        .start()?;
    running.wait_for("guest: io filled", 1)?;
    let mut random = Stream::new(1);
    for round in 1..=STOCK_KILLS {
        thread::sleep(Duration::from_millis(50 + random.below(300)));
        if running.serial().iter().any(|line| line.contains("guest: io moved")) {
            break;
        }
        for device in ["data", "rng", "console"] {
            signal(&running, device, Signal::SIGKILL)?;
        }
        for device in ["data", "rng", "console"] {
            wait_until(context, "the successor", || replaced(&running, device).len() == round)?;
        }
    }
    running.expect_exit(exit::SUCCESS)?;
    let times = replaced(&running, "data");
    report(context, "data", &times);
    ensure!(times.len() >= STOCK_KILLS / 2, "the I/O was over after {} kills", times.len());
    expect_digest(&running, &disk)
}
