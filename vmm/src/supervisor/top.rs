//! `bulkhead top`: machines, their processes and what their devices do, drawn again and again.
//!
//! What a machine says of itself comes from it; CPU time and memory from `/proc`, with the rights of whoever asks. On a terminal the
//! other screen is used and left again, whatever ends the program; its modes are not touched.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_ipc::metrics::Counters;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{SysconfVar, sysconf};

use super::api::MachineEntry;
use super::api::client::{ClientError, Connection, list};
use super::cli::TopArgs;
use super::ps::field;
use super::stats;

/// The other screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// To the first place; each line erases what is left of the old one, and the last one what is below.
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const BELOW: &str = "\x1b[J";

/// What was seen of a process at one moment.
#[derive(Debug, Clone, Default)]
struct Sample {
    /// CPU time in ticks.
    ticks: u64,
    /// Resident memory in KiB.
    resident: Option<u64>,
    counters: Option<Counters>,
    restarts: Option<u64>,
}

/// What was seen of all machines at one moment, by machine and process.
#[derive(Debug)]
struct Frame {
    at: Instant,
    machines: Vec<MachineEntry>,
    samples: BTreeMap<(String, String), Sample>,
}

impl Frame {
    /// Looks at one machine, or at all that this user may ask.
    fn take(name: Option<&str>) -> Result<Self, ClientError> {
        let connections = match name {
            Some(name) => vec![Connection::to_name(name)?],
            None => list()?.iter().filter_map(|address| Connection::to(address).ok()).collect(),
        };
        let mut frame = Self { at: Instant::now(), machines: Vec::new(), samples: BTreeMap::new() };
        for connection in connections {
            // One that ends just now is left out.
            let Ok(machine) = connection.machine() else { continue };
            let devices = stats::ask(&connection).unwrap_or_default();
            for process in &machine.processes {
                let device = devices.iter().find(|device| device.id == process.id);
                let sample = Sample {
                    ticks: ticks(process.pid).unwrap_or(0),
                    resident: resident(process.pid),
                    counters: device.and_then(|device| device.counters.clone()),
                    restarts: device.map(|device| device.restarts),
                };
                frame.samples.insert((machine.name.clone(), process.id.clone()), sample);
            }
            frame.machines.push(machine);
        }
        Ok(frame)
    }

    /// The lines of the screen. What happened between `before` and now is shown as a rate.
    fn lines(&self, before: Option<&Self>) -> Vec<String> {
        let seconds = before.map_or(0.0, |before| self.at.duration_since(before.at).as_secs_f64());
        let mut lines = vec![format!(
            "{:<16} {:<16} {:>8} {:>6} {:>9} {:>9} {:>10} {:>10} {:>6} {:>8} {:>7} {:>8}",
            "MACHINE",
            "PROCESS",
            "PID",
            "CPU%",
            "RSS_KIB",
            "REQ/S",
            "KIB/S_IN",
            "KIB/S_OUT",
            "DEPTH",
            "P99_US",
            "ERRORS",
            "RESTARTS"
        )];
        for machine in &self.machines {
            for process in &machine.processes {
                let key = (machine.name.clone(), process.id.clone());
                let Some(now) = self.samples.get(&key) else { continue };
                let old = before.and_then(|before| before.samples.get(&key));
                lines.push(row(&machine.name, &process.id, process.pid, (now, old), seconds));
            }
        }
        if self.machines.is_empty() {
            lines.push("no machine runs".to_owned());
        }
        lines
    }
}

/// One process.
fn row(machine: &str, id: &str, pid: i32, (now, old): (&Sample, Option<&Sample>), seconds: f64) -> String {
    let unknown = || "-".to_owned();
    // Counts of a process that was replaced in between begin anew in /proc.
    let rate = |now: u64, old: Option<u64>, unit: f64| match old {
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        Some(old) if seconds > 0.0 => format!("{:.0}", now.saturating_sub(old) as f64 / unit / seconds),
        _ => unknown(),
    };
    let count = |get: fn(&Counters) -> u64, unit: f64| match &now.counters {
        Some(counters) => rate(get(counters), old.and_then(|old| old.counters.as_ref()).map(get), unit),
        None => unknown(),
    };
    let show = |number: Option<u64>| number.map_or_else(unknown, |number| number.to_string());
    let counters = now.counters.as_ref();
    format!(
        "{machine:<16} {id:<16} {pid:>8} {:>6} {:>9} {:>9} {:>10} {:>10} {:>6} {:>8} {:>7} {:>8}",
        rate(now.ticks, old.map(|old| old.ticks), ticks_per_second() / 100.0),
        show(now.resident),
        count(|it| it.requests, 1.0),
        count(|it| it.bytes_to_driver, 1024.0),
        count(|it| it.bytes_from_driver, 1024.0),
        show(counters.map(|it| it.in_flight)),
        show(counters.and_then(|it| stats::percentile(it, 99))),
        show(counters.map(|it| it.errors)),
        show(now.restarts),
    )
}

