//! `--balloon [size=…][,deflate-on-oom=…][,free-page-reporting=…][,id=…][,restart=…][,addr=…]` and the table `[balloon]`.

use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

use super::pairs::{PairError, Pairs};
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};
use super::size::{Size, SizeError};

/// How it is written.
const PAIRS: Pairs = Pairs {
    what: "a balloon",
    shape: "[size=SIZE][,deflate-on-oom=on|off][,free-page-reporting=on|off][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]",
    keys: &["size", "deflate-on-oom", "free-page-reporting", "id", "restart", "addr"],
};

/// Bytes of a page of the balloon.
pub const BALLOON_PAGE: u64 = 4096;

/// A balloon as the user describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct BalloonSpec {
    /// Memory that the guest is to do without from the start. Default: none.
    pub size: Option<Size>,
    /// The guest may take it back when it has none left. Default: yes.
    pub deflate_on_oom: Option<bool>,
    /// The guest names the pages that it does not use. Default: yes.
    pub free_page_reporting: Option<bool>,
    /// The name in messages and in `bulkhead ps`. Default: balloon.
    pub id: Option<String>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0; default: the lowest empty slot.
    pub addr: Option<PciAddress>,
}

/// A balloon with its id settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Size at the start, pages of 4 KiB.
    pub target: u32,
    /// The guest may take pages back when it has none left.
    pub deflate_on_oom: bool,
    /// The guest names the pages that it does not use.
    pub free_page_reporting: bool,
    /// Unique among the processes of the machine.
    pub id: String,
    /// What follows the death of its process.
    pub restart: RestartPolicy,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// Why a balloon is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BalloonSpecError {
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// A switch with something other than on or off.
    #[error("{0}: say on or off")]
    Switch(String),
    /// A size that is none.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A size that does not consist of pages, or that leaves nothing to the guest.
    #[error("balloon: a size of {given} is not possible: it is whole pages of 4 KiB, and less than the guest's {memory}", given = Size(*.size), memory = Size(*.memory))]
    NotPossible {
        /// What was asked for, bytes.
        size: u64,
        /// What the guest has, bytes.
        memory: u64,
    },
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Addr(#[from] PciAddressError),
}

/// Pages of a balloon of `size` bytes in a guest with so much memory.
///
/// # Errors
/// [`BalloonSpecError::NotPossible`].
pub fn balloon_pages(size: u64, memory: u64) -> Result<u32, BalloonSpecError> {
    let pages = u32::try_from(size / BALLOON_PAGE).ok();
    let pages = pages.filter(|_| size.is_multiple_of(BALLOON_PAGE) && size < memory);
    pages.ok_or(BalloonSpecError::NotPossible { size, memory })
}

impl FromStr for BalloonSpec {
    type Err = BalloonSpecError;

    fn from_str(text: &str) -> Result<Self, BalloonSpecError> {
        let mut spec = Self::default();
        for (key, value) in PAIRS.read(text)? {
            let switch = || match value {
                "on" | "true" => Ok(true),
                "off" | "false" => Ok(false),
                _ => Err(BalloonSpecError::Switch(format!("{key}={value}"))),
            };
            match key {
                "size" => spec.size = Some(value.parse()?),
                "deflate-on-oom" => spec.deflate_on_oom = Some(switch()?),
                "free-page-reporting" => spec.free_page_reporting = Some(switch()?),
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
    fn reads_all_keys() {
        let balloon: BalloonSpec =
            "size=64M,deflate-on-oom=off,free-page-reporting=on,id=b,restart=never,addr=7".parse().unwrap();
        let expected = BalloonSpec {
            size: Some(Size(64 << 20)),
            deflate_on_oom: Some(false),
            free_page_reporting: Some(true),
            id: Some("b".into()),
            restart: Some(RestartPolicy::Never),
            addr: "07.0".parse().ok(),
        };
        assert_eq!(balloon, expected);
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let refusal = |text: &str| text.parse::<BalloonSpec>().unwrap_err().to_string();
        assert!(refusal("sise=1M").contains("did you mean 'size'?"));
        assert!(refusal("deflate-on-oom=maybe").contains("say on or off"));
        assert!(refusal("size=1M,size=2M").contains("given twice"));
        assert!(refusal("64M").contains("not KEY=VALUE"));
        assert_eq!(balloon_pages(8192, 16384), Ok(2));
        for size in [4097, 16384, !4095] {
            let error = balloon_pages(size, 16384).unwrap_err().to_string();
            assert!(error.contains("less than the guest's 16K"), "{error}");
        }
    }
}
