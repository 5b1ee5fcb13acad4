//! Memory that outlives the process: packets on their way through it, and how far they came.
//!
//! A process can be killed before and after each of its instructions, but not within a system call that does not wait. So what a
//! socket gave or took is noted by the kernel, in the same call: the structure into which `recvmmsg` and `sendmmsg` write
//! the number of bytes lies in this memory. Everything else is one store of one word.
//!
//! Contains unsafe code: a shared mapping, `recvmmsg` and `sendmmsg` with structures in it, and `Send` for what owns it.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::libc::{self, c_void};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Bytes before those that are kept: a page.
pub const HEAD: usize = 4096;
/// Where the words lie that the owner makes use of, and one that says for which way out they were written.
const WORD: usize = 0;
const WAY: usize = 8;
/// Where the bytes begin that a call is about.
const FROM: usize = 16;
/// `struct mmsghdr`, and its only `struct iovec`.
const MESSAGE: usize = 64;
const VECTOR: usize = 128;
/// No call, or one that moved nothing: no number of bytes.
const NOTHING: u32 = u32::MAX;

/// The memory: a page with words, then bytes.
#[derive(Debug)]
pub struct Kept {
    memory: NonNull<u8>,
    length: NonZeroUsize,
}

// SAFETY: the mapping is this value's alone and bound to no thread.
unsafe impl Send for Kept {}

