//! Base address registers (PCI Local Bus Specification 3.0, section 6.2.5.1).

use super::super::host::Space;
use super::config_space::{Command, header};

/// What a base address register maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports; size a power of two, 4–256.
    Io,
    /// Memory below 4 GiB; size a power of two, at least 16.
    Memory32,
    /// Memory anywhere; takes this register and the next.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// The expansion ROM (section 6.2.5.2), number [`ROM_BAR`]: memory below 4 GiB with an enable bit of its own, at least 2 KiB.
    Rom,
}

/// The number of the expansion ROM's register among the base address registers.
pub const ROM_BAR: u8 = 6;

/// The offset of a base address register in configuration space.
pub(in super::super) fn register(index: u8) -> u16 {
    if index == ROM_BAR {
        header::ROM
    } else {
        header::BAR0.saturating_add(u16::from(index).saturating_mul(4))
    }
}

impl BarKind {
    /// The read-only low bits of the register.
    pub(super) const fn flags(self) -> u32 {
        match self {
            Self::Io => 1,
            Self::Memory32 | Self::Rom => 0,
            Self::Memory64 { prefetchable: false } => 0b0100,
            Self::Memory64 { prefetchable: true } => 0b1100,
        }
    }

    /// The address space that it maps into.
    #[must_use]
    pub const fn space(self) -> Space {
        match self {
            Self::Io => Space::Port,
            Self::Memory32 | Self::Memory64 { .. } | Self::Rom => Space::Memory,
        }
    }

    /// Whether `size` is one that such a register can have.
    pub(super) const fn allows(self, size: u64) -> bool {
        size.is_power_of_two()
            && match self {
                Self::Io => size >= 4 && size <= 256,
                Self::Memory32 => size >= 16 && size <= 1 << 31,
                Self::Memory64 { .. } => size >= 16 && size <= 1 << 40,
                Self::Rom => size >= 1 << 11 && size <= 1 << 24,
            }
    }
}

/// A base address register as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0–5, or [`ROM_BAR`].
    pub index: u8,
    /// What it maps.
    pub kind: BarKind,
    /// The address that the guest gave it, a multiple of `size`.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

impl Bar {
    /// The address range that it decodes under this command register, first and last address; nothing while its space is off.
    #[must_use]
    pub fn decoded(&self, command: Command) -> Option<(u64, u64)> {
        let on = match self.kind.space() {
            Space::Port => command.io(),
            Space::Memory => command.memory(),
        };
        let last = self.address.checked_add(self.size.checked_sub(1)?)?;
        (on && last <= self.kind.space().last()).then_some((self.address, last))
    }
}
