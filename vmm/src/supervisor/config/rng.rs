//! `--rng[=on|off|[max-bytes=…[,period=…]][,restart=…][,addr=…]]`, and `rng = true` or the table `[rng]`.

use std::fmt;
use std::str::FromStr;

use bulkhead_ipc::channel::message::RngLimit;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use thiserror::Error;

use super::pairs::{PairError, Pairs};
use super::pci::{PciAddress, PciAddressError};
use super::restart::{RestartError, RestartPolicy};
use super::size::{Size, SizeError};

/// How it is written.
const PAIRS: Pairs = Pairs {
    what: "rng",
    shape: "on, off or max-bytes=SIZE[,period=MILLISECONDS][,restart=POLICY][,addr=SLOT.FUNCTION]",
    keys: &["max-bytes", "period", "restart", "addr"],
};

/// Milliseconds of a period that nothing is said of, as in QEMU.
const PERIOD: u32 = 65536;

/// An entropy device as the user describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RngSpec {
    /// Whether the device exists.
    pub on: bool,
    /// How much the guest gets; `None`: as much as it likes.
    pub limit: Option<RngLimit>,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// Why an entropy device is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RngSpecError {
    /// What is not of the form that it should be.
    #[error(transparent)]
    Pairs(#[from] PairError),
    /// A number of bytes that is none.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A period that is none.
    #[error("period={0}: a period is a number of milliseconds")]
    Period(String),
    /// Nothing, or in no time.
    #[error("rng: max-bytes and period are at least 1")]
    Zero,
    /// A period of nothing.
    #[error("rng: period= needs max-bytes=SIZE")]
    PeriodAlone,
    /// `restart` with something that is no policy.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// `addr` with something that is no place.
    #[error(transparent)]
    Address(#[from] PciAddressError),
}

fn limit(max_bytes: Option<Size>, period: Option<u32>) -> Result<Option<RngLimit>, RngSpecError> {
    match (max_bytes, period) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(RngSpecError::PeriodAlone),
        (Some(Size(0)), _) | (_, Some(0)) => Err(RngSpecError::Zero),
        (Some(Size(max_bytes)), period) => Ok(Some(RngLimit { max_bytes, period: period.unwrap_or(PERIOD) })),
    }
}

impl From<bool> for RngSpec {
    fn from(on: bool) -> Self {
        Self { on, limit: None, restart: None, addr: None }
    }
}

impl FromStr for RngSpec {
    type Err = RngSpecError;

    fn from_str(text: &str) -> Result<Self, RngSpecError> {
        if let "on" | "off" = text {
            return Ok(Self::from(text == "on"));
        }
        let (mut max_bytes, mut period, mut restart, mut addr) = (None, None, None, None);
        for (key, value) in PAIRS.read(text)? {
            match key {
                "max-bytes" => max_bytes = Some(value.parse()?),
                "period" => {
                    period = Some(value.parse().map_err(|_| RngSpecError::Period(value.to_owned()))?);
                }
                "restart" => restart = Some(value.parse()?),
                _ => addr = Some(value.parse()?),
            }
        }
        Ok(Self { on: true, limit: limit(max_bytes, period)?, restart, addr })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Table {
    max_bytes: Option<Size>,
    period: Option<u32>,
    restart: Option<RestartPolicy>,
    addr: Option<PciAddress>,
}

impl<'de> Deserialize<'de> for RngSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SwitchOrTable;
        impl<'de> Visitor<'de> for SwitchOrTable {
            type Value = RngSpec;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or { max-bytes = \"1K\", period = 1000, restart = \"always\" }")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<RngSpec, E> {
                Ok(RngSpec::from(on))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RngSpec, A::Error> {
                let table = Table::deserialize(MapAccessDeserializer::new(map))?;
                let limit = limit(table.max_bytes, table.period).map_err(de::Error::custom)?;
                Ok(RngSpec { on: true, limit, restart: table.restart, addr: table.addr })
            }
        }
        deserializer.deserialize_any(SwitchOrTable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_switches_and_keys() {
        assert_eq!("on".parse(), Ok(RngSpec::from(true)));
        assert_eq!("off".parse(), Ok(RngSpec::from(false)));
        let limit = Some(RngLimit { max_bytes: 1024, period: 500 });
        let restart = Some(RestartPolicy::Never);
        let addr = "05.1".parse().ok();
        let text = "max-bytes=1K,period=500,restart=never,addr=5.1";
        assert_eq!(text.parse(), Ok(RngSpec { on: true, limit, restart, addr }));
        let limit = Some(RngLimit { max_bytes: 7, period: 65536 });
        assert_eq!("max-bytes=7".parse(), Ok(RngSpec { limit, ..RngSpec::from(true) }));
    }

    #[test]
    fn the_file_says_the_same() {
        #[derive(Deserialize)]
        struct File {
            rng: RngSpec,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.rng).map_err(|e| e.to_string());
        assert_eq!(read("rng = false"), Ok(RngSpec::from(false)));
        let limit = Some(RngLimit { max_bytes: 1024, period: 500 });
        assert_eq!(
            read("[rng]\nmax-bytes = '1K'\nperiod = 500\naddr = '5'"),
            Ok(RngSpec { limit, addr: "05.0".parse().ok(), ..RngSpec::from(true) })
        );
        assert!(read("[rng]\nperiod = 500").unwrap_err().contains("needs max-bytes"));
        assert!(read("[rng]\nmaxbytes = '1K'").unwrap_err().contains("unknown field"));
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        for (text, word) in [
            ("max-byte=1", "did you mean 'max-bytes'?"),
            ("max-bytes=x", "is not a size"),
            ("max-bytes=0", "at least 1"),
            ("max-bytes=1,period=0", "at least 1"),
            ("period=9", "needs max-bytes"),
            ("max-bytes=1,period=s", "period=s"),
            ("max-bytes=1,max-bytes=2", "given twice"),
            ("yes", "not KEY=VALUE"),
        ] {
            let error = text.parse::<RngSpec>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
