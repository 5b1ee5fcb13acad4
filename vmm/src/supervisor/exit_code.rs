//! The exit codes of `bulkhead`: scripts rely on them, so they stand in one place and in the help.

use std::process;

/// How `bulkhead` ends. The numbers are part of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// The guest powered off (or rebooted, with `--on-reboot exit`); any other command succeeded.
    Success,
    /// Something in Bulkhead itself went wrong.
    Internal,
    /// Wrong option, value, key or file: nothing was started. clap uses the same number.
    Usage,
    /// This host lacks something that the machine needs; `bulkhead doctor` says what.
    Host,
    /// A process of the machine failed, died, or was killed by its seccomp policy.
    Process,
    /// The guest panicked and `--on-panic exit` (the default) was in force.
    GuestPanic,
    /// The machine was ended by `bulkhead stop --force` or by Ctrl-A X.
    Forced,
    /// No machine of that name runs, or it did not do what it was asked for in time.
    NoMachine,
    /// The guest's watchdog ran out and the machine ended of it.
    Watchdog,
    /// What the guest wrote to the debug exit port: twice the value, and 1.
    Guest(u8),
    /// The guest of a command ended before the command's exit status was known.
    Untold,
    /// Ended by this signal: 128 + its number, as shells count.
    Signal(u8),
}

impl ExitCode {
    /// The number that the parent process sees.
    pub const fn number(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Internal => 1,
            Self::Usage => 2,
            Self::Host => 3,
            Self::Process => 4,
            Self::GuestPanic => 5,
            Self::Forced => 6,
            Self::NoMachine => 7,
            Self::Watchdog => 8,
            Self::Guest(code) => code,
            Self::Untold => 125,
            Self::Signal(signal) => 128 | (signal & 0x7f),
        }
    }
}

impl From<ExitCode> for process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.number())
    }
}

/// The table as it stands in `bulkhead --help`.
pub const HELP: &str = "\
Exit codes:
    0  the guest powered off (or rebooted, with --on-reboot exit); the command succeeded
    1  internal error
    2  wrong option, value, configuration key or file; nothing was started
    3  this host lacks something that is needed (see `bulkhead doctor`)
    4  a process of the machine failed, died or was killed by its seccomp policy
    5  the guest panicked
    6  the machine was ended by `bulkhead stop --force` or by Ctrl-A X
    7  no machine of that name runs, or it did not end in time
    8  the guest's --watchdog ran out, with action=poweroff, or action=reset and --on-reboot exit
  odd  with --debug-exit: the guest wrote V to port F4, and the code is 2·V+1
  125  with a command: it could not be started, or the guest ended without telling its exit status
  129, 130, 143  ended by SIGHUP, SIGINT, SIGTERM (128 + number of the signal)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_counted_as_shells_do() {
        assert_eq!(ExitCode::Signal(2).number(), 130);
        assert_eq!(ExitCode::Signal(15).number(), 143);
    }

    #[test]
    fn each_code_stands_in_the_help() {
        for code in [
            ExitCode::Success,
            ExitCode::Internal,
            ExitCode::Usage,
            ExitCode::Host,
            ExitCode::Process,
            ExitCode::GuestPanic,
            ExitCode::Forced,
            ExitCode::NoMachine,
            ExitCode::Watchdog,
            ExitCode::Untold,
        ] {
            assert!(HELP.contains(&format!("\n{:>5}  ", code.number())), "{code:?}");
        }
    }
}
