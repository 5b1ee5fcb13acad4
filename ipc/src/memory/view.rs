//! A range of guest memory with a direction: typed, checked access that marks what it writes.

use std::mem::size_of;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, ByteValued, Bytes, GuestAddress};

use super::{Direction, GuestRam, LentBuffer, MemoryError};

/// A range of guest memory that may be read, written, or both. Offsets count from the start of the range.
///
/// Every access is volatile: the guest may change the memory at any time, and two reads of a field may differ. Read a
/// structure once, then check and use the copy.
#[derive(Clone, Debug)]
pub struct View {
    ram: GuestRam,
    address: u64,
    len: u64,
    direction: Direction,
}

impl View {
    pub(super) fn new(
        ram: GuestRam,
        address: u64,
        len: u64,
        direction: Direction,
    ) -> Result<Self, MemoryError> {
        if !ram.contains(address, len) {
            return Err(MemoryError::OutOfRange { address, len });
        }
        Ok(Self { ram, address, len, direction })
    }

    /// Guest-physical address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the view has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What may be done with the range.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// A view of `len` bytes at `offset` of this one, with the same direction.
    ///
    /// # Errors
    /// The range leaves this view.
    pub fn part(&self, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let address = self.check_bounds(offset, len)?;
        Ok(Self { ram: self.ram.clone(), address, len, direction: self.direction })
    }

    /// Reads a value at `offset`, which need not be aligned.
    ///
    /// # Errors
    /// The view is not for reading, or the value leaves it.
    pub fn read<T: ByteValued>(&self, offset: u64) -> Result<T, MemoryError> {
        let address = self.check(offset, size_of::<T>(), Direction::Read)?;
        self.ram.memory().read_obj(GuestAddress(address)).map_err(|_| self.lost(offset, size_of::<T>()))
    }

    /// Writes a value at `offset`, which need not be aligned, and marks its pages.
    ///
    /// # Errors
    /// The view is not for writing, or the value leaves it.
    pub fn write<T: ByteValued>(&self, offset: u64, value: T) -> Result<(), MemoryError> {
        let address = self.check(offset, size_of::<T>(), Direction::Write)?;
        self.ram
            .memory()
            .write_obj(value, GuestAddress(address))
            .map_err(|_| self.lost(offset, size_of::<T>()))
    }

    /// Loads an aligned integer in one access.
    ///
    /// # Errors
    /// As [`View::read`], or the address is not a multiple of the integer's size.
    pub fn load<T: AtomicAccess>(&self, offset: u64, order: Ordering) -> Result<T, MemoryError> {
        let address = self.check_aligned::<T>(offset, Direction::Read)?;
        self.ram.memory().load(GuestAddress(address), order).map_err(|_| self.lost(offset, size_of::<T>()))
    }

    /// Stores an aligned integer in one access and marks its page.
    ///
    /// # Errors
    /// As [`View::write`], or the address is not a multiple of the integer's size.
    pub fn store<T: AtomicAccess>(&self, offset: u64, value: T, order: Ordering) -> Result<(), MemoryError> {
        let address = self.check_aligned::<T>(offset, Direction::Write)?;
        self.ram
            .memory()
            .store(value, GuestAddress(address), order)
            .map_err(|_| self.lost(offset, size_of::<T>()))
    }

    /// Copies bytes from `offset` on out of guest memory.
    ///
    /// # Errors
    /// The view is not for reading, or the bytes leave it.
    pub fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let len = bytes.len();
        let address = self.check(offset, len, Direction::Read)?;
        self.ram.memory().read_slice(bytes, GuestAddress(address)).map_err(|_| self.lost(offset, len))
    }

    /// Copies bytes into guest memory from `offset` on and marks their pages.
    ///
    /// # Errors
    /// The view is not for writing, or the bytes leave it.
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let address = self.check(offset, bytes.len(), Direction::Write)?;
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| self.lost(offset, bytes.len()))
    }

    /// Writes `len` bytes of zero from `offset` on and marks their pages.
    ///
    /// # Errors
    /// The view is not for writing, or the range leaves it.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        static ZEROES: [u8; 4096] = [0; 4096];
        let (mut address, mut left) = (self.check_range(offset, len, Direction::Write)?, len);
        while left > 0 {
            let chunk = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            let bytes = ZEROES.get(..chunk).unwrap_or(&ZEROES);
            self.ram
                .memory()
                .write_slice(bytes, GuestAddress(address))
                .map_err(|_| self.lost(offset, bytes.len()))?;
            address = address.saturating_add(chunk as u64);
            left = left.saturating_sub(chunk as u64);
        }
        Ok(())
    }

    /// Lends `len` bytes at `offset` to the kernel, in the view's direction or a part of it.
    ///
    /// # Errors
    /// The range leaves the view, or the direction is not the view's.
    pub fn lend(&self, offset: u64, len: u64, direction: Direction) -> Result<LentBuffer, MemoryError> {
        let address = self.check_range(offset, len, direction)?;
        LentBuffer::new(&self.ram, address, len, direction)
    }

    /// Reads `len` bytes at `file_offset` of a file straight into guest memory at `offset`, and marks them.
    ///
    /// # Errors
    /// The view is not for writing, the range leaves it, reading fails, or the file ends early. What was
    /// read before an error stays, and is marked.
    pub fn copy_from_file(
        &self,
        offset: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let (mut done, mut left) = (0u64, len);
        self.check_range(offset, len, Direction::Write)?;
        while left > 0 {
            let buffer = self.lend(offset.saturating_add(done), left, Direction::Write)?;
            match buffer.read_at(file, file_offset.saturating_add(done)) {
                Ok(0) => return Err(MemoryError::EndOfFile { missing: left }),
                Ok(count) => {
                    done = done.saturating_add(count as u64);
                    left = left.saturating_sub(count as u64);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(MemoryError::Io(error)),
            }
        }
        Ok(())
    }

    fn check_bounds(&self, offset: u64, len: u64) -> Result<u64, MemoryError> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        match self.address.checked_add(offset) {
            Some(address) if fits => Ok(address),
            _ => Err(MemoryError::OutOfView { offset, len, view_len: self.len }),
        }
    }

    fn check_range(&self, offset: u64, len: u64, wanted: Direction) -> Result<u64, MemoryError> {
        if (wanted.reads() && !self.direction.reads()) || (wanted.writes() && !self.direction.writes()) {
            return Err(MemoryError::WrongDirection { bound: self.direction, wanted });
        }
        self.check_bounds(offset, len)
    }

    fn check(&self, offset: u64, len: usize, wanted: Direction) -> Result<u64, MemoryError> {
        self.check_range(offset, len as u64, wanted)
    }

    fn check_aligned<T>(&self, offset: u64, wanted: Direction) -> Result<u64, MemoryError> {
        let size = size_of::<T>();
        let address = self.check(offset, size, wanted)?;
        // Regions begin and end on pages, so that an aligned integer never lies in two of them.
        if !address.is_multiple_of(size as u64) {
            return Err(MemoryError::UnalignedAccess { address, size });
        }
        Ok(address)
    }

    /// Never seen while the regions of a view are immutable, but no reason to panic.
    fn lost(&self, offset: u64, len: usize) -> MemoryError {
        MemoryError::OutOfRange { address: self.address.saturating_add(offset), len: len as u64 }
    }
}
