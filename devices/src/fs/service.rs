//! A shared directory as a service.

use std::os::fd::OwnedFd;

use bulkhead_ipc::channel::message::{DeviceConfig, FsConfig};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{getegid, geteuid};

use super::options::{FsCache, FsOwners, Tag, cache_from_word};
use crate::standalone::arguments::{Given, OptionSpec};
use crate::standalone::outfit::{Outfit, Shared, open_directory};
use crate::standalone::{ServiceType, StandaloneError};

/// Descriptors that the process may have, as far as the host allows it: one for each file that the guest knows.
pub const DESCRIPTORS: u64 = 1 << 19;
/// Private memory for what is known of them, bytes.
pub const DATA: u64 = 512 << 20;
/// Whom files of other users belong to, for a guest that sees one: the kernel's overflow user.
const NOBODY: u32 = 65534;

/// Its row in the table of services.
pub const SERVICE: ServiceType = ServiceType {
    name: "fs",
    backend_type: "fs",
    features: &[],
    description: "a directory of the host (virtio-fs)",
    options: &[
        OptionSpec { name: "--shared-dir", value: Some("DIR"), help: "the directory" },
        OptionSpec {
            name: "--tag",
            value: Some("TAG"),
            help: "the name to mount it by, where the front end does not give it (shared)",
        },
        OptionSpec { name: "--readonly", value: None, help: "nothing in it can be changed" },
        OptionSpec {
            name: "--cache",
            value: Some("MODE"),
            help: "what the guest may keep: auto (the default), always, metadata or never",
        },
        OptionSpec { name: "--submounts", value: None, help: "share what is mounted below it, too" },
        OptionSpec { name: "--xattr", value: None, help: "share extended attributes" },
        OptionSpec {
            name: "--owner",
            value: Some("UID:GID"),
            help: "for root: act as this user only; all of its files are the guest's root's",
        },
    ],
    prepare,
};

fn prepare(given: &Given, outfit: &mut Outfit) -> Result<DeviceConfig, StandaloneError> {
    let usage = StandaloneError::usage;
    let Tag(tag) = given.value("--tag").unwrap_or("shared").parse().map_err(usage)?;
    let cache = given.value("--cache").map_or(Ok(FsCache::Auto), cache_from_word);
    let cache = cache.map_err(|error| StandaloneError::usage(error.to_string()))?;
    let read_only = given.flag("--readonly");
    let owner = match given.value("--owner").map(|owner| owner.split_once(':')) {
        None if geteuid().is_root() => None,
        None => Some((geteuid().as_raw(), getegid().as_raw())),
        Some(_) if !geteuid().is_root() => return Err(StandaloneError::usage("--owner is for root")),
        Some(Some((uid, gid))) => uid.parse().ok().zip(gid.parse().ok()),
        Some(None) => None,
    };
    if given.value("--owner").is_some() && owner.is_none_or(|(uid, gid)| uid == 0 || gid == 0) {
        return Err(StandaloneError::usage(
            "--owner needs the numbers of a user and a group, neither 0: 1000:1000",
        ));
    }
    let directory = open_directory("shared directory", given.required("--shared-dir")?)?;
    outfit.shared = Some(Shared { directory, read_only, owner });
    outfit.may_write(None);
    outfit.limits.descriptors = DESCRIPTORS;
    outfit.limits.data = Some(DATA);
    let table: OwnedFd = memfd_create(c"fs-table", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| StandaloneError::System("memfd_create", errno.into()))?;
    Ok(DeviceConfig::Fs(FsConfig {
        table: outfit.add(table),
        tag,
        read_only,
        cache,
        submounts: given.flag("--submounts"),
        xattr: given.flag("--xattr"),
        owners: owner.map_or(FsOwners::All, |(uid, gid)| FsOwners::One { uid, gid, others: NOBODY }),
    }))
}
