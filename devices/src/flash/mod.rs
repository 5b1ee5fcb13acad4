//! A flash chip that keeps firmware's variables, in a process of its own: commands from the core over vfio-user, contents in
//! a file.
//!
//! | file | what |
//! | --- | --- |
//! | `cfi` | the chip's command set, without files |
//! | `device` | the chip behind the register protocol, over its file and the memory that the guest reads |
//!
//! While the chip shows its array, the guest reads the memory that this process shares with the core, without an exit. Every
//! change goes to the file first: a process that is killed leaves a file in which each byte is as before or as after.

mod cfi;
mod device;

use bulkhead_ipc::memory::MemoryError;

pub use cfi::{BLOCK, Chip, Store};
pub use device::{FlashDevice, MODE_ARRAY, MODE_BUSY, MODE_READY, REGION_BYTES, REGION_MODE};

/// Why a flash chip cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FlashError {
    /// The memory that the guest reads.
    #[error("the memory that shows the contents: {0}")]
    Memory(#[from] MemoryError),
    /// The file.
    #[error("the file with the contents: {0}")]
    File(#[from] std::io::Error),
    /// A size that such a chip cannot have.
    #[error("a flash chip consists of blocks of {BLOCK} bytes; {0} bytes is no such size")]
    Size(u64),
}
