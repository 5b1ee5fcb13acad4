//! 32-bit ELF kernels with a multiboot header (Multiboot Specification 0.6.96): what kernel developers' own kernels and
//! unikernels mostly are.

use bulkhead_ipc::memory::{Direction, GuestRam};

use super::entry::{Entry, Mode, Segment};
use super::image::Image;
use super::initrd::{self, Initrd};
use super::map::memory_map;
use super::{BootError, BootSource, elf, low_ram_end, write_command_line};

const KIND: &str = "multiboot kernel";

/// Where the header may lie: at a multiple of 4 in the first 8 KiB (section 3.1).
const SEARCHED: usize = 8192;
const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// What EAX says (section 3.2).
const BOOT_MAGIC: u64 = 0x2BAD_B002;
/// Flags of the header that a loader must know (bits 0–15), and of these the ones that are met: modules on pages, memory sizes.
/// Bit 2 asks for a graphics mode, which there is none of; bit 16 gives addresses in place of those of the ELF headers.
const REQUIRED: u32 = 0xFFFF;
const KNOWN: u32 = 0b11;
const OWN_ADDRESSES: u32 = 1 << 16;

/// The information structure and what it points to (section 3.3).
const INFO: u64 = 0x6000;
const MODULE: u64 = 0x6080;
const NAME: u64 = 0x60A0;
const MAP: u64 = 0x6100;
/// `boot_params` lies here when there is one.
const END: u64 = 0x7000;
/// What the structure has: memory sizes, command line, modules, memory map, loader's name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
/// KiB below 640 KiB.
const LOWER: u32 = 640;
const MIB: u64 = 1 << 20;

/// Whether this is a 32-bit ELF file with a multiboot header.
///
/// # Errors
/// It cannot be read, or its header asks for what there is not.
pub(super) fn recognise(image: &Image<'_>) -> Result<bool, BootError> {
    let mut head = vec![0; SEARCHED];
    let length = image.read_up_to(0, &mut head)?;
    let head = head.get(..length).unwrap_or_default();
    if !elf::is_32_bit_x86(head) {
        return Ok(false);
    }
    let words: Vec<u32> =
        head.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_le_bytes)).collect();
    let found = words.windows(3).find_map(|header| match *header {
        [HEADER_MAGIC, flags, sum] if HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0 => Some(flags),
        _ => None,
    });
    match found {
        Some(flags) if flags & REQUIRED & !KNOWN != 0 || flags & OWN_ADDRESSES != 0 => {
            Err(BootError::BadHeader { kind: KIND, field: "the header's flags", value: flags.into() })
        }
        found => Ok(found.is_some()),
    }
}

/// Loads it with its information structure.
pub(super) fn boot(ram: &GuestRam, image: &Image<'_>, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let ram_end = low_ram_end(ram);
    let command_line = write_command_line(ram, source.command_line, u64::MAX)?;
    let kernel = elf::load_32(ram, image, ram_end)?;
    let initrd = initrd::load(ram, source, kernel.end, ram_end)?;
    write_info(ram, source, command_line, initrd)?;
    Ok(Entry {
        rip: kernel.entry,
        rsi: 0,
        rbx: INFO,
        rax: BOOT_MAGIC,
        rflags: Entry::RFLAGS,
        mode: Mode::Protected32,
        code: Segment::CODE_32,
        data: Segment::DATA,
        task: Segment::TASK,
    })
}

fn write_info(
    ram: &GuestRam,
    source: &BootSource<'_>,
    command_line: u64,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    let map = memory_map(ram, source.reserved);
    let mut entries = Vec::new();
    for entry in &map {
        // The size of what follows, which is why the entry's address is not aligned.
        entries.extend(20_u32.to_le_bytes());
        entries.extend(entry.address.to_le_bytes());
        entries.extend(entry.size.to_le_bytes());
        entries.extend((entry.kind as u32).to_le_bytes());
    }
    let space = END.saturating_sub(MAP);
    if entries.len() as u64 > space {
        return Err(BootError::MapTooLong {
            entries: map.len(),
            limit: usize::try_from(space / 24).unwrap_or(0),
        });
    }
    let upper = low_ram_end(ram).saturating_sub(MIB) >> 10;
    let mut info = [0_u32; 22];
    // By the structure's offsets: 0 flags, 4 and 8 memory, 16 command line, 20 and 24 modules, 44 and 48 map, 64 name.
    let fields = [
        (0, u64::from(INFO_FLAGS)),
        (1, u64::from(LOWER)),
        (2, upper),
        (4, command_line),
        (5, u64::from(initrd.is_some())),
        (6, MODULE),
        (11, entries.len() as u64),
        (12, MAP),
        (16, NAME),
    ];
    for (index, value) in fields {
        // All lie below 4 GiB.
        info.iter_mut().skip(index).take(1).for_each(|field| *field = u32::try_from(value).unwrap_or(0));
    }
    let bytes: Vec<u8> = info.iter().flat_map(|field| field.to_le_bytes()).collect();
    let view = ram.view(INFO, END.saturating_sub(INFO), Direction::Write)?;
    view.write_bytes(0, &bytes)?;
    view.write_bytes(NAME.saturating_sub(INFO), b"Bulkhead\0")?;
    view.write_bytes(MAP.saturating_sub(INFO), &entries)?;
    if let Some(Initrd { address, size }) = initrd {
        let module = [address, address.saturating_add(size), command_line, 0];
        let module: Vec<u8> =
            module.iter().flat_map(|field| u32::try_from(*field).unwrap_or(0).to_le_bytes()).collect();
        view.write_bytes(MODULE.saturating_sub(INFO), &module)?;
    }
    Ok(())
}
