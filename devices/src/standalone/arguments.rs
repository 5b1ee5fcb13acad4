//! The command line of a service.

use std::path::PathBuf;
use std::str::FromStr;

use bulkhead_ipc::log::LogLevel;

use super::{ServiceType, StandaloneError};

/// An option of a type.
#[derive(Debug)]
pub struct OptionSpec {
    /// With its two dashes.
    pub name: &'static str,
    /// The word for its value; `None`: it has none.
    pub value: Option<&'static str>,
    /// What it does.
    pub help: &'static str,
}

/// The options of every type.
const COMMON: &[OptionSpec] = &[
    OptionSpec {
        name: "--socket-path",
        value: Some("PATH"),
        help: "listen on this Unix socket; a stale one is replaced",
    },
    OptionSpec { name: "--fd", value: Some("N"), help: "use this socket, which is connected or listens" },
    OptionSpec {
        name: "--persistent",
        value: None,
        help: "wait for the next front end when one has gone, instead of ending",
    },
    OptionSpec {
        name: "--log-level",
        value: Some("LEVEL"),
        help: "error, warn, info (the default), debug or trace",
    },
];

/// Where front ends come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// A path to listen on.
    Path(PathBuf),
    /// A descriptor of this number.
    Descriptor(i32),
    /// systemd's socket activation (sd_listen_fds(3)).
    Activated,
}

/// What was said.
#[derive(Debug)]
pub struct Arguments {
    /// Where front ends come from.
    pub socket: Socket,
    /// Stay when a front end has gone.
    pub persistent: bool,
    /// Least severe level that is logged.
    pub log: LogLevel,
    /// The options of the type.
    pub given: Given,
}

/// The options of a type that were given, in their order.
#[derive(Debug, Default)]
pub struct Given(Vec<(&'static str, String)>);

impl Given {
    /// The value of an option; the last one counts.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values(name).last()
    }

    /// All values of an option that may be repeated.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// Whether an option without a value is there.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The value of an option that must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn required(&self, name: &str) -> Result<&str, StandaloneError> {
        self.value(name).ok_or_else(|| StandaloneError::usage(format!("{name} is needed")))
    }

    /// A number, or the default.
    ///
    /// # Errors
    /// It is no number, or too large.
    pub fn number<T: FromStr>(&self, name: &str, default: T) -> Result<T, StandaloneError> {
        let Some(value) = self.value(name) else { return Ok(default) };
        value
            .parse()
            .map_err(|_| StandaloneError::usage(format!("{name}: {value:?} is not a number that fits here")))
    }

    /// A rate a second and what may pass at once after a pause, `N` or `N,BURST`; zeros without the option.
    ///
    /// # Errors
    /// It is neither.
    pub fn rate(&self, name: &str) -> Result<(u64, u64), StandaloneError> {
        let Some(value) = self.value(name) else { return Ok((0, 0)) };
        let (rate, burst) = value.split_once(',').unwrap_or((value, "0"));
        match (rate.parse(), burst.parse()) {
            (Ok(rate), Ok(burst)) => Ok((rate, burst)),
            _ => Err(StandaloneError::usage(format!("{name}: {value:?} is not N or N,BURST"))),
        }
    }
}

impl Arguments {
    /// Reads the command line of a type. The environment says whether systemd has opened the socket.
    ///
    /// # Errors
    /// [`StandaloneError::Usage`] with the option.
    pub fn parse(service: &ServiceType, arguments: Vec<String>) -> Result<Self, StandaloneError> {
        let activated = std::env::var_os("LISTEN_FDS").is_some();
        Self::parse_with(service, arguments, activated)
    }

    fn parse_with(
        service: &ServiceType,
        arguments: Vec<String>,
        activated: bool,
    ) -> Result<Self, StandaloneError> {
        let mut given = Given::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument, None),
            };
            let option = COMMON.iter().chain(service.options).find(|option| option.name == name);
            let option = option
                .ok_or_else(|| StandaloneError::usage(format!("{} has no option {name}", service.name)))?;
            let value = match (option.value, inline) {
                (None, None) => String::new(),
                (None, Some(_)) => return Err(StandaloneError::usage(format!("{name} takes no value"))),
                (Some(word), inline) => inline
                    .or_else(|| arguments.next())
                    .ok_or_else(|| StandaloneError::usage(format!("{name} needs a value: {name} {word}")))?,
            };
            given.0.push((option.name, value));
        }
        Ok(Self {
            socket: socket(&given, activated)?,
            persistent: given.flag("--persistent"),
            log: level(given.value("--log-level"))?,
            given,
        })
    }
}

