//! The shared directory on the host: every way to a file in it.
//!
//! A file is held by an `O_PATH` descriptor, and opened for use by that descriptor's name in `/proc/self/fd`. Names are taken one
//! component at a time and never followed: neither a symbolic link nor `..` leads anywhere. In the jail the directory is the root of a
//! mount tree of its own, so that even a process that was taken over has nothing above it.

use std::ffi::CStr;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;

use super::table::Key;

/// The flags of every statx: of the file that a descriptor or a name stands for, and not of what a link or an automount would
/// lead to.
const STATX: AtFlags = AtFlags::EMPTY_PATH.union(AtFlags::SYMLINK_NOFOLLOW).union(AtFlags::NO_AUTOMOUNT);

/// The directory and the way to open what is held.
#[derive(Debug)]
pub(super) struct Host {
    /// The shared directory, `O_PATH`.
    root: OwnedFd,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
    /// The mount that the directory is in, when others below it are not to be entered.
    only_mount: Option<u64>,
    root_device: u64,
    /// The log has heard of a mount below.
    told: AtomicBool,
}

/// Attributes of a file, and by what it is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) attributes: Statx,
    pub(super) key: Key,
}

impl Found {
    /// `S_IFMT` bits.
    pub(super) fn kind(&self) -> u32 {
        u32::from(self.attributes.stx_mode) & libc::S_IFMT
    }
}

/// The name of a descriptor in `/proc/self/fd`.
struct Name([u8; 12]);

impl Name {
    fn of(fd: BorrowedFd<'_>) -> Self {
        let mut bytes = [0; 12];
        // Ten digits at most: the last two bytes stay zero.
        let _ = write!(bytes.as_mut_slice(), "{}", fd.as_raw_fd());
        Self(bytes)
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

impl Host {
    /// The directory `root`, with `descriptors` for `/proc/self/fd`.
    ///
    /// # Errors
    /// The directory cannot be looked at.
    pub(super) fn new(root: OwnedFd, descriptors: OwnedFd, submounts: bool) -> Result<Self, Errno> {
        let attributes = statx(&root, c"", STATX, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)?;
        let only_mount = (!submounts).then_some(attributes.stx_mnt_id);
        Ok(Self {
            root,
            descriptors,
            only_mount,
            root_device: device(&attributes),
            told: AtomicBool::new(false),
        })
    }

    /// The shared directory.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// What must stay open.
    pub(super) fn held(&self) -> [i32; 2] {
        [self.root.as_raw_fd(), self.descriptors.as_raw_fd()]
    }

    /// Attributes of a file that is held or open.
    pub(super) fn stat(&self, file: BorrowedFd<'_>) -> Result<Found, Errno> {
        self.statx(file, c"")
    }

    /// Attributes of a name in a directory; EXDEV where it leads into another mount that is not shared.
    pub(super) fn stat_name(&self, directory: BorrowedFd<'_>, name: &CStr) -> Result<Found, Errno> {
        let found = self.statx(directory, name)?;
        if self.only_mount.is_some_and(|mount| mount != found.attributes.stx_mnt_id) {
            if !self.told.swap(true, Ordering::Relaxed) {
                let name = String::from_utf8_lossy(name.to_bytes()).escape_debug().to_string();
                tracing::warn!(
                    name,
                    "a mount lies below the shared directory; the guest gets an error there (submounts=on shares such mounts too)"
                );
            }
            return Err(Errno::XDEV);
        }
        Ok(found)
    }

    fn statx(&self, directory: BorrowedFd<'_>, name: &CStr) -> Result<Found, Errno> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        let attributes = statx(directory, name, STATX, mask)?;
        let born = (attributes.stx_btime.tv_sec, attributes.stx_btime.tv_nsec);
        let key = Key { device: device(&attributes), number: attributes.stx_ino, born };
        Ok(Found { attributes, key })
    }

    /// Takes hold of a name in a directory.
    pub(super) fn hold(&self, directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
        openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    /// Opens a file that is held. The caller has seen that it is a regular file or a directory.
    pub(super) fn open(&self, held: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        openat(&self.descriptors, Name::of(held).as_c_str(), flags, Mode::empty())
    }

    /// Changes the permissions of a file that is held.
    pub(super) fn change_mode(&self, held: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::chmodat(&self.descriptors, Name::of(held).as_c_str(), mode, AtFlags::empty())
    }

    /// Changes the times of a file that is held.
    pub(super) fn change_times(
        &self,
        held: BorrowedFd<'_>,
        times: &rustix::fs::Timestamps,
    ) -> Result<(), Errno> {
        rustix::fs::utimensat(&self.descriptors, Name::of(held).as_c_str(), times, AtFlags::empty())
    }

    /// Another name for a file that is held.
    pub(super) fn link(
        &self,
        held: BorrowedFd<'_>,
        directory: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), Errno> {
        let own = Name::of(held);
        rustix::fs::linkat(&self.descriptors, own.as_c_str(), directory, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// The number of an inode for the guest, to which all is one file system.
    pub(super) fn number(&self, found: &Found) -> u64 {
        let Key { device, number, .. } = found.key;
        if device == self.root_device {
            return number;
        }
        // The upper bits are free in all but the largest file systems.
        let folded = (device ^ (device >> 16) ^ (device >> 32)) & 0x7FFF;
        number ^ (folded.wrapping_add(1) << 48)
    }
}

fn device(attributes: &Statx) -> u64 {
    (u64::from(attributes.stx_dev_major) << 32) | u64::from(attributes.stx_dev_minor)
}
