//! Kernels made of bytes, small enough to see what is in them.

use super::MIB;

pub const COMMAND_LINE_LIMIT: usize = 300;
/// Bytes of the protected-mode part of [`bzimage`].
pub const PAYLOAD: usize = 0x2000;
/// Its file offset: two sectors of setup and the boot sector.
pub const PAYLOAD_OFFSET: usize = 3 * 512;
pub const PREFERRED: u64 = 16 * MIB;
pub const INIT_SIZE: u32 = 0x5000;
/// Physical address of the segment of [`elf`], and of its entry in the segment.
pub const SEGMENT: u64 = 2 * MIB;
pub const ENTRY: u64 = SEGMENT + 0x10;
pub const SEGMENT_FILE_SIZE: u64 = 0x1234;
pub const SEGMENT_MEMORY_SIZE: u64 = 0x5678;
/// File offset of the segment.
pub const SEGMENT_OFFSET: usize = 0x200;

pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of boot protocol 2.15 that prefers 16 MiB and may be moved.
pub fn bzimage() -> Vec<u8> {
    let mut image = vec![0; PAYLOAD_OFFSET + PAYLOAD];
    put(&mut image, 0x1F1, &[2]);
    put(&mut image, 0x1F4, &u32::try_from(PAYLOAD / 16).unwrap().to_le_bytes());
    put(&mut image, 0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020Fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21]);
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &u32::try_from(COMMAND_LINE_LIMIT).unwrap().to_le_bytes());
    put(&mut image, 0x258, &PREFERRED.to_le_bytes());
    put(&mut image, 0x260, &INIT_SIZE.to_le_bytes());
    for (at, byte) in image[PAYLOAD_OFFSET..].iter_mut().zip((1..=251u8).cycle()) {
        *at = byte;
    }
    image
}

/// A note: name, type, descriptor.
pub fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for number in [u32::try_from(name.len()).unwrap(), u32::try_from(descriptor.len()).unwrap(), kind] {
        note.extend(number.to_le_bytes());
    }
    for part in [name, descriptor] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// An ELF file with one segment, and a note of another kind before the PVH note.
pub fn elf() -> Vec<u8> {
    let notes = [note(b"GNU\0", 3, &[9; 20]), note(b"Xen\0", 18, &ENTRY.to_le_bytes())].concat();
    elf_with_notes(&notes)
}

pub fn elf_with_notes(notes: &[u8]) -> Vec<u8> {
    let notes_offset = SEGMENT_OFFSET + usize::try_from(SEGMENT_FILE_SIZE).unwrap();
    let mut image = vec![0; notes_offset + notes.len()];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &2u16.to_le_bytes());
    program_header(
        &mut image,
        64,
        1,
        [SEGMENT_OFFSET as u64, SEGMENT, SEGMENT_FILE_SIZE, SEGMENT_MEMORY_SIZE],
    );
    program_header(&mut image, 120, 4, [notes_offset as u64, 0, notes.len() as u64, notes.len() as u64]);
    for (at, byte) in image[SEGMENT_OFFSET..notes_offset].iter_mut().zip((1..=251u8).cycle()) {
        *at = byte;
    }
    put(&mut image, notes_offset, notes);
    image
}

/// Offset, physical address, size in the file, size in memory.
fn program_header(image: &mut [u8], at: usize, kind: u32, fields: [u64; 4]) {
    put(image, at, &kind.to_le_bytes());
    for (field, value) in [8, 24, 32, 40].into_iter().zip(fields) {
        put(image, at + field, &value.to_le_bytes());
    }
    put(image, at + 48, &4u64.to_le_bytes());
}
