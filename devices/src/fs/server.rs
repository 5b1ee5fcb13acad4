//! The FUSE server: one request at a time, from its bytes to its answer's.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use tracing::{debug, info, warn};

use super::abi::{self, Opcode, init};
use super::credentials::Credentials;
use super::handles::Handles;
use super::host::{Found, Host};
use super::message::{Answer, Fields, Header, parse};
use super::nodes::Nodes;
use super::options::{Caching, FsCache, FsOptions, FsOwners};
use super::table::Agreed;

/// Most bytes of one read or write.
pub(super) const MOST_DATA: u32 = 1 << 20;
/// Pages of that.
const MOST_PAGES: u16 = 256;
/// Room for the answer's other parts: names, attributes, entries of directories.
pub(super) const MOST_ANSWER: usize = 128 << 10;

/// What a file's bytes travel by, without a copy in this process.
pub(super) trait Payload {
    /// Puts up to `len` bytes from `offset` of a file behind the answer's header.
    fn fill(&mut self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize>;
    /// Writes up to `len` bytes, which lie `skip` bytes into the request, to `offset` of a file.
    fn drain(&mut self, skip: usize, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize>;
    /// Bytes that the guest has room for, the answer's header included.
    fn room(&self) -> usize;
}

/// A shared directory with what the guest has of it.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) host: Host,
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) options: FsOptions,
    pub(super) answer: Answer,
    /// Where directories are read to.
    pub(super) entries: Vec<u8>,
    begun: bool,
    noted: Agreed,
}

/// What a request has come to: nothing beyond the answer, or bytes that the payload has put behind it.
pub(super) type Outcome = Result<usize, Errno>;

impl Server {
    /// Serves `host`; takes over what the table of `nodes` has from a predecessor.
    pub(super) fn new(host: Host, mut nodes: Nodes, options: FsOptions) -> io::Result<Self> {
        let noted = nodes.table().agreed()?;
        let mut handles = Handles::default();
        if noted.begun {
            nodes.restore(noted)?;
            handles.restore(&nodes, noted)?;
            info!(nodes = noted.nodes, open = noted.handles, "took over from a predecessor");
        }
        let (answer, entries) = (Answer::default(), Vec::new());
        Ok(Self { host, nodes, handles, options, answer, entries, begun: noted.begun, noted })
    }

    /// Serves one request. The answer's bytes but for the payload's; empty when none is due.
    pub(super) fn serve(&mut self, request: &[u8], payload: &mut dyn Payload) -> (&[u8], usize) {
        let Some((header, fields)) = parse(request) else {
            warn!(bytes = request.len(), "a request is shorter than its header");
            return (&[], 0);
        };
        let opcode = Opcode::from_number(header.opcode);
        self.answer.begin();
        let outcome = match opcode {
            None => Err(Errno::NOSYS),
            Some(opcode) if opcode.changes() && self.options.read_only => Err(Errno::ROFS),
            Some(opcode) if !self.begun && opcode != Opcode::Init => Err(Errno::IO),
            Some(opcode) => self.act(opcode, &header, fields, payload),
        };
        self.note();
        if opcode.is_some_and(Opcode::is_silent) {
            return (&[], 0);
        }
        debug!(?opcode, node = header.node, ?outcome, "request");
        let beyond = outcome.unwrap_or(0);
        (self.answer.end(header.unique, outcome.map(drop), beyond), beyond)
    }

    /// Notes what a successor must know of, when it has changed.
    fn note(&mut self) {
        let now = Agreed { begun: self.begun, nodes: self.nodes.used(), handles: self.handles.used() };
        if now != self.noted && self.nodes.table().set_agreed(now).is_ok() {
            self.noted = now;
        }
    }

