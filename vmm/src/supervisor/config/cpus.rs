//! `--cpus N[,max=N][,sockets=N][,cores=N][,threads=N]` and the key `cpus`: how many processors, and how they sit together.

use std::fmt;
use std::str::FromStr;

use bulkhead_ipc::channel::message::FIRST_WIDE_APIC_ID;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use thiserror::Error;

use super::nearest::hint;

/// The keys.
const KEYS: [&str; 4] = ["max", "sockets", "cores", "threads"];
/// The most CPUs: what the names of their ACPI objects tell apart. However they sit together, their APIC ids have no more than the
/// 15 bits that an interrupt message has for its destination.
const MOST_CPUS: u32 = 1 << 12;
/// The most where some come later: the ACPI tables of a direct boot lie below 1 MiB.
const MOST_WITH_ROOM: u32 = 1536;
/// The most of anything that a text is read as.
const MOST: u32 = 1 << 16;

/// Processors as the user describes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuSpec {
    /// How many there are at the start.
    pub count: u32,
    /// How many there may be; more can be added while the machine runs.
    max: Option<u32>,
    sockets: Option<u32>,
    cores: Option<u32>,
    threads: Option<u32>,
}

/// Why these are no processors.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CpuSpecError {
    /// Not a number.
    #[error("'{0}' is not a number of CPUs: write N[,max=N][,sockets=N][,cores=N][,threads=N]")]
    Number(String),
    /// A key that is none.
    #[error("unknown key '{key}' of cpus: {hint}")]
    UnknownKey {
        /// What was written.
        key: String,
        /// The nearest valid key.
        hint: String,
    },
    /// A key twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// Nothing.
    #[error("cpus: 0 is not possible; a machine has at least 1 CPU")]
    None,
    /// Fewer possible CPUs than there are at the start.
    #[error("cpus: max={max} is less than the {count} CPUs at the start")]
    Max {
        /// At the start.
        count: u32,
        /// At most.
        max: u32,
    },
    /// The product is another number.
    #[error(
        "cpus: {sockets} sockets of {cores} cores of {threads} threads are {product} CPUs, not {max}: say max={product} to have room for that many"
    )]
    Product {
        /// Sockets.
        sockets: u32,
        /// Cores of each.
        cores: u32,
        /// Threads of each.
        threads: u32,
        /// All together.
        product: u32,
        /// What there may be.
        max: u32,
    },
    /// More than there can be.
    #[error("cpus: {0} is too many; this machine type goes up to {MOST_CPUS}")]
    TooMany(u32),
    /// More than there can be when some come later.
    #[error("cpus: room for {0} is too much; up to {MOST_WITH_ROOM} may come while a machine runs")]
    TooMuchRoom(u32),
}

impl From<u32> for CpuSpec {
    fn from(count: u32) -> Self {
        Self { count, max: None, sockets: None, cores: None, threads: None }
    }
}

impl FromStr for CpuSpec {
    type Err = CpuSpecError;

    fn from_str(text: &str) -> Result<Self, CpuSpecError> {
        let number = |value: &str| match value.parse() {
            Ok(number) if number <= MOST => Ok(number),
            _ => Err(CpuSpecError::Number(value.to_owned())),
        };
        let mut pieces = text.split(',');
        let mut spec = Self::from(number(pieces.next().unwrap_or_default())?);
        for piece in pieces {
            let (key, value) = piece.split_once('=').unwrap_or((piece, ""));
            let place = match key {
                "max" => &mut spec.max,
                "sockets" => &mut spec.sockets,
                "cores" => &mut spec.cores,
                "threads" => &mut spec.threads,
                _ => return Err(CpuSpecError::UnknownKey { key: key.to_owned(), hint: hint(key, &KEYS) }),
            };
            if place.replace(number(value)?).is_some() {
                return Err(CpuSpecError::Twice(key.to_owned()));
            }
        }
        Ok(spec)
    }
}

impl<'de> Deserialize<'de> for CpuSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = CpuSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of CPUs, or a text such as \"2,max=8,threads=2\"")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<CpuSpec, E> {
                u32::try_from(value).map(CpuSpec::from).map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<CpuSpec, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Text)
    }
}

