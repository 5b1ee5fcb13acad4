//! PVH: the start info that a kernel finds at EBX (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::elf;
use super::initrd::Initrd;
use super::map::MapEntry;
use super::protected::{Facts, Parts, Protocol, address};

/// Offsets in the page.
const MODULES: usize = 0x40;
const MEMORY_MAP: usize = 0x80;

pub(super) const PROTOCOL: Protocol = Protocol {
    load: elf::load,
    // PVH names no limit; this is Linux's COMMAND_LINE_SIZE without the NUL, beyond which it would cut silently.
    command_line_limit: 2047,
    magic: 0,
    map: MEMORY_MAP,
    map_entry,
    parts,
};

fn map_entry(entry: &MapEntry) -> Vec<u8> {
    let MapEntry { address, size, kind } = *entry;
    let entry = hvm_memmap_table_entry { addr: address, size, type_: kind as u32, reserved: 0 };
    entry.as_slice().to_vec()
}

fn parts(facts: &Facts) -> Parts {
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(facts.initrd.is_some()),
        modlist_paddr: facts.initrd.map_or(0, |_| address(MODULES)),
        cmdline_paddr: facts.command_line,
        rsdp_paddr: facts.rsdp.unwrap_or(0),
        memmap_paddr: address(MEMORY_MAP),
        memmap_entries: u32::try_from(facts.map_entries).unwrap_or(u32::MAX),
        ..hvm_start_info::default()
    };
    let module = facts.initrd.map(|Initrd { address, size }| {
        let module = hvm_modlist_entry { paddr: address, size, ..hvm_modlist_entry::default() };
        (MODULES, module.as_slice().to_vec())
    });
    [(0, info.as_slice().to_vec())].into_iter().chain(module).collect()
}
