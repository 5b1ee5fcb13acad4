//! 32-bit ELF with a multiboot header.

use bulkhead_ipc::memory::GuestRam;

use super::super::{Mode, load_kernel, memory_map};
use super::make::put;
use super::{MIB, boot, bytes, file, message, read, source};

const SEGMENT: u32 = 0x10_0000;
const OFFSET: usize = 0x1000;
const INFO: u64 = 0x6000;

/// One segment with the header at its start, entered 16 bytes after it; linked for 3 GiB and above.
fn image() -> Vec<u8> {
    let mut image = vec![0; OFFSET + 0x100];
    put(&mut image, 0, b"\x7fELF\x01\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &3u16.to_le_bytes());
    put(&mut image, 24, &(0xC000_0000 + SEGMENT + 16).to_le_bytes());
    put(&mut image, 28, &52u32.to_le_bytes());
    put(&mut image, 42, &32u16.to_le_bytes());
    put(&mut image, 44, &1u16.to_le_bytes());
    let header = [1, 0x1000, 0xC000_0000 + SEGMENT, SEGMENT, 0x100, 0x3000, 7, 0x1000];
    for (index, field) in header.into_iter().enumerate() {
        put(&mut image, 52 + 4 * index, &field.to_le_bytes());
    }
    flags(&mut image, 0b11);
    image
}

fn flags(image: &mut [u8], flags: u32) {
    for (index, field) in
        [0x1BAD_B002, flags, 0_u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags)].into_iter().enumerate()
    {
        put(image, OFFSET + 4 * index, &field.to_le_bytes());
    }
}

#[test]
fn the_kernel_begins_at_the_physical_address_of_its_entry() {
    let (ram, entry) = boot(&image()).unwrap();
    assert_eq!((entry.rip, entry.rax, entry.rbx), (u64::from(SEGMENT) + 16, 0x2BAD_B002, INFO));
    assert_eq!(entry.mode, Mode::Protected32);
    assert_eq!(bytes(&ram, SEGMENT.into(), 4), 0x1BAD_B002_u32.to_le_bytes());
}

#[test]
fn information_names_memory_command_line_and_module() {
    let (kernel, initrd) = (file(&image()), file(&[7; 5000]));
    let ram = GuestRam::create(64 * MIB).unwrap();
    load_kernel(&ram, &source(&kernel, Some(&initrd), "quiet")).unwrap();
    let field = |offset: u64| u64::from(read::<u32>(&ram, INFO + offset));
    assert_eq!(field(0), 0b10_0100_1101);
    assert_eq!((field(4), field(8)), (640, 63 << 10));
    assert_eq!(bytes(&ram, field(16), 6), b"quiet\0");
    assert_eq!(field(20), 1);
    let (start, end) = (u64::from(read::<u32>(&ram, field(24))), u64::from(read::<u32>(&ram, field(24) + 4)));
    assert_eq!((start % 4096, end - start), (0, 5000));
    assert_eq!(bytes(&ram, start, 5000), [7; 5000]);
    let map = memory_map(&ram, &[]);
    assert_eq!(field(44), map.len() as u64 * 24);
    for (index, entry) in (0..).zip(&map) {
        let at = field(48) + index * 24;
        assert_eq!(read::<u32>(&ram, at), 20);
        assert_eq!((read::<u64>(&ram, at + 4), read::<u64>(&ram, at + 12)), (entry.address, entry.size));
        assert_eq!(read::<u32>(&ram, at + 20), entry.kind as u32);
    }
    assert_eq!(bytes(&ram, field(64), 9), b"Bulkhead\0");
}

#[test]
fn what_it_asks_for_and_there_is_not_is_refused() {
    for bad in [1 << 2, 1 << 15, 1 << 16] {
        let mut kernel = image();
        flags(&mut kernel, bad);
        assert!(message(boot(&kernel)).contains("the header's flags"), "{bad:#x}");
    }
}

#[test]
fn without_a_right_header_it_is_a_32_bit_kernel_like_any_other() {
    for at in [0, 4, 8] {
        let mut kernel = image();
        kernel[OFFSET + at] ^= 1;
        assert!(message(boot(&kernel)).contains("32-bit x86"), "{at}");
    }
    let mut far = image();
    far.splice(OFFSET..OFFSET, vec![0; 8192]);
    assert!(message(boot(&far)).contains("32-bit x86"));
}

#[test]
fn damaged_headers_are_refused() {
    let refused = |at: usize, bytes: &[u8]| {
        let mut kernel = image();
        put(&mut kernel, at, bytes);
        message(boot(&kernel))
    };
    assert!(refused(42, &[31, 0]).contains("e_phentsize"));
    assert!(refused(44, &[0, 0]).contains("e_phnum"));
    assert!(refused(24, &[0; 4]).contains("entry point"));
    assert!(refused(52 + 12, &0x9_0000_u32.to_le_bytes()).contains("1 MiB"));
    assert!(refused(52 + 20, &u32::MAX.to_le_bytes()).contains("needs memory up to"));
    assert!(refused(52 + 16, &0x4000_u32.to_le_bytes()).contains("p_filesz"));
    assert!(refused(52 + 4, &0x1_0000_u32.to_le_bytes()).contains("truncated"));
    assert!(refused(28, &u32::MAX.to_le_bytes()).contains("truncated"));
}

#[test]
fn every_prefix_and_every_flipped_byte_is_loaded_or_refused() {
    let whole = image();
    for length in (0..whole.len()).step_by(7) {
        let _ = boot(&whole[..length]).map(drop);
    }
    for at in (0..84).chain(OFFSET..OFFSET + 12) {
        let mut kernel = whole.clone();
        kernel[at] = !kernel[at];
        let _ = boot(&kernel).map(drop);
    }
}
