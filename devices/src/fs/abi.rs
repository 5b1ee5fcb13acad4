//! Numbers of the FUSE protocol (include/uapi/linux/fuse.h), version 7.31 and what later ones added to it.

/// The version that this server speaks.
pub(super) const MAJOR: u32 = 7;
/// Minor version: what a client of a newer one sends beyond it is not used.
pub(super) const MINOR: u32 = 36;
/// The oldest client: `fuse_init_out` has had its size since 7.23, what is used of virtio-fs came with 7.31.
pub(super) const OLDEST_MINOR: u32 = 27;

/// Bytes of `fuse_in_header`.
pub(super) const IN_HEADER: usize = 40;
/// Bytes of `fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;
/// Bytes of `fuse_entry_out`.
pub(super) const ENTRY: usize = 128;
/// Bytes of `fuse_dirent` without its name.
pub(super) const DIRENT: usize = 24;
/// The node of the root.
pub(super) const ROOT: u64 = 1;
/// The longest name, bytes (`FUSE_NAME_MAX` is larger; no file system of Linux has longer ones).
pub(super) const NAME_MAX: usize = 255;

/// What a request asks for (`enum fuse_opcode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Opcode {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Syncfs = 50,
}

impl Opcode {
    const ALL: [Self; 37] = [
        Self::Lookup,
        Self::Forget,
        Self::Getattr,
        Self::Setattr,
        Self::Readlink,
        Self::Symlink,
        Self::Mknod,
        Self::Mkdir,
        Self::Unlink,
        Self::Rmdir,
        Self::Rename,
        Self::Link,
        Self::Open,
        Self::Read,
        Self::Write,
        Self::Statfs,
        Self::Release,
        Self::Fsync,
        Self::Setxattr,
        Self::Getxattr,
        Self::Listxattr,
        Self::Removexattr,
        Self::Init,
        Self::Opendir,
        Self::Readdir,
        Self::Releasedir,
        Self::Fsyncdir,
        Self::Create,
        Self::Interrupt,
        Self::Destroy,
        Self::BatchForget,
        Self::Fallocate,
        Self::Readdirplus,
        Self::Rename2,
        Self::Lseek,
        Self::CopyFileRange,
        Self::Syncfs,
    ];

    /// The opcode of this number; `None` for what this server leaves to the client, which is told ENOSYS.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|opcode| *opcode as u32 == number)
    }

    /// Whether the client waits for no answer.
    pub(super) fn is_silent(self) -> bool {
        matches!(self, Self::Forget | Self::BatchForget | Self::Interrupt)
    }

    /// Whether it changes the file system.
    pub(super) fn changes(self) -> bool {
        matches!(
            self,
            Self::Setattr
                | Self::Symlink
                | Self::Mknod
                | Self::Mkdir
                | Self::Unlink
                | Self::Rmdir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Write
                | Self::Setxattr
                | Self::Removexattr
                | Self::Create
                | Self::Fallocate
                | Self::CopyFileRange
        )
    }
}

/// Flags of FUSE_INIT.
pub(super) mod init {
    pub(crate) const ASYNC_READ: u32 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub(crate) const BIG_WRITES: u32 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(crate) const ASYNC_DIO: u32 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(crate) const MAX_PAGES: u32 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u32 = 1 << 23;
    pub(crate) const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    /// More flags follow, 32 bits on.
    pub(crate) const EXT: u32 = 1 << 30;
    /// `FUSE_DIRECT_IO_ALLOW_MMAP`, among those: files without page cache can be mapped all the same.
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u32 = 1 << (36 - 32);
}

/// `valid` of FUSE_SETATTR.
pub(super) mod setattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
}

/// `open_flags` of the answer to FUSE_OPEN.
pub(super) mod open {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const CACHE_DIR: u32 = 1 << 3;
}

/// `getattr_flags`: the request names an open file.
pub(super) const GETATTR_FH: u32 = 1;
/// `fsync_flags`: data only.
pub(super) const FSYNC_DATA: u32 = 1;
