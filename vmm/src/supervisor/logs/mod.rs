//! Messages: the supervisor's own and those that the processes of the machine write to their pipes.

pub mod limit;
pub mod lines;
mod stderr;
pub mod time;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use limit::{Limiter, Verdict};
use lines::LineBuffer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use stderr::Stderr;

use super::cli::{LogFormat, LogLevel};
use super::config::SUPERVISOR;

/// What one wake-up reads from one pipe at most, in bytes, so that a flood from one process does not starve the rest.
const READ_AT_ONCE: usize = 4096;

impl LogLevel {
    const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    /// The level that a line of `bulkhead_ipc::log` starts with, and the rest of the line.
    fn split(line: &str) -> Option<(Self, &str)> {
        let (word, rest) = line.trim_start().split_once(' ')?;
        let level = match word {
            "ERROR" => Self::Error,
            "WARN" => Self::Warn,
            "INFO" => Self::Info,
            "DEBUG" => Self::Debug,
            "TRACE" => Self::Trace,
            _ => return None,
        };
        Some((level, rest.trim_start()))
    }
}

/// One message as JSON.
#[derive(Serialize)]
struct Record<'a> {
    time: String,
    level: &'static str,
    machine: &'a str,
    process: &'a str,
    message: &'a str,
}

/// Where messages go.
#[derive(Debug)]
enum Sink {
    Stderr(Option<Stderr>),
    File(File),
}

/// Writes messages of one machine.
#[derive(Debug)]
pub struct Log {
    machine: String,
    level: LogLevel,
    format: LogFormat,
    sink: Sink,
    dropped: u64,
}

impl Log {
    /// Messages of `machine` to `file`, or to standard error.
    pub fn new(machine: &str, level: LogLevel, format: LogFormat, file: Option<File>) -> Self {
        let stderr = || Sink::Stderr(Stderr::new(io::stderr().as_fd()).ok());
        let sink = file.map_or_else(stderr, Sink::File);
        Self { machine: machine.to_owned(), level, format, sink, dropped: 0 }
    }

    /// Whether messages of this level are shown.
    pub fn shows(&self, level: LogLevel) -> bool {
        level <= self.level
    }

    /// A message of the supervisor itself.
    pub fn say(&mut self, level: LogLevel, message: &str) {
        self.write(level, SUPERVISOR, message);
    }

    /// A message of or about a process of the machine. `message` must not contain control characters.
    pub fn write(&mut self, level: LogLevel, process: &str, message: &str) {
        if !self.shows(level) {
            return;
        }
        let line = match self.format {
            LogFormat::Json => {
                let record = Record {
                    time: time::now(),
                    level: level.name(),
                    machine: &self.machine,
                    process,
                    message,
                };
                serde_json::to_string(&record).unwrap_or_default() + "\n"
            }
            LogFormat::Text => {
                let time = if matches!(self.sink, Sink::File(_)) { time::now() + " " } else { String::new() };
                let from = if process == SUPERVISOR {
                    self.machine.clone()
                } else {
                    format!("{}/{process}", self.machine)
                };
                format!("{time}bulkhead {from}: {}: {message}\n", level.name())
            }
        };
        // A full disk or a closed terminal must not end the machine: what cannot be written is lost, and counted.
        if self.emit(line.as_bytes()).is_err() {
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    fn emit(&mut self, line: &[u8]) -> io::Result<()> {
        match &mut self.sink {
            Sink::File(file) => file.write_all(line),
            Sink::Stderr(Some(stderr)) => stderr.write(line),
            Sink::Stderr(None) => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// The pipe of one process.
#[derive(Debug)]
pub struct LogPipe {
    pipe: File,
    lines: LineBuffer,
    limiter: Limiter,
}

impl LogPipe {
    /// Reads from `pipe`, which must be non-blocking.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe: pipe.into(), lines: LineBuffer::default(), limiter: Limiter::new(Instant::now()) }
    }

    /// Reads once and passes complete lines to `log`. Returns false at the end of the pipe.
    pub fn read(&mut self, process: &str, log: &mut Log) -> bool {
        let mut buffer = [0; READ_AT_ONCE];
        let count = match self.pipe.read(&mut buffer) {
            Ok(0) => {
                self.finish(process, log);
                return false;
            }
            Ok(count) => count,
            Err(error) => {
                return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            }
        };
        let Self { lines, limiter, .. } = self;
        lines.push(buffer.get(..count).unwrap_or(&[]), |line| pass(line, process, limiter, log));
        true
    }

    /// Passes on all that is left, within the limits: the process has ended.
    pub fn drain(&mut self, process: &str, log: &mut Log) {
        // A pipe holds 64 KiB; another process might still have its other end, so the number of rounds is bounded.
        for _ in 0..(65536 / READ_AT_ONCE) {
            let mut ready = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::ZERO) != Ok(1) || !self.read(process, log) {
                break;
            }
        }
        self.finish(process, log);
    }

    fn finish(&mut self, process: &str, log: &mut Log) {
        let Self { lines, limiter, .. } = self;
        lines.finish(|line| pass(line, process, limiter, log));
        note_dropped(limiter.take_dropped(), process, log);
    }
}

impl AsFd for LogPipe {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// A line of a process. One that does not start with a level (a panic message, output of the C library) is a warning.
fn pass(line: &str, process: &str, limiter: &mut Limiter, log: &mut Log) {
    let (level, message) = LogLevel::split(line).unwrap_or((LogLevel::Warn, line));
    if !log.shows(level) {
        return;
    }
    if let Verdict::Write { dropped_before } = limiter.check(line.len(), Instant::now()) {
        note_dropped(dropped_before, process, log);
        log.write(level, process, message);
    }
}

fn note_dropped(dropped: u64, process: &str, log: &mut Log) {
    if dropped > 0 {
        log.write(
            LogLevel::Warn,
            process,
            &format!("{dropped} messages dropped: this process writes too many"),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, write};

    use super::*;

    fn logged(format: LogFormat, level: LogLevel, input: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = Log::new("web", level, format, Some(File::create(&path).unwrap()));
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        write(&writer, input).unwrap();
        drop(writer);
        let mut pipe = LogPipe::new(reader);
        while pipe.read("disk0", &mut log) {}
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn text_lines_name_machine_and_process() {
        let text =
            logged(LogFormat::Text, LogLevel::Info, b"INFO blk: ready queues=1\nDEBUG blk: x\npanicked\n");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines.first().unwrap().ends_with("Z bulkhead web/disk0: info: blk: ready queues=1"),
            "{text}"
        );
        assert!(lines.last().unwrap().ends_with("web/disk0: warn: panicked"), "{text}");
    }

    #[test]
    fn json_lines_are_objects() {
        let text = logged(LogFormat::Json, LogLevel::Info, b"ERROR blk: \"q\"\x1b[0m\n");
        let value: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(value.get("process").unwrap(), "disk0");
        assert_eq!(value.get("level").unwrap(), "error");
        assert_eq!(value.get("message").unwrap(), "blk: \"q\"\\u{1b}[0m");
    }

    #[test]
    fn a_flood_leaves_a_note() {
        let flood = b"INFO a: b\n".repeat(1000);
        let text = logged(LogFormat::Text, LogLevel::Info, &flood);
        assert!(text.lines().count() <= 203, "{}", text.lines().count());
        assert!(text.contains("messages dropped"), "{text}");
    }
}
