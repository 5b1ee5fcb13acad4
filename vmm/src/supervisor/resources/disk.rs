//! The files of a disk: image, chain, data; opened, locked, and compared with those of other disks. No byte of them is read
//! here: what is in an image is the device process's business, and which files belong to it is the user's.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::ImageFormat;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use thiserror::Error;

use super::{ResourceError, SECTOR, kind, open, open_error};
use crate::supervisor::config::{DiskConfig, DiskOptions, Size};

/// How long a lock of somebody else may last before the disk counts as locked, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Room for the requests in flight of a disk (vhost-user, inflight I/O tracking), in bytes.
const INFLIGHT_AREA: u64 = 1 << 20;

/// A disk image, locked.
#[derive(Debug)]
pub struct Disk {
    /// Name of the device.
    pub id: String,
    /// The image or block device. Its lock belongs to the open file, so it holds in every process that has it.
    pub file: File,
    /// The same with O_DIRECT, if the page cache is to be gone round.
    pub direct: Option<File>,
    /// What backs it, from the top down; nobody may write.
    pub backing: Vec<(File, ImageFormat)>,
    /// Files that hold data for it.
    pub data: Vec<File>,
    /// Nobody may write.
    pub readonly: bool,
    /// Size in bytes: for a raw image a multiple of 512.
    pub size: u64,
    /// What is said of it.
    pub options: DiskOptions,
    /// Device and inode of each of its files, and whether it is only read.
    identities: Vec<((u64, u64), bool)>,
    /// Who waits for its process to have changed the size of its image.
    pub client: Option<u16>,
}

/// Why a disk does not get another size. The sentences follow the disk's id.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// What is in the image decides.
    #[error(
        "has a VMDK image, whose size cannot be changed: `qemu-img convert -O qcow2` makes another of it"
    )]
    Format,
    /// The image says how large it is.
    #[error("has an image in a format, which says itself how large it is: name the new SIZE")]
    NoSize,
    /// It would not grow.
    #[error(
        "has an image in a format, which only grows while it is in use: `qemu-img resize --shrink` changes it while no machine uses it"
    )]
    Grows,
    /// Nobody may write into the image.
    #[error("has an image that is read-only: its size is in it, and stays")]
    ReadOnlyImage,
    /// Nobody may write.
    #[error("is read-only: leave SIZE out, and it takes the size that its file has")]
    ReadOnly,
    /// It is a block device.
    #[error(
        "is a block device: change its size by what made it (lvextend, for example), then leave SIZE out"
    )]
    BlockDevice,
    /// Nothing would be left.
    #[error("cannot have no bytes at all")]
    Empty,
    /// Not in whole blocks.
    #[error("has blocks of {block} bytes, and {size} is no multiple of that: {} is the next smaller one", .size - .size % .block)]
    Blocks {
        /// Bytes of a block.
        block: u64,
        /// Bytes asked for, or found.
        size: u64,
    },
    /// Data would be lost.
    #[error("has {} now, and what is beyond {} would be lost: say --shrink if the guest uses it no more", Size(*.now), Size(*.size))]
    Shrinks {
        /// Bytes now.
        now: u64,
        /// Bytes asked for.
        size: u64,
    },
    /// The host.
    #[error("cannot have that size: {0}")]
    Host(#[from] io::Error),
}

/// One file of a disk, open.
struct Opened {
    file: File,
    size: u64,
    identity: (u64, u64),
}

/// Opens a disk with all its files.
pub fn open_disk(disk: &DiskConfig, before: &[Disk]) -> Result<Disk, ResourceError> {
    let DiskConfig { id, path, readonly, options, .. } = disk.clone();
    let mut identities = Vec::new();
    let mut take = |path: &Path, readonly: bool| {
        let opened = open_file(&id, path, readonly)?;
        let other =
            before.iter().find(|other| other.collides(opened.identity, readonly)).map(|disk| &disk.id);
        let own = identities.iter().any(|(identity, _)| *identity == opened.identity).then_some(&id);
        if let Some(other) = own.or(other) {
            let (id, path, other) = (id.clone(), path.to_owned(), other.clone());
            return Err(ResourceError::DiskTwice { id, path, other });
        }
        lock_file(&id, path, &opened.file, readonly)?;
        identities.push((opened.identity, readonly));
        Ok(opened)
    };
    let Opened { file, size, .. } = take(&path, readonly)?;
    let mut backing = Vec::new();
    for layer in &options.backing {
        backing.push((take(&layer.path, true)?.file, layer.format));
    }
    let mut data = Vec::new();
    for path in &options.data {
        data.push(take(path, readonly)?.file);
    }
    if options.format.0 == ImageFormat::Raw && !size.is_multiple_of(SECTOR) {
        return Err(ResourceError::DiskSize { id, path, size });
    }
    let direct = if options.cache.direct { Some(open_direct(&id, &path, readonly)?) } else { None };
    Ok(Disk { id, file, direct, backing, data, readonly, size, options, identities, client: None })
}

impl Disk {
    /// The largest file that its process writes, in bytes: its own, or the memory of requests in flight.
    pub fn most_written(&self) -> u64 {
        self.size.max(INFLIGHT_AREA)
    }