/// How the processors sit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Packages.
    pub sockets: u32,
    /// Cores of each package.
    pub cores: u32,
    /// Threads of each core.
    pub threads: u32,
}

impl CpuSpec {
    /// Fills in what was not said: threads 1, sockets 1, the rest are cores.
    ///
    /// # Errors
    /// What was said makes no machine.
    pub fn resolve(&self) -> Result<(u16, Topology), CpuSpecError> {
        let Self { count, .. } = *self;
        if [Some(count), self.max, self.sockets, self.cores, self.threads].contains(&Some(0)) {
            return Err(CpuSpecError::None);
        }
        let whole = |a: u32, b: u32| a.saturating_mul(b);
        let given = match (self.sockets, self.cores, self.threads) {
            (Some(sockets), Some(cores), Some(threads)) => Some(whole(whole(sockets, cores), threads)),
            _ => None,
        };
        let max = self.max.or(given).unwrap_or(count);
        if max < count {
            return Err(CpuSpecError::Max { count, max });
        }
        let threads = self.threads.unwrap_or(1);
        let sockets = self.sockets.unwrap_or_else(|| match self.cores {
            Some(cores) => max.checked_div(whole(cores, threads)).unwrap_or(1).max(1),
            None => 1,
        });
        let cores =
            self.cores.unwrap_or_else(|| max.checked_div(whole(sockets, threads)).unwrap_or(1).max(1));
        let product = whole(whole(sockets, cores), threads);
        if product != max {
            return Err(CpuSpecError::Product { sockets, cores, threads, product, max });
        }
        let topology = Topology { sockets, cores, threads };
        if max > count && (MOST_WITH_ROOM..MOST_CPUS).contains(&max.saturating_sub(1)) {
            return Err(CpuSpecError::TooMuchRoom(max));
        }
        match u16::try_from(count) {
            Ok(count) if max <= MOST_CPUS => Ok((count, topology)),
            _ => Err(CpuSpecError::TooMany(max)),
        }
    }
}

/// How many bits tell so many things apart.
const fn bits(count: u32) -> u32 {
    u32::BITS - count.saturating_sub(1).leading_zeros()
}

impl Topology {
    /// How many processors there may be.
    pub const fn count(&self) -> u32 {
        self.logical_in_package().saturating_mul(self.sockets)
    }

    /// Threads of one package.
    pub const fn logical_in_package(&self) -> u32 {
        self.cores.saturating_mul(self.threads)
    }

    /// How many bits of an APIC id tell the threads of a core apart: what is above names the core.
    pub const fn core_shift(&self) -> u32 {
        bits(self.threads)
    }

    /// How many bits of an APIC id tell the threads of a package apart: what is above names the package.
    pub const fn package_shift(&self) -> u32 {
        bits(self.cores).saturating_add(self.core_shift())
    }

    /// The local APIC id of a processor by its index: package, core and thread each in bits of their own.
    pub fn apic_id(&self, index: u32) -> u32 {
        let split =
            |value: u32, by: u32| (value.checked_div(by).unwrap_or(0), value.checked_rem(by).unwrap_or(0));
        let (core, thread) = split(index, self.threads);
        let (package, core) = split(core, self.cores);
        let place = |value: u32, shift: u32| {
            let placed = u64::from(value).checked_shl(shift).unwrap_or(u64::MAX);
            u32::try_from(placed).unwrap_or(u32::MAX)
        };
        place(package, self.package_shift()) | place(core, self.core_shift()) | thread
    }

    /// All APIC ids, in ascending order.
    pub fn apic_ids(&self) -> Vec<u32> {
        (0..self.count()).map(|index| self.apic_id(index)).collect()
    }

    /// The last APIC id.
    pub fn last_apic_id(&self) -> u32 {
        self.apic_id(self.count().saturating_sub(1))
    }

