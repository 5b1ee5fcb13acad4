//! A front end that is not ours: QEMU, whose BIOS boots from our disk.

use std::process::Command;

use crate::driver::Service;

/// Prints B, reads sector 1 and prints its first byte, writes that to sector 2, prints W, leaves.
const BOOT: &[u8] = &[
    0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xC0, // xor ax,ax; mov ds,ax; mov es,ax
    0xB0, b'B', 0xE6, 0xE9, // mov al,'B'; out 0xE9,al
    0xB8, 0x01, 0x02, 0xBB, 0x00, 0x7E, 0xB9, 0x02, 0x00, 0xBA, 0x80, 0x00, 0xCD, 0x13, // read a sector
    0x72, 0x19, // jc end
    0xA0, 0x00, 0x7E, 0xE6, 0xE9, // mov al,[0x7E00]; out 0xE9,al
    0xB8, 0x01, 0x03, 0xBB, 0x00, 0x7E, 0xB9, 0x03, 0x00, 0xBA, 0x80, 0x00, 0xCD, 0x13, // write it
    0x72, 0x04, // jc end
    0xB0, b'W', 0xE6, 0xE9, // mov al,'W'; out 0xE9,al
    0xB0, 0x00, 0xE6, 0xF4, // end: out 0xF4,al
    0xF4, 0xEB, 0xFD, // hlt; jmp
];

#[test]
fn qemu_boots_from_our_disk() {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-system-x86_64 is not installed");
        return;
    }
    let service = Service::disk(1 << 20, &[]);
    let mut image = vec![0; 1 << 20];
    image[..BOOT.len()].copy_from_slice(BOOT);
    image[510..512].copy_from_slice(&[0x55, 0xAA]);
    image[512..1024].fill(b'Q');
    std::fs::write(service.disk_path(), &image).unwrap();
    drop(service.connect());
    let log = service.directory.path().join("debugcon");
    let output = Command::new("timeout")
        .args([
            "60",
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-m",
            "128",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-object", "memory-backend-memfd,id=m,size=128M,share=on", "-machine", "pc,memory-backend=m"])
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", service.socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=c,bootindex=0"])
        .arg("-debugcon")
        .arg(format!("file:{}", log.display()))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(log).unwrap(), b"BQW");
    assert_eq!(std::fs::read(service.disk_path()).unwrap()[1024..1536], [b'Q'; 512]);
}