    fn act(
        &mut self,
        opcode: Opcode,
        header: &Header,
        mut fields: Fields<'_>,
        payload: &mut dyn Payload,
    ) -> Outcome {
        let fields = &mut fields;
        match opcode {
            Opcode::Init => self.init(fields)?,
            Opcode::Destroy => self.destroy()?,
            Opcode::Lookup => self.lookup(header.node, fields)?,
            Opcode::Forget => self.nodes.forget(header.node, fields.u64()?),
            Opcode::BatchForget => self.batch_forget(fields)?,
            Opcode::Getattr => self.getattr(header.node, fields)?,
            Opcode::Setattr => self.setattr(header, fields)?,
            Opcode::Readlink => self.readlink(header.node)?,
            Opcode::Statfs => self.statfs(header.node)?,
            Opcode::Symlink => self.symlink(header, fields)?,
            Opcode::Mknod => self.mknod(header, fields)?,
            Opcode::Mkdir => self.mkdir(header, fields)?,
            Opcode::Unlink => self.unlink(header.node, fields, false)?,
            Opcode::Rmdir => self.unlink(header.node, fields, true)?,
            Opcode::Rename => self.rename(header.node, fields, false)?,
            Opcode::Rename2 => self.rename(header.node, fields, true)?,
            Opcode::Link => self.link(header.node, fields)?,
            Opcode::Create => self.create(header, fields)?,
            Opcode::Open => self.open(header.node, fields)?,
            Opcode::Opendir => self.opendir(header.node)?,
            Opcode::Read => return self.read(fields, payload),
            Opcode::Write => self.write(fields, payload)?,
            Opcode::Release | Opcode::Releasedir => self.handles.remove(&self.nodes, fields.u64()?)?,
            Opcode::Fsync | Opcode::Fsyncdir => self.fsync(fields)?,
            Opcode::Fallocate => self.fallocate(fields)?,
            Opcode::Lseek => self.lseek(fields)?,
            Opcode::CopyFileRange => self.copy_file_range(fields)?,
            Opcode::Syncfs => self.syncfs()?,
            Opcode::Readdir => self.readdir(header.node, fields, false, payload.room())?,
            Opcode::Readdirplus => self.readdir(header.node, fields, true, payload.room())?,
            Opcode::Getxattr => self.getxattr(header.node, fields)?,
            Opcode::Listxattr => self.listxattr(header.node, fields)?,
            Opcode::Setxattr => self.setxattr(header.node, fields)?,
            Opcode::Removexattr => self.removexattr(header.node, fields)?,
            // A request is done by the time that the next one is read.
            Opcode::Interrupt => {}
        }
        Ok(0)
    }

    fn init(&mut self, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let (major, minor) = (fields.u32()?, fields.u32()?);
        let (read_ahead, offered) = (fields.u32()?, fields.u32()?);
        if major > abi::MAJOR {
            // The client comes back with our major version (Documentation/filesystems/fuse: "version negotiation").
            self.answer.u32(abi::MAJOR);
            self.answer.put(&[0; 60]);
            return Ok(());
        }
        if major < abi::MAJOR || minor < abi::OLDEST_MINOR {
            warn!(major, minor, "the guest's FUSE is too old");
            return Err(Errno::PROTO);
        }
        self.forget_all()?;
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2;
        wanted |= match self.options.cache {
            FsCache::Never => 0,
            FsCache::Auto | FsCache::Metadata => init::AUTO_INVAL_DATA,
            FsCache::Always => init::CACHE_SYMLINKS,
        };
        let mut more = 0;
        if offered & init::EXT != 0 && self.options.cache.bypasses_pages() {
            wanted |= init::EXT;
            more = fields.u32()? & init::DIRECT_IO_ALLOW_MMAP;
        }
        if self.options.cache != FsCache::Never {
            wanted |= init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
        }
        self.begun = true;
        self.answer.u32(abi::MAJOR);
        self.answer.u32(abi::MINOR);
        self.answer.u32(read_ahead);
        self.answer.u32(wanted & offered);
        // Requests that the client may have under way in the background, and from when on it holds back.
        self.answer.u16(128);
        self.answer.u16(96);
        self.answer.u32(MOST_DATA);
        // Times count nanoseconds.
        self.answer.u32(1);
        self.answer.u16(MOST_PAGES);
        self.answer.u16(0);
        self.answer.u32(more);
        self.answer.put(&[0; 28]);
        Ok(())
    }

    fn forget_all(&mut self) -> Result<(), Errno> {
        self.handles.clear();
        self.nodes.clear(&self.host)?;
        self.nodes.table().clear().map_err(|_| Errno::IO)?;
        self.noted = Agreed::default();
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), Errno> {
        self.begun = false;
        self.forget_all()
    }

    fn batch_forget(&mut self, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let count = fields.u32()?;
        fields.skip(4)?;
        for _ in 0..count {
            let (node, lookups) = (fields.u64()?, fields.u64()?);
            self.nodes.forget(node, lookups);
        }
        Ok(())
    }

