//! The device models of Bulkhead: one module for each type; `bulkhead-device` runs one of them in its own process.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod flash;
pub mod footprint;
pub mod fs;
mod idle;
mod kept;
pub mod keyboard;
pub mod net;
pub mod pmem;
pub mod rate_limit;
pub mod registers;
pub mod relay;
pub mod rng;
pub mod segments;
pub mod serve;
pub mod standalone;
pub mod stream;
pub mod uart;
pub mod vsock;
pub mod watchdog;

/// Copies configuration space from `offset` on; what lies beyond its end reads as zero.
pub(crate) fn copy_config(space: &[u8], offset: u32, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