impl Kept {
    /// Maps a page and `bytes` bytes of `file` from `offset` on; without a file they end with the process.
    ///
    /// A successor maps them while its predecessor still serves. The caller neither reads nor changes the bytes before that one has
    /// ended: the kernel and another process would change them under a slice.
    ///
    /// # Errors
    /// The file is too small, or the kernel refuses.
    pub fn new(file: Option<&File>, offset: u64, bytes: usize) -> io::Result<Self> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the file for a successor is too small");
        let length = bytes.checked_add(HEAD).and_then(NonZeroUsize::new).ok_or_else(invalid)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = match file {
            Some(file) => {
                if offset.saturating_add(length.get() as u64) > file.metadata()?.len() {
                    return Err(invalid());
                }
                let offset = i64::try_from(offset).map_err(|_| invalid())?;
                // SAFETY: a new mapping takes nothing that is in use.
                unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, offset) }?
            }
            // SAFETY: as above.
            None => unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }?,
        };
        Ok(Self { memory: memory.cast(), length })
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        // SAFETY: the offsets are constants below HEAD, aligned as the page is, and apart from all that is lent as slices.
        unsafe { AtomicU64::from_ptr(self.memory.add(at).cast().as_ptr()) }
    }

    /// Number of bytes that the kernel noted.
    fn noted(&self) -> &AtomicU32 {
        let at = MESSAGE + std::mem::offset_of!(libc::mmsghdr, msg_len);
        // SAFETY: as above; the field is a 32-bit word.
        unsafe { AtomicU32::from_ptr(self.memory.add(at).cast().as_ptr()) }
    }

    /// The owner's word. A store of it comes after all stores before, and before all after.
    pub fn word(&self) -> u64 {
        self.long(WORD).load(Ordering::Acquire)
    }

    /// Stores the owner's word.
    pub fn set_word(&self, word: u64) {
        self.long(WORD).store(word, Ordering::SeqCst);
    }

    /// The way out for which all this was written; 0: none.
    pub fn way(&self) -> u64 {
        self.long(WAY).load(Ordering::Acquire)
    }

    /// Stores the way out, or another second word where nothing is asked about ways out. A store of it comes after all stores before.
    pub fn set_way(&self, way: u64) {
        self.long(WAY).store(way, Ordering::SeqCst);
    }

    /// Forgets everything and begins with another way out.
    pub fn begin(&self, way: u64) {
        self.long(WAY).store(0, Ordering::SeqCst);
        self.set_word(0);
        self.settle();
        self.long(WAY).store(way, Ordering::SeqCst);
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is longer than HEAD and lives as long as `self`; the bytes are changed through `&mut self` alone, by
        // this process or by the kernel at its order. A successor that maps them too touches none before this process is reaped,
        // which is its callers' duty (`new`).
        unsafe { std::slice::from_raw_parts(self.memory.add(HEAD).as_ptr(), self.length.get() - HEAD) }
    }

    /// The bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` lends them once.
        unsafe { std::slice::from_raw_parts_mut(self.memory.add(HEAD).as_ptr(), self.length.get() - HEAD) }
    }

    /// Writes the structures for a call about `length` bytes from `from` on; where they lie.
    fn prepare(&mut self, from: usize, length: usize) -> Option<*mut libc::mmsghdr> {
        let place = self.bytes_mut().get_mut(from..from.checked_add(length)?)?.as_mut_ptr();
        self.settle();
        self.long(FROM).store(from as u64, Ordering::SeqCst);
        let vector = libc::iovec { iov_base: place.cast(), iov_len: length };
        // SAFETY: all-zero bytes are a message without address, data and control.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_len = NOTHING;
        // SAFETY: both offsets are constants below HEAD, aligned to 64 bytes and 64 apart, which is what the structures need; slices of
        // the bytes never reach there, and the atomics that do are not borrowed here.
        unsafe {
            let at = self.memory.add(VECTOR).cast::<libc::iovec>().as_ptr();
            at.write(vector);
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (at, 1);
            let at = self.memory.add(MESSAGE).cast::<libc::mmsghdr>().as_ptr();
            at.write(message);
            Some(at)
        }
    }

    /// Receives at most `length` bytes to `from`. What came is noted until [`Self::settle`].
    ///
    /// # Errors
    /// `recvmmsg`'s.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, from: usize, length: usize) -> nix::Result<usize> {
        let message = self.prepare(from, length).ok_or(Errno::EFAULT)?;
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: `message` is one live structure whose vector names bytes of this mapping, which `&mut self` keeps from everybody else.
        let count = unsafe { libc::recvmmsg(socket.as_raw_fd(), message, 1, flags, std::ptr::null_mut()) };
        Errno::result(count)?;
        self.moved(length)
    }

    /// Sends `length` bytes from `from` on. What went is noted until [`Self::settle`].
    ///
    /// # Errors
    /// `sendmmsg`'s.
    pub fn send(&mut self, socket: BorrowedFd<'_>, from: usize, length: usize) -> nix::Result<usize> {
        let message = self.prepare(from, length).ok_or(Errno::EFAULT)?;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as above.
        let count = unsafe { libc::sendmmsg(socket.as_raw_fd(), message, 1, flags) };
        Errno::result(count)?;
        self.moved(length)
    }

    fn moved(&self, most: usize) -> nix::Result<usize> {
        let count = usize::try_from(self.noted().load(Ordering::SeqCst)).unwrap_or(usize::MAX);
        if count > most { Err(Errno::EAGAIN) } else { Ok(count) }
    }

    /// What the last call moved is known to the owner's word.
    pub fn settle(&self) {
        self.noted().store(NOTHING, Ordering::SeqCst);
    }

    /// Where a call's bytes begin of which the owner's word may not know, and how many it moved.
    pub fn unsettled(&self) -> Option<(usize, usize)> {
        let count = self.noted().load(Ordering::SeqCst);
        let from = self.long(FROM).load(Ordering::SeqCst);
        if count == NOTHING {
            return None;
        }
        Some((usize::try_from(from).ok()?, usize::try_from(count).ok()?))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and whatever it lent ended with the borrow. It cannot fail with what was mapped.
        let _ = unsafe { munmap(self.memory.cast::<c_void>(), self.length.get()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_successor_finds_what_a_call_moved() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * HEAD as u64).unwrap();
        let open = || Kept::new(Some(&file), HEAD as u64, HEAD).unwrap();
        assert!(Kept::new(Some(&file), HEAD as u64, HEAD + 1).is_err());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut first = open();
        first.begin(7);
        assert_eq!(first.unsettled(), None);
        assert_eq!(first.receive(ours.as_fd(), 0, 100), Err(Errno::EAGAIN));
        assert_eq!(open().unsettled(), None, "nothing came");
        nix::unistd::write(&theirs, b"some bytes").unwrap();
        assert_eq!(first.receive(ours.as_fd(), 30, 100), Ok(10));
        let second = open();
        assert_eq!((second.way(), second.unsettled()), (7, Some((30, 10))));
        assert_eq!(second.bytes()[30..40], *b"some bytes");
        first.set_word(40);
        first.settle();
        assert_eq!((second.word(), second.unsettled()), (40, None));
        assert_eq!(first.send(ours.as_fd(), 35, 5), Ok(5));
        assert_eq!(second.unsettled(), Some((35, 5)));
        assert_eq!(first.send(ours.as_fd(), HEAD, 1), Err(Errno::EFAULT), "behind the end");
        assert_eq!(nix::unistd::read(theirs.as_fd(), &mut [0; 10]), Ok(5));
        drop(theirs);
        assert_eq!(first.receive(ours.as_fd(), 0, 100), Ok(0), "the end of the stream is noted, too");
    }
}
