//! Requests that change names and attributes.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::abi::setattr;
use super::credentials::Credentials;
use super::message::{Fields, Header};
use super::server::Server;

/// `S_ISGID` (inode(7)).
const SET_GROUP_ID: u32 = 0o2000;
/// `UTIME_NOW` and `UTIME_OMIT` (utimensat(2)).
const NOW: i64 = 0x3FFF_FFFF;
const OMIT: i64 = 0x3FFF_FFFE;

impl Server {
    pub(super) fn setattr(&mut self, header: &Header, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let valid = fields.u32()?;
        fields.skip(4)?;
        let (handle, size) = (fields.u64()?, fields.u64()?);
        fields.skip(8)?;
        let (atime, mtime) = (fields.u64()?.cast_signed(), fields.u64()?.cast_signed());
        fields.skip(8)?;
        let (atime_nsec, mtime_nsec) = (fields.u32()?, fields.u32()?);
        fields.skip(4)?;
        let mode = fields.u32()?;
        fields.skip(4)?;
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        self.nodes.file(&self.host, header.node)?;
        if valid & setattr::MODE != 0 {
            let file = self.nodes.known(&self.host, header.node)?;
            // The guest's kernel has judged who may set this bit. This one keeps it for members of the file's group alone.
            let group =
                if mode & SET_GROUP_ID != 0 { Some(self.host.stat(file)?.attributes.stx_gid) } else { None };
            let _member = group.map(Credentials::join);
            self.host.change_mode(file, mode)?;
        }
        if valid & (setattr::UID | setattr::GID) != 0 {
            let user = self.named_owner(valid & setattr::UID != 0, uid, false)?;
            let group = self.named_owner(valid & setattr::GID != 0, gid, true)?;
            let file = self.nodes.known(&self.host, header.node)?;
            let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
            rustix::fs::chownat(file, c"", user, group, AtFlags::EMPTY_PATH)?;
        }
        if valid & setattr::SIZE != 0 {
            self.set_size(header.node, (valid & setattr::FH != 0).then_some(handle), size)?;
        }
        let time = |given: u32, now: u32, tv_sec: i64, nsec: u32| Timespec {
            tv_sec,
            tv_nsec: match valid {
                _ if valid & now != 0 => NOW,
                _ if valid & given != 0 => nsec.into(),
                _ => OMIT,
            },
        };
        let times = Timestamps {
            last_access: time(setattr::ATIME, setattr::ATIME_NOW, atime, atime_nsec),
            last_modification: time(setattr::MTIME, setattr::MTIME_NOW, mtime, mtime_nsec),
        };
        if times.last_access.tv_nsec != OMIT || times.last_modification.tv_nsec != OMIT {
            self.host.change_times(self.nodes.known(&self.host, header.node)?, &times)?;
        }
        let found = self.host.stat(self.nodes.known(&self.host, header.node)?)?;
        self.attributes_answer(&found);
        Ok(())
    }

    fn named_owner(&self, named: bool, id: u32, group: bool) -> Result<Option<u32>, Errno> {
        if !named {
            return Ok(None);
        }
        self.owner(id, group).map(Some).ok_or(Errno::PERM)
    }

    fn set_size(&mut self, node: u64, handle: Option<u64>, size: u64) -> Result<(), Errno> {
        if let Some(handle) = handle {
            return rustix::fs::ftruncate(self.handles.file(&self.host, &mut self.nodes, handle)?, size);
        }
        if self.nodes.kind(node)? != libc::S_IFREG {
            return Err(Errno::INVAL);
        }
        let held = self.nodes.file(&self.host, node)?;
        rustix::fs::ftruncate(self.host.open(held, OFlags::WRONLY)?, size)
    }

    /// Answers with what a request has made.
    fn made(&mut self, parent: u64, name: &CStr) -> Result<(), Errno> {
        let (found, node) = self.look_up(parent, name)?;
        self.entry(&found, node);
        Ok(())
    }

    pub(super) fn symlink(&mut self, header: &Header, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (name, target) = (fields.name()?, fields.text()?);
        let credentials = self.credentials(header)?;
        rustix::fs::symlinkat(target, self.nodes.file(&self.host, header.node)?, name)?;
        drop(credentials);
        self.made(header.node, name)
    }

