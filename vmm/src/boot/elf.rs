//! ELF: what of the file goes where, and the entry: the one that its PVH note names, or a 32-bit file's own.

use bulkhead_ipc::memory::{GuestRam, HUGE_PAGE_SIZE};

use super::image::Image;
use super::{BootError, KERNEL_START};

const KIND: &str = "ELF file";

const HEADER_SIZE: usize = 64;
const HEADER_SIZE_32: usize = 52;
const PROGRAM_HEADER_SIZE_32: usize = 32;
const PROGRAM_HEADER_SIZE: usize = 56;
/// The most program headers that are read; Linux has five.
const MOST_PROGRAM_HEADERS: u16 = 128;
/// The most bytes of notes that are read from one segment; Linux has about 500.
const MOST_NOTES: u64 = 64 << 10;

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY, from xen/include/public/elfnote.h.
const PHYS32_ENTRY: u32 = 18;

/// A kernel that was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loaded {
    /// 32-bit physical entry point.
    pub entry: u64,
    /// First address after the last segment.
    pub end: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    /// Where it is linked, which counts for the entry of a 32-bit file alone.
    linked: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
    alignment: u64,
}

/// Loads all segments below `ram_end`.
pub(super) fn load(ram: &GuestRam, image: &Image<'_>, ram_end: u64) -> Result<Loaded, BootError> {
    let headers = program_headers(image)?;
    let entry = find_entry(image, &headers)?;
    load_at(ram, image, &headers, ram_end, entry, "the entry point in the PVH note")
}

/// Loads a 32-bit file, whose entry is where its segment is linked.
pub(super) fn load_32(ram: &GuestRam, image: &Image<'_>, ram_end: u64) -> Result<Loaded, BootError> {
    let mut header = [0; HEADER_SIZE_32];
    image.read(KIND, "header", 0, &mut header)?;
    let header = Fields(&header);
    let table = (u64::from(header.u32(28)), header.u16(42), header.u16(44));
    let headers = read_headers(image, table, PROGRAM_HEADER_SIZE_32, |fields| ProgramHeader {
        kind: fields.u32(0),
        offset: fields.u32(4).into(),
        linked: fields.u32(8).into(),
        address: fields.u32(12).into(),
        file_size: fields.u32(16).into(),
        memory_size: fields.u32(20).into(),
        alignment: fields.u32(28).into(),
    })?;
    let linked = u64::from(header.u32(24));
    let place = |header: &ProgramHeader| {
        let offset = linked.checked_sub(header.linked).filter(|offset| *offset < header.memory_size)?;
        (header.kind == PT_LOAD).then(|| header.address.saturating_add(offset))
    };
    let entry = headers.iter().find_map(place).unwrap_or(linked);
    load_at(ram, image, &headers, ram_end, entry, "the entry point")
}

/// Whether a file that begins so is for 32-bit x86.
pub(super) fn is_32_bit_x86(head: &[u8]) -> bool {
    let header = Fields(head);
    (header.u8(4), header.u8(5), header.u16(18)) == (CLASS_32, LITTLE_ENDIAN, EM_386)
}

fn load_at(
    ram: &GuestRam,
    image: &Image<'_>,
    headers: &[ProgramHeader],
    ram_end: u64,
    entry: u64,
    field: &'static str,
) -> Result<Loaded, BootError> {
    let segments: Vec<_> =
        headers.iter().filter(|header| header.kind == PT_LOAD && header.memory_size > 0).collect();
    let mut end = KERNEL_START;
    for segment in &segments {
        end = end.max(check(image, segment, ram_end)?);
    }
    let inside = |segment: &&&ProgramHeader| {
        entry.checked_sub(segment.address).is_some_and(|offset| offset < segment.memory_size)
    };
    if segments.iter().find(inside).is_none() {
        return Err(bad(field, entry));
    }
    let first = segments.iter().map(|segment| segment.address).min().unwrap_or(end);
    back_with_huge_pages(ram, first, end);
    for segment in segments {
        image.load(ram, segment.offset, segment.file_size, segment.address)?;
    }
    Ok(Loaded { entry, end })
}

/// Puts a kernel that fills a huge page or more on such, its edges and what is not in its file too: a running kernel fills them.
fn back_with_huge_pages(ram: &GuestRam, first: u64, end: u64) {
    if end.saturating_sub(first) >= HUGE_PAGE_SIZE {
        let first = (first - first % HUGE_PAGE_SIZE).max(HUGE_PAGE_SIZE);
        ram.back_with_huge_pages(first, end.saturating_add(HUGE_PAGE_SIZE - 1).saturating_sub(first));
    }
}

/// Checks one segment; answers the first address after it.
fn check(image: &Image<'_>, segment: &ProgramHeader, ram_end: u64) -> Result<u64, BootError> {
    if segment.file_size > segment.memory_size {
        return Err(bad("p_filesz, which is more than p_memsz,", segment.file_size));
    }
    image.check_range(KIND, "segment", segment.offset, segment.file_size)?;
    if segment.address < KERNEL_START {
        return Err(BootError::KernelTooLow(segment.address));
    }
    let end = segment.address.saturating_add(segment.memory_size);
    if end > ram_end {
        return Err(BootError::KernelTooLarge { needed: end, available: ram_end });
    }
    Ok(end)
}

