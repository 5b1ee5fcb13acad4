//! `--restart`, `restart=` of a disk, and the key `restart` of machine and device: what follows the death of a device process.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use thiserror::Error;

/// The longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// By what factor each pause exceeds the one before.
const GROWTH: u32 = 10;
const DEFAULT_MAX: u32 = 5;
const DEFAULT_WINDOW: u32 = 10;
const DEFAULT_BACKOFF: u32 = 10;

/// What follows the death of a device process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    /// The machine ends.
    Never,
    /// Another process takes its place, at once the first time, then after pauses that grow up to a second.
    Restart {
        /// More deaths than this within `window`, and the device is given up; `None`: never.
        max: Option<u32>,
        /// The time over which deaths are counted.
        window: Duration,
        /// The pause before the second restart within `window`; each further one is ten times as long.
        backoff: Duration,
    },
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self::limited(DEFAULT_MAX, DEFAULT_WINDOW)
    }
}

/// Why a text is not a policy.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "'{0}' is not a restart policy: say always, never, or MAX/SECONDS[/MILLISECONDS] such as 5/10 (at most 5 restarts within 10 s) or 5/10/50 (the second of them after 50 ms)"
)]
pub struct RestartError(String);

/// A policy for one device, or for all that have none of their own: `POLICY` or `DEVICE=POLICY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestartRule {
    /// The id of the device; `None`: all.
    pub device: Option<String>,
    /// What follows its death.
    pub policy: RestartPolicy,
}

impl FromStr for RestartRule {
    type Err = RestartError;

    fn from_str(text: &str) -> Result<Self, RestartError> {
        let (device, policy) = match text.split_once('=') {
            Some((device, policy)) => (Some(device.to_owned()), policy),
            None => (None, text),
        };
        Ok(Self { device, policy: policy.parse()? })
    }
}

impl RestartPolicy {
    /// Another process takes the place each time, after pauses that grow up to a second.
    #[must_use]
    pub fn always() -> Self {
        match Self::default() {
            Self::Restart { window, backoff, .. } => Self::Restart { max: None, window, backoff },
            Self::Never => Self::Never,
        }
    }

    fn limited(max: u32, seconds: u32) -> Self {
        Self::with_backoff(max, seconds, DEFAULT_BACKOFF)
    }

    fn with_backoff(max: u32, seconds: u32, milliseconds: u32) -> Self {
        Self::Restart {
            max: Some(max),
            window: Duration::from_secs(seconds.into()),
            backoff: Duration::from_millis(milliseconds.into()),
        }
    }

    /// How long to wait before a restart that follows `earlier` others within the window; `None`: no restart.
    pub fn pause(self, earlier: usize) -> Option<Duration> {
        let Self::Restart { max, backoff, .. } = self else { return None };
        let earlier = u32::try_from(earlier).unwrap_or(u32::MAX);
        if max.is_some_and(|max| earlier >= max) {
            return None;
        }
        let Some(exponent) = earlier.checked_sub(1) else { return Some(Duration::ZERO) };
        let pause = backoff.checked_mul(GROWTH.saturating_pow(exponent)).unwrap_or(LONGEST_PAUSE);
        Some(pause.min(LONGEST_PAUSE))
    }
}

impl FromStr for RestartPolicy {
    type Err = RestartError;

    fn from_str(text: &str) -> Result<Self, RestartError> {
        let wrong = || RestartError(text.to_owned());
        match text {
            "never" => Ok(Self::Never),
            "always" => Ok(Self::always()),
            _ => {
                let numbers: Result<Vec<u32>, _> = text.split('/').map(str::parse).collect();
                match numbers.map_err(|_| wrong())?.as_slice() {
                    [max, seconds] => Ok(Self::limited(*max, *seconds)),
                    [max, seconds, milliseconds] => Ok(Self::with_backoff(*max, *seconds, *milliseconds)),
                    _ => Err(wrong()),
                }
            }
        }
    }
}

