//! Tests on made-up and on real kernels.

mod bzimage;
mod elf;
mod hostile;
mod make;
mod multiboot;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;

use bulkhead_ipc::memory::{Direction, GuestRam};
use vm_memory::ByteValued;

use super::{BootError, BootSource, Entry, load_kernel};

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn source<'a>(kernel: &'a File, initrd: Option<&'a File>, command_line: &'a str) -> BootSource<'a> {
    BootSource { kernel, initrd, command_line, rsdp: Some(0xE_0000), reserved: &[] }
}

fn boot_in(ram: &GuestRam, kernel: &[u8]) -> Result<Entry, BootError> {
    load_kernel(ram, &source(&file(kernel), None, "console=ttyS0"))
}

/// Boots in 64 MiB.
fn boot(kernel: &[u8]) -> Result<(GuestRam, Entry), BootError> {
    let ram = GuestRam::create(64 * MIB).unwrap();
    boot_in(&ram, kernel).map(|entry| (ram, entry))
}

fn read<T: ByteValued>(ram: &GuestRam, address: u64) -> T {
    ram.view(address, size_of::<T>() as u64, Direction::Read).unwrap().read(0).unwrap()
}

fn bytes(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.view(address, len as u64, Direction::Read).unwrap().read_bytes(0, &mut bytes).unwrap();
    bytes
}

fn dirty(ram: &GuestRam) -> BTreeSet<u64> {
    ram.dirty_pages().pages().collect()
}

fn message(result: Result<impl Sized, BootError>) -> String {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_not_a_kernel_is_named() {
    let said = |bytes: &[u8]| message(boot(bytes));
    assert!(said(b"").contains("begins with nothing (an empty file)"), "{}", said(b""));
    assert!(said(b"#!").contains("begins with 23 21;"));
    assert!(said(&[0x1f, 0x8b, 8, 0, 0]).contains("begins with 1f 8b 08 00 (gzip data)"));
    assert!(said(&[0; 4096]).contains("begins with 00 00 00 00;"));
    let mut arm = vec![0; 4096];
    arm[..2].copy_from_slice(b"MZ");
    assert!(said(&arm).contains("an EFI program"));
    arm[56..60].copy_from_slice(b"ARM\x64");
    assert!(said(&arm).contains("aarch64"));
}

#[test]
fn what_is_not_a_file_is_refused() {
    let ram = GuestRam::create(MIB).unwrap();
    let directory = File::open("/").unwrap();
    let null = File::open("/dev/null").unwrap();
    for kernel in [&directory, &null] {
        assert_eq!(message(load_kernel(&ram, &source(kernel, None, ""))), "the kernel is not a regular file");
    }
    let kernel = file(&make::elf());
    let initrd = load_kernel(&GuestRam::create(8 * MIB).unwrap(), &source(&kernel, Some(&directory), ""));
    assert_eq!(message(initrd), "the initrd is not a regular file");
}

#[test]
fn a_kernel_file_that_may_not_be_read_says_so() {
    let ram = GuestRam::create(MIB).unwrap();
    let named = tempfile::NamedTempFile::new().unwrap();
    let write_only = File::options().write(true).open(named.path()).unwrap();
    assert_eq!(message(load_kernel(&ram, &source(&write_only, None, ""))), "cannot read the kernel");
}

#[test]
fn command_lines_are_checked_against_the_kernels_limit() {
    for (kernel, limit) in [(make::bzimage(), make::COMMAND_LINE_LIMIT), (make::elf(), 2047)] {
        let kernel = file(&kernel);
        let ram = GuestRam::create(64 * MIB).unwrap();
        let fits = "x".repeat(limit);
        load_kernel(&ram, &source(&kernel, None, &fits)).unwrap();
        assert_eq!(bytes(&ram, super::COMMAND_LINE, limit + 1), [fits.as_bytes(), &[0]].concat());
        let long = message(load_kernel(&ram, &source(&kernel, None, &format!("{fits}y"))));
        assert_eq!(
            long,
            format!("the kernel command line has {} bytes, this kernel takes {limit}", limit + 1)
        );
        let nul = message(load_kernel(&ram, &source(&kernel, None, "quiet\0init=/x")));
        assert!(nul.contains("NUL character at byte 5"), "{nul}");
    }
}

#[test]
fn machines_without_room_for_boot_structures_are_refused() {
    let small = GuestRam::create(MIB - 4096).unwrap();
    assert!(matches!(boot_in(&small, &make::elf()), Err(BootError::RamTooSmall { .. })));
}

#[test]
fn initrds_that_do_not_fit_name_both_sizes() {
    for kernel in [make::bzimage(), make::elf()] {
        let kernel = file(&kernel);
        let ram = GuestRam::create(8 * MIB).unwrap();
        let initrd = tempfile::tempfile().unwrap();
        initrd.set_len(7 * MIB).unwrap();
        let said = message(load_kernel(&ram, &source(&kernel, Some(&initrd), "")));
        assert!(said.contains(&format!("the initrd has {} bytes", 7 * MIB)), "{said}");
        assert!(said.contains("leave room for"), "{said}");
        initrd.set_len(0).unwrap();
        assert_eq!(message(load_kernel(&ram, &source(&kernel, Some(&initrd), ""))), "the initrd is empty");
    }
}

#[test]
fn too_many_reserved_ranges_are_refused() {
    let reserved: Vec<_> = (0..200).map(|n| (2 * MIB + n * 0x2000, 0x1000)).collect();
    for kernel in [make::bzimage(), make::elf()] {
        let kernel = file(&kernel);
        let ram = GuestRam::create(64 * MIB).unwrap();
        let with_reserved = BootSource { reserved: &reserved, ..source(&kernel, None, "") };
        assert!(matches!(load_kernel(&ram, &with_reserved), Err(BootError::MapTooLong { entries: 404, .. })));
    }
}
