//! Memory of words that several processes share: loaded and stored atomically, and nothing else.
//!
//! Contains unsafe code: mapping memory, and reading and writing it through references. A mapping keeps no descriptor.

use std::ffi::{CStr, c_void};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The memory could not be made or mapped.
#[derive(Debug, thiserror::Error)]
#[error("shared memory: {call}: {errno}")]
pub struct WordsError {
    call: &'static str,
    errno: Errno,
}

fn failed(call: &'static str) -> impl Fn(Errno) -> WordsError {
    move |errno| WordsError { call, errno }
}

/// A mapping of the words.
#[derive(Debug)]
pub struct Words {
    address: NonNull<c_void>,
    count: usize,
    size: NonZeroUsize,
    writable: bool,
}

// SAFETY: the mapping belongs to the process and not to a thread, and nothing but atomics is reached through it.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

/// Makes memory of so many words, all zero, of a size that nobody can change.
///
/// # Errors
/// The host refuses memory or a descriptor.
pub fn create(name: &CStr, count: usize) -> Result<OwnedFd, WordsError> {
    sealed(name, bytes(count)?.get() as u64).map_err(failed("memfd_create"))
}

/// Makes memory of so many bytes, all zero, of a size that nobody can change: whoever maps it is safe.
///
/// # Errors
/// The host refuses memory or a descriptor.
pub fn sealed(name: &CStr, bytes: u64) -> Result<OwnedFd, Errno> {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&file, i64::try_from(bytes).map_err(|_| Errno::EFBIG)?)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn bytes(count: usize) -> Result<NonZeroUsize, WordsError> {
    let size = count.checked_mul(size_of::<u64>()).and_then(NonZeroUsize::new);
    size.ok_or(WordsError { call: "mmap", errno: Errno::EINVAL })
}

impl Words {
    /// Maps the first `count` words of what [`create`] has made so large; a shorter file would end the process that touches what
    /// is missing, so a device process trusts its supervisor, which makes it, and nobody else is asked.
    ///
    /// # Errors
    /// The descriptor is not open for this, or there is no room.
    pub fn map(file: BorrowedFd<'_>, count: usize, writable: bool) -> Result<Self, WordsError> {
        let size = bytes(count)?;
        let write = if writable { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let address =
            unsafe { mmap(None, size, ProtFlags::PROT_READ | write, MapFlags::MAP_SHARED, file.as_fd(), 0) }
                .map_err(failed("mmap"))?;
        Ok(Self { address, count, size, writable })
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.count {
            return None;
        }
        // SAFETY: the index is within the mapping, which is page-aligned and lives until `self` is dropped; every process that maps
        // it reaches the word by atomic operations or, if hostile, by writes that an atomic load tolerates: any value is valid.
        Some(unsafe { AtomicU64::from_ptr(self.address.as_ptr().cast::<u64>().add(index)) })
    }

    /// The word; zero where there is none. What its writer stored before it is seen, too.
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Stores the word. Nothing happens to a mapping that is for reading.
    pub fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.word(index).filter(|_| self.writable) {
            word.store(value, Ordering::Release);
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: `self` owns the mapping and no reference into it outlives it.
        let _ = unsafe { munmap(self.address, self.size.get()) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn nobody_changes_the_size_of_sealed_memory_or_its_seals() {
        let memory = File::from(sealed(c"test", 10).unwrap());
        for size in [9, 11] {
            assert_eq!(memory.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM), "{size}");
        }
        let sealed_again = fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE));
        assert_eq!((sealed_again, memory.metadata().unwrap().len()), (Err(Errno::EPERM), 10));
        assert_eq!(sealed(c"test", u64::MAX).unwrap_err(), Errno::EFBIG);
    }
}
