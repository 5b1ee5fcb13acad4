//! A disk as a service.

use bulkhead_ipc::channel::message::{BlkConfig, DeviceConfig};
use nix::sys::resource::{Resource, getrlimit};

use crate::standalone::arguments::{Given, OptionSpec};
use crate::standalone::outfit::{Outfit, open_disk};
use crate::standalone::{ServiceType, StandaloneError};

/// Locked memory for the rings of io_uring, as far as the host allows it.
const IO_URING_LOCKED: u64 = 8 << 20;

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "blk",
    backend_type: "block",
    features: &["read-only", "blk-file"],
    description: "a disk from an image or block device (virtio-blk)",
    options: &[
        OptionSpec { name: "--blk-file", value: Some("FILE"), help: "the image or block device" },
        OptionSpec { name: "--read-only", value: None, help: "nobody writes to it" },
        OptionSpec { name: "--serial", value: Some("TEXT"), help: "serial number, up to 20 bytes" },
        OptionSpec { name: "--num-queues", value: Some("N"), help: "request queues, 1 (the default) to 64" },
        OptionSpec {
            name: "--block-size",
            value: Some("N"),
            help: "logical block, 512 (the default) or 4096 bytes",
        },
    ],
    prepare,
};

fn prepare(given: &Given, outfit: &mut Outfit) -> Result<DeviceConfig, StandaloneError> {
    let read_only = given.flag("--read-only");
    let queues = given.number("--num-queues", 1)?;
    let logical_block_size = given.number("--block-size", 512)?;
    let (disk, size) = open_disk(given.required("--blk-file")?, read_only)?;
    if !read_only {
        outfit.may_write(Some(size));
    }
    outfit.limits.locked =
        getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(_, hard)| hard.min(IO_URING_LOCKED));
    Ok(DeviceConfig::Blk(BlkConfig {
        disk: outfit.add(disk),
        read_only,
        serial: given.value("--serial").unwrap_or_default().to_owned(),
        queues,
        logical_block_size,
    }))
}