/// Exactly one place where front ends come from.
fn socket(given: &Given, activated: bool) -> Result<Socket, StandaloneError> {
    let number = given.number("--fd", -1)?;
    match (given.value("--socket-path"), given.flag("--fd"), activated) {
        (Some(""), ..) => Err(StandaloneError::usage("--socket-path is empty")),
        (Some(path), false, false) => Ok(Socket::Path(path.into())),
        (None, true, false) if number > 2 => Ok(Socket::Descriptor(number)),
        (None, true, false) => Err(StandaloneError::usage("--fd: a socket has a number from 3 on")),
        (None, false, true) => Ok(Socket::Activated),
        (None, false, false) => Err(StandaloneError::usage("--socket-path or --fd is needed")),
        (Some(_), true, _) => Err(StandaloneError::usage("--socket-path and --fd exclude each other")),
        (_, _, true) => Err(StandaloneError::usage(
            "systemd has opened a socket (LISTEN_FDS), so --socket-path and --fd make no sense",
        )),
    }
}

fn level(word: Option<&str>) -> Result<LogLevel, StandaloneError> {
    Ok(match word.unwrap_or("info") {
        "error" => LogLevel::Error,
        "warn" => LogLevel::Warn,
        "info" => LogLevel::Info,
        "debug" => LogLevel::Debug,
        "trace" => LogLevel::Trace,
        other => {
            return Err(StandaloneError::usage(format!(
                "--log-level: {other:?} is none of error, warn, info, debug and trace"
            )));
        }
    })
}

/// The help of a type.
#[must_use]
pub fn help(service: &ServiceType) -> String {
    let mut text = format!(
        "usage: bulkhead-device {} OPTION…\n\n{}: {}\n\n",
        service.name, service.name, service.description
    );
    for option in service.options.iter().chain(COMMON) {
        let name = option.value.map_or(option.name.to_owned(), |value| format!("{} {value}", option.name));
        text.push_str(&format!("  {name:<24} {}\n", option.help));
    }
    text.push_str(
        "  --print-capabilities     say in JSON what this back end can do (vhost-user program conventions)\n",
    );
    text.push_str("\nWithout --socket-path and --fd it takes the socket of systemd (LISTEN_FDS).\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, activated: bool) -> Result<Arguments, String> {
        let words = line.split_whitespace().map(str::to_owned).collect();
        Arguments::parse_with(&crate::blk::SERVICE, words, activated).map_err(|error| error.to_string())
    }

    #[test]
    fn both_ways_to_give_a_value_mean_the_same() {
        for line in ["--socket-path /x --blk-file=f --read-only", "--blk-file f --socket-path=/x --read-only"]
        {
            let arguments = parse(line, false).unwrap();
            assert_eq!(arguments.socket, Socket::Path("/x".into()));
            assert_eq!(arguments.given.required("--blk-file").unwrap(), "f");
            assert!(arguments.given.flag("--read-only") && !arguments.persistent);
        }
    }

    #[test]
    fn there_is_one_socket() {
        assert_eq!(parse("--fd 3", false).unwrap().socket, Socket::Descriptor(3));
        assert_eq!(parse("", true).unwrap().socket, Socket::Activated);
        for (line, activated, word) in [
            ("", false, "is needed"),
            ("--fd 3 --socket-path /x", false, "exclude each other"),
            ("--fd 3", true, "LISTEN_FDS"),
            ("--socket-path /x", true, "LISTEN_FDS"),
            ("--socket-path=", false, "empty"),
            ("--fd 2", false, "from 3 on"),
            ("--fd x", false, "not a number"),
        ] {
            let message = parse(line, activated).unwrap_err();
            assert!(message.contains(word), "{line}: {message}");
        }
    }

    #[test]
    fn nonsense_is_named() {
        for (line, word) in [
            ("--socket-path", "needs a value"),
            ("--persistent=1 --fd 3", "takes no value"),
            ("--colour red", "no option --colour"),
            ("--fd 3 --log-level loud", "loud"),
        ] {
            let message = parse(line, false).unwrap_err();
            assert!(message.contains(word), "{line}: {message}");
        }
    }
}
