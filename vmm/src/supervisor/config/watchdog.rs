//! `--watchdog [action=…][,id=…][,restart=…][,addr=…]` and the table `[watchdog]`.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use thiserror::Error;

use super::nearest::hint;
use super::pairs::{PairError, Pairs};
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};

/// How it is written.
const PAIRS: Pairs = Pairs {
    what: "a watchdog",
    shape: "[action=ACTION][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]",
    keys: &["action", "id", "restart", "addr"],
};

/// What follows when the watchdog runs out; the words are those of QEMU's `-action watchdog=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WatchdogAction {
    /// The machine starts anew, as after a reset by the guest (`--on-reboot`).
    #[default]
    Reset,
    /// The power button is pressed.
    Shutdown,
    /// The machine ends at once.
    Poweroff,
    /// The CPUs stand still until `bulkhead resume`.
    Pause,
    /// Every CPU gets an NMI.
    InjectNmi,
    /// A warning and an event.
    Debug,
    /// An event.
    None,
}

/// The actions with their names.
const ACTIONS: [(&str, WatchdogAction); 7] = [
    ("reset", WatchdogAction::Reset),
    ("shutdown", WatchdogAction::Shutdown),
    ("poweroff", WatchdogAction::Poweroff),
    ("pause", WatchdogAction::Pause),
    ("inject-nmi", WatchdogAction::InjectNmi),
    ("debug", WatchdogAction::Debug),
    ("none", WatchdogAction::None),
];

impl fmt::Display for WatchdogAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ACTIONS.iter().find(|(_, action)| action == self).map_or("", |(name, _)| name))
    }
}

impl FromStr for WatchdogAction {
    type Err = WatchdogSpecError;

    fn from_str(text: &str) -> Result<Self, WatchdogSpecError> {
        let found = ACTIONS.iter().find(|(name, _)| *name == text).map(|(_, action)| *action);
        found.ok_or_else(|| WatchdogSpecError::Action {
            action: text.escape_debug().to_string(),
            hint: hint(text, &ACTIONS.map(|(name, _)| name)),
        })
    }
}

impl<'de> Deserialize<'de> for WatchdogAction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A watchdog as the user describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct WatchdogSpec {
    /// What follows when it runs out.
    pub action: WatchdogAction,
    /// The name in messages and in `bulkhead ps`. Default: watchdog.
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0; default: the lowest empty slot.
    pub addr: Option<PciAddress>,
}

/// A watchdog with its id settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchdogConfig {
    /// What follows when it runs out.
    pub action: WatchdogAction,
    /// Unique among the processes of the machine.
    pub id: String,
    /// What follows the death of its process.
    pub restart: RestartPolicy,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// Why a watchdog is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WatchdogSpecError {
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// An unknown action.
    #[error("watchdog: there is no action '{action}': {hint}")]
    Action {
        /// What was written.
        action: String,
        /// The nearest valid action.
        hint: String,
    },
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
}

impl FromStr for WatchdogSpec {
    type Err = WatchdogSpecError;

    fn from_str(text: &str) -> Result<Self, WatchdogSpecError> {
        let mut spec = Self::default();
        for (key, value) in PAIRS.read(text)? {
            match key {
                "action" => spec.action = value.parse()?,
                "id" => spec.id = Some(value.to_owned()),
                "restart" => spec.restart = Some(value.parse()?),
                _ => spec.addr = Some(value.parse()?),
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_all_keys_and_actions() {
        let watchdog: WatchdogSpec = "action=inject-nmi,id=dog,restart=never,addr=7".parse().unwrap();
        let expected = WatchdogSpec {
            action: WatchdogAction::InjectNmi,
            id: Some("dog".into()),
            restart: Some(RestartPolicy::Never),
            addr: "07.0".parse().ok(),
        };
        assert_eq!(watchdog, expected);
        for (name, action) in ACTIONS {
            assert_eq!((name.parse(), action.to_string()), (Ok(action), name.to_owned()));
        }
        assert_eq!("id=w".parse::<WatchdogSpec>().unwrap().action, WatchdogAction::Reset);
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let refusal = |text: &str| text.parse::<WatchdogSpec>().unwrap_err().to_string();
        assert!(refusal("action=rest").contains("did you mean 'reset'?"));
        assert!(refusal("acton=reset").contains("did you mean 'action'?"));
        assert!(refusal("action=reset,action=none").contains("given twice"));
        assert!(refusal("reset").contains("not KEY=VALUE"));
    }
}
