//! Files that guests see as persistent memory: opened, locked, and given their places above guest RAM.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use bulkhead_ipc::memory::{HOLE_END, HUGE_PAGE_SIZE, layout};

use super::disk::lock_file;
use super::{ResourceError, kind, open, open_error};
use crate::supervisor::config::PmemConfig;
use crate::supervisor::processor::Leaves;

/// CPUID: the width of physical addresses in the lowest 8 bits of EAX.
const ADDRESS_WIDTHS: u32 = 0x8000_0008;
/// What KVM offers at least.
const LEAST_ADDRESS_BITS: u32 = 36;

/// A file that the guest sees as memory.
#[derive(Debug)]
pub struct Pmem {
    /// As it was asked for.
    pub config: PmemConfig,
    /// The file, for the core. Its lock holds as long as this is open anywhere.
    pub file: File,
    /// The same open for reading, for the process that flushes it.
    pub for_device: File,
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Bytes, a multiple of 2 MiB.
    pub size: u64,
}

/// The end of guest RAM and of what lies above it, a multiple of 2 MiB.
fn end(memory: u64, before: &[Pmem]) -> u64 {
    let ram = layout(memory).unwrap_or_default();
    let ends = ram.iter().map(|region| region.guest_address.saturating_add(region.size));
    let ends = ends.chain(before.iter().map(|pmem| pmem.address.saturating_add(pmem.size)));
    ends.max().unwrap_or(0).max(HOLE_END).next_multiple_of(HUGE_PAGE_SIZE)
}

/// Opens all of a machine with so much memory.
pub fn open_all(configs: &[PmemConfig], memory: u64, leaves: &Leaves) -> Result<Vec<Pmem>, ResourceError> {
    if configs.is_empty() {
        return Ok(Vec::new());
    }
    let widths = leaves.get()?.iter().find(|leaf| leaf.leaf == ADDRESS_WIDTHS);
    let bits = widths.map_or(LEAST_ADDRESS_BITS, |leaf| leaf.registers.first().map_or(0, |eax| eax & 0xFF));
    let limit = 1_u64.checked_shl(bits).unwrap_or(u64::MAX);
    let mut opened = Vec::with_capacity(configs.len());
    for config in configs {
        let pmem = Pmem::open(config, end(memory, &opened))?;
        if pmem.address.checked_add(pmem.size).is_none_or(|end| end > limit) {
            return Err(ResourceError::PmemRoom { id: config.id.clone(), size: pmem.size, bits });
        }
        opened.push(pmem);
    }
    Ok(opened)
}

impl Pmem {
    /// Opens the file for the guest to see at `address`.
    fn open(config: &PmemConfig, address: u64) -> Result<Self, ResourceError> {
        let PmemConfig { path, readonly, id, .. } = config.clone();
        let field = format!("pmem {id}");
        let failed = |error: io::Error| open_error(&field, &path, &error);
        let file = open(OpenOptions::new().read(true).write(!readonly), &path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let (is, wanted) = (kind(&metadata), "a regular file");
            return Err(ResourceError::Kind { field, path, is, wanted });
        }
        let size = metadata.len();
        if size == 0 || !size.is_multiple_of(HUGE_PAGE_SIZE) {
            let wanted = size.max(1).next_multiple_of(HUGE_PAGE_SIZE);
            return Err(ResourceError::PmemSize { id, path, size, wanted });
        }
        lock_file(&id, &path, &file, readonly)?;
        // The same file, whatever the path leads to now.
        let for_device = File::open(PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
        let for_device = for_device.map_err(|error| open_error(&field, &path, &error))?;
        Ok(Self { config: config.clone(), file, for_device, address, size })
    }
}
