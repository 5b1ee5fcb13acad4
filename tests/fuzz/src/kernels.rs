//! Kernel images: what a loader takes from headers that an attacker wrote.

use std::io::Write;

use bulkhead_ipc::memory::GuestRam;
use bulkhead_vmm::boot::{BootSource, load_kernel};

const MIB: u64 = 1 << 20;

/// Loads the bytes as a kernel, with an initial RAM file system when the first byte is odd.
pub fn kernels(input: &[u8]) {
    let file = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().ok()?;
        file.write_all(bytes).ok()?;
        Some(file)
    };
    let Some((first, image)) = input.split_first() else { return };
    let (Some(kernel), Some(initrd)) = (file(image), file(&[7; 5000])) else { return };
    let Ok(ram) = GuestRam::create(20 * MIB) else { return };
    let initrd = (first & 1 != 0).then_some(&initrd);
    let source = BootSource { kernel: &kernel, initrd, command_line: "quiet", rsdp: None, reserved: &[] };
    if let Ok(entry) = load_kernel(&ram, &source) {
        assert!(ram.contains(entry.rip, 1), "entered beyond RAM: {entry:x?}");
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in image.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// A small ELF file with a segment at 2 MiB and a PVH note.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x300];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0]);
    put(&mut image, 32, &64_u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, 2, 0]);
    for (at, kind, [offset, address, file, memory]) in
        [(64, 1_u32, [0x200, 2 * MIB, 0x80, 0x5000]), (120, 4, [0x280_u64, 0, 20, 20])]
    {
        put(&mut image, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, file), (40, memory), (48, 4)] {
            put(&mut image, at + field, &value.to_le_bytes());
        }
    }
    put(&mut image, 0x280, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut image, 0x28C, b"Xen\0\x10\x00\x20\x00");
    image
}

/// A small bzImage of protocol 2.15.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0x90; 0x1600];
    put(&mut image, 0, &[0; 0x280]);
    put(&mut image, 0x1F1, &[2]);
    put(&mut image, 0x1F4, &0x100_u32.to_le_bytes());
    put(&mut image, 0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    put(&mut image, 0x202, b"HdrS\x0F\x02");
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22C, &0x7FFF_FFFF_u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21, 1]);
    put(&mut image, 0x238, &300_u32.to_le_bytes());
    put(&mut image, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut image, 0x260, &0x5000_u32.to_le_bytes());
    image
}

pub fn seeds() -> Vec<Vec<u8>> {
    let with = |first: u8, image: Vec<u8>| [vec![first], image].concat();
    vec![with(0, elf()), with(1, elf()), with(0, bzimage()), with(1, bzimage())]
}
