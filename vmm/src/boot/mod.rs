//! Direct kernel boot: a kernel, an initrd and a command line go into guest RAM, and what comes out is the state of the
//! first vCPU.
//!
//! Three kinds of kernels: a bzImage by its 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), a 64-bit
//! ELF file by its PVH note (xen/docs/misc/pvh.pandoc), and a 32-bit one by its multiboot header. The bytes of all are taken as
//! hostile. Firmware is no kernel: it goes into a ROM.
//!
//! Images are read from their files straight into guest RAM, which has to be fresh (or after
//! [`GuestRam::clear`]): what has to be zero is not written, neither the part of an ELF segment that is not in the
//! file nor holes of the file.
//!
//! | guest address | what |
//! | --- | --- |
//! | 500 | GDT |
//! | 6000 | PVH start info or multiboot information, module list and memory map |
//! | 7000 | `boot_params`, the "zero page" |
//! | 9000–EFFF | page tables |
//! | 20000 | command line |
//! | 9FC00–9FFFF | extended BIOS data area, reserved |
//! | E0000–FFFFF | reserved; ACPI tables and SMBIOS, written by the core; long ACPI tables begin at C0000, reserved then |
//! | 100000… | kernel, and the initrd as high as it may be below the hole |

mod bzimage;
mod elf;
mod entry;
mod error;
mod firmware;
mod image;
mod initrd;
mod map;
mod multiboot;
mod paging;
mod protected;
mod pvh;

#[cfg(test)]
mod tests;

use std::fs::File;

use bulkhead_ipc::memory::{Direction, GuestRam};

pub use entry::{ControlRegisters, Entry, Gdt, Mode, Segment, Unpacking};
pub use error::BootError;
pub use firmware::load_firmware;
pub use map::{BIOS_START, MapEntry, MapKind, memory_map};

use image::{Image, Kind};

/// Where the command line goes.
const COMMAND_LINE: u64 = 0x2_0000;

/// Bytes between the command line and the extended BIOS data area.
const COMMAND_LINE_SPACE: u64 = map::EBDA_START - COMMAND_LINE;

/// Where kernels begin: nothing of a kernel may lie below.
const KERNEL_START: u64 = 0x10_0000;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// A bzImage, or an ELF file with a PVH note or a multiboot header. Its file offset may be anywhere, and is moved.
    pub kernel: &'a File,
    /// An initial RAM disk.
    pub initrd: Option<&'a File>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Guest address of the ACPI RSDP.
    pub rsdp: Option<u64>,
    /// What else is not RAM for the guest, as (guest address, bytes), beside the ranges in the table above.
    pub reserved: &'a [(u64, u64)],
}

/// Loads what `source` names into `ram`, and answers how the first vCPU begins.
///
/// # Errors
/// Each way in which a kernel, an initrd or a command line can be unfit has its variant of [`BootError`].
pub fn load_kernel(ram: &GuestRam, source: &BootSource<'_>) -> Result<Entry, BootError> {
    if !ram.contains(0, KERNEL_START) {
        return Err(BootError::RamTooSmall { ram: ram.size(), needed: KERNEL_START });
    }
    let kernel = Image::new(source.kernel, "kernel")?;
    match kernel.kind()? {
        Kind::BzImage => bzimage::boot(ram, &kernel, source),
        Kind::Elf if multiboot::recognise(&kernel)? => {
            protected::boot(ram, &kernel, source, &multiboot::PROTOCOL)
        }
        Kind::Elf => protected::boot(ram, &kernel, source, &pvh::PROTOCOL),
    }
}

/// End of the RAM that begins at 0: kernel and initrd lie below it.
fn low_ram_end(ram: &GuestRam) -> u64 {
    let mut end = 0;
    for region in ram.regions() {
        if region.guest_address != end {
            break;
        }
        end = region.guest_address.saturating_add(region.size);
    }
    end
}

/// Writes the command line; `limit` is its longest length without the NUL. Answers its address.
fn write_command_line(ram: &GuestRam, command_line: &str, limit: u64) -> Result<u64, BootError> {
    let bytes = command_line.as_bytes();
    let length = bytes.len() as u64;
    let limit = limit.min(COMMAND_LINE_SPACE.saturating_sub(1));
    if length > limit {
        return Err(BootError::CommandLineTooLong { length, limit });
    }
    if let Some(position) = bytes.iter().position(|&byte| byte == 0) {
        return Err(BootError::CommandLineHasNul { position });
    }
    let view = ram.view(COMMAND_LINE, length.saturating_add(1), Direction::Write)?;
    view.write_bytes(0, bytes)?;
    view.write(length, 0u8)?;
    Ok(COMMAND_LINE)
}
