//! An entropy device as a service.

use bulkhead_ipc::channel::message::{DeviceConfig, RngConfig};

use crate::standalone::ServiceType;
use crate::standalone::outfit::open;

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "rng",
    backend_type: "rng",
    features: &[],
    description: "random bytes of the host (virtio-rng)",
    options: &[],
    prepare: |_, outfit| {
        let source = outfit.add(open("entropy source", "/dev/urandom", false)?);
        Ok(DeviceConfig::Rng(RngConfig { source }))
    },
};
