//! A directory of the host that the guest sees.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{getegid, geteuid};

use super::{ResourceError, open_error};
use crate::supervisor::config::ShareConfig;
use crate::supervisor::config::fs::Owner;

/// A directory to be shared.
#[derive(Debug)]
pub struct Share {
    /// As it was asked for.
    pub config: ShareConfig,
    /// The directory, `O_PATH`.
    pub directory: OwnedFd,
    /// Where its process notes what a successor must know.
    pub table: OwnedFd,
    /// The one user and group of the host that its process acts as; `None`: all of them.
    pub owner: Option<(u32, u32)>,
}

impl Share {
    /// Takes hold of the directory.
    pub fn open(config: &ShareConfig) -> Result<Self, ResourceError> {
        let field = format!("fs {}", config.id);
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotADirectory => ResourceError::Kind {
                field: field.clone(),
                path: config.path.clone(),
                is: "no directory",
                wanted: "a directory",
            },
            io::ErrorKind::NotFound => ResourceError::Open {
                field: field.clone(),
                path: config.path.clone(),
                reason: "no such directory".to_owned(),
            },
            _ => open_error(&field, &config.path, &error),
        };
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let directory =
            OpenOptions::new().read(true).custom_flags(flags).open(&config.path).map_err(failed)?;
        let own = (geteuid().as_raw(), getegid().as_raw());
        let owner = match (config.owner, own.0) {
            (Some(Owner::One(uid, gid)), 0) => Some((uid, gid)),
            (None | Some(Owner::All), 0) => None,
            (None, _) => Some(own),
            (Some(Owner::One(uid, gid)), _) if (uid, gid) == own => Some(own),
            (Some(_), _) => return Err(ResourceError::ShareOwner(config.id.clone())),
        };
        let table = memfd_create(c"fs-table", MFdFlags::MFD_CLOEXEC).map_err(|errno| {
            ResourceError::Host { what: "cannot make a file without a name".to_owned(), reason: errno.into() }
        })?;
        Ok(Self { config: config.clone(), directory: directory.into(), table, owner })
    }
}
