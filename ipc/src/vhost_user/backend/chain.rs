//! A descriptor chain, walked strictly.
//!
//! Everything here is the guest's. `virtio_queue::DescriptorChain` ends quietly at whatever it cannot follow, which
//! makes a malformed chain look like a short one; a device must be able to tell the two apart, because only the first means
//! that the driver (or an attacker) has broken the ring. Follows virtio 1.2, 2.7.4 to 2.7.6.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::single;

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: u64 = 16;

/// Most descriptors in an indirect table. Drivers should stay within the queue's size, and Linux does not always.
const MAX_INDIRECT: u32 = 1024;

/// A piece of guest memory that a descriptor names. Not checked to be memory: who reads, writes or lends it does that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes, never 0.
    pub len: u32,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChainError {
    /// A descriptor index is not in the table.
    #[error("descriptor {index} is outside its table of {size}")]
    OutsideTable {
        /// The index.
        index: u32,
        /// Entries of the table.
        size: u32,
    },
    /// The table cannot be read.
    #[error("the descriptor table at {0:#x} is not guest memory")]
    TableNotMemory(u64),
    /// More descriptors than the table has.
    #[error("the chain has a loop")]
    Loop,
    /// A descriptor of 0 bytes.
    #[error("a descriptor has length 0")]
    Empty,
    /// The device-readable part must come first.
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// VIRTIO_F_INDIRECT_DESC was not negotiated.
    #[error("an indirect descriptor was used without the feature")]
    IndirectNotNegotiated,
    /// An indirect table names another.
    #[error("an indirect table holds an indirect descriptor")]
    IndirectInIndirect,
    /// INDIRECT and NEXT together.
    #[error("an indirect descriptor has a successor")]
    IndirectWithNext,
    /// Length of an indirect table: zero, not a multiple of 16, or too large.
    #[error("an indirect table has {0} bytes")]
    IndirectLength(u32),
    /// More than 4 GiB.
    #[error("the chain describes more than 4 GiB")]
    TooLong,
}

/// A chain taken from the available ring. Reused from request to request, so that a request allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_bytes: u32,
    writable_bytes: u32,
}

/// Where a walk stands.
struct Table {
    address: u64,
    size: u32,
    indirect: bool,
}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of the first descriptor: the request's name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Where the device writes its answer, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes of [`Self::readable`].
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Bytes of [`Self::writable`].
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Follows the chain that begins at descriptor `head` of the table of `queue_size` entries at `table`.
    ///
    /// # Errors
    /// The chain is malformed; `self` then holds the part that was followed.
    pub fn walk<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        table: u64,
        queue_size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.readable_bytes = 0;
        self.writable_bytes = 0;
        let mut table = Table { address: table, size: u32::from(queue_size), indirect: false };
        let mut index = u32::from(head);
        let mut left = table.size;
        loop {
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                if !indirect {
                    return Err(ChainError::IndirectNotNegotiated);
                }
                table = table.enter(&descriptor)?;
                index = 0;
                left = table.size;
                continue;
            }
            self.push(&descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
    }

    fn push(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let len = descriptor.len();
        if len == 0 {
            return Err(ChainError::Empty);
        }
        self.readable_bytes
            .checked_add(self.writable_bytes)
            .and_then(|sum| sum.checked_add(len))
            .ok_or(ChainError::TooLong)?;
        let segment = Segment { address: descriptor.addr().0, len };
        if descriptor.is_write_only() {
            self.writable_bytes = self.writable_bytes.saturating_add(len);
            self.writable.push(segment);
        } else if self.writable.is_empty() {
            self.readable_bytes = self.readable_bytes.saturating_add(len);
            self.readable.push(segment);
        } else {
            return Err(ChainError::ReadableAfterWritable);
        }
        Ok(())
    }
}

impl Table {
    fn read<M: GuestMemoryBackend>(&self, memory: &M, index: u32) -> Result<Descriptor, ChainError> {
        if index >= self.size {
            return Err(ChainError::OutsideTable { index, size: self.size });
        }
        let not_memory = ChainError::TableNotMemory(self.address);
        let offset = u64::from(index).saturating_mul(DESCRIPTOR_SIZE);
        let address = self.address.checked_add(offset).ok_or(not_memory)?;
        let at_once =
            single(memory, address, size_of::<Descriptor>()).and_then(|slice| slice.read_obj(0).ok());
        match at_once {
            Some(descriptor) => Ok(descriptor),
            None => memory.read_obj(GuestAddress(address)).map_err(|_| not_memory),
        }
    }

    /// The table that an indirect descriptor names.
    fn enter(&self, descriptor: &Descriptor) -> Result<Table, ChainError> {
        if self.indirect {
            return Err(ChainError::IndirectInIndirect);
        }
        if descriptor.has_next() {
            return Err(ChainError::IndirectWithNext);
        }
        let len = descriptor.len();
        let size = len >> 4;
        if size == 0 || size > MAX_INDIRECT || !len.is_multiple_of(16) {
            return Err(ChainError::IndirectLength(len));
        }
        Ok(Table { address: descriptor.addr().0, size, indirect: true })
    }
}

#[cfg(test)]
mod tests;
