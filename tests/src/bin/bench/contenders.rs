//! The monitors that are compared, and how each is started for the same guest.

use std::path::Path;
use std::process::Command;

use bulkhead_tests::harness::Places;

/// What the guest is to be.
pub struct Guest<'a> {
    /// Words of the kernel command line.
    pub cmdline: &'a str,
    /// MiB of memory.
    pub memory: u32,
    /// A disk image; with it come an entropy device and a console.
    pub disk: Option<&'a Path>,
}

/// A monitor with one form of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// This project, bzImage.
    BulkheadBzImage,
    /// This project, ELF by PVH.
    BulkheadElf,
    /// `qemu-system-x86_64 -M pc`, bzImage.
    QemuPc,
    /// `qemu-system-x86_64 -M microvm`, bzImage.
    QemuMicrovm,
}

impl Contender {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::QemuPc, Self::BulkheadBzImage, Self::QemuMicrovm, Self::BulkheadElf];

    /// As it stands in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::BulkheadBzImage => "Bulkhead, bzImage",
            Self::BulkheadElf => "Bulkhead, ELF",
            Self::QemuPc => "QEMU pc, bzImage",
            Self::QemuMicrovm => "QEMU microvm, bzImage",
        }
    }

    /// The command that boots the stock kernel with its serial port on standard output.
    pub fn command(self, places: &Places, guest: &Guest<'_>) -> Command {
        let kernel = places.guest.join(if self == Self::BulkheadElf { "vmlinux" } else { "bzImage" });
        let mut command = match self {
            Self::BulkheadBzImage | Self::BulkheadElf => bulkhead(places, guest),
            Self::QemuPc | Self::QemuMicrovm => self.qemu(guest),
        };
        let (kernel_option, initrd, words) = match self {
            Self::BulkheadBzImage | Self::BulkheadElf => ("--kernel", "--initrd", "--cmdline"),
            Self::QemuPc | Self::QemuMicrovm => ("-kernel", "-initrd", "-append"),
        };
        command.arg(kernel_option).arg(kernel).arg(initrd).arg(places.guest.join("initramfs"));
        command.arg(words).arg(format!("console=ttyS0 panic=1 {}", guest.cmdline));
        command
    }

    fn qemu(self, guest: &Guest<'_>) -> Command {
        let bus = if self == Self::QemuPc { "pci" } else { "device" };
        let options = if bus == "pci" { ",disable-legacy=on" } else { "" };
        let memory = if guest.disk.is_some() { Memory::File } else { Memory::Private };
        let mut command =
            qemu(if self == Self::QemuPc { "pc" } else { "microvm" }, "host", guest.memory, memory);
        if let Some(disk) = guest.disk {
            command.args(["-drive", &format!("file={},format=raw,if=none,id=data", disk.display())]);
            command.args(["-device", &format!("virtio-blk-{bus},drive=data{options}")]);
            command.args(["-device", &format!("virtio-rng-{bus}{options}")]);
            command.args(["-device", &format!("virtio-serial-{bus}{options}")]);
            command.args(["-chardev", "null,id=console", "-device", "virtconsole,chardev=console"]);
        }
        command
    }
}

/// `bulkhead run` with the guest's memory and devices.
pub fn bulkhead(places: &Places, guest: &Guest<'_>) -> Command {
    let mut command = Command::new(places.programs.join("bulkhead"));
    command.args(["run", "--cpus", "1", "--serial", "stdio"]);
    command.args(["--memory", &format!("{}M", guest.memory)]);
    if let Some(disk) = guest.disk {
        command.arg("--disk").arg(format!("path={}", disk.display())).args(["--rng", "--console"]);
    }
    command
}

/// What QEMU's guest memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Private memory, its default, which gets huge pages by itself.
    Private,
    /// A memfd, which can be told from the rest of the process.
    File,
}

/// QEMU with nothing but a serial port.
pub fn qemu(machine: &str, cpu: &str, size: u32, memory: Memory) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let backend = if memory == Memory::File { ",memory-backend=ram" } else { "" };
    command.args(["-M", &format!("{machine},accel=kvm{backend}"), "-cpu", cpu, "-smp", "1"]);
    command.args(["-m", &size.to_string()]);
    if memory == Memory::File {
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={size}M,share=on")]);
    }
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command
}