    /// The size that it gets when `wanted` is asked for (`None`: the size of its file), in bytes.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub fn new_size(&self, wanted: Option<u64>, shrink: bool) -> Result<u64, ResizeError> {
        let now = (&self.file).seek(SeekFrom::End(0))?;
        let size = wanted.unwrap_or(now);
        if wanted.is_some() && self.readonly {
            return Err(ResizeError::ReadOnly);
        }
        if wanted.is_some() && self.file.metadata()?.file_type().is_block_device() {
            return Err(ResizeError::BlockDevice);
        }
        let block = u64::from(self.options.logical_block_size).max(SECTOR);
        match size {
            0 => Err(ResizeError::Empty),
            size if !size.is_multiple_of(block) => Err(ResizeError::Blocks { block, size }),
            size if size < now && !shrink => Err(ResizeError::Shrinks { now, size }),
            size => Ok(size),
        }
    }

    /// The size that an image in a format is to get, which its process judges.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub fn new_image_size(&self, wanted: Option<u64>, shrink: bool) -> Result<u64, ResizeError> {
        match wanted {
            _ if self.options.format.0 == ImageFormat::Vmdk => Err(ResizeError::Format),
            _ if self.readonly => Err(ResizeError::ReadOnlyImage),
            _ if shrink => Err(ResizeError::Grows),
            None => Err(ResizeError::NoSize),
            Some(0) => Err(ResizeError::Empty),
            Some(size) => Ok(size),
        }
    }

    /// Gives its file this size, if it has another.
    ///
    /// # Errors
    /// The kernel's; all is as it was then.
    pub fn set_size(&mut self, size: u64) -> Result<(), ResizeError> {
        if (&self.file).seek(SeekFrom::End(0))? != size {
            self.file.set_len(size)?;
        }
        self.size = size;
        Ok(())
    }

    /// Whether one of its files is this one, and one of both disks writes.
    fn collides(&self, identity: (u64, u64), readonly: bool) -> bool {
        self.identities.iter().any(|(own, own_readonly)| *own == identity && !(readonly && *own_readonly))
    }
}

fn open_file(id: &str, path: &Path, readonly: bool) -> Result<Opened, ResourceError> {
    let field = format!("disk {id}");
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !readonly => {
            ResourceError::Open {
                field: field.clone(),
                path: path.to_owned(),
                reason: "it may not be written by this user; with readonly=on it need only be readable"
                    .to_owned(),
            }
        }
        io::ErrorKind::IsADirectory => wrong_kind(&field, path, "a directory"),
        _ => open_error(&field, path, &error),
    };
    let mut file = open(OpenOptions::new().read(true).write(!readonly), path).map_err(failed)?;
    let metadata: Metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(wrong_kind(&field, path, kind(&metadata)));
    }
    // Works for block devices too, whose metadata has no length.
    let size = file.seek(SeekFrom::End(0)).and_then(|size| file.rewind().map(|()| size)).map_err(failed)?;
    if size == 0 {
        return Err(ResourceError::DiskEmpty { id: id.to_owned(), path: path.to_owned() });
    }
    Ok(Opened { file, size, identity: (metadata.dev(), metadata.ino()) })
}

fn wrong_kind(field: &str, path: &Path, is: &'static str) -> ResourceError {
    let wanted = "a disk image or a block device";
    ResourceError::Kind { field: field.to_owned(), path: path.to_owned(), is, wanted }
}

/// Opens an image once more, around the page cache. The lock of the other holds for it.
fn open_direct(id: &str, path: &Path, readonly: bool) -> Result<File, ResourceError> {
    let mut options = OpenOptions::new();
    options.read(true).write(!readonly).custom_flags(libc::O_CLOEXEC | libc::O_DIRECT);
    options.open(path).map_err(|error| ResourceError::Open {
        field: format!("disk {id}"),
        path: path.to_owned(),
        reason: match error.raw_os_error() {
            Some(libc::EINVAL) => "its file system has no O_DIRECT, which cache=none needs".to_owned(),
            _ => error.to_string(),
        },
    })
}

pub(super) fn lock_file(id: &str, path: &Path, file: &File, readonly: bool) -> Result<(), ResourceError> {
    let (id, path): (String, PathBuf) = (id.to_owned(), path.to_owned());
    match lock(file, readonly) {
        Ok(()) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            let hint = if readonly {
                ""
            } else {
                "; several machines may share a disk that all open with readonly=on"
            };
            Err(ResourceError::DiskLocked { id, path, hint })
        }
        Err(error) => Err(ResourceError::Lock { id, path, reason: error.into() }),
    }
}

/// Locks the whole file: exclusively for a writer, shared for a reader (`F_OFD_SETLK`, `fcntl(2)`).
pub(super) fn lock(file: &File, readonly: bool) -> Result<(), Errno> {
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // A disk process that was killed a moment ago may still have its image open: the kernel takes io_uring's files
    // down after the process itself.
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < end => thread::sleep(LOCK_INTERVAL),
            other => return other.map(drop),
        }
    }
}
