//! Why a kernel cannot be booted.

use std::io;

use bulkhead_ipc::channel::message::Input;
use bulkhead_ipc::memory::MemoryError;

/// An error of direct kernel boot. Sizes are bytes.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be examined or read.
    #[error("cannot read the {what}")]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, a pipe, or some such.
    #[error("the {0} is not a regular file")]
    NotAFile(&'static str),
    /// Neither a bzImage nor ELF.
    #[error(
        "this is not a kernel: it begins with {magic}{guess}; a bzImage or an ELF file with a PVH note is needed"
    )]
    NotAKernel {
        /// The first bytes in hexadecimal.
        magic: String,
        /// What the file may be, in brackets, or nothing.
        guess: &'static str,
    },
    /// A kernel for other processors.
    #[error("this kernel is for {0}, not for x86-64")]
    WrongArchitecture(String),
    /// An image that can be no firmware.
    #[error("the firmware has {0} bytes; an image has whole pages of 4 KiB, at least one and at most 8 MiB")]
    FirmwareSize(u64),
    /// A file that ends before what its header says is in it.
    #[error("the {kind} is truncated: its {part} ends at {needed}, the file at {actual}")]
    Truncated {
        /// `bzImage` or `ELF file`.
        kind: &'static str,
        /// Which part is not whole.
        part: &'static str,
        /// Where the part ends.
        needed: u64,
        /// Size of the file.
        actual: u64,
    },
    /// A bzImage before boot protocol 2.12.
    #[error("the kernel's boot protocol is {major}.{minor:02}, 2.12 (Linux 3.8) or newer is needed")]
    OldProtocol {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// A 32-bit bzImage.
    #[error("the kernel has no 64-bit entry point: it was built for 32-bit processors")]
    No64BitEntry,
    /// A header field that cannot be.
    #[error("the {kind} is damaged: {field} is {value:#x}")]
    BadHeader {
        /// `bzImage` or `ELF file`.
        kind: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// ELF without XEN_ELFNOTE_PHYS32_ENTRY.
    #[error("the ELF file has no PVH note (Linux: CONFIG_PVH), so that its entry point is not known")]
    NoPvhNote,
    /// A part of the kernel wants to lie below 1 MiB, where the boot structures are.
    #[error("the kernel wants to lie at {0:#x}; it must lie at 1 MiB or above")]
    KernelTooLow(u64),
    /// The kernel does not fit into guest memory.
    #[error("the kernel needs memory up to {needed}, the machine has {available} below its device memory")]
    KernelTooLarge {
        /// First address that the kernel does not need.
        needed: u64,
        /// First address after RAM.
        available: u64,
    },
    /// Less RAM than boot structures need.
    #[error("{ram} bytes of memory are too little to boot a kernel, which takes at least {needed}")]
    RamTooSmall {
        /// Size of RAM.
        ram: u64,
        /// What is needed.
        needed: u64,
    },
    /// An initrd without contents.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// No room for the initrd.
    #[error("the initrd has {size} bytes, the kernel and the machine's memory leave room for {available}")]
    InitrdTooLarge {
        /// Size of the initrd.
        size: u64,
        /// Bytes between the kernel and the end of what it can reach.
        available: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {length} bytes, this kernel takes {limit}")]
    CommandLineTooLong {
        /// Its length.
        length: u64,
        /// The longest that is taken.
        limit: u64,
    },
    /// The command line has a NUL, where the kernel would end it.
    #[error("the kernel command line has a NUL character at byte {position}")]
    CommandLineHasNul {
        /// Offset of the first one.
        position: usize,
    },
    /// More memory map entries than a kernel can be told.
    #[error("the memory map has {entries} entries, the boot protocol takes {limit}")]
    MapTooLong {
        /// How many there are.
        entries: usize,
        /// How many can be.
        limit: usize,
    },
    /// Guest memory could not be written.
    #[error("cannot write to guest memory")]
    Memory(#[from] MemoryError),
}

impl BootError {
    /// What the user gave that is to blame; `None` where it is not the user's doing.
    #[must_use]
    pub fn input(&self) -> Option<Input> {
        match self {
            Self::Read { what: "firmware", .. } | Self::NotAFile("firmware") | Self::FirmwareSize(_) => {
                Some(Input::Firmware)
            }
            Self::Read { what: "initrd", .. }
            | Self::NotAFile("initrd")
            | Self::EmptyInitrd
            | Self::InitrdTooLarge { .. } => Some(Input::Initrd),
            Self::Read { .. }
            | Self::NotAFile(_)
            | Self::NotAKernel { .. }
            | Self::WrongArchitecture(_)
            | Self::Truncated { .. }
            | Self::OldProtocol { .. }
            | Self::No64BitEntry
            | Self::BadHeader { .. }
            | Self::NoPvhNote
            | Self::KernelTooLow(_)
            | Self::KernelTooLarge { .. } => Some(Input::Kernel),
            Self::RamTooSmall { .. } | Self::CommandLineTooLong { .. } | Self::CommandLineHasNul { .. } => {
                Some(Input::Setting)
            }
            Self::MapTooLong { .. } | Self::Memory(_) => None,
        }
    }
}
