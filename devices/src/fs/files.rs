//! Requests on open files, and on extended attributes.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;

use super::abi::{FSYNC_DATA, OUT_HEADER};
use super::message::Fields;
use super::server::{MOST_DATA, Outcome, Payload, Server};

/// The largest extended attribute, and the largest list of their names, bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MOST_XATTR: usize = 64 << 10;

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Server {
    pub(super) fn open(&mut self, node: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let flags = self.host_flags(fields.u32()?)?;
        if self.nodes.kind(node)? != libc::S_IFREG {
            return Err(Errno::NXIO);
        }
        let file = self.host.open(self.nodes.file(&self.host, node)?, flags)?;
        let handle = self.handles.add(&self.nodes, node, file, flags)?;
        self.open_answer(handle, false);
        Ok(())
    }

    pub(super) fn opendir(&mut self, node: u64) -> Result<(), Errno> {
        if self.nodes.kind(node)? != libc::S_IFDIR {
            return Err(Errno::NOTDIR);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self.host.open(self.nodes.file(&self.host, node)?, flags)?;
        let handle = self.handles.add(&self.nodes, node, file, flags)?;
        self.open_answer(handle, true);
        Ok(())
    }

    /// `struct fuse_open_out`.
    pub(super) fn open_answer(&mut self, handle: u64, directory: bool) {
        let flags = self.open_flags(directory);
        self.answer.u64(handle);
        self.answer.u32(flags);
        self.answer.u32(0);
    }

    pub(super) fn read(&mut self, fields: &mut Fields<'_>, payload: &mut dyn Payload) -> Outcome {
        let (handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        let room = payload.room().saturating_sub(OUT_HEADER);
        let len = usize::try_from(size.min(MOST_DATA)).unwrap_or(0).min(room);
        let file = self.handles.file(&self.host, &mut self.nodes, handle)?;
        payload.fill(file, offset, len).map_err(|error| errno(&error))
    }

    pub(super) fn write(&mut self, fields: &mut Fields<'_>, payload: &mut dyn Payload) -> Result<(), Errno> {
        /// Bytes of `struct fuse_write_in`.
        const WRITE: usize = 40;
        let (handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        if size > MOST_DATA {
            return Err(Errno::INVAL);
        }
        let file = self.handles.file(&self.host, &mut self.nodes, handle)?;
        let len = usize::try_from(size).unwrap_or(0);
        let skip = super::abi::IN_HEADER.saturating_add(WRITE);
        let written = payload.drain(skip, file, offset, len).map_err(|error| errno(&error))?;
        self.count_answer(written);
        Ok(())
    }

    /// `struct fuse_write_out`, which is also `struct fuse_getxattr_out`.
    fn count_answer(&mut self, count: usize) {
        self.answer.u32(u32::try_from(count).unwrap_or(u32::MAX));
        self.answer.u32(0);
    }

    pub(super) fn fsync(&mut self, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (handle, flags) = (fields.u64()?, fields.u32()?);
        let file = self.handles.file(&self.host, &mut self.nodes, handle)?;
        if flags & FSYNC_DATA != 0 { rustix::fs::fdatasync(file) } else { rustix::fs::fsync(file) }
    }

    pub(super) fn fallocate(&mut self, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (handle, offset, length) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let mode = FallocateFlags::from_bits_retain(fields.u32()?);
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.handles.file(&self.host, &mut self.nodes, handle)?;
        rustix::fs::fallocate(file, mode, offset, length)
    }

    pub(super) fn lseek(&mut self, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (handle, offset, whence) = (fields.u64()?, fields.u64()?, fields.u32()?);
        // The client counts itself from the start, the end and where it is.
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let file = self.handles.file(&self.host, &mut self.nodes, handle)?;
        let found = rustix::fs::seek(file, position)?;
        self.answer.u64(found);
        Ok(())
    }

    pub(super) fn copy_file_range(&mut self, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (from, mut from_offset) = (fields.u64()?, fields.u64()?);
        fields.skip(8)?;
        let (to, mut to_offset) = (fields.u64()?, fields.u64()?);
        let (len, flags) = (fields.u64()?, fields.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        // Bounded: nobody else is served meanwhile.
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(64 << 20);
        self.handles.file(&self.host, &mut self.nodes, from)?;
        self.handles.file(&self.host, &mut self.nodes, to)?;
        let (source, sink) = (self.handles.known(from)?, self.handles.known(to)?);
        let count =
            rustix::fs::copy_file_range(source, Some(&mut from_offset), sink, Some(&mut to_offset), len)?;
        self.count_answer(count);
        Ok(())
    }

    pub(super) fn syncfs(&mut self) -> Result<(), Errno> {
        // The whole file system of the host, for which a guest may not make the host wait: each file of its own has its fsync.
        Err(Errno::NOSYS)
    }

    /// Opens a file for its extended attributes.
    fn for_xattr(&mut self, node: u64) -> Result<OwnedFd, Errno> {
        if !self.options.xattr {
            // The client asks no more.
            return Err(Errno::NOSYS);
        }
        if !matches!(self.nodes.kind(node)?, libc::S_IFREG | libc::S_IFDIR) {
            return Err(Errno::OPNOTSUPP);
        }
        let held = self.nodes.file(&self.host, node)?;
        self.host.open(held, OFlags::RDONLY)
    }

    pub(super) fn getxattr(&mut self, node: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let size = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
        fields.skip(4)?;
        let name = fields.text()?;
        let file = self.for_xattr(node)?;
        let mut value = vec![0; size.min(MOST_XATTR)];
        let count = rustix::fs::fgetxattr(&file, name, value.as_mut_slice())?;
        self.sized_answer(size, count, &value);
        Ok(())
    }

    pub(super) fn listxattr(&mut self, node: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let size = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
        let file = self.for_xattr(node)?;
        let mut names = vec![0; size.min(MOST_XATTR)];
        let count = rustix::fs::flistxattr(&file, names.as_mut_slice())?;
        self.sized_answer(size, count, &names);
        Ok(())
    }

    /// What was asked for, or how much it is.
    fn sized_answer(&mut self, size: usize, count: usize, bytes: &[u8]) {
        if size == 0 {
            self.count_answer(count);
        } else {
            self.answer.put(bytes.get(..count).unwrap_or_default());
        }
    }

    pub(super) fn setxattr(&mut self, node: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (size, flags) = (usize::try_from(fields.u32()?).unwrap_or(usize::MAX), fields.u32()?);
        let name = fields.text()?;
        let value = fields.rest().get(..size).ok_or(Errno::INVAL)?;
        let file = self.for_xattr(node)?;
        rustix::fs::fsetxattr(&file, name, value, XattrFlags::from_bits_retain(flags & 3))
    }

    pub(super) fn removexattr(&mut self, node: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let name = fields.text()?;
        let file = self.for_xattr(node)?;
        rustix::fs::fremovexattr(&file, name)
    }
}
