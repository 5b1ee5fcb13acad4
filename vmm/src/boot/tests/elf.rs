//! ELF with a PVH note.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use bulkhead_ipc::memory::GuestRam;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::super::{BootError, Mode, load_kernel, memory_map};
use super::make::{self, ENTRY, SEGMENT, SEGMENT_FILE_SIZE, SEGMENT_MEMORY_SIZE, SEGMENT_OFFSET, note, put};
use super::{MIB, boot, boot_in, bytes, dirty, file, message, read, source};

const START_INFO: u64 = 0x6000;

#[test]
fn the_segment_lies_at_its_physical_address_and_the_note_names_the_entry() {
    let image = make::elf();
    let (ram, entry) = boot(&image).unwrap();
    let size = usize::try_from(SEGMENT_FILE_SIZE).unwrap();
    assert_eq!(bytes(&ram, SEGMENT, size), image[SEGMENT_OFFSET..SEGMENT_OFFSET + size]);
    assert_eq!((entry.rip, entry.rbx, entry.rflags, entry.mode), (ENTRY, START_INFO, 2, Mode::Protected32));
    assert!(entry.code.default_32 && !entry.code.long);
    let control = entry.control_registers();
    assert_eq!((control.cr0, control.cr4, control.efer), (0x11, 0, 0));
}

#[test]
fn start_info_says_where_everything_is() {
    let (kernel, initrd) = (file(&make::elf()), file(&[7; 5000]));
    let ram = GuestRam::create(64 * MIB).unwrap();
    load_kernel(&ram, &source(&kernel, Some(&initrd), "quiet")).unwrap();
    let info: hvm_start_info = read(&ram, START_INFO);
    assert_eq!((info.magic, info.version, info.rsdp_paddr), (0x336E_C578, 1, 0xE_0000));
    assert_eq!(bytes(&ram, info.cmdline_paddr, 6), b"quiet\0");
    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = read(&ram, info.modlist_paddr);
    assert_eq!((module.paddr, module.size), (64 * MIB - 8192, 5000));
    assert_eq!(bytes(&ram, module.paddr, 5000), [7; 5000]);
    let told: Vec<_> = (0..u64::from(info.memmap_entries))
        .map(|n| read::<hvm_memmap_table_entry>(&ram, info.memmap_paddr + n * 24))
        .map(|entry| (entry.addr, entry.size, entry.type_))
        .collect();
    let map = memory_map(&ram, &[]);
    assert_eq!(told, map.iter().map(|e| (e.address, e.size, e.kind as u32)).collect::<Vec<_>>());
}

#[test]
fn without_an_initrd_there_is_no_module() {
    let (ram, _) = boot(&make::elf()).unwrap();
    let info: hvm_start_info = read(&ram, START_INFO);
    assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
}

#[test]
fn only_what_was_written_is_dirty() {
    let (ram, _) = boot(&make::elf()).unwrap();
    assert_eq!(dirty(&ram), BTreeSet::from([START_INFO, 0x2_0000, SEGMENT, SEGMENT + 4096]));
}

#[test]
fn holes_of_the_file_are_left_out() {
    // Two pages of data around 1 MiB of nothing, in one segment.
    let mut image = make::elf();
    let (offset, size) = (0x10_0000u64, MIB + 0x2000);
    put(&mut image, 64 + 8, &offset.to_le_bytes());
    put(&mut image, 64 + 32, &size.to_le_bytes());
    put(&mut image, 64 + 40, &size.to_le_bytes());
    let kernel = file(&image);
    kernel.set_len(offset + size).unwrap();
    kernel.write_all_at(&[7; 4096], offset).unwrap();
    kernel.write_all_at(&[8; 4096], offset + size - 4096).unwrap();
    let ram = GuestRam::create(64 * MIB).unwrap();
    load_kernel(&ram, &source(&kernel, None, "")).unwrap();
    let last = SEGMENT + size - 4096;
    assert_eq!([SEGMENT, SEGMENT + 4096, last - 1, last].map(|at| bytes(&ram, at, 1)[0]), [7, 0, 0, 8]);
    let touched: Vec<_> = dirty(&ram).into_iter().filter(|page| *page >= SEGMENT).collect();
    assert_eq!(touched, [SEGMENT, last]);
}

#[test]
fn a_kernel_needs_ram_for_all_of_its_memory() {
    let end = SEGMENT + SEGMENT_MEMORY_SIZE;
    let fits = GuestRam::create(end.next_multiple_of(4096)).unwrap();
    boot_in(&fits, &make::elf()).unwrap();
    let short = GuestRam::create(end.next_multiple_of(4096) - 4096).unwrap();
    let said = message(boot_in(&short, &make::elf()));
    assert!(said.contains(&format!("needs memory up to {end}")), "{said}");
}