/// As the command line takes it.
impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Restart { max: None, .. } => f.write_str("always"),
            Self::Restart { max: Some(max), window, backoff } => {
                write!(f, "{max}/{}", window.as_secs())?;
                match backoff.as_millis() {
                    milliseconds if milliseconds == DEFAULT_BACKOFF.into() => Ok(()),
                    milliseconds => write!(f, "/{milliseconds}"),
                }
            }
        }
    }
}

/// The policy as a table: `{ max = 5, window = 10, backoff = 10 }`, seconds and milliseconds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    max: Option<u32>,
    window: Option<u32>,
    backoff: Option<u32>,
}

impl<'de> Deserialize<'de> for RestartPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrTable;
        impl<'de> Visitor<'de> for TextOrTable {
            type Value = RestartPolicy;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "\"always\", \"never\", \"MAX/SECONDS\" or { max = 5, window = 10, backoff = 10 }",
                )
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<RestartPolicy, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RestartPolicy, A::Error> {
                let table = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(RestartPolicy::with_backoff(
                    table.max.unwrap_or(DEFAULT_MAX),
                    table.window.unwrap_or(DEFAULT_WINDOW),
                    table.backoff.unwrap_or(DEFAULT_BACKOFF),
                ))
            }
        }
        deserializer.deserialize_any(TextOrTable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pauses(policy: &str) -> Vec<Option<u128>> {
        let policy: RestartPolicy = policy.parse().unwrap();
        (0..7).map(|earlier| policy.pause(earlier).map(|pause| pause.as_millis())).collect()
    }

    #[test]
    fn the_first_restart_is_immediate_and_the_pauses_grow() {
        assert_eq!(pauses("5/10"), [Some(0), Some(10), Some(100), Some(1000), Some(1000), None, None]);
        assert_eq!(pauses("always")[6], Some(1000));
        assert_eq!(pauses("always")[..3], [Some(0), Some(10), Some(100)]);
        assert_eq!(pauses("never"), [None; 7]);
        assert_eq!(pauses("0/1"), [None; 7]);
        assert_eq!("5/10".parse(), Ok(RestartPolicy::default()));
        assert_eq!(pauses("5/10/200")[..4], [Some(0), Some(200), Some(1000), Some(1000)]);
    }

    #[test]
    fn a_policy_is_shown_as_it_is_written() {
        for text in ["always", "never", "5/10", "3/60/200"] {
            assert_eq!(text.parse::<RestartPolicy>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_rule_may_name_a_device() {
        let rule: RestartRule = "serial=never".parse().unwrap();
        assert_eq!((rule.device.as_deref(), rule.policy), (Some("serial"), RestartPolicy::Never));
        let rule: RestartRule = "5/10".parse().unwrap();
        assert_eq!((rule.device, rule.policy), (None, RestartPolicy::default()));
        assert!("serial=".parse::<RestartRule>().is_err());
    }

    #[test]
    fn what_is_no_policy_is_refused_with_an_example() {
        for text in ["", "sometimes", "5", "5/", "/10", "-1/10", "5/10s", "5/10/1/1"] {
            let error = text.parse::<RestartPolicy>().unwrap_err().to_string();
            assert!(error.contains("5/10") && error.contains(&format!("'{text}'")), "{error}");
        }
    }

    #[test]
    fn a_table_says_each_number() {
        #[derive(Deserialize)]
        struct File {
            restart: RestartPolicy,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.restart);
        let policy = read("restart = { max = 100, window = 1, backoff = 0 }").unwrap();
        assert_eq!(policy.pause(99), Some(Duration::ZERO));
        assert_eq!(policy.pause(100), None);
        assert_eq!(read("restart = {}").unwrap(), RestartPolicy::default());
        assert_eq!(read("restart = \"never\"").unwrap(), RestartPolicy::Never);
        assert!(read("restart = { maximum = 1 }").unwrap_err().to_string().contains("maximum"));
        assert!(read("restart = 5").unwrap_err().to_string().contains("always"));
    }
}
