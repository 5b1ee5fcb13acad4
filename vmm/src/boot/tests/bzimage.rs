//! bzImage.

use std::collections::BTreeSet;

use bulkhead_ipc::memory::GuestRam;
use linux_loader::bootparam::boot_params;

use super::super::{BootError, BootSource, MapKind, Mode, load_kernel, memory_map};
use super::make::{self, INIT_SIZE, PAYLOAD, PAYLOAD_OFFSET, PREFERRED, put};
use super::{MIB, boot, boot_in, bytes, dirty, file, message, read, source};

const PARAMS: u64 = 0x7000;

#[test]
fn the_kernel_lies_where_it_prefers_and_is_entered_at_200() {
    let image = make::bzimage();
    let (ram, entry) = boot(&image).unwrap();
    assert_eq!(bytes(&ram, PREFERRED, PAYLOAD), image[PAYLOAD_OFFSET..]);
    assert_eq!((entry.rip, entry.rsi, entry.rflags), (PREFERRED + 0x200, PARAMS, 2));
    assert_eq!((entry.code.selector, entry.data.selector), (0x10, 0x18));
    let Mode::Long { cr3, .. } = entry.mode else { panic!("not long mode") };
    let control = entry.control_registers();
    assert_eq!((control.cr0, control.cr3, control.cr4, control.efer), (0x8000_0011, cr3, 0x20, 0x500));
}

#[test]
fn boot_params_say_where_everything_is() {
    let (kernel, initrd) = (file(&make::bzimage()), file(&[7; 5000]));
    let ram = GuestRam::create(64 * MIB).unwrap();
    load_kernel(&ram, &source(&kernel, Some(&initrd), "quiet")).unwrap();
    let params: boot_params = read(&ram, PARAMS);
    let header = params.hdr;
    let (boot_flag, magic, version) = (header.boot_flag, header.header, header.version);
    assert_eq!((boot_flag, magic, version), (0xAA55, 0x5372_6448, 0x020F));
    let (code32_start, command_line, rsdp) =
        (header.code32_start, header.cmd_line_ptr, params.acpi_rsdp_addr);
    assert_eq!((u64::from(code32_start), header.type_of_loader, rsdp), (PREFERRED, 0xFF, 0xE_0000));
    assert_eq!(bytes(&ram, u64::from(command_line), 6), b"quiet\0");
    let (address, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((u64::from(address), size), (64 * MIB - 8192, 5000));
    assert_eq!(bytes(&ram, u64::from(address), 5000), [7; 5000]);
}

#[test]
fn e820_is_the_memory_map() {
    let kernel = file(&make::bzimage());
    let ram = GuestRam::create(64 * MIB).unwrap();
    let reserved = [(32 * MIB, 4096)];
    let boot = BootSource { reserved: &reserved, ..source(&kernel, None, "") };
    load_kernel(&ram, &boot).unwrap();
    let params: boot_params = read(&ram, PARAMS);
    let table = params.e820_table;
    let told: Vec<_> = table[..usize::from(params.e820_entries)]
        .iter()
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect();
    let map = memory_map(&ram, &reserved);
    assert_eq!(told, map.iter().map(|e| (e.address, e.size, e.kind as u32)).collect::<Vec<_>>());
    assert!(told.contains(&(0xE_0000, 0x2_0000, MapKind::Reserved as u32)));
    assert!(told.contains(&(32 * MIB, 4096, MapKind::Reserved as u32)));
}

#[test]
fn only_what_was_written_is_dirty() {
    let (ram, _) = boot(&make::bzimage()).unwrap();
    let mut expected: BTreeSet<u64> = (0x9000..0xF000).step_by(4096).collect();
    expected.extend([0, PARAMS, 0x2_0000]);
    expected.extend((PREFERRED..PREFERRED + PAYLOAD as u64).step_by(4096));
    assert_eq!(dirty(&ram), expected);
}

#[test]
fn a_kernel_that_may_be_moved_is_where_its_place_is_not_ram() {
    let ram = GuestRam::create(8 * MIB).unwrap();
    let entry = boot_in(&ram, &make::bzimage()).unwrap();
    assert_eq!(entry.rip, 2 * MIB + 0x200);
    let exactly = GuestRam::create(2 * MIB + u64::from(INIT_SIZE)).unwrap();
    assert_eq!(boot_in(&exactly, &make::bzimage()).unwrap().rip, 2 * MIB + 0x200);
    let short = GuestRam::create(2 * MIB + u64::from(INIT_SIZE) - 4096).unwrap();
    let said = message(boot_in(&short, &make::bzimage()));
    assert!(said.contains(&format!("needs memory up to {}", 2 * MIB + u64::from(INIT_SIZE))), "{said}");
}

#[test]
fn a_kernel_that_may_not_be_moved_needs_its_place() {
    let mut image = make::bzimage();
    put(&mut image, 0x234, &[0]);
    assert_eq!(boot(&image).unwrap().1.rip, PREFERRED + 0x200);
    let small = GuestRam::create(16 * MIB).unwrap();
    assert!(matches!(boot_in(&small, &image), Err(BootError::KernelTooLarge { .. })));
    put(&mut image, 0x258, &0x9_0000u64.to_le_bytes());
    assert!(matches!(boot(&image), Err(BootError::KernelTooLow(0x9_0000))));
}

#[test]
fn the_initrd_keeps_below_what_the_kernel_can_reach() {
    let mut image = make::bzimage();
    put(&mut image, 0x22C, &u32::try_from(32 * MIB - 1).unwrap().to_le_bytes());
    let (kernel, initrd) = (file(&image), file(&[7; 4097]));
    let ram = GuestRam::create(64 * MIB).unwrap();
    load_kernel(&ram, &source(&kernel, Some(&initrd), "")).unwrap();
    let address = read::<boot_params>(&ram, PARAMS).hdr.ramdisk_image;
    assert_eq!(u64::from(address), 32 * MIB - 8192);
}

#[test]
fn what_a_header_cannot_say_is_refused() {
    let with = |at, bytes: &[u8]| {
        let mut image = make::bzimage();
        put(&mut image, at, bytes);
        message(boot(&image))
    };
    assert!(with(0x206, &[0x0B, 0x02]).contains("boot protocol is 2.11, 2.12"));
    assert!(with(0x236, &[0, 0]).contains("no 64-bit entry"));
    assert!(with(0x211, &[0]).contains("loadflags"));
    assert!(with(0x1F4, &[0, 0, 0, 0]).contains("syssize is 0x0"));
    let truncated = with(0x1F4, &[0xFF, 0xFF, 0xFF, 0xFF]);
    assert!(truncated.contains("truncated: its kernel ends at 68719478256, the file at 9728"), "{truncated}");
    let unmovable = [0x100u64.to_le_bytes()].concat();
    let mut image = make::bzimage();
    put(&mut image, 0x258, &unmovable);
    put(&mut image, 0x230, &[3, 0, 0, 0]);
    assert!(message(boot(&image)).contains("kernel_alignment is 0x3"));
    // A moderate size that no RAM holds.
    assert!(with(0x260, &[0xFF; 4]).contains("needs memory up to"));
}

#[test]
fn truncation_anywhere_is_found() {
    let image = make::bzimage();
    for length in [0x206, 0x210, 0x26B, 0x26C, PAYLOAD_OFFSET, PAYLOAD_OFFSET + PAYLOAD - 1] {
        let said = message(boot(&image[..length]));
        assert!(said.contains("truncated") || said.contains("protocol"), "{length:#x}: {said}");
    }
    boot(&image).unwrap();
}
