//! An entropy device as a service.

use bulkhead_ipc::channel::message::{DeviceConfig, RngConfig, RngLimit};

use crate::standalone::arguments::{Given, OptionSpec};
use crate::standalone::outfit::open;
use crate::standalone::{ServiceType, StandaloneError};

/// Milliseconds of a period that nothing is said of.
const PERIOD: u32 = 65536;

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "rng",
    backend_type: "rng",
    features: &[],
    description: "random bytes of the host (virtio-rng)",
    options: &[
        OptionSpec {
            name: "--max-bytes",
            value: Some("N"),
            help: "most bytes in a period (default: no limit)",
        },
        OptionSpec {
            name: "--period",
            value: Some("MS"),
            help: "the period of --max-bytes, milliseconds (default: 65536)",
        },
    ],
    prepare: |given, outfit| {
        let limit = limit(given)?;
        let source = outfit.add(open("entropy source", "/dev/urandom", false)?);
        Ok(DeviceConfig::Rng(RngConfig { source, limit }))
    },
};

fn limit(given: &Given) -> Result<Option<RngLimit>, StandaloneError> {
    let (max_bytes, period) = (given.number("--max-bytes", 0)?, given.number("--period", PERIOD)?);
    match (given.flag("--max-bytes"), given.flag("--period")) {
        (false, false) => Ok(None),
        (false, true) => Err(StandaloneError::usage("--period needs --max-bytes")),
        (true, _) if max_bytes == 0 || period == 0 => {
            Err(StandaloneError::usage("--max-bytes and --period are at least 1"))
        }
        (true, _) => Ok(Some(RngLimit { max_bytes, period })),
    }
}
