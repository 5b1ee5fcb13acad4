//! A front end that is not ours: QEMU, whose BIOS boots from our disk.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;

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

/// Prints B, reads sector 1 twenty thousand times and checks it, prints D, leaves.
const LOOP: &[u8] = &[
    0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xC0, // xor ax,ax; mov ds,ax; mov es,ax
    0xB0, b'B', 0xE6, 0xE9, // mov al,'B'; out 0xE9,al
    0xBD, 0x20, 0x4E, // mov bp,20000
    0xC6, 0x06, 0x00, 0x7E, 0x00, // again: mov byte [0x7E00],0
    0xB8, 0x01, 0x02, 0xBB, 0x00, 0x7E, 0xB9, 0x02, 0x00, 0xBA, 0x80, 0x00, 0xCD, 0x13, // read a sector
    0x72, 0x0E, // jc end
    0x80, 0x3E, 0x00, 0x7E, b'Q', // cmp byte [0x7E00],'Q'
    0x75, 0x07, // jne end
    0x4D, 0x75, 0xE1, // dec bp; jnz again
    0xB0, b'D', 0xE6, 0xE9, // mov al,'D'; out 0xE9,al
    0xB0, 0x00, 0xE6, 0xF4, // end: out 0xF4,al
    0xF4, 0xEB, 0xFD, // hlt; jmp
];

/// A disk that boots `code`, and whose sector 1 is full of Q.
fn bootable(code: &[u8]) -> Service {
    let service = Service::disk(1 << 20, &[]);
    let mut image = vec![0; 1 << 20];
    image[..code.len()].copy_from_slice(code);
    image[510..512].copy_from_slice(&[0x55, 0xAA]);
    image[512..1024].fill(b'Q');
    service.write_disk(&image);
    drop(service.connect());
    service
}

/// QEMU with the service's disk.
fn qemu(service: &Service) -> Child {
    let installed = Command::new("qemu-system-x86_64").arg("--version").output();
    assert!(installed.is_ok(), "qemu-system-x86_64 is missing: install Debian's package qemu-system-x86");
    let child = Command::new("timeout")
        .args(["180", "qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-nodefaults", "-display", "none"])
        .args(["-object", "memory-backend-memfd,id=m,size=128M,share=on", "-no-reboot"])
        .args(["-machine", "pc,memory-backend=m", "-chardev"])
        .arg(format!("socket,id=c,path={},reconnect=1", service.socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=c,bootindex=0", "-debugcon"])
        .arg(format!("file:{}", debug_console(service).display()))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .spawn();
    child.unwrap()
}

fn debug_console(service: &Service) -> PathBuf {
    service.directory.path().join("debugcon")
}

#[test]
fn qemu_boots_from_our_disk() {
    let service = bootable(BOOT);
    let mut child = qemu(&service);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read(debug_console(&service)).unwrap(), b"BQW");
    assert_eq!(std::fs::read(service.disk_path()).unwrap()[1024..1536], [b'Q'; 512]);
}

#[test]
fn qemu_goes_on_after_our_process_was_killed() {
    let mut service = bootable(LOOP);
    let mut child = qemu(&service);
    let said = || std::fs::read(debug_console(&service)).unwrap_or_default();
    while said().is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "QEMU ended before it booted");
        sleep(Duration::from_millis(1));
    }
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    assert_eq!(std::fs::read(debug_console(&service)).unwrap(), b"B", "the guest was done before the kill");
    let disk = service.disk_path();
    let arguments = ["--blk-file".to_owned(), disk.to_str().unwrap().to_owned()];
    service.child = Service::spawn("blk", &service.socket, &arguments);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read(debug_console(&service)).unwrap(), b"BD");
}