    /// How many CPUs, from the first one on, the I/O APIC of the host's kernel reaches, when it does not reach all.
    pub fn reached_by_io_apic(&self) -> Option<usize> {
        let ids = self.apic_ids();
        Some(ids.partition_point(|id| *id < FIRST_WIDE_APIC_ID)).filter(|reached| *reached < ids.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(text: &str) -> (u16, u32, u32, u32) {
        let (count, Topology { sockets, cores, threads }) =
            text.parse::<CpuSpec>().unwrap().resolve().unwrap();
        (count, sockets, cores, threads)
    }

    fn refusal(text: &str) -> String {
        match text.parse::<CpuSpec>() {
            Ok(spec) => spec.resolve().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_is_not_said_is_one_but_for_the_cores() {
        assert_eq!(resolved("1"), (1, 1, 1, 1));
        assert_eq!(resolved("6"), (6, 1, 6, 1));
        assert_eq!(resolved("8,threads=2"), (8, 1, 4, 2));
        assert_eq!(resolved("8,sockets=2"), (8, 2, 4, 1));
        assert_eq!(resolved("8,cores=2"), (8, 4, 2, 1));
        assert_eq!(resolved("8,cores=2,threads=2"), (8, 2, 2, 2));
        assert_eq!(resolved("2,max=4"), (2, 1, 4, 1));
        assert_eq!(resolved("1,sockets=2,cores=2,threads=2"), (1, 2, 2, 2));
        assert_eq!(resolved("254"), (254, 1, 254, 1));
        assert_eq!(resolved("255"), (255, 1, 255, 1));
    }

    #[test]
    fn refusals_say_what_to_write() {
        assert!(refusal("0").contains("at least 1 CPU"));
        assert!(refusal("2,cores=0").contains("at least 1 CPU"));
        assert!(refusal("many").contains("'many' is not a number of CPUs"));
        assert!(refusal("4,max=2").contains("max=2 is less than the 4"));
        assert!(refusal("7,threads=2").contains("say max=6"));
        assert!(refusal("4,core=2").contains("did you mean 'cores'?"));
        assert!(refusal("4,max=8,max=9").contains("given twice"));
        assert!(refusal("60000").contains("60000 is too many"));
        assert!(refusal("4097").contains("goes up to 4096"));
        assert!(refusal("1,max=4100").contains("4100 is too many"));
        assert!(refusal("1,max=1537").contains("room for 1537"));
        assert_eq!(resolved("1,max=1536"), (1, 1, 1536, 1));
        assert!(refusal("4294967295").contains("not a number of CPUs"));
    }

    #[test]
    fn ids_are_unique_ascending_and_tell_the_place() {
        for text in [
            "1",
            "3",
            "6,sockets=2",
            "12,sockets=2,cores=3,threads=2",
            "255",
            "120,threads=8",
            "4095,sockets=91,cores=9,threads=5",
        ] {
            let (_, topology) = text.parse::<CpuSpec>().unwrap().resolve().unwrap();
            let ids = topology.apic_ids();
            assert_eq!(ids.len(), usize::try_from(topology.count()).unwrap(), "{text}");
            assert!(ids.is_sorted_by(|a, b| a < b), "{text}: {ids:?}");
            assert_eq!(ids.last(), Some(&topology.last_apic_id()), "{text}");
            assert!(topology.last_apic_id() < 1 << 15, "{text}");
        }
        let (_, topology) = "12,sockets=2,cores=3,threads=2".parse::<CpuSpec>().unwrap().resolve().unwrap();
        assert_eq!(topology.apic_ids(), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!((topology.core_shift(), topology.package_shift()), (1, 3));
    }

    #[test]
    fn the_io_apic_reaches_ids_of_8_bits() {
        let reached = |text: &str| text.parse::<CpuSpec>().unwrap().resolve().unwrap().1.reached_by_io_apic();
        assert_eq!(reached("255"), None);
        assert_eq!(reached("256"), Some(255));
        assert_eq!(reached("1,max=1024"), Some(255));
        // 8 ids for 5 processors: the 32nd package begins with 248.
        assert_eq!(reached("200,sockets=40,cores=5"), Some(31 * 5 + 5));
    }
}
