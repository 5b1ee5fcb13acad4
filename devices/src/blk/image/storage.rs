//! A file of an image as `imago` sees it: the crate's own file, without a name to resolve others by.
//!
//! Contains unsafe code: unsafe methods of the crate's trait, which pass the caller's promise on unchanged.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::{Path, PathBuf};

use imago::Storage;
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

/// A file that was opened by somebody else.
#[derive(Debug)]
pub struct Given(File);

impl Given {
    /// This file.
    ///
    /// # Errors
    /// It cannot be examined.
    pub fn new(file: std::fs::File) -> io::Result<Self> {
        Ok(Self(File::try_from(file)?))
    }
}

impl Display for Given {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("the image's file")
    }
}

impl Storage for Given {
    fn mem_align(&self) -> usize {
        self.0.mem_align()
    }

    fn req_align(&self) -> usize {
        self.0.req_align()
    }

    fn zero_align(&self) -> usize {
        self.0.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.0.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    /// Names stay what the image says: they are shown to people, and nothing is opened by them.
    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        Ok(relative.as_ref().to_owned())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller's promise is this method's.
        unsafe { self.0.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.0.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.0.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.0.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.0.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.0.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.0.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.0.resize(new_size, prealloc_mode)
    }
}