#[test]
fn initrd_and_kernel_do_not_meet() {
    let (kernel, initrd) = (file(&make::elf()), tempfile::tempfile().unwrap());
    let ram = GuestRam::create(4 * MIB).unwrap();
    let room = 4 * MIB - (SEGMENT + SEGMENT_MEMORY_SIZE).next_multiple_of(4096);
    initrd.set_len(room).unwrap();
    load_kernel(&ram, &source(&kernel, Some(&initrd), "")).unwrap();
    initrd.set_len(room + 1).unwrap();
    let said = message(load_kernel(&ram, &source(&kernel, Some(&initrd), "")));
    assert!(said.contains(&format!("leave room for {room}")), "{said}");
}

#[test]
fn notes_are_read_with_care() {
    let with = |notes: &[u8]| boot(&make::elf_with_notes(notes)).map(|(_, entry)| entry.rip);
    let entry_32 = u32::try_from(ENTRY).unwrap().to_le_bytes();
    assert_eq!(with(&note(b"Xen\0", 18, &entry_32)).unwrap(), ENTRY);
    // Names and types that only look alike.
    for decoy in [note(b"Xen\0", 17, &entry_32), note(b"XenX", 18, &entry_32), note(b"Xen", 18, &entry_32)] {
        assert!(matches!(with(&decoy), Err(BootError::NoPvhNote)));
        assert_eq!(with(&[decoy, note(b"Xen\0", 18, &entry_32)].concat()).unwrap(), ENTRY);
    }
    assert!(matches!(with(&[]), Err(BootError::NoPvhNote)));
    let whole = note(b"Xen\0", 18, &entry_32);
    for length in 0..whole.len() {
        assert!(matches!(with(&whole[..length]), Err(BootError::NoPvhNote)), "{length}");
    }
    assert!(message(with(&note(b"Xen\0", 18, &[1, 2]))).contains("size of the PVH note is 0x2"));
    let above_4_gib = (ENTRY | 1 << 32).to_le_bytes();
    assert!(message(with(&note(b"Xen\0", 18, &above_4_gib))).contains("entry point in the PVH note"));
    let outside = (SEGMENT + SEGMENT_MEMORY_SIZE).to_le_bytes();
    assert!(message(with(&note(b"Xen\0", 18, &outside))).contains("entry point in the PVH note"));
    let mut endless = note(b"", 0, &[]).repeat(5000);
    endless.extend(whole);
    assert_eq!(with(&endless).unwrap(), ENTRY);
    endless.extend([0; 64 << 10]);
    assert!(message(with(&endless)).contains("size of the notes"));
}

#[test]
fn what_a_header_cannot_say_is_refused() {
    let with = |at, bytes: &[u8]| {
        let mut image = make::elf();
        put(&mut image, at, bytes);
        message(boot(&image))
    };
    assert!(with(5, &[2]).contains("big-endian"));
    assert!(with(18, &[183, 0]).contains("aarch64"));
    assert!(with(18, &[0x34, 0x12]).contains("machine number 4660"));
    assert!(with(4, &[1]).contains("x32"));
    assert!(with(54, &[32, 0]).contains("e_phentsize is 0x20"));
    assert!(with(56, &[0, 0]).contains("e_phnum is 0x0"));
    assert!(with(56, &[0xFF, 0xFF]).contains("e_phnum is 0xffff"));
    assert!(with(32, &[0xFF; 8]).contains("truncated: its program header table"));
    // The segment: offset, address, size in the file, size in memory.
    assert!(with(64 + 8, &[0xFF; 8]).contains("truncated: its segment"));
    assert!(with(64 + 24, &0xF_F000u64.to_le_bytes()).contains("wants to lie at 0xff000"));
    assert!(with(64 + 24, &[0xFF; 8]).contains("needs memory up to"));
    assert!(with(64 + 32, &[0xFF; 8]).contains("p_filesz"));
    assert!(with(64 + 40, &[0xFF; 8]).contains("needs memory up to"));
    assert!(with(64, &[0]).contains("entry point in the PVH note"));
    assert!(with(120, &[0]).contains("no PVH note"));
}

#[test]
fn truncation_anywhere_is_found() {
    let image = make::elf();
    for length in [4, 63, 64, 175, 176, SEGMENT_OFFSET, image.len() - 1] {
        let said = message(boot(&image[..length]));
        assert!(said.contains("truncated"), "{length}: {said}");
    }
}
