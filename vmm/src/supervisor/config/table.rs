//! Devices of the configuration file that are a word, or a table with more than that word.

use std::fmt;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::pci::PciAddress;
use super::restart::RestartPolicy;
use super::stream::StreamTarget;

/// `keyboard = true`, or `keyboard = { restart = … }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchSpec {
    /// Whether the device exists.
    pub on: bool,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
}

/// `console = "attach"`, or `console = { target = "attach", restart = …, addr = … }`; `serial` without the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamSpec {
    /// The host side.
    pub target: StreamTarget,
    /// What follows the death of its process; default: as for all devices.
    pub restart: Option<RestartPolicy>,
    /// Where on PCI bus 0, if it is a console and the user chose.
    pub addr: Option<PciAddress>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SwitchTable {
    restart: Option<RestartPolicy>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamTable {
    target: StreamTarget,
    restart: Option<RestartPolicy>,
    addr: Option<PciAddress>,
}

impl<'de> Deserialize<'de> for SwitchSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SwitchOrTable;
        impl<'de> Visitor<'de> for SwitchOrTable {
            type Value = SwitchSpec;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or { restart = \"always\" }")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<SwitchSpec, E> {
                Ok(SwitchSpec { on, restart: None })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SwitchSpec, A::Error> {
                let table = SwitchTable::deserialize(MapAccessDeserializer::new(map))?;
                Ok(SwitchSpec { on: true, restart: table.restart })
            }
        }
        deserializer.deserialize_any(SwitchOrTable)
    }
}

impl<'de> Deserialize<'de> for StreamSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TargetOrTable;
        impl<'de> Visitor<'de> for TargetOrTable {
            type Value = StreamSpec;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a target such as \"attach\" or { target = \"attach\", restart = \"always\" }")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<StreamSpec, E> {
                Ok(StreamSpec { target: text.parse().map_err(E::custom)?, restart: None, addr: None })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<StreamSpec, A::Error> {
                let StreamTable { target, restart, addr } =
                    StreamTable::deserialize(MapAccessDeserializer::new(map))?;
                Ok(StreamSpec { target, restart, addr })
            }
        }
        deserializer.deserialize_any(TargetOrTable)
    }
}

/// Reads a serial port: it is not on the PCI bus.
pub fn serial<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<StreamSpec>, D::Error> {
    let spec = StreamSpec::deserialize(deserializer)?;
    match spec.addr {
        None => Ok(Some(spec)),
        Some(_) => Err(de::Error::custom("addr is for PCI devices: the serial port is not one")),
    }
}