    pub(super) fn mknod(&mut self, header: &Header, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let mode = fields.u32()?;
        fields.skip(12)?;
        let name = fields.name()?;
        let kind = FileType::from_raw_mode(mode);
        // A device of the host would be one for the host's processes, too.
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let credentials = self.credentials(header)?;
        let directory = self.nodes.file(&self.host, header.node)?;
        rustix::fs::mknodat(directory, name, kind, Mode::from_raw_mode(mode & 0o7777), 0)?;
        drop(credentials);
        self.made(header.node, name)
    }

    pub(super) fn mkdir(&mut self, header: &Header, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let mode = fields.u32()?;
        fields.skip(4)?;
        let name = fields.name()?;
        let credentials = self.credentials(header)?;
        let directory = self.nodes.file(&self.host, header.node)?;
        rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(mode & 0o7777))?;
        drop(credentials);
        self.made(header.node, name)
    }

    pub(super) fn unlink(
        &mut self,
        parent: u64,
        fields: &mut Fields<'_>,
        directory: bool,
    ) -> Result<(), Errno> {
        let name = fields.name()?;
        let found = self.host.stat_name(self.nodes.file(&self.host, parent)?, name)?;
        self.nodes.hold_before_loss(&self.host, &found.key);
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(self.nodes.known(&self.host, parent)?, name, flags)?;
        self.nodes.renamed(&found.key, (parent, name), None);
        Ok(())
    }

    pub(super) fn rename(
        &mut self,
        parent: u64,
        fields: &mut Fields<'_>,
        has_flags: bool,
    ) -> Result<(), Errno> {
        let target = fields.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            flags = RenameFlags::from_bits_retain(fields.u32()?);
            fields.skip(4)?;
        }
        // RENAME_WHITEOUT would make a device.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (fields.name()?, fields.name()?);
        let moved = self.host.stat_name(self.nodes.file(&self.host, parent)?, old)?;
        let replaced = self.host.stat_name(self.nodes.file(&self.host, target)?, new).ok();
        if let Some(replaced) = replaced.filter(|_| !flags.contains(RenameFlags::EXCHANGE)) {
            self.nodes.hold_before_loss(&self.host, &replaced.key);
        }
        let (from, to) = (self.nodes.known(&self.host, parent)?, self.nodes.known(&self.host, target)?);
        rustix::fs::renameat_with(from, old, to, new, flags)?;
        let exchanged = flags.contains(RenameFlags::EXCHANGE).then_some((parent, old));
        match replaced {
            Some(replaced) if replaced.key == moved.key => return Ok(()),
            Some(replaced) => self.nodes.renamed(&replaced.key, (target, new), exchanged),
            None => {}
        }
        self.nodes.renamed(&moved.key, (parent, old), Some((target, new)));
        Ok(())
    }

    pub(super) fn link(&mut self, parent: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let node = fields.u64()?;
        let name = fields.name()?;
        self.nodes.file(&self.host, node)?;
        self.nodes.file(&self.host, parent)?;
        let (held, directory) = (self.nodes.known(&self.host, node)?, self.nodes.known(&self.host, parent)?);
        self.host.link(held, directory, name)?;
        self.made(parent, name)
    }

    pub(super) fn create(&mut self, header: &Header, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (flags, mode) = (fields.u32()?, fields.u32()?);
        fields.skip(8)?;
        let name = fields.name()?;
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let flags = self.host_flags(flags)?;
        let credentials = self.credentials(header)?;
        let directory = self.nodes.file(&self.host, header.node)?;
        let making = flags | exclusive | OFlags::CREATE | OFlags::NOFOLLOW;
        let making = making | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let file = rustix::fs::openat(directory, name, making, mode)?;
        drop(credentials);
        let (found, node) = self.look_up(header.node, name)?;
        // The name may stand for another file by now; and a device or pipe that stood there is not opened for the guest.
        if found.kind() != libc::S_IFREG || self.host.stat(file.as_fd())?.key != found.key {
            self.nodes.forget(node.0, 1);
            return Err(Errno::IO);
        }
        let handle = self.handles.add(&self.nodes, node.0, file, flags).inspect_err(|_| {
            self.nodes.forget(node.0, 1);
        })?;
        self.entry(&found, node);
        self.open_answer(handle, false);
        Ok(())
    }
}
