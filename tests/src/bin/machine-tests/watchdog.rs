//! The watchdog: what follows when the guest does not feed it, and that nothing does when it is fed.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, Running, bulkhead, exit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{guest_command, serial};

/// What the guest gives itself: two stages of 512 counts of 33 MHz / 2^15 each.
const ARMED: Duration = Duration::from_millis(1017);
/// What a stock guest does: a driver that is fed for twice as long as it takes to starve, and then starves.
const STARVES: &str = r#"
wdctl --settimeout 4 /dev/watchdog0 || exit 1
exec 3>/dev/watchdog0 || exit 2
for second in 1 2 3 4 5 6 7 8; do
    sleep 1
    echo >&3
done
echo yes >fed
sync
sleep 60
exit 3
"#;
/// How late an expiry may come on a busy host.
const LATE: Duration = Duration::from_secs(2);

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bare", "watchdog: resets a guest that starves it, not one that feeds it", 60, reset),
        Case::new("bare", "watchdog: each other action does what it says", 60, actions),
        Case::new(
            "stock",
            "watchdog: Linux's driver feeds it, and its machine ends when it starves",
            120,
            stock,
        ),
    ]
}

/// A guest that drives a watchdog as it is told, and a connection to its serial port.
fn guest(context: &Context, arguments: &[&str]) -> Outcome<(Running, UnixStream)> {
    let machine = Machine::bare(context, &context.places.payloads.join("watchdog.elf"))?;
    let target = format!("unix={}", context.folder.join("serial").display());
    let machine = machine.arguments(&["--memory", "64M", "--serial", &target]).arguments(arguments);
    let running = machine.start()?;
    let mut stream = serial::connect(context, &context.folder.join("serial"))?;
    serial::read_until(&mut stream, "after power on\n")?;
    Ok((running, stream))
}

fn say(stream: &mut UnixStream, word: &[u8], answer: &str) -> Outcome {
    stream.write_all(word).map_err(|error| error.to_string())?;
    serial::read_until(stream, answer).map(drop)
}

/// Kills the watchdog's process and waits until the next one serves.
fn kill_process(context: &Context, running: &Running) -> Outcome {
    let replaced = || running.messages().iter().filter(|line| line.contains("watchdog was replaced")).count();
    let before = replaced();
    let processes = running.processes();
    let process = processes.iter().find(|process| process.title().contains("/watchdog]"));
    let process = process.ok_or("there is no process for the watchdog")?;
    kill(Pid::from_raw(i32::try_from(process.pid).unwrap_or(0)), Signal::SIGKILL)
        .map_err(|e| e.to_string())?;
    while replaced() == before {
        ensure!(!context.left().is_zero(), "the watchdog's process is not replaced");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The actions that `bulkhead events` tells of.
fn events(context: &Context, running: &Running) -> Outcome<Vec<String>> {
    let output = bulkhead(context).args(["events", &running.name]).output().map_err(|e| e.to_string())?;
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let watchdog = lines.lines().filter(|line| line.contains("\"event\":\"watchdog\""));
    let action = |line: &str| Some(line.split_once("\"reason\":\"")?.1.split('"').next()?.to_owned());
    Ok(watchdog.filter_map(action).collect())
}

fn reset(context: &Context) -> Outcome {
    let (mut running, mut stream) = guest(context, &["--watchdog"])?;
    say(&mut stream, b"a", "armed\n")?;
    // Longer than it has, with two processes that die meanwhile, and one that is replaced in order.
    let start = Instant::now();
    kill_process(context, &running)?;
    let restart = bulkhead(context).args(["device", "restart", &running.name, "watchdog"]).status();
    ensure!(restart.is_ok_and(|status| status.success()), "the process is not replaced in order");
    kill_process(context, &running)?;
    std::thread::sleep((ARMED * 2).saturating_sub(start.elapsed()));
    say(&mut stream, b"p", "here\n")?;
    ensure!(events(context, &running)?.is_empty(), "it ran out while it was fed");
    say(&mut stream, b"os", "starving\n")?;
    std::thread::sleep(ARMED + ARMED / 4);
    say(&mut stream, b"p", "here\n")?;
    let start = Instant::now();
    say(&mut stream, b"as", "starving\n")?;
    // The deadline outlives the process.
    kill_process(context, &running)?;
    serial::read_until(&mut stream, "no more").err().ok_or("the port is still open")?;
    let took = start.elapsed();
    // A successor gives the guest two seconds.
    ensure!(took >= ARMED && took < ARMED + 2 * LATE, "reset after {took:?}");
    let mut stream = serial::connect(context, &context.folder.join("serial"))?;
    serial::read_until(&mut stream, "after it ran out\n")?;
    let events = events(context, &running)?;
    ensure!(events == ["reset"], "events: {events:?}");
    stream.write_all(b"q").map_err(|error| error.to_string())?;
    running.expect_exit(exit::SUCCESS)
}

fn actions(context: &Context) -> Outcome {
    for (action, options, code) in [
        ("poweroff", &[][..], exit::WATCHDOG),
        ("reset", &["--on-reboot", "exit"], exit::WATCHDOG),
        // The payload has no handler for an NMI: a triple fault is the proof that it came.
        ("inject-nmi", &["--on-reboot", "exit"], exit::SUCCESS),
    ] {
        let option = format!("--watchdog=action={action}");
        let (mut running, mut stream) = guest(context, &[&[option.as_str()], options].concat())?;
        let start = Instant::now();
        say(&mut stream, b"as", "starving\n")?;
        running.expect_exit(code)?;
        let took = start.elapsed();
        ensure!(took >= ARMED && took < ARMED + LATE, "{action} after {took:?}");
        let text = format!("the watchdog watchdog has run out: {action}");
        ensure!(running.messages().iter().any(|line| line.contains(&text)), "no '{text}'");
    }
    let (mut running, mut stream) = guest(context, &["--watchdog=action=pause"])?;
    let resume = || bulkhead(context).args(["resume", &running.name]).status();
    ensure!(resume().is_ok_and(|status| !status.success()), "a machine that runs was resumed");
    say(&mut stream, b"as", "starving\n")?;
    std::thread::sleep(ARMED);
    while events(context, &running)?.is_empty() {
        ensure!(!context.left().is_zero(), "it does not run out");
    }
    stream.write_all(b"p").map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(Duration::from_millis(300))).map_err(|error| error.to_string())?;
    serial::read_until(&mut stream, "here\n").err().ok_or("the guest runs")?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|error| error.to_string())?;
    ensure!(resume().is_ok_and(|status| status.success()), "it is not resumed");
    serial::read_until(&mut stream, "here\n")?;
    stream.write_all(b"q").map_err(|error| error.to_string())?;
    running.expect_exit(exit::SUCCESS)
}

/// By the kernel with every driver: Debian's for clouds has none for this.
fn stock(context: &Context) -> Outcome {
    let arguments = ["--net=none".to_owned(), "--watchdog".to_owned()];
    let kernel = context.places.lab.join("kernel");
    let mut running = guest_command::command(context, &kernel, &arguments, STARVES)?.start()?;
    running.expect_exit(exit::WATCHDOG)?;
    ensure!(context.folder.join("fed").exists(), "it starved while it was fed");
    Ok(())
}
