//! virtio-fs: a directory of the host (virtio 1.2, 5.11; FUSE as its protocol).
//!
//! - `server` with `changes`, `files`, `directories`: the requests;
//! - `message`, `abi`: their bytes;
//! - `host`, `nodes`, `handles`: the files behind them;
//! - `table`: what survives this process;
//! - `queue`: the device's queues.
//!
//! The crates that there are (`virtiofsd`, `fuse-backend-rs`) bind themselves to one exact older version of `vm-memory`, and so to guest
//! memory that this project's dirty log does not see. A server of our own needs fewer system calls, too.

mod abi;
mod changes;
mod credentials;
mod directories;
mod files;
mod handles;
mod host;
mod message;
mod nodes;
mod options;
mod queue;
mod server;
mod service;
mod table;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use bulkhead_ipc::vhost_user::backend::{PollWorker, QueueWorker, VirtioDevice};
use nix::sys::resource::{Resource, getrlimit};
use thiserror::Error;

pub use options::{CacheError, FsCache, FsOptions, FsOwners, TAG, Tag, cache_from_word, switch};

pub use service::SERVICE;

use host::Host;
use nodes::Nodes;
use queue::FsQueue;
use server::Server;
use table::Table;

/// Queue 0 is for FUSE_FORGET and its kin, queue 1 for everything else.
const QUEUES: u16 = 2;
/// Descriptors that are not for nodes: open files, directories, what every process has.
const RESERVED: u64 = 512;

/// Why a directory cannot be shared.
#[derive(Debug, Error)]
pub enum FsError {
    /// The directory cannot be looked at.
    #[error("the shared directory cannot be used: {0}")]
    Directory(io::Error),
    /// What the predecessor left.
    #[error("the table of files that the guest holds cannot be read: {0}")]
    Table(io::Error),
    /// No name that a guest could mount by.
    #[error("{0}")]
    Tag(String),
}

/// A shared directory.
#[derive(Debug)]
pub struct Fs {
    server: Option<Server>,
    held: Vec<RawFd>,
    tag: String,
}

impl Fs {
    /// Shares `directory` (`O_PATH`). `descriptors` is this process's `/proc/self/fd`, `table` what a predecessor left and a
    /// successor needs.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(
        directory: OwnedFd,
        descriptors: OwnedFd,
        table: Option<File>,
        options: FsOptions,
    ) -> Result<Self, FsError> {
        let Tag(tag) = options.tag.parse().map_err(FsError::Tag)?;
        // The guest says what permissions a file gets.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        let held = table.as_ref().map(AsRawFd::as_raw_fd);
        let failed = |errno: rustix::io::Errno| FsError::Directory(errno.into());
        let host = Host::new(directory, descriptors, options.submounts).map_err(failed)?;
        let held = held.into_iter().chain(host.held()).collect();
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        let budget = (limit / 2).max(limit.saturating_sub(RESERVED));
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        let nodes = Nodes::new(&host, budget, Table::new(table)).map_err(failed)?;
        let server = Server::new(host, nodes, options).map_err(FsError::Table)?;
        Ok(Self { server: Some(server), held, tag })
    }

    /// Descriptors that stay open.
    pub fn held(&self) -> &[RawFd] {
        &self.held
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let queue = self.server.take().map(FsQueue::new);
        queue.into_iter().map(|queue| Box::new(PollWorker::new(queue, QUEUES)) as _).collect()
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // `struct virtio_fs_config`: the tag, padded with zeroes, and the number of request queues.
        let mut space = [0; TAG + 4];
        let (tag, queues) = space.split_at_mut(TAG);
        tag.iter_mut().zip(self.tag.bytes()).for_each(|(place, byte)| *place = byte);
        queues.copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        crate::copy_config(&space, offset, data);
    }

    // A reset of the device forgets nothing: what the guest held is needed again when only this process was replaced, and the
    // first request of a driver that begins anew, FUSE_INIT, forgets it.
}
