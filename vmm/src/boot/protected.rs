//! What PVH and multiboot have in common: an ELF kernel that is entered in 32-bit protected mode without paging, with the
//! address of a page in EBX that says what the machine has.

use bulkhead_ipc::memory::{Direction, GuestRam};

use super::elf::Loaded;
use super::entry::{Entry, Mode, Segment};
use super::image::Image;
use super::initrd::{self, Initrd};
use super::map::{MapEntry, memory_map};
use super::{BootError, BootSource, low_ram_end, write_command_line};

/// Guest address of the page. `boot_params` lies after it when there is one.
pub(super) const PAGE: u64 = 0x6000;
const PAGE_SIZE: usize = 0x1000;

/// How such kernels want it.
pub(super) struct Protocol {
    /// Loads the file into RAM that ends here.
    pub load: fn(&GuestRam, &Image<'_>, u64) -> Result<Loaded, BootError>,
    /// The longest command line, without the NUL.
    pub command_line_limit: u64,
    /// EAX.
    pub magic: u64,
    /// Where in the page the memory map begins; it has the rest of it.
    pub map: usize,
    /// An entry of the memory map; all have the same size.
    pub map_entry: fn(&MapEntry) -> Vec<u8>,
    /// What else is in the page, by offset.
    pub parts: fn(&Facts) -> Parts,
}

/// What is in the page, each with its offset.
pub(super) type Parts = Vec<(usize, Vec<u8>)>;

/// What a kernel is told, as guest addresses and bytes.
pub(super) struct Facts {
    pub command_line: u64,
    pub initrd: Option<Initrd>,
    pub rsdp: Option<u64>,
    /// End of the RAM that begins at 0.
    pub ram_end: u64,
    /// Entries of the memory map.
    pub map_entries: usize,
    /// All of the memory map.
    pub map_bytes: usize,
}

/// Loads a kernel with its page.
pub(super) fn boot(
    ram: &GuestRam,
    image: &Image<'_>,
    source: &BootSource<'_>,
    protocol: &Protocol,
) -> Result<Entry, BootError> {
    let ram_end = low_ram_end(ram);
    let command_line = write_command_line(ram, source.command_line, protocol.command_line_limit)?;
    let kernel = (protocol.load)(ram, image, ram_end)?;
    let initrd = initrd::load(ram, source, kernel.end, kernel.end, ram_end)?;
    let map = memory_map(ram, source.reserved);
    let entries: Vec<Vec<u8>> = map.iter().map(protocol.map_entry).collect();
    let room = PAGE_SIZE.saturating_sub(protocol.map);
    let limit = entries.first().map_or(0, |entry| room.checked_div(entry.len()).unwrap_or(0));
    if map.len() > limit {
        return Err(BootError::MapTooLong { entries: map.len(), limit });
    }
    let entries = entries.concat();
    let (map_entries, map_bytes) = (map.len(), entries.len());
    let facts = Facts { command_line, initrd, rsdp: source.rsdp, ram_end, map_entries, map_bytes };
    let mut parts = (protocol.parts)(&facts);
    parts.push((protocol.map, entries));
    let page = ram.view(PAGE, PAGE_SIZE as u64, Direction::Write)?;
    for (offset, bytes) in parts {
        page.write_bytes(offset as u64, &bytes)?;
    }
    Ok(Entry {
        rip: kernel.entry,
        rsi: 0,
        rbx: PAGE,
        rax: protocol.magic,
        rflags: Entry::RFLAGS,
        mode: Mode::Protected32,
        code: Segment::CODE_32,
        data: Segment::DATA,
        task: Segment::TASK,
        unpacking: None,
    })
}

/// The guest address of what lies at this offset of the page.
pub(super) const fn address(offset: usize) -> u64 {
    PAGE + offset as u64
}
