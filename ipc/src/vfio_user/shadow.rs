//! The shadow page: registers that the client may read without asking.
//!
//! A guest that prints reads the line status register before every character. Each such read would be a round trip
//! between two processes. Instead the device publishes, in one page that the client maps read-only (a region with
//! VFIO_REGION_INFO_FLAG_MMAP), what it *would* answer, and how long that stays true:
//!
//! - `settled`: how many REGION_WRITE messages of this connection the device has carried out when it says so;
//! - `registers` and `valid`: the values of up to three registers, each valid only while a read of it has **no side
//!   effect** (an LSR with error bits, say, is not valid: reading it clears them);
//! - `credit`: the promise that so many further *stream writes* (writes to the one data register that both sides agree
//!   on) after `settled` leave every valid register as it is.
//!
//! The client knows how many writes it has posted and whether all those that are not settled are stream writes. If they
//! are, and there are no more of them than the credit, then the published value is what a round trip would bring: the
//! answer is exact, not a guess. In every other case it asks. All of this is one 64-bit word, so it is never torn.
//!
//! Safe against a hostile device: the page is a memfd sealed against shrinking (checked), mapped read-only, read by one
//! atomic load; the value is trusted as much as a reply, that is, not at all. A device that hangs is still found: its
//! credit is finite, and so is the socket's buffer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};

use super::error::Fault;
use super::mapping::Mapping;

/// Size of the page, and of the region that it is, in bytes.
pub const SHADOW_SIZE: usize = 4096;

/// Number of registers that a page can hold.
pub const SHADOW_REGISTERS: usize = 3;

/// What the page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShadowState {
    /// Writes that have taken effect, modulo 2^16.
    pub settled: u16,
    /// Stream writes beyond those that leave the valid registers as they are.
    pub credit: u16,
    /// The registers' values.
    pub registers: [u8; SHADOW_REGISTERS],
    /// Bit *n*: a read of register *n* has no side effect and brings `registers[n]`.
    pub valid: u8,
}

impl ShadowState {
    /// As the word in the page.
    pub fn pack(self) -> u64 {
        let [a, b] = self.settled.to_le_bytes();
        let [c, d] = self.credit.to_le_bytes();
        let [x, y, z] = self.registers;
        u64::from_le_bytes([a, b, c, d, x, y, z, self.valid])
    }

    /// From the word in the page; every word is a state.
    pub fn unpack(word: u64) -> Self {
        let [a, b, c, d, x, y, z, valid] = word.to_le_bytes();
        Self {
            settled: u16::from_le_bytes([a, b]),
            credit: u16::from_le_bytes([c, d]),
            registers: [x, y, z],
            valid,
        }
    }

    /// The value of a register, if it is what a round trip would bring after `posted` writes in all, of which the last
    /// `streamed` were stream writes.
    pub fn answer(self, register: usize, posted: u16, streamed: u32) -> Option<u8> {
        let outstanding = posted.wrapping_sub(self.settled);
        let valid = self.valid.checked_shr(u32::try_from(register).ok()?)? & 1 != 0;
        let promised = outstanding <= self.credit && u32::from(outstanding) <= streamed;
        if valid && promised { self.registers.get(register).copied() } else { None }
    }
}

/// The device's side of the page.
#[derive(Debug)]
pub struct ShadowPage {
    file: OwnedFd,
    memory: Mapping,
}

impl ShadowPage {
    /// Makes a page in which no register is valid. Call it before the process is sealed.
    ///
    /// # Errors
    /// The host refuses memory.
    pub fn create() -> Result<Self, Fault> {
        let call = |call| move |error| Fault::Socket { call, error };
        // Beyond this limit ftruncate would end the process with SIGXFSZ.
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE).map_err(call("getrlimit"))?;
        if limit < SHADOW_SIZE as u64 {
            return Err(Fault::Descriptor("RLIMIT_FSIZE forbids a page of shared memory"));
        }
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"shadow", flags).map_err(call("memfd_create"))?;
        nix::unistd::ftruncate(&file, 4096).map_err(call("ftruncate"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(call("fcntl"))?;
        let memory = Mapping::new(file.as_fd(), true)?;
        Ok(Self { file, memory })
    }

    /// Publishes a state. Everything that the device did before is visible to a client that sees it.
    pub fn publish(&self, state: ShadowState) {
        self.memory.word().store(state.pack(), Ordering::Release);
    }

    /// Publishes the number of the last character that will not be lost with the device, nor any before it: they have been passed
    /// on, or dropped for want of a reader.
    pub fn publish_delivered(&self, characters: u64) {
        self.memory.second_word().store(characters, Ordering::Release);
    }
}

impl AsFd for ShadowPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The client's side: the device's page, mapped read-only.
#[derive(Debug)]
pub struct ShadowView {
    memory: Mapping,
}

impl ShadowView {
    /// Maps a page that came from the device.
    ///
    /// # Errors
    /// Not a memfd of at least [`SHADOW_SIZE`] bytes that is sealed against shrinking.
    pub(super) fn map(file: OwnedFd) -> Result<Self, Fault> {
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| Fault::Descriptor("not a memfd"))?;
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(Fault::Descriptor("not sealed against shrinking"));
        }
        let status = nix::sys::stat::fstat(&file).map_err(|error| Fault::Socket { call: "fstat", error })?;
        if status.st_size < 4096 {
            return Err(Fault::Descriptor("smaller than its region"));
        }
        Ok(Self { memory: Mapping::new(file.as_fd(), false)? })
    }

    /// What the page says now.
    pub fn load(&self) -> ShadowState {
        ShadowState::unpack(self.memory.word().load(Ordering::Acquire))
    }

    /// Number of the last character that the device says it has delivered.
    pub fn delivered(&self) -> u64 {
        self.memory.second_word().load(Ordering::Acquire)
    }
}
