//! A kernel or initrd file: its kind, and reads that never go past its end.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use bulkhead_ipc::memory::{Direction, GuestRam, MemoryError, View};
use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, lseek};

use super::BootError;

/// What a kernel file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    BzImage,
    Elf,
}

/// A file with its size and what to call it in errors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image<'a> {
    file: &'a File,
    what: &'static str,
    size: u64,
}

/// Bytes that tell kinds apart: the bzImage magic ends at 0x206.
const HEAD: usize = 0x206;

/// Other things that people pass as a kernel, by what they begin with.
const GUESSES: [(&[u8], &str); 8] = [
    (b"\x1f\x8b", " (gzip data)"),
    (b"\xfd7zXZ", " (xz data)"),
    (b"\x28\xb5\x2f\xfd", " (zstd data)"),
    (b"\x02\x21\x4c\x18", " (lz4 data)"),
    (b"BZh", " (bzip2 data)"),
    (b"070701", " (a cpio archive: an initrd?)"),
    (b"QFI\xfb", " (a qcow2 disk image)"),
    (b"MZ", " (an EFI program)"),
];

impl<'a> Image<'a> {
    pub(super) fn new(file: &'a File, what: &'static str) -> Result<Self, BootError> {
        let status = fstat(file).map_err(|errno| BootError::Read { what, source: io::Error::from(errno) })?;
        if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(BootError::NotAFile(what));
        }
        Ok(Self { file, what, size: u64::try_from(status.st_size).unwrap_or(0) })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Reads up to the length of `buffer` at `offset`; answers how much there was.
    pub(super) fn read_up_to(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, BootError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done = done.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(BootError::Read { what: self.what, source }),
            }
        }
        Ok(done)
    }

    /// Fills `buffer` from `offset` on.
    pub(super) fn read(
        &self,
        kind: &'static str,
        part: &'static str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BootError> {
        self.check_range(kind, part, offset, buffer.len() as u64)?;
        let read = self.read_up_to(offset, buffer)?;
        if read < buffer.len() {
            // The file has shrunk since its size was taken.
            let needed = offset.saturating_add(buffer.len() as u64);
            return Err(BootError::Truncated {
                kind,
                part,
                needed,
                actual: offset.saturating_add(read as u64),
            });
        }
        Ok(())
    }

    /// Refuses a range that the file does not hold.
    pub(super) fn check_range(
        &self,
        kind: &'static str,
        part: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), BootError> {
        let needed = offset.saturating_add(len);
        if needed > self.size {
            return Err(BootError::Truncated { kind, part, needed, actual: self.size });
        }
        Ok(())
    }

    /// Reads `len` bytes at `offset` straight into guest RAM at `address`. Holes of the file are left out: RAM is zero
    /// there, and stays untouched. (Half of an uncompressed Linux kernel is zero, and sparse where it was unpacked.)
    pub(super) fn load(&self, ram: &GuestRam, offset: u64, len: u64, address: u64) -> Result<(), BootError> {
        let view = ram.view(address, len, Direction::Write)?;
        let end = offset.saturating_add(len);
        let mut next = offset;
        while next < end {
            let (start, stop) = self.data_after(next, end);
            self.load_part(&view, offset, start, stop)?;
            next = stop;
        }
        Ok(())
    }

    /// The next stretch of data in `from..end`; empty at `end` when there is none. Where the file system cannot tell,
    /// all is data.
    fn data_after(&self, from: u64, end: u64) -> (u64, u64) {
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).map_err(|_| Errno::EINVAL)?;
            lseek(self.file, from, whence).and_then(|at| u64::try_from(at).map_err(|_| Errno::EINVAL))
        };
        let start = match seek(from, Whence::SeekData) {
            Ok(start) => start.clamp(from, end),
            // A hole up to the end of the file.
            Err(Errno::ENXIO) => end,
            Err(_) => return (from, end),
        };
        let stop = seek(start, Whence::SeekHole).unwrap_or(end).clamp(start, end);
        // A file that changes under us must not keep us here.
        if stop == from { (from, end) } else { (start, stop) }
    }

    /// Reads `start..stop` of the file to where it belongs in `view`, which begins at `offset` of the file.
    fn load_part(&self, view: &View, offset: u64, start: u64, stop: u64) -> Result<(), BootError> {
        let (at, len) = (start.saturating_sub(offset), stop.saturating_sub(start));
        view.copy_from_file(at, self.file.as_fd(), start, len).map_err(|error| match error {
            MemoryError::Io(source) => BootError::Read { what: self.what, source },
            MemoryError::EndOfFile { .. } => {
                BootError::Read { what: self.what, source: io::ErrorKind::UnexpectedEof.into() }
            }
            other => other.into(),
        })
    }

    /// Tells a bzImage from ELF, and both from anything else.
    pub(super) fn kind(&self) -> Result<Kind, BootError> {
        let mut head = [0; HEAD];
        let length = self.read_up_to(0, &mut head)?;
        let head = head.get(..length).unwrap_or_default();
        let has =
            |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
        if has(0, b"\x7fELF") {
            return Ok(Kind::Elf);
        }
        if has(0x1FE, b"\x55\xAA") && has(0x202, b"HdrS") {
            return Ok(Kind::BzImage);
        }
        // Images of these carry a PE header for EFI, and their own magic at offset 56.
        for (magic, name) in [(b"ARM\x64", "ARM (aarch64)"), (b"RSC\x05", "RISC-V")] {
            if has(56, magic) {
                return Err(BootError::WrongArchitecture(name.into()));
            }
        }
        let guess = GUESSES.iter().find(|(magic, _)| has(0, magic)).map_or("", |(_, guess)| guess);
        let start = head.get(..head.len().min(4)).unwrap_or_default();
        let magic = match start {
            [] => "nothing (an empty file)".into(),
            bytes => bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "),
        };
        Err(BootError::NotAKernel { magic, guess })
    }
}