    fn lookup(&mut self, parent: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let name = fields.name()?;
        match self.look_up(parent, name) {
            Ok((found, node)) => self.entry(&found, node),
            // A name that is not there may be believed in as long as one that is.
            Err(Errno::NOENT) if self.options.cache.lifetime().as_secs() > 1 => self.no_entry(),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Finds a name and counts the lookup.
    pub(super) fn look_up(&mut self, parent: u64, name: &CStr) -> Result<(Found, (u64, u64)), Errno> {
        let directory = self.nodes.file(&self.host, parent)?;
        let found = self.host.stat_name(directory, name)?;
        if let Some(node) = self.nodes.look_up_again(&found.key) {
            return Ok((found, node));
        }
        let directory = self.nodes.known(&self.host, parent)?;
        let held = self.host.hold(directory, name)?;
        // What is held counts, should the name stand for another file by now.
        let found = self.host.stat(held.as_fd())?;
        let node = self.nodes.look_up(parent, name.to_owned(), &found, held)?;
        Ok((found, node))
    }

    /// `struct fuse_entry_out`.
    pub(super) fn entry(&mut self, found: &Found, (node, generation): (u64, u64)) {
        let lifetime = self.options.cache.lifetime().as_secs();
        for value in [node, generation, lifetime, lifetime, 0] {
            self.answer.u64(value);
        }
        self.attributes(found);
    }

    /// An entry that says for how long there is none.
    fn no_entry(&mut self) {
        let lifetime = self.options.cache.lifetime().as_secs();
        for value in [0, 0, lifetime, 0, 0] {
            self.answer.u64(value);
        }
        self.answer.put(&[0; abi::ENTRY - 40]);
    }

    /// `struct fuse_attr`.
    fn attributes(&mut self, found: &Found) {
        let it = &found.attributes;
        let (uid, gid) = self.shown(it.stx_uid, it.stx_gid);
        let number = self.host.number(found);
        let answer = &mut self.answer;
        for value in [number, it.stx_size, it.stx_blocks] {
            answer.u64(value);
        }
        for time in [it.stx_atime, it.stx_mtime, it.stx_ctime] {
            answer.u64(time.tv_sec.cast_unsigned());
        }
        for time in [it.stx_atime, it.stx_mtime, it.stx_ctime] {
            answer.u32(time.tv_nsec);
        }
        for value in [u32::from(it.stx_mode), it.stx_nlink, uid, gid] {
            answer.u32(value);
        }
        // As the kernel's `new_encode_dev`.
        let (major, minor) = (it.stx_rdev_major, it.stx_rdev_minor);
        answer.u32((minor & 0xFF) | (major << 8) | ((minor & !0xFF) << 12));
        answer.u32(it.stx_blksize);
        answer.u32(0);
    }

    /// The owner that the guest is shown.
    fn shown(&self, uid: u32, gid: u32) -> (u32, u32) {
        match self.options.owners {
            FsOwners::All => (uid, gid),
            FsOwners::One { uid: own, gid: own_group, others } => {
                (if uid == own { 0 } else { others }, if gid == own_group { 0 } else { others })
            }
        }
    }

    /// The owner that the guest names, as the host knows it; `None` for what cannot be.
    pub(super) fn owner(&self, id: u32, group: bool) -> Option<u32> {
        match self.options.owners {
            FsOwners::All => (id != u32::MAX).then_some(id),
            FsOwners::One { uid, gid, .. } => (id == 0).then_some(if group { gid } else { uid }),
        }
    }

    /// Whose files are made while this lives.
    pub(super) fn credentials(&self, header: &Header) -> Result<Credentials, Errno> {
        match self.options.owners {
            FsOwners::All => Credentials::assume(header.uid, header.gid),
            FsOwners::One { .. } => Ok(Credentials::own()),
        }
    }

    fn getattr(&mut self, node: u64, fields: &mut Fields<'_>) -> Result<(), Errno> {
        let flags = fields.u32()?;
        fields.skip(4)?;
        let handle = fields.u64()?;
        let found = if flags & abi::GETATTR_FH != 0 {
            let file = self.handles.file(&self.host, &mut self.nodes, handle)?;
            self.host.stat(file)?
        } else {
            self.nodes.file(&self.host, node)?;
            self.host.stat(self.nodes.known(&self.host, node)?)?
        };
        self.attributes_answer(&found);
        Ok(())
    }

    /// `struct fuse_attr_out`.
    pub(super) fn attributes_answer(&mut self, found: &Found) {
        self.answer.u64(self.options.cache.lifetime().as_secs());
        self.answer.u64(0);
        self.attributes(found);
    }

    fn readlink(&mut self, node: u64) -> Result<(), Errno> {
        let link = self.nodes.file(&self.host, node)?;
        let target = rustix::fs::readlinkat(link, c"", Vec::new())?;
        self.answer.put(target.to_bytes());
        Ok(())
    }

    fn statfs(&mut self, node: u64) -> Result<(), Errno> {
        let it = rustix::fs::fstatvfs(self.nodes.file(&self.host, node)?)?;
        for value in [it.f_blocks, it.f_bfree, it.f_bavail, it.f_files, it.f_ffree] {
            self.answer.u64(value);
        }
        for value in [it.f_bsize, it.f_namemax, it.f_frsize] {
            self.answer.u32(u32::try_from(value).unwrap_or(u32::MAX));
        }
        self.answer.put(&[0; 28]);
        Ok(())
    }

    /// Flags of the answer to an open.
    pub(super) fn open_flags(&self, directory: bool) -> u32 {
        use abi::open::{CACHE_DIR, DIRECT_IO, KEEP_CACHE};
        match (self.options.cache, directory) {
            (FsCache::Always, true) => KEEP_CACHE | CACHE_DIR,
            (FsCache::Always, false) => KEEP_CACHE,
            (cache, false) if cache.bypasses_pages() => DIRECT_IO,
            _ => 0,
        }
    }

    /// Which of the guest's flags a file is opened with.
    pub(super) fn host_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let passed = OFlags::ACCMODE | OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
        let flags = OFlags::from_bits_retain(flags) & passed;
        let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC);
        if writes && self.options.read_only { Err(Errno::ROFS) } else { Ok(flags) }
    }
}