fn ticks_per_second() -> f64 {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    ticks.and_then(|ticks| i32::try_from(ticks).ok()).map_or(100.0, f64::from)
}

/// User and system time of a process in ticks (proc(5), stat, fields 14 and 15).
fn ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything.
    let rest = stat.rsplit_once(')')?.1;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    user.checked_add(system)
}

/// Resident memory in KiB, guest RAM that it has touched included.
fn resident(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field(&status, "VmRSS")?.parse().ok()
}

/// The screen, left when this is dropped.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Self> {
        io::stdout().write_all(ENTER.as_bytes())?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut stdout = io::stdout();
        let _gone = stdout.write_all(LEAVE.as_bytes()).and_then(|()| stdout.flush());
    }
}

/// The height and width of the terminal.
fn size() -> (usize, usize) {
    let (columns, rows) = super::terminal::size(io::stdout()).unwrap_or((80, 24));
    (rows.into(), columns.into())
}

/// The text of one frame on a terminal of this size.
fn draw(lines: &[String], (rows, columns): (usize, usize)) -> String {
    let mut text = HOME.to_owned();
    let shown = lines.iter().take(rows.saturating_sub(1).max(1));
    for line in shown {
        let cut: String = line.chars().filter(|c| !c.is_control()).take(columns.saturating_sub(1)).collect();
        let _infallible = write!(text, "{cut}{REST_OF_LINE}\r\n");
    }
    text.push_str(BELOW);
    text
}

/// Draws until SIGINT or SIGTERM, or as often as asked for.
///
/// # Errors
/// [`ClientError`] when the named machine does not run, or standard output cannot be written.
pub fn top(args: &TopArgs) -> Result<(), ClientError> {
    let mask: SigSet =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
    mask.thread_block().map_err(io::Error::from)?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC).map_err(io::Error::from)?;
    let mut stdout = io::stdout();
    let mut frame = Frame::take(args.name.as_deref())?;
    let screen = if stdout.is_terminal() { Some(Screen::enter()?) } else { None };
    let mut before = None;
    let mut left = args.count.unwrap_or(u32::MAX);
    loop {
        let lines = frame.lines(before.as_ref());
        let text = match &screen {
            Some(_) => draw(&lines, size()),
            None => format!("{}\n", lines.join("\n")),
        };
        stdout.write_all(text.as_bytes())?;
        stdout.flush()?;
        left = left.saturating_sub(1);
        if left == 0 || interrupted(&signals, Duration::from_millis(args.interval.into())) {
            return Ok(());
        }
        let next = Frame::take(args.name.as_deref());
        // The machine that was asked for has ended: that is the end, not an error.
        let Ok(next) = next else { return Ok(()) };
        before = Some(std::mem::replace(&mut frame, next));
    }
}

/// Waits; true when a signal came.
fn interrupted(signals: &SignalFd, pause: Duration) -> bool {
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, timeout).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(requests: u64, ticks: u64) -> Sample {
        let counters = Counters { requests, bytes_to_driver: requests * 4096, ..Counters::default() };
        Sample { ticks, resident: Some(1), counters: Some(counters), restarts: Some(0) }
    }

    #[test]
    fn rates_are_differences_over_time() {
        let (old, now) = (sample(100, 0), sample(300, 50));
        let row = row("web", "disk0", 7, (&now, Some(&old)), 2.0);
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(words[..7], ["web", "disk0", "7", "25", "1", "100", "400"]);
        let first = super::row("web", "disk0", 7, (&now, None), 0.0);
        assert_eq!(first.split_whitespace().nth(5), Some("-"), "no rate without a moment before");
        let replaced = super::row("web", "disk0", 7, (&old, Some(&now)), 2.0);
        assert_eq!(replaced.split_whitespace().nth(3), Some("0"), "a count that went back is no rate");
    }

    #[test]
    fn a_frame_fits_its_screen_and_steers_nothing() {
        let lines = vec!["long line".repeat(40), "a\u{1b}[2Jb".to_owned(), "third".to_owned()];
        let text = draw(&lines, (3, 20));
        assert_eq!(text.matches("\r\n").count(), 2);
        assert!(!text.contains("third") && !text.contains("\u{1b}[2J"));
        assert!(text.split("\r\n").next().unwrap().len() < 20 + HOME.len() + REST_OF_LINE.len());
    }

    #[test]
    fn this_process_uses_memory_and_time() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(resident(pid).unwrap() > 0 && ticks(pid).is_some());
        assert_eq!(ticks(-1), None);
    }
}
