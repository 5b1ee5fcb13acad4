//! Log records of a jailed process: `tracing` events, one bounded line each on standard error, which is a pipe to the
//! supervisor. The supervisor adds machine, device and time and bounds the rate; it trusts nothing that stands in a line.
//!
//! A line is `LEVEL target: message key=value`, at most [`MAX_LINE`] bytes, written with one `write` from the stack: logging
//! allocates nothing beyond what a value's own `Debug` does. Control characters become `?`, so that an event is always one line.
//! Spans are ignored.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest line in bytes, its end included; below `PIPE_BUF`, so that lines of several threads do not mix.
pub const MAX_LINE: usize = 1024;
/// What a cut line ends with.
const CUT: &[u8] = "…\n".as_bytes();

/// Least severe level that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[repr(u8)]
pub enum LogLevel {
    /// What ends a process or loses data.
    Error,
    /// What a person should look at.
    Warn,
    /// Once in a process's life.
    #[default]
    Info,
    /// Once for each event that a person causes.
    Debug,
    /// Anything.
    Trace,
}

impl From<&Level> for LogLevel {
    fn from(level: &Level) -> Self {
        match *level {
            Level::ERROR => Self::Error,
            Level::WARN => Self::Warn,
            Level::INFO => Self::Info,
            Level::DEBUG => Self::Debug,
            _ => Self::Trace,
        }
    }
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Info as u8);

/// Sends all `tracing` events of this process from `level` upwards to standard error. A second call changes the level.
pub fn init(level: LogLevel) {
    LEVEL.store(level as u8, Ordering::Relaxed);
    // Refused when a subscriber is there already: then it is ours, or a test's own.
    let _ = tracing::subscriber::set_global_default(StderrSubscriber);
    tracing::callsite::rebuild_interest_cache();
}

/// The level that is in force.
fn level() -> LogLevel {
    match LEVEL.load(Ordering::Relaxed) {
        0 => LogLevel::Error,
        1 => LogLevel::Warn,
        2 => LogLevel::Info,
        3 => LogLevel::Debug,
        _ => LogLevel::Trace,
    }
}

/// Writes events to descriptor 2.
struct StderrSubscriber;

impl Subscriber for StderrSubscriber {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && LogLevel::from(metadata.level()) <= level()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(level().into())
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::new();
        line.event(event);
        // A full or closed pipe loses the line: there is nobody to tell.
        let _ = std::io::stderr().write_all(line.finish());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// One line on the stack, cut to [`MAX_LINE`]; also for panics, which may come from a failing allocator.
pub(crate) struct Line {
    bytes: [u8; MAX_LINE],
    length: usize,
    cut: bool,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self { bytes: [0; MAX_LINE], length: 0, cut: false }
    }

    fn event(&mut self, event: &Event<'_>) {
        let metadata = event.metadata();
        let _ = write!(self, "{} {}:", metadata.level(), metadata.target());
        // The message first, wherever it stands among the fields.
        event.record(&mut Fields { line: self, message: true });
        event.record(&mut Fields { line: self, message: false });
    }

    /// Ends the line.
    pub(crate) fn finish(&mut self) -> &[u8] {
        let end: &[u8] = if self.cut { CUT } else { b"\n" };
        if let Some(place) = self.bytes.get_mut(self.length..self.length + end.len()) {
            place.copy_from_slice(end);
            self.length += end.len();
        }
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let character = if character.is_control() { '?' } else { character };
            let end = self.length + character.len_utf8();
            match self.bytes.get_mut(self.length..end) {
                Some(place) if !self.cut && end <= MAX_LINE - CUT.len() => {
                    character.encode_utf8(place);
                    self.length = end;
                }
                _ => {
                    self.cut = true;
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Appends either the message or all other fields.
struct Fields<'a> {
    line: &'a mut Line,
    message: bool,
}

impl Fields<'_> {
    fn append(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let is_message = field.name() == "message";
        if is_message != self.message {
            return;
        }
        let _ = match is_message {
            true => write!(self.line, " {value}"),
            false => write!(self.line, " {}={value}", field.name()),
        };
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.append(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.append(field, format_args!("{value}"));
        } else {
            self.append(field, format_args!("{value:?}"));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.append(field, format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> String {
        let mut line = Line::new();
        line.write_str(text).unwrap();
        String::from_utf8(line.finish().to_vec()).unwrap()
    }

    #[test]
    fn line_breaks_and_escape_sequences_cannot_leave_their_line() {
        assert_eq!(line("a\nERROR forged\u{1b}[2J\r"), "a?ERROR forged?[2J?\n");
    }

    #[test]
    fn long_lines_are_cut_at_a_character_and_end_once() {
        for text in ["x".repeat(5000), "ß".repeat(5000), format!("x{}", "€".repeat(5000))] {
            let line = line(&text);
            assert!(line.len() <= MAX_LINE);
            assert!(line.len() > MAX_LINE - 8);
            assert!(line.ends_with("…\n"));
            assert_eq!(line.matches('\n').count(), 1);
        }
    }

    #[test]
    fn a_line_that_just_fits_is_not_cut() {
        let text = "y".repeat(MAX_LINE - CUT.len());
        assert_eq!(line(&text), format!("{text}\n"));
    }

    #[test]
    fn levels_are_ordered_from_severe_to_chatty() {
        assert!(LogLevel::from(&Level::ERROR) < LogLevel::from(&Level::WARN));
        assert!(LogLevel::from(&Level::DEBUG) < LogLevel::from(&Level::TRACE));
    }
}
