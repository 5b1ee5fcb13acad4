//! PVH: the start info that a kernel finds at EBX (xen/include/public/arch-x86/hvm/start_info.h), and the entry state.

use bulkhead_ipc::memory::{Direction, GuestRam};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::entry::{Entry, Mode, Segment};
use super::image::Image;
use super::initrd::{self, Initrd};
use super::map::memory_map;
use super::{BootError, BootSource, elf, low_ram_end, write_command_line};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6080;
/// `boot_params` lies here when there is one.
const END: u64 = 0x7000;

/// PVH names no limit; this is Linux's COMMAND_LINE_SIZE without the NUL, beyond which it would cut silently.
const COMMAND_LINE_LIMIT: u64 = 2047;

/// Loads an ELF file with its start info.
pub(super) fn boot(ram: &GuestRam, image: &Image<'_>, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let ram_end = low_ram_end(ram);
    let command_line = write_command_line(ram, source.command_line, COMMAND_LINE_LIMIT)?;
    let kernel = elf::load(ram, image, ram_end)?;
    let initrd = initrd::load(ram, source, kernel.end, ram_end)?;
    write_start_info(ram, source, command_line, initrd)?;
    Ok(Entry {
        rip: kernel.entry,
        rsi: 0,
        rbx: START_INFO,
        rax: 0,
        rflags: Entry::RFLAGS,
        mode: Mode::Protected32,
        code: Segment::CODE_32,
        data: Segment::DATA,
        task: Segment::TASK,
    })
}

fn write_start_info(
    ram: &GuestRam,
    source: &BootSource<'_>,
    command_line: u64,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    let map = memory_map(ram, source.reserved);
    let entries: Vec<u8> = map
        .iter()
        .flat_map(|entry| {
            let entry = hvm_memmap_table_entry {
                addr: entry.address,
                size: entry.size,
                type_: entry.kind as u32,
                reserved: 0,
            };
            entry.as_slice().to_vec()
        })
        .collect();
    let space = END.saturating_sub(MEMORY_MAP);
    let too_long = BootError::MapTooLong {
        entries: map.len(),
        limit: usize::try_from(space).unwrap_or(0) / size_of::<hvm_memmap_table_entry>(),
    };
    if entries.len() as u64 > space {
        return Err(too_long);
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: command_line,
        rsdp_paddr: source.rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).map_err(|_| too_long)?,
        ..hvm_start_info::default()
    };
    let view = ram.view(START_INFO, END.saturating_sub(START_INFO), Direction::Write)?;
    view.write(0, info)?;
    if let Some(Initrd { address, size }) = initrd {
        let module = hvm_modlist_entry { paddr: address, size, ..hvm_modlist_entry::default() };
        view.write(MODULES.saturating_sub(START_INFO), module)?;
    }
    view.write_bytes(MEMORY_MAP.saturating_sub(START_INFO), &entries)?;
    Ok(())
}
