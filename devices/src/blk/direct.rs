//! Reads and writes that the queue's thread makes itself, because that is cheaper than io_uring: a copy to or from the host's page cache.
//!
//! A read asks for what is there without waiting (RWF_NOWAIT). What is not there goes through io_uring, as do the next reads, more
//! and more of them, until one is found again. A write into the page cache seldom waits, and most file systems cannot say beforehand;
//! io_uring leaves such writes to a kernel thread, one at a time for each file, which costs more than the copy. So it is made here too; one that
//! had to wait (the host writes back, or a block had to be read first) sends the next ones through io_uring. A file in memory is always
//! there. Nothing is done here to a disk that is open with O_DIRECT, or whose writes must be durable when they end.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_ipc::memory::LentVector;
use bulkhead_ipc::vhost_user::backend::HostCall;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use crate::idle::Backoff;

/// A write that took longer had to wait.
const SLOW: Duration = Duration::from_millis(2);

/// What a read or write came to.
#[derive(Debug)]
pub enum Moved {
    /// This many bytes, maybe fewer than asked for; 0: the file ends here.
    Bytes(usize),
    /// It is for io_uring.
    Not,
    /// The host refused it.
    Failed(i32),
}

/// What may be done without io_uring, and whether it is worth it now.
#[derive(Debug)]
pub struct Direct {
    reads: bool,
    writes: bool,
    /// The file is memory: nothing waits for a device.
    memory: bool,
    misses: Backoff,
    slow: Backoff,
    call: HostCall,
}

impl Direct {
    /// For a raw disk.
    pub fn new(disk: &File, call: HostCall) -> Self {
        let flags = fcntl(disk, FcntlArg::F_GETFL).map_or(OFlag::O_DIRECT, OFlag::from_bits_retain);
        let cached = !flags.contains(OFlag::O_DIRECT);
        let memory = fstatfs(disk).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        let (misses, slow) = Default::default();
        Self { reads: cached, writes: cached, memory, misses, slow, call }
    }

    /// For a disk of which nothing is done here.
    pub fn never() -> Self {
        let (misses, slow, call) = Default::default();
        Self { reads: false, writes: false, memory: false, misses, slow, call }
    }

    /// Reads what is left of the buffers.
    pub fn read(&mut self, disk: &File, buffers: &mut LentVector, offset: u64) -> Moved {
        if !self.reads || !self.misses.due() {
            return Moved::Not;
        }
        let result = if self.memory {
            self.call.during(|| buffers.read_at(disk.as_fd(), offset))
        } else {
            buffers.read_at_once(disk.as_fd(), offset)
        };
        match result {
            Ok(count) => {
                self.misses.succeeded();
                Moved::Bytes(count)
            }
            Err(error) => {
                self.misses.failed();
                self.reads &= error.raw_os_error() != Some(libc::EOPNOTSUPP);
                failure(&error)
            }
        }
    }

    /// Writes what is left of the buffers.
    pub fn write(&mut self, disk: &File, buffers: &mut LentVector, offset: u64) -> Moved {
        if !self.writes || !self.slow.due() {
            return Moved::Not;
        }
        let begin = Instant::now();
        let result = self.call.during(|| buffers.write_at(disk.as_fd(), offset));
        if self.memory || begin.elapsed() < SLOW {
            self.slow.succeeded();
        } else {
            self.slow.failed();
        }
        match result {
            Ok(count) => Moved::Bytes(count),
            Err(error) => failure(&error),
        }
    }
}

fn failure(error: &io::Error) -> Moved {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINTR) | None => Moved::Not,
        Some(errno) => Moved::Failed(errno),
    }
}
