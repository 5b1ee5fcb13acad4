//! 32-bit ELF kernels with a multiboot header (Multiboot Specification 0.6.96): what kernel developers' own kernels and
//! unikernels mostly are.

use super::image::Image;
use super::initrd::Initrd;
use super::map::MapEntry;
use super::protected::{Facts, Parts, Protocol, address};
use super::{BootError, elf};

const KIND: &str = "multiboot kernel";

/// Where the header may lie: at a multiple of 4 in the first 8 KiB (section 3.1).
const SEARCHED: usize = 8192;
const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// Flags of the header that a loader must know (bits 0–15), and of these the ones that are met: modules on pages, memory sizes.
/// Bit 2 asks for a graphics mode, which there is none of; bit 16 gives addresses in place of those of the ELF headers.
const REQUIRED: u32 = 0xFFFF;
const KNOWN: u32 = 0b11;
const OWN_ADDRESSES: u32 = 1 << 16;

/// Offsets in the page, at whose start the information structure lies (section 3.3).
const MODULE: usize = 0x80;
const NAME: usize = 0xA0;
const MAP: usize = 0x100;
/// What the structure has: memory sizes, command line, modules, memory map, loader's name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
/// KiB below 640 KiB.
const LOWER: u64 = 640;
const MIB: u64 = 1 << 20;

pub(super) const PROTOCOL: Protocol = Protocol {
    load: elf::load_32,
    command_line_limit: u64::MAX,
    // Section 3.2.
    magic: 0x2BAD_B002,
    map: MAP,
    map_entry,
    parts,
};

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

/// The size of what follows comes first, which is why the entry's address is not aligned.
fn map_entry(entry: &MapEntry) -> Vec<u8> {
    let MapEntry { address, size, kind } = *entry;
    let kind = kind as u32;
    [&20_u32.to_le_bytes()[..], &address.to_le_bytes(), &size.to_le_bytes(), &kind.to_le_bytes()].concat()
}

fn parts(facts: &Facts) -> Parts {
    let mut info = [0_u64; 22];
    // By the structure's offsets: 0 flags, 4 and 8 memory, 16 command line, 20 and 24 modules, 44 and 48 map, 64 name.
    let fields = [
        (0, u64::from(INFO_FLAGS)),
        (1, LOWER),
        (2, facts.ram_end.saturating_sub(MIB) >> 10),
        (4, facts.command_line),
        (5, u64::from(facts.initrd.is_some())),
        (6, address(MODULE)),
        (11, facts.map_bytes as u64),
        (12, address(MAP)),
        (16, address(NAME)),
    ];
    for (index, value) in fields {
        info.iter_mut().skip(index).take(1).for_each(|field| *field = value);
    }
    let module = facts.initrd.map(|Initrd { address, size }| {
        (MODULE, words(&[address, address.saturating_add(size), facts.command_line, 0]))
    });
    let name = b"Bulkhead\0".to_vec();
    [(0, words(&info)), (NAME, name)].into_iter().chain(module).collect()
}

/// Numbers that lie below 4 GiB, 32 bits each.
fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| u32::try_from(*value).unwrap_or(0).to_le_bytes()).collect()
}
