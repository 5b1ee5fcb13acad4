//! Reading directories, with and without the attributes of what is in them.

use std::os::fd::AsFd;

use rustix::fs::{FileType, RawDir, SeekFrom};
use rustix::io::Errno;

use super::abi::{DIRENT, ENTRY, OUT_HEADER};
use super::message::Fields;
use super::server::{MOST_ANSWER, Server};

/// Least bytes that one entry of the host needs: the longest name and what goes with it.
const LEAST: usize = 320;

/// An entry of the host, out of the buffer that it was read to.
struct Entry {
    number: u64,
    next: u64,
    kind: u32,
    name: std::ffi::CString,
}

impl Server {
    pub(super) fn readdir(
        &mut self,
        node: u64,
        fields: &mut Fields<'_>,
        plus: bool,
        room: usize,
    ) -> Result<(), Errno> {
        let (handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        let room = room.saturating_sub(OUT_HEADER).min(MOST_ANSWER);
        let size = usize::try_from(size).unwrap_or(0).min(room);
        let directory = self.handles.file(&self.host, &mut self.nodes, handle)?;
        let directory = directory.try_clone_to_owned().map_err(|_| Errno::NFILE)?;
        // An entry takes more room in the answer than in the host's list, so that about as many are read as fit.
        let mut buffer = std::mem::take(&mut self.entries);
        buffer.reserve(size.max(LEAST));
        let position = *self.handles.position(handle)?;
        if position != offset {
            if position == 0 {
                // A directory whose first read is at its end, as after a death, shows nothing when it is rewound
                // (ext4_dx_readdir of Linux 6.1 takes position 0 for where it was before). So its first read is here.
                let _ = RawDir::new(&directory, buffer.spare_capacity_mut()).next();
            }
            rustix::fs::seek(&directory, SeekFrom::Start(offset))?;
            *self.handles.position(handle)? = offset;
        }
        let result = self.list(node, handle, &directory, &mut buffer, (size, plus));
        self.entries = buffer;
        result
    }

    fn list(
        &mut self,
        node: u64,
        handle: u64,
        directory: &impl AsFd,
        buffer: &mut Vec<u8>,
        (size, plus): (usize, bool),
    ) -> Result<(), Errno> {
        let room = buffer.spare_capacity_mut();
        let most = size.max(LEAST).min(room.len());
        let mut list = RawDir::new(directory, room.get_mut(..most).unwrap_or_default());
        let mut all = true;
        while let Some(entry) = list.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) if self.answer.len() > 0 => break,
                Err(error) => return Err(error),
            };
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                other => other.as_raw_mode() >> 12,
            };
            let entry = Entry {
                number: entry.ino(),
                next: entry.next_entry_cookie(),
                kind,
                name: entry.file_name().to_owned(),
            };
            if !self.put_entry(node, &entry, size, plus)? {
                all = false;
                break;
            }
            *self.handles.position(handle)? = entry.next;
            if list.is_buffer_empty() {
                break;
            }
        }
        if !all {
            // The host has read further than the guest.
            let position = *self.handles.position(handle)?;
            rustix::fs::seek(directory, SeekFrom::Start(position))?;
        }
        Ok(())
    }

    /// `struct fuse_dirent` or `struct fuse_direntplus`. False: it does not fit.
    fn put_entry(&mut self, node: u64, entry: &Entry, size: usize, plus: bool) -> Result<bool, Errno> {
        let name = entry.name.to_bytes();
        let before = self.answer.len();
        let head = if plus { ENTRY } else { 0 };
        let needs = head.saturating_add(DIRENT).saturating_add(name.len()).next_multiple_of(8);
        if before.saturating_add(needs) > size {
            return Ok(false);
        }
        if plus {
            let special = matches!(name, b"." | b"..");
            let found = if special { Err(Errno::NOENT) } else { self.look_up(node, &entry.name) };
            match found {
                Ok((found, known)) => self.entry(&found, known),
                // An entry without attributes: the client looks it up when it needs it.
                Err(_) => self.answer.put(&[0; ENTRY]),
            }
        }
        self.answer.u64(entry.number);
        self.answer.u64(entry.next);
        self.answer.u32(u32::try_from(name.len()).unwrap_or(0));
        self.answer.u32(entry.kind);
        self.answer.put(name);
        self.answer.align();
        Ok(true)
    }
}
