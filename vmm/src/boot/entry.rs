//! State of the first vCPU, as plain numbers.

/// A segment register with its hidden part (Intel SDM volume 3, 3.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, whatever the granularity.
    pub limit: u32,
    /// Type field.
    pub kind: u8,
    /// S: code or data, not a system segment.
    pub code_or_data: bool,
    /// D/B: 32-bit.
    pub default_32: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// G: the limit counts pages.
    pub granularity: bool,
}

impl Segment {
    /// 64-bit code, `__BOOT_CS` of the Linux boot protocol.
    pub(super) const CODE_64: Self = Self {
        selector: 0x10,
        base: 0,
        limit: u32::MAX,
        kind: 0xB,
        code_or_data: true,
        default_32: false,
        long: true,
        granularity: true,
    };
    /// 32-bit code over all of the address space.
    pub(super) const CODE_32: Self = Self { default_32: true, long: false, ..Self::CODE_64 };
    /// Data over all of the address space, `__BOOT_DS`.
    pub(super) const DATA: Self =
        Self { selector: 0x18, kind: 0x3, default_32: true, long: false, ..Self::CODE_64 };
    /// A busy TSS of 0x68 bytes at 0.
    pub(super) const TASK: Self = Self {
        selector: 0x20,
        base: 0,
        limit: 0x67,
        kind: 0xB,
        code_or_data: false,
        default_32: false,
        long: false,
        granularity: false,
    };

    /// The descriptor of this segment in a GDT, its lower 8 bytes. Present, privilege level 0.
    pub(super) fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.granularity { self.limit >> 12 } else { self.limit });
        let access = u64::from(self.kind & 0xF) | u64::from(self.code_or_data) << 4 | 1 << 7;
        let flags =
            u64::from(self.long) << 1 | u64::from(self.default_32) << 2 | u64::from(self.granularity) << 3;
        limit & 0xFFFF
            | (self.base & 0xFF_FFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
    }
}

/// GDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gdt {
    /// Guest address of the table.
    pub base: u64,
    /// Bytes of the table, minus one.
    pub limit: u16,
}

/// The mode in which the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode with identity page tables.
    Long {
        /// Guest address of the PML4.
        cr3: u64,
        /// The GDT that holds the segments below.
        gdt: Gdt,
    },
    /// 32-bit protected mode without paging.
    Protected32,
}

/// Control registers and EFER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
}

/// How the first vCPU begins. General registers that are not named are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer.
    pub rip: u64,
    /// RSI: `boot_params` for a bzImage.
    pub rsi: u64,
    /// RBX: start info for PVH, information for multiboot.
    pub rbx: u64,
    /// RAX: the number by which a multiboot kernel knows that its loader is one.
    pub rax: u64,
    /// RFLAGS: interrupts off, only the bit that is always set.
    pub rflags: u64,
    /// Mode, with what it needs.
    pub mode: Mode,
    /// CS.
    pub code: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// TR.
    pub task: Segment,
    /// The kernel unpacks itself first.
    pub unpacking: Option<Unpacking>,
}

/// A compressed kernel, which chooses by itself where it unpacks (kernel address-space layout randomization).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unpacking {
    /// Until it does, it writes to no RAM from this address on: neither itself nor what the loader gave it lies there.
    pub above: u64,
    /// Bytes from the place of its choice on that it fills at most.
    pub size: u64,
}

impl Entry {
    /// RFLAGS with nothing set but bit 1.
    pub(super) const RFLAGS: u64 = 1 << 1;

    /// Control registers that put a vCPU into [`Entry::mode`].
    pub fn control_registers(&self) -> ControlRegisters {
        const PE: u64 = 1;
        const ET: u64 = 1 << 4;
        const PG: u64 = 1 << 31;
        const PAE: u64 = 1 << 5;
        const LME: u64 = 1 << 8;
        const LMA: u64 = 1 << 10;
        match self.mode {
            Mode::Long { cr3, .. } => ControlRegisters { cr0: PE | ET | PG, cr3, cr4: PAE, efer: LME | LMA },
            Mode::Protected32 => ControlRegisters { cr0: PE | ET, cr3: 0, cr4: 0, efer: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_manual_says() {
        assert_eq!(Segment::CODE_64.descriptor(), 0x00AF_9B00_0000_FFFF);
        assert_eq!(Segment::CODE_32.descriptor(), 0x00CF_9B00_0000_FFFF);
        assert_eq!(Segment::DATA.descriptor(), 0x00CF_9300_0000_FFFF);
        assert_eq!(Segment::TASK.descriptor(), 0x0000_8B00_0000_0067);
    }
}
