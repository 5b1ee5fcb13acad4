//! Accesses as they travel: cut into the cycles that a 32-bit PCI bus carries.

use super::host::Space;

/// What a decoder can see of a cycle besides its address. Only the host bridge tells dwords from narrower cycles, since its
/// CONFADD register answers nothing else (290549, section 3.1.1), and reads of memory from writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CycleKind {
    /// A byte or word at an I/O port.
    Port,
    /// An aligned dword at an I/O port.
    PortDword,
    /// A read of memory, any width. PAM tells reads from writes (290549, section 3.2.18).
    MemoryRead,
    /// A write to memory, any width.
    MemoryWrite,
}

impl CycleKind {
    /// All kinds.
    #[cfg(test)]
    pub(super) const ALL: [Self; 4] = [Self::Port, Self::PortDword, Self::MemoryRead, Self::MemoryWrite];

    /// The kind of a read of `width` bytes.
    pub(super) const fn read(space: Space, width: usize) -> Self {
        match space {
            Space::Port if width == 4 => Self::PortDword,
            Space::Port => Self::Port,
            Space::Memory => Self::MemoryRead,
        }
    }

    /// The kind of a write of `width` bytes.
    pub(super) const fn write(space: Space, width: usize) -> Self {
        match space {
            Space::Port => Self::read(space, width),
            Space::Memory => Self::MemoryWrite,
        }
    }

    /// The address space.
    pub(super) const fn space(self) -> Space {
        match self {
            Self::Port | Self::PortDword => Space::Port,
            Self::MemoryRead | Self::MemoryWrite => Space::Memory,
        }
    }
}

/// The width of the next cycle of an access that has `left` bytes to go from `address`: 4, 2 or 1 bytes, aligned to
/// its width. Zero when nothing is left. Cutting this way keeps every cycle within one dword, as on PCI, and hands
/// devices no odd byte enables.
pub(super) const fn next_cycle(address: u64, left: usize) -> usize {
    match left {
        0 => 0,
        _ if left >= 4 && address.is_multiple_of(4) => 4,
        _ if left >= 2 && address.is_multiple_of(2) => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(mut address: u64, mut left: usize) -> Vec<(u64, usize)> {
        let mut cycles = Vec::new();
        while let width @ 1.. = next_cycle(address, left) {
            cycles.push((address, width));
            address += width as u64;
            left -= width;
        }
        cycles
    }

    #[test]
    fn aligned_accesses_up_to_a_dword_are_one_cycle() {
        assert_eq!(cut(0x1000, 1), [(0x1000, 1)]);
        assert_eq!(cut(0x1002, 2), [(0x1002, 2)]);
        assert_eq!(cut(0x1004, 4), [(0x1004, 4)]);
    }

    #[test]
    fn eight_bytes_are_two_dwords() {
        assert_eq!(cut(0x1000, 8), [(0x1000, 4), (0x1004, 4)]);
    }

    #[test]
    fn unaligned_accesses_are_cut_at_dwords_and_into_aligned_parts() {
        assert_eq!(cut(0x1001, 4), [(0x1001, 1), (0x1002, 2), (0x1004, 1)]);
        assert_eq!(cut(0x1003, 2), [(0x1003, 1), (0x1004, 1)]);
        assert_eq!(cut(0x1001, 2), [(0x1001, 1), (0x1002, 1)]);
    }
}
