//! Requests and answers as bytes. What is read here is the guest's: every length is checked, and a request that is too short is
//! answered with EINVAL.

use std::ffi::CStr;

use rustix::io::Errno;

use super::abi::{IN_HEADER, NAME_MAX, OUT_HEADER};

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The rest of a request, taken field by field.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// A request without its header.
    #[cfg(test)]
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.take(4)?.try_into().map(u32::from_le_bytes).map_err(|_| Errno::INVAL)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.take(8)?.try_into().map(u64::from_le_bytes).map_err(|_| Errno::INVAL)
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.take(count).map(drop)
    }

    /// A text that ends with a zero byte: the target of a symbolic link, the name of an attribute.
    pub(super) fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(text.count_bytes().saturating_add(1))?;
        Ok(text)
    }

    /// The name of a file in its directory: one component, and neither `.` nor `..`, so that no name leads anywhere else.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        check_name(name.to_bytes())?;
        Ok(name)
    }

    /// All that is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Whether a name is one component that leads down.
pub(super) fn check_name(name: &[u8]) -> Result<(), Errno> {
    match name {
        _ if name.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

/// Splits a request into header and fields.
pub(super) fn parse(bytes: &[u8]) -> Option<(Header, Fields<'_>)> {
    let (head, rest) = bytes.split_at_checked(IN_HEADER)?;
    let mut fields = Fields(head);
    fields.u32().ok()?;
    let header = Header {
        opcode: fields.u32().ok()?,
        unique: fields.u64().ok()?,
        node: fields.u64().ok()?,
        uid: fields.u32().ok()?,
        gid: fields.u32().ok()?,
    };
    Some((header, Fields(rest)))
}

/// An answer in the making, in storage that is used again. Numbers are little-endian, as both sides are here.
#[derive(Debug, Default)]
pub(super) struct Answer {
    bytes: Vec<u8>,
}

impl Answer {
    /// Forgets the last one and leaves room for the header.
    pub(super) fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.resize(OUT_HEADER, 0);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Zeroes up to a multiple of 8 bytes.
    pub(super) fn align(&mut self) {
        let len = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(len, 0);
    }

    /// Bytes after the header.
    pub(super) fn len(&self) -> usize {
        self.bytes.len().saturating_sub(OUT_HEADER)
    }

    /// Completes the header. `beyond` bytes follow that are not in here, such as a file's data.
    pub(super) fn end(&mut self, unique: u64, result: Result<(), Errno>, beyond: usize) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            Err(errno) => {
                self.bytes.truncate(OUT_HEADER);
                errno.raw_os_error().wrapping_neg()
            }
        };
        let len = u32::try_from(self.bytes.len().saturating_add(beyond)).unwrap_or(u32::MAX);
        let mut header = [0; OUT_HEADER];
        let (start, rest) = header.split_at_mut(4);
        start.copy_from_slice(&len.to_le_bytes());
        let (middle, end) = rest.split_at_mut(4);
        middle.copy_from_slice(&error.to_le_bytes());
        end.copy_from_slice(&unique.to_le_bytes());
        if let Some(place) = self.bytes.get_mut(..OUT_HEADER) {
            place.copy_from_slice(&header);
        }
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let name = |bytes: &'static [u8]| Fields::new(bytes).name().map(CStr::to_bytes);
        assert_eq!(name(b"file\0rest"), Ok(&b"file"[..]));
        assert_eq!(name(b"...\0"), Ok(&b"..."[..]));
        for bad in [&b"\0"[..], b".\0", b"..\0", b"../etc\0", b"a/b\0", b"/\0", b"no end"] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        let long: &'static [u8] = &[b'a'; 256];
        assert_eq!(check_name(long), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn an_answer_says_its_length_and_error() {
        let mut answer = Answer::default();
        answer.begin();
        answer.u64(5);
        assert_eq!(
            answer.end(7, Ok(()), 4),
            [&28u32.to_le_bytes()[..], &[0; 4], &7u64.to_le_bytes(), &5u64.to_le_bytes()].concat()
        );
        answer.begin();
        answer.u64(5);
        let error = (-2i32).to_le_bytes();
        assert_eq!(
            answer.end(7, Err(Errno::NOENT), 0),
            [&16u32.to_le_bytes()[..], &error, &7u64.to_le_bytes()].concat()
        );
    }
}