fn program_headers(image: &Image<'_>) -> Result<Vec<ProgramHeader>, BootError> {
    let mut header = [0; HEADER_SIZE];
    image.read(KIND, "header", 0, &mut header)?;
    let header = Fields(&header);
    check_target(header)?;
    let table = (header.u64(32), header.u16(54), header.u16(56));
    read_headers(image, table, PROGRAM_HEADER_SIZE, |fields| ProgramHeader {
        kind: fields.u32(0),
        offset: fields.u64(8),
        linked: fields.u64(16),
        address: fields.u64(24),
        file_size: fields.u64(32),
        memory_size: fields.u64(40),
        alignment: fields.u64(48),
    })
}

/// Reads the table at an offset, of entries of a size, so many.
fn read_headers(
    image: &Image<'_>,
    (offset, size, count): (u64, u16, u16),
    expected: usize,
    parse: impl Fn(Fields<'_>) -> ProgramHeader,
) -> Result<Vec<ProgramHeader>, BootError> {
    if usize::from(size) != expected {
        return Err(bad("e_phentsize", u64::from(size)));
    }
    if count == 0 || count > MOST_PROGRAM_HEADERS {
        return Err(bad("e_phnum", u64::from(count)));
    }
    let mut table = vec![0; usize::from(count).saturating_mul(expected)];
    image.read(KIND, "program header table", offset, &mut table)?;
    Ok(table.chunks_exact(expected).map(|bytes| parse(Fields(bytes))).collect())
}

fn check_target(header: Fields<'_>) -> Result<(), BootError> {
    let (class, data) = (header.u8(4), header.u8(5));
    if data != LITTLE_ENDIAN {
        return Err(BootError::WrongArchitecture("a big-endian processor".into()));
    }
    let machine = header.u16(18);
    if class == CLASS_64 && machine == EM_X86_64 {
        return Ok(());
    }
    let name = match machine {
        EM_386 => "32-bit x86 (and it has no multiboot header)".into(),
        EM_X86_64 => "x86-64 with 32-bit addresses (x32)".into(),
        40 => "32-bit ARM".into(),
        183 => "ARM (aarch64)".into(),
        243 => "RISC-V".into(),
        other => format!("ELF machine number {other}"),
    };
    Err(BootError::WrongArchitecture(name))
}

/// Finds the entry point in the notes of all PT_NOTE segments.
fn find_entry(image: &Image<'_>, headers: &[ProgramHeader]) -> Result<u64, BootError> {
    for header in headers.iter().filter(|header| header.kind == PT_NOTE) {
        if header.file_size > MOST_NOTES {
            return Err(bad("the size of the notes", header.file_size));
        }
        let mut notes = vec![0; usize::try_from(header.file_size).unwrap_or(0)];
        image.read(KIND, "note segment", header.offset, &mut notes)?;
        let alignment = if header.alignment == 8 { 8 } else { 4 };
        if let Some(descriptor) = find_note(&notes, alignment) {
            let fields = Fields(descriptor);
            return match descriptor.len() {
                4 => Ok(u64::from(fields.u32(0))),
                // Linux writes 8 bytes; the entry is in 32-bit mode all the same.
                8 if fields.u32(4) == 0 => Ok(u64::from(fields.u32(0))),
                8 => Err(bad("the entry point in the PVH note", fields.u64(0))),
                length => Err(bad("the size of the PVH note", length as u64)),
            };
        }
    }
    Err(BootError::NoPvhNote)
}

/// The descriptor of the first note `Xen`, PHYS32_ENTRY. A note that is not whole ends the search.
fn find_note(notes: &[u8], alignment: usize) -> Option<&[u8]> {
    const HEADER: usize = 12;
    let mut rest = notes;
    loop {
        let fields = Fields(rest.get(..HEADER)?);
        let name_size = usize::try_from(fields.u32(0)).ok()?;
        let descriptor_size = usize::try_from(fields.u32(4)).ok()?;
        let descriptor_start = HEADER.checked_add(name_size)?.checked_next_multiple_of(alignment)?;
        let descriptor_end = descriptor_start.checked_add(descriptor_size)?;
        let name = rest.get(HEADER..)?.get(..name_size)?;
        let descriptor = rest.get(descriptor_start..descriptor_end)?;
        if fields.u32(8) == PHYS32_ENTRY && name == b"Xen\0" {
            return Some(descriptor);
        }
        rest = rest.get(descriptor_end.checked_next_multiple_of(alignment)?..)?;
    }
}

/// Little-endian fields of a structure; what lies beyond its end reads as 0.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(self, offset: usize) -> [u8; N] {
        self.0.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn u8(self, offset: usize) -> u8 {
        u8::from_le_bytes(self.bytes(offset))
    }

    fn u16(self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

fn bad(field: &'static str, value: u64) -> BootError {
    BootError::BadHeader { kind: KIND, field, value }
}
