//! `--console[=TARGET][,addr=…]`.

use std::str::FromStr;

use thiserror::Error;

use super::pci::{PciAddress, PciAddressError};
use super::stream::{StreamError, StreamTarget};

/// A virtio console as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// The host side.
    pub target: StreamTarget,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// Why a console is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConsoleError {
    /// Its host side.
    #[error(transparent)]
    Target(#[from] StreamError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Address(#[from] PciAddressError),
}

impl From<StreamTarget> for ConsoleSpec {
    fn from(target: StreamTarget) -> Self {
        Self { target, addr: None }
    }
}

impl FromStr for ConsoleSpec {
    type Err = ConsoleError;

    /// The place is what follows the last `,addr=`: a path may have commas.
    fn from_str(text: &str) -> Result<Self, ConsoleError> {
        let (target, addr) = match (text.strip_prefix("addr="), text.rsplit_once(",addr=")) {
            (Some(addr), _) => (StreamTarget::Attach, Some(addr)),
            (None, Some((target, addr))) => (target.parse()?, Some(addr)),
            (None, None) => (text.parse()?, None),
        };
        Ok(Self { target, addr: addr.map(str::parse).transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_targets_and_places() {
        let at = |target, addr: &str| Ok(ConsoleSpec { target, addr: addr.parse().ok() });
        assert_eq!("pty".parse(), Ok(ConsoleSpec::from(StreamTarget::Pty)));
        assert_eq!("addr=5".parse(), at(StreamTarget::Attach, "05.0"));
        assert_eq!("attach,addr=5.1".parse(), at(StreamTarget::Attach, "05.1"));
        assert_eq!("file=/a,b,addr=1f".parse(), at(StreamTarget::File("/a,b".into()), "1f.0"));
        for (text, word) in [
            ("pyt,addr=5", "did you mean 'pty'"),
            ("pty,addr=1", "slots 2 to 1f"),
            ("pty,id=5", "not a target"),
        ] {
            let error = text.parse::<ConsoleSpec>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
