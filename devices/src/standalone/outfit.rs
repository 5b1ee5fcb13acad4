//! What a device is given: open files, and limits to go with them.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::FdIndex;
use bulkhead_ipc::jail::Limits;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;

use super::entrance::Door;

/// How long a lock of somebody else may last before a disk counts as locked, and how often it is tried. The kernel takes the
/// io_uring of a process that was killed down after the process itself.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);
/// Room for the requests in flight of any device (vhost-user, inflight I/O tracking).
const INFLIGHT_AREA: u64 = 1 << 20;

/// Why a device cannot be given what it needs.
#[derive(Debug, Error)]
pub enum OutfitError {
    /// A file cannot be opened.
    #[error("{what}: cannot open '{path}': {error}", path = path.display())]
    Open {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// A disk that somebody else uses.
    #[error("disk: '{path}' is locked by another machine or program: stop that first", path = .0.display())]
    Locked(PathBuf),
}

/// A directory for a device to share.
#[derive(Debug)]
pub struct Shared {
    /// Open with `O_PATH`.
    pub directory: OwnedFd,
    /// Nothing in it can be changed.
    pub read_only: bool,
    /// The host user and group that the process runs as, where this program is root; `None`: it acts for all of them.
    pub owner: Option<(u32, u32)>,
}

/// Descriptors for the device's process, and its limits.
#[derive(Debug)]
pub struct Outfit {
    descriptors: Vec<OwnedFd>,
    /// Sockets that are there as long as the service.
    doors: Vec<Door>,
    /// A raw disk among the descriptors, whose size is looked up again when somebody asks for that.
    disk: Option<FdIndex>,
    /// A directory that the device shares.
    pub shared: Option<Shared>,
    /// Resource limits; a file that it may write and locked memory are none unless a type says so.
    pub limits: Limits,
}

impl Default for Outfit {
    fn default() -> Self {
        let limits = Limits { file_size: Some(INFLIGHT_AREA), ..Limits::default() };
        Self { descriptors: Vec::new(), doors: Vec::new(), disk: None, shared: None, limits }
    }
}

impl Outfit {
    /// Hands a descriptor over; the index is for the device's configuration.
    pub fn add(&mut self, descriptor: impl Into<OwnedFd>) -> FdIndex {
        self.descriptors.push(descriptor.into());
        // The front end's socket is number 0. A message with too many is refused when it is sent.
        FdIndex(u8::try_from(self.descriptors.len()).unwrap_or(u8::MAX))
    }

    /// Keeps a socket for the life of the service.
    pub fn keep(&mut self, door: Door) {
        self.doors.push(door);
    }

    /// All descriptors, in the order of their indices from 1 on.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.descriptors.iter().map(AsFd::as_fd)
    }

    /// The device writes to a file of this size, or without bound.
    pub fn may_write(&mut self, size: Option<u64>) {
        self.limits.file_size = size.map(|size| size.max(INFLIGHT_AREA));
        self.limits.file_may_grow = true;
    }

    /// The descriptor of this index is a raw disk that may get another size: SIGHUP says when.
    pub fn may_be_resized(&mut self, disk: FdIndex) {
        self.disk = Some(disk);
    }

    /// Whether there is something to do at SIGHUP.
    pub(super) fn is_resizable(&self) -> bool {
        self.disk.is_some()
    }

    /// The present size of the raw disk, in bytes.
    pub(super) fn disk_size(&self) -> Option<u64> {
        let index = usize::from(self.disk?.0).checked_sub(1)?;
        let mut disk = File::from(self.descriptors.get(index)?.try_clone().ok()?);
        disk.seek(SeekFrom::End(0)).ok()
    }

    /// The largest file that the process may write now, where its disk is that file.
    pub(super) fn most_written(&self) -> Option<u64> {
        let size = self.limits.file_may_grow.then(|| self.disk_size()).flatten()?;
        Some(size.max(INFLIGHT_AREA))
    }

    /// The limits of a process that is started now.
    pub(super) fn limits_now(&self) -> Limits {
        Limits { file_size: self.most_written().or(self.limits.file_size), ..self.limits }
    }
}

/// Opens a file for a device, without waiting for the other end of a pipe.
///
/// # Errors
/// [`OutfitError::Open`].
pub fn open(what: &'static str, path: &str, write: bool) -> Result<File, OutfitError> {
    let failed = |error: io::Error| OutfitError::Open { what, path: path.into(), error };
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(failed)?;
    // io_uring fails a request on a non-blocking file whenever the page cache does not hold its data.
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|errno| failed(errno.into()))?;
    let flags = OFlag::from_bits_retain(flags).difference(OFlag::O_NONBLOCK);
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags)).map_err(|errno| failed(errno.into()))?;
    Ok(file)
}

/// Takes hold of a directory.
///
/// # Errors
/// [`OutfitError::Open`], also for what is no directory.
pub fn open_directory(what: &'static str, path: &str) -> Result<OwnedFd, OutfitError> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.map(OwnedFd::from).map_err(|error| OutfitError::Open { what, path: path.into(), error })
}

/// Opens a disk image and, with `locked`, locks it: alone for a writer, with others for a reader (`F_OFD_SETLK`, fcntl(2)), as a machine's
/// supervisor does. Returns it with its size in bytes.
///
/// # Errors
/// [`OutfitError`].
pub fn open_disk(path: &str, read_only: bool, locked: bool) -> Result<(File, u64), OutfitError> {
    let mut file = open("disk", path, !read_only)?;
    let failed = |error: io::Error| OutfitError::Open { what: "disk", path: path.into(), error };
    if locked {
        lock(&file, path, read_only)?;
    }
    // A block device has its size at its end.
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((file, size))
}

fn lock(file: &File, path: &str, read_only: bool) -> Result<(), OutfitError> {
    let failed = |error: io::Error| OutfitError::Open { what: "disk", path: path.into(), error };
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let end = Instant::now().checked_add(LOCK_PATIENCE);
    loop {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) if end.is_some_and(|end| Instant::now() < end) => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(OutfitError::Locked(path.into())),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}
