//! A disk as a service.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use bulkhead_ipc::channel::message::{
    BackingImage, BlkConfig, BlkOptions, DeviceConfig, Durability, ErrorAction, ImageFormat, Rates,
};
use nix::sys::resource::{Resource, getrlimit};

use crate::standalone::arguments::{Given, OptionSpec};
use crate::standalone::outfit::{Outfit, OutfitError, open_disk};
use crate::standalone::{ServiceType, StandaloneError};

/// Locked memory for the rings of io_uring, as far as the host allows it.
const IO_URING_LOCKED: u64 = 8 << 20;

const fn option(name: &'static str, value: Option<&'static str>, help: &'static str) -> OptionSpec {
    OptionSpec { name, value, help }
}

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "blk",
    backend_type: "block",
    features: &["read-only", "blk-file"],
    description: "a disk from an image or block device (virtio-blk)",
    options: &[
        option("--blk-file", Some("FILE"), "the image or block device"),
        option("--read-only", None, "nobody writes to it"),
        option("--serial", Some("TEXT"), "serial number, up to 20 bytes"),
        option("--num-queues", Some("N"), "request queues, 1 (the default) to 64"),
        option("--block-size", Some("N"), "logical block, 512 (the default) or 4096 bytes"),
        option("--physical-block-size", Some("N"), "physical block, bytes; 4096 is the default"),
        option("--format", Some("FORMAT"), "raw (the default), qcow2 or vmdk; never guessed"),
        option("--backing", Some("FILE:FORMAT"), "what backs the image; repeated from the top down"),
        option("--data", Some("FILE"), "a file that holds data for the image; repeated in their order"),
        option("--cache", Some("MODE"), "writeback (the default), writethrough, none (O_DIRECT) or unsafe"),
        option("--no-discard", None, "the guest cannot give space up"),
        option("--bps", Some("N[,BURST]"), "most bytes a second, and at once"),
        option("--iops", Some("N[,BURST]"), "most requests a second, and at once"),
        option("--read-error", Some("ACTION"), "report (the default), wait or wait-for-space"),
        option("--write-error", Some("ACTION"), "the same, or ignore"),
        option(
            "--unlocked",
            None,
            "do not lock the image: another service has it, as during a live migration",
        ),
    ],
    prepare,
};

/// The word of a table.
fn word<T: Copy>(given: &Given, name: &str, words: &[(&str, T)], default: T) -> Result<T, StandaloneError> {
    given.value(name).map_or(Ok(default), |value| known(name, value, words))
}

fn known<T: Copy>(name: &str, value: &str, words: &[(&str, T)]) -> Result<T, StandaloneError> {
    words.iter().find(|(word, _)| *word == value).map(|(_, meaning)| *meaning).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        StandaloneError::usage(format!("{name}: {value:?} is none of {}", words.join(", ")))
    })
}

const FORMATS: &[(&str, ImageFormat)] =
    &[("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2), ("vmdk", ImageFormat::Vmdk)];
const ACTIONS: &[(&str, ErrorAction)] = &[
    ("report", ErrorAction::Report),
    ("wait", ErrorAction::Wait),
    ("wait-for-space", ErrorAction::WaitForSpace),
    ("ignore", ErrorAction::Ignore),
];
/// Durability, and whether the page cache is gone round.
const CACHES: &[(&str, (Durability, bool))] = &[
    ("writeback", (Durability::Flush, false)),
    ("writethrough", (Durability::Write, false)),
    ("none", (Durability::Flush, true)),
    ("unsafe", (Durability::Never, false)),
];

/// Opens the disk once more, with O_DIRECT.
fn open_direct(path: &str, read_only: bool) -> Result<File, StandaloneError> {
    let mut options = File::options();
    options.read(true).write(!read_only).custom_flags(libc::O_CLOEXEC | libc::O_DIRECT);
    options.open(path).map_err(|error| {
        OutfitError::Open { what: "disk without the page cache (--cache none)", path: path.into(), error }
            .into()
    })
}

fn options(given: &Given, outfit: &mut Outfit) -> Result<BlkOptions, StandaloneError> {
    let locked = !given.flag("--unlocked");
    let mut backing = Vec::new();
    for layer in given.values("--backing") {
        let (path, format) = layer
            .rsplit_once(':')
            .ok_or_else(|| StandaloneError::usage(format!("--backing: {layer:?} is not FILE:FORMAT")))?;
        let format = known("--backing", format, FORMATS)?;
        backing.push(BackingImage { file: outfit.add(open_disk(path, true, locked)?.0), format });
    }
    let read_only = given.flag("--read-only");
    let mut data = Vec::new();
    for path in given.values("--data") {
        data.push(outfit.add(open_disk(path, read_only, locked)?.0));
    }
    let ((bps, bps_burst), (iops, iops_burst)) = (given.rate("--bps")?, given.rate("--iops")?);
    let (durability, _) = word(given, "--cache", CACHES, (Durability::Flush, false))?;
    Ok(BlkOptions {
        physical_block_size: given.number("--physical-block-size", 0)?,
        format: word(given, "--format", FORMATS, ImageFormat::Raw)?,
        backing,
        data,
        cached: None,
        durability,
        no_discard: given.flag("--no-discard"),
        rates: Rates { bps, bps_burst, iops, iops_burst },
        group: None,
        read_error: word(given, "--read-error", ACTIONS, ErrorAction::Report)?,
        write_error: word(given, "--write-error", ACTIONS, ErrorAction::Report)?,
    })
}

fn prepare(given: &Given, outfit: &mut Outfit) -> Result<DeviceConfig, StandaloneError> {
    let read_only = given.flag("--read-only");
    let queues = given.number("--num-queues", 1)?;
    let logical_block_size = given.number("--block-size", 512)?;
    let path = given.required("--blk-file")?;
    let (disk, size) = open_disk(path, read_only, !given.flag("--unlocked"))?;
    let mut options = options(given, outfit)?;
    let (_, direct) = word(given, "--cache", CACHES, (Durability::Flush, false))?;
    if !read_only {
        // An image in a format grows.
        outfit.may_write((options.format == ImageFormat::Raw).then_some(size));
    }
    outfit.limits.locked =
        getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(_, hard)| hard.min(IO_URING_LOCKED));
    let disk = if direct {
        let direct = open_direct(path, read_only)?;
        // It has the lock, too.
        let cached = outfit.add(disk);
        options.cached = Some(cached);
        direct
    } else {
        disk
    };
    let disk = outfit.add(disk);
    if options.format == ImageFormat::Raw {
        outfit.may_be_resized(disk);
    }
    Ok(DeviceConfig::Blk(BlkConfig {
        disk,
        read_only,
        serial: given.value("--serial").unwrap_or_default().to_owned(),
        queues,
        logical_block_size,
        options,
    }))
}
