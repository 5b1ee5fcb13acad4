//! `--port name=NAME,unix=PATH` and the tables `[[port]]`.

use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;
use super::stream::{StreamError, StreamTarget};

/// The most ports of a machine: what their device can have.
const MOST: usize = 15;
/// The longest name, bytes: a driver's buffer for the message with it has 4 KiB at most, and nobody needs more than this.
const LONGEST: usize = 128;

/// A named port.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Its name in the guest: `/dev/virtio-ports/NAME`.
    pub name: String,
    /// The host side: `unix=PATH`, `file=PATH` or `pty`.
    pub target: StreamTarget,
    /// It is a console, `/dev/hvcN`, there.
    #[serde(default)]
    pub console: bool,
}

/// Why a port is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PortSpecError {
    /// The name or the target is missing.
    #[error("a port needs {0}: name=NAME,unix=PATH (or file=PATH, or pty)")]
    Missing(&'static str),
    /// A key that is none.
    #[error("unknown key '{key}' of a port: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// A key twice.
    #[error("port: '{0}' is given twice")]
    Twice(String),
    /// `console` with something else than on or off.
    #[error("port: console={0}: say on or off")]
    Switch(String),
    /// A target that is none.
    #[error("port: {0}")]
    Target(#[from] StreamError),
    /// One that is not for ports.
    #[error("port {0}: a port leads to unix=PATH, file=PATH or pty")]
    NotForPorts(String),
    /// A name that cannot be one.
    #[error("port: '{0}' cannot be a name: it is 1 to {LONGEST} of the characters a-z A-Z 0-9 . _ -")]
    Name(String),
    /// A name twice.
    #[error("port: two ports are called '{0}'")]
    SameName(String),
    /// Too many.
    #[error("{0} ports are too many: a machine has {MOST} at most")]
    TooMany(usize),
}

impl FromStr for PortSpec {
    type Err = PortSpecError;

    fn from_str(text: &str) -> Result<Self, PortSpecError> {
        let (mut name, mut target, mut console) = (None, None, None);
        for piece in text.split(',') {
            let (key, value) = piece.split_once('=').unwrap_or((piece, ""));
            let twice = match key {
                "name" => name.replace(value.to_owned()).is_some(),
                "console" => console.replace(switch(value)?).is_some(),
                "target" => target.replace(value.parse()?).is_some(),
                "unix" | "file" | "pty" => target.replace(piece.parse()?).is_some(),
                _ => {
                    let hint = hint(key, &["name", "unix", "file", "pty", "target", "console"]);
                    return Err(PortSpecError::UnknownKey { key: key.to_owned(), hint });
                }
            };
            if twice {
                return Err(PortSpecError::Twice(key.to_owned()));
            }
        }
        let name = name.ok_or(PortSpecError::Missing("a name"))?;
        let target = target.ok_or(PortSpecError::Missing("a target"))?;
        Ok(Self { name, target, console: console.unwrap_or(false) })
    }
}

fn switch(word: &str) -> Result<bool, PortSpecError> {
    match word {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err(PortSpecError::Switch(word.escape_debug().to_string())),
    }
}

impl PortSpec {
    /// The same with a relative path below a folder.
    #[must_use]
    pub fn below(self, base: &Path) -> Self {
        let target = match self.target {
            StreamTarget::File(path) => StreamTarget::File(base.join(path)),
            StreamTarget::Unix(path) => StreamTarget::Unix(base.join(path)),
            other => other,
        };
        Self { target, ..self }
    }
}

/// Checks the ports of a machine.
///
/// # Errors
/// [`PortSpecError`].
pub fn check(ports: &[PortSpec]) -> Result<(), PortSpecError> {
    if ports.len() > MOST {
        return Err(PortSpecError::TooMany(ports.len()));
    }
    for (index, PortSpec { name, target, .. }) in ports.iter().enumerate() {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        // udev makes a path of it.
        let dots = name.bytes().all(|byte| byte == b'.');
        if dots || name.len() > LONGEST || !name.bytes().all(good) {
            return Err(PortSpecError::Name(name.escape_debug().to_string()));
        }
        if !matches!(target, StreamTarget::Unix(_) | StreamTarget::File(_) | StreamTarget::Pty) {
            return Err(PortSpecError::NotForPorts(name.clone()));
        }
        if ports.iter().take(index).any(|other| other.name == *name) {
            return Err(PortSpecError::SameName(name.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(texts: &[&str]) -> String {
        let ports: Result<Vec<PortSpec>, _> = texts.iter().map(|text| text.parse()).collect();
        ports.and_then(|ports| check(&ports)).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_name_and_a_target() {
        let name = "org.qemu.guest_agent.0".to_owned();
        let port = PortSpec { name, target: StreamTarget::Unix("/run/a".into()), console: false };
        assert_eq!("name=org.qemu.guest_agent.0,unix=/run/a".parse(), Ok(port.clone()));
        assert_eq!("target=unix=/run/a,name=org.qemu.guest_agent.0".parse(), Ok(port.clone()));
        assert_eq!(check(&[port]), Ok(()));
        let pty: PortSpec = "name=p,pty".parse().unwrap();
        assert_eq!(pty.target, StreamTarget::Pty);
        assert!("console=on,name=p,pty".parse::<PortSpec>().unwrap().console);
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        for (texts, word) in [
            (&["unix=a"] as &[&str], "needs a name"),
            (&["name=a"], "needs a target"),
            (&["name=a,unx=b"], "did you mean 'unix'?"),
            (&["name=a,unix=b,file=c"], "given twice"),
            (&["name=a,unix=b,console=yes"], "on or off"),
            (&["name=a,unix="], "needs a path"),
            (&["name=a,target=stdio"], "leads to unix=PATH"),
            (&["name=a/b,unix=c"], "cannot be a name"),
            (&["name=..,unix=c"], "cannot be a name"),
            (&["name=,unix=c"], "cannot be a name"),
            (&["name=a,unix=b", "name=a,unix=c"], "two ports"),
            (&["name=a,pty"; 16], "at most"),
        ] {
            let error = refusal(texts);
            assert!(error.contains(word), "{texts:?}: {error}");
        }
    }
}
