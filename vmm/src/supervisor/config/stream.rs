//! Where a serial port or console is connected to.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::nearest::hint;

/// The host side of a serial port or console.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum StreamTarget {
    /// Standard input and output of `bulkhead run`.
    Stdio,
    /// Output appended to a file; there is no input.
    File(PathBuf),
    /// A pseudo terminal whose path is printed.
    Pty,
    /// A Unix stream socket; each new connection takes the place of the one before.
    Unix(PathBuf),
    /// Nothing until `bulkhead console NAME` connects.
    Attach,
    /// The device does not exist.
    Off,
}

/// Why a text does not name a stream target.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StreamError {
    /// A word that is none of the targets.
    #[error("'{word}' is not a target: {hint} (stdio, file=PATH, pty, unix=PATH, attach, off)")]
    Unknown {
        /// What was written.
        word: String,
        /// The nearest valid word.
        hint: String,
    },
    /// `file` or `unix` without a path.
    #[error("'{0}' needs a path: {0}=PATH")]
    NoPath(String),
    /// A path where none belongs.
    #[error("'{0}' takes no path")]
    NeedlessPath(String),
}

impl FromStr for StreamTarget {
    type Err = StreamError;

    fn from_str(text: &str) -> Result<Self, StreamError> {
        let (word, path) = match text.split_once('=') {
            Some((word, path)) => (word, Some(path)),
            None => (text, None),
        };
        let target = match word {
            "file" | "unix" => {
                let path =
                    path.filter(|path| !path.is_empty()).ok_or(StreamError::NoPath(word.to_owned()))?;
                return Ok(if word == "file" { Self::File(path.into()) } else { Self::Unix(path.into()) });
            }
            "stdio" => Self::Stdio,
            "pty" => Self::Pty,
            "attach" => Self::Attach,
            "off" => Self::Off,
            _ => {
                let hint = hint(word, &["stdio", "file", "pty", "unix", "attach", "off"]);
                return Err(StreamError::Unknown { word: word.to_owned(), hint });
            }
        };
        match path {
            None => Ok(target),
            Some(_) => Err(StreamError::NeedlessPath(word.to_owned())),
        }
    }
}

impl TryFrom<String> for StreamTarget {
    type Error = StreamError;

    fn try_from(text: String) -> Result<Self, StreamError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_target() {
        assert_eq!("stdio".parse(), Ok(StreamTarget::Stdio));
        assert_eq!("file=/tmp/a=b".parse(), Ok(StreamTarget::File("/tmp/a=b".into())));
        assert_eq!("unix=s".parse(), Ok(StreamTarget::Unix("s".into())));
        assert_eq!("off".parse(), Ok(StreamTarget::Off));
    }

    #[test]
    fn refusals_name_the_nearest_target() {
        let error = "sdtio".parse::<StreamTarget>().unwrap_err();
        assert!(error.to_string().contains("did you mean 'stdio'?"), "{error}");
        assert_eq!("file".parse::<StreamTarget>(), Err(StreamError::NoPath("file".into())));
        assert_eq!("unix=".parse::<StreamTarget>(), Err(StreamError::NoPath("unix".into())));
        assert_eq!("pty=x".parse::<StreamTarget>(), Err(StreamError::NeedlessPath("pty".into())));
    }
}
