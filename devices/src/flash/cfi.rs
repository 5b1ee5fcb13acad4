//! The command set of Intel's flash chips (Common Flash Memory Interface, JEDEC JESD68 and JEP137: command set 0001) as an
//! 8-bit chip, with the behaviour that firmware for virtual machines was written for.

/// What is erased at once, in bytes.
pub const BLOCK: u32 = 4096;
/// The most bytes of one buffered program, a power of two: one byte says how many.
const BUFFER: u32 = 256;

/// Commands.
mod command {
    pub(super) const PROGRAM: [u8; 2] = [0x10, 0x40];
    pub(super) const ERASE: u8 = 0x20;
    pub(super) const CLEAR_STATUS: u8 = 0x50;
    pub(super) const LOCK: u8 = 0x60;
    pub(super) const READ_STATUS: u8 = 0x70;
    pub(super) const READ_ID: u8 = 0x90;
    pub(super) const QUERY: u8 = 0x98;
    pub(super) const CONFIRM: u8 = 0xD0;
    pub(super) const BUFFER: u8 = 0xE8;
}

/// Status register: ready, erase failed, program failed. Clearing it clears `READY` too, by which OVMF tells this chip from
/// RAM and ROM; a real one is always ready.
const READY: u8 = 1 << 7;
const ERASE_ERROR: u8 = 1 << 5;
const PROGRAM_ERROR: u8 = 1 << 4;

/// Manufacturer and device code.
const ID: [u8; 2] = [0x89, 0x18];

/// Where the bytes are.
pub trait Store {
    /// The byte at an offset.
    fn byte(&self, offset: u32) -> u8;
    /// Replaces bytes; false when they could not be kept.
    fn set(&mut self, offset: u32, bytes: &[u8]) -> bool;
}

/// What reads show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Show {
    #[default]
    Array,
    Status,
    Id,
    Query,
}

/// A command of which more is to come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Pending {
    #[default]
    None,
    Program,
    Erase,
    Lock,
    /// How many bytes.
    Count,
    /// So many bytes are missing.
    Buffer(u32, Vec<(u32, u8)>),
    Confirm(Vec<(u32, u8)>),
}

/// The chip, its bytes aside.
#[derive(Debug, Default)]
pub struct Chip {
    size: u32,
    show: Show,
    pending: Pending,
    status: u8,
}

impl Chip {
    /// A chip of `size` bytes, after its reset.
    pub fn new(size: u32) -> Self {
        Self { size, ..Self::default() }
    }

    /// RP#: shows the array, forgets a command that has begun.
    pub fn reset(&mut self) {
        *self = Self::new(self.size);
    }

    /// Whether reads show the array.
    pub fn shows_array(&self) -> bool {
        self.show == Show::Array
    }

    /// Whether more of a command is to come.
    pub fn is_busy(&self) -> bool {
        self.pending != Pending::None
    }

    /// Reads a byte; nothing is beyond the end.
    pub fn read(&self, store: &impl Store, offset: u32) -> u8 {
        if offset >= self.size {
            return 0xFF;
        }
        match self.show {
            Show::Array => store.byte(offset),
            Show::Status => self.status,
            Show::Id => ID.get(offset as usize).copied().unwrap_or(0),
            Show::Query => self.query(offset),
        }
    }

    /// Writes a byte: a command, or what belongs to one.
    pub fn write(&mut self, store: &mut impl Store, offset: u32, value: u8) {
        if offset >= self.size {
            return;
        }
        match std::mem::take(&mut self.pending) {
            Pending::None => self.command(value),
            Pending::Program => self.program(store, &[(offset, value)]),
            Pending::Erase if value == command::CONFIRM => {
                let kept = store.set(offset & !(BLOCK - 1), &[0xFF; BLOCK as usize]);
                self.finish(if kept { 0 } else { ERASE_ERROR });
            }
            Pending::Erase => self.finish(ERASE_ERROR | PROGRAM_ERROR),
            // Blocks cannot be locked; firmware may try.
            Pending::Lock => self.finish(0),
            Pending::Count => {
                self.pending = Pending::Buffer(u32::from(value).saturating_add(1), Vec::new());
            }
            Pending::Buffer(missing, mut bytes) => {
                bytes.push((offset, value));
                self.pending = match missing.saturating_sub(1) {
                    0 => Pending::Confirm(bytes),
                    missing => Pending::Buffer(missing, bytes),
                };
            }
            Pending::Confirm(bytes) if value == command::CONFIRM => self.program(store, &bytes),
            Pending::Confirm(_) => self.finish(ERASE_ERROR | PROGRAM_ERROR),
        }
    }

    fn command(&mut self, value: u8) {
        let (show, pending) = match value {
            value if command::PROGRAM.contains(&value) => (Show::Status, Pending::Program),
            command::ERASE => (Show::Status, Pending::Erase),
            command::LOCK => (Show::Status, Pending::Lock),
            command::BUFFER => (Show::Status, Pending::Count),
            command::READ_STATUS => (Show::Status, Pending::None),
            command::READ_ID => (Show::Id, Pending::None),
            command::QUERY => (Show::Query, Pending::None),
            _ => (Show::Array, Pending::None),
        };
        if value == command::CLEAR_STATUS {
            self.status = 0;
        } else if pending == Pending::Count {
            self.status |= READY;
        }
        (self.show, self.pending) = (show, pending);
    }

    /// Programming only clears bits.
    fn program(&mut self, store: &mut impl Store, bytes: &[(u32, u8)]) {
        let kept = bytes.iter().all(|(offset, value)| {
            let value = store.byte(*offset) & value;
            store.set(*offset, &[value])
        });
        self.finish(if kept { 0 } else { PROGRAM_ERROR });
    }

    fn finish(&mut self, errors: u8) {
        self.status |= READY | errors;
        self.show = Show::Status;
    }

    /// The query table (JESD68, section 3): identification, voltages and times, geometry, and the vendor's table.
    fn query(&self, offset: u32) -> u8 {
        let blocks = (self.size / BLOCK).saturating_sub(1).to_le_bytes();
        let block = (BLOCK / 256).to_le_bytes();
        // A size that is no power of two is told as its largest part that is one.
        let size = u8::try_from(self.size.trailing_zeros()).unwrap_or(0);
        let buffer = u8::try_from(BUFFER.trailing_zeros()).unwrap_or(0);
        let (identification, voltages) = (*b"QRY\x01\x00\x31\x00\x00\x00\x00\x00", [0x45, 0x55, 0, 0]);
        let (times, most) = ([7, 7, 10, 0], [4, 4, 4, 0]);
        let geometry = [size, 0, 0, buffer, 0, 1, blocks[0], blocks[1], block[0], block[1]];
        let table = identification.iter().chain(&voltages).chain(&times).chain(&most).chain(&geometry);
        let vendor = b"PRI10";
        let mut bytes = table.chain(vendor);
        let at = offset.checked_sub(0x10).and_then(|at| usize::try_from(at).ok());
        at.and_then(|at| bytes.nth(at)).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl Store for Bytes {
        fn byte(&self, offset: u32) -> u8 {
            self.0[offset as usize]
        }

        fn set(&mut self, offset: u32, bytes: &[u8]) -> bool {
            self.0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            true
        }
    }

    fn chip() -> (Chip, Bytes) {
        (Chip::new(3 * BLOCK), Bytes(vec![0x55; 3 * BLOCK as usize]))
    }

    fn write(chip: &mut Chip, store: &mut Bytes, writes: &[(u32, u8)]) {
        for (offset, value) in writes {
            chip.write(store, *offset, *value);
        }
    }

    #[test]
    fn ovmf_recognises_the_chip() {
        let (mut chip, mut store) = chip();
        write(&mut chip, &mut store, &[(7, 0x50)]);
        assert_eq!(chip.read(&store, 7), 0x55, "clearing the status shows the array");
        write(&mut chip, &mut store, &[(7, 0x70)]);
        assert_eq!(chip.read(&store, 7), 0, "a cleared status: neither the byte nor the command");
        write(&mut chip, &mut store, &[(7, 0xFF)]);
        assert_eq!(chip.read(&store, 7), 0x55);
        assert!(chip.shows_array() && !chip.is_busy());
    }

    #[test]
    fn programming_clears_bits_and_erasing_sets_a_block() {
        let (mut chip, mut store) = chip();
        write(&mut chip, &mut store, &[(9, 0x40), (9, 0x0F)]);
        assert_eq!(chip.read(&store, 9), READY);
        assert_eq!(store.0[9], 0x05);
        write(&mut chip, &mut store, &[(BLOCK + 9, 0x20), (BLOCK + 9, 0xD0), (0, 0xFF)]);
        assert_eq!(store.0[BLOCK as usize..2 * BLOCK as usize], [0xFF; BLOCK as usize]);
        assert_eq!((store.0[BLOCK as usize - 1], store.0[2 * BLOCK as usize]), (0x55, 0x55));
    }

    #[test]
    fn an_erase_without_its_second_half_fails_and_erases_nothing() {
        let (mut chip, mut store) = chip();
        write(&mut chip, &mut store, &[(0, 0x20), (0, 0xFF)]);
        assert_eq!(chip.read(&store, 0), READY | ERASE_ERROR | PROGRAM_ERROR);
        assert!(store.0.iter().all(|byte| *byte == 0x55));
    }

    #[test]
    fn buffered_programs_take_effect_when_they_are_confirmed() {
        let (mut chip, mut store) = chip();
        let begin = [(0, 0xE8), (0, 1), (4, 0x11), (5, 0x44)];
        write(&mut chip, &mut store, &begin);
        assert_eq!((chip.read(&store, 0), store.0[4]), (READY, 0x55));
        write(&mut chip, &mut store, &[(0, 0xD0)]);
        assert_eq!((store.0[4], store.0[5]), (0x11, 0x44));
        write(&mut chip, &mut store, &begin);
        write(&mut chip, &mut store, &[(0, 0x00), (0, 0xFF)]);
        assert!(chip.shows_array());
    }

    #[test]
    fn the_query_table_tells_the_geometry() {
        let (mut chip, mut store) = chip();
        write(&mut chip, &mut store, &[(0x55, 0x98)]);
        let byte = |offset| chip.read(&store, offset);
        assert_eq!([byte(0x10), byte(0x11), byte(0x12), byte(0x13)], *b"QRY\x01");
        assert_eq!(byte(0x2C), 1, "one region");
        assert_eq!([byte(0x2D), byte(0x2E), byte(0x2F), byte(0x30)], [2, 0, 16, 0], "3 blocks of 4 KiB");
        assert_eq!([byte(0x31), byte(0x32), byte(0x33)], *b"PRI");
        assert_eq!(byte(0xFFF), 0);
        assert_eq!(byte(3 * BLOCK), 0xFF);
    }

    #[test]
    fn repeating_commands_from_the_start_gives_the_same_bytes() {
        // What a successor of a killed process is told: everything since the array was shown last.
        let writes = [
            (1, 0x40),
            (1, 0x01),
            (0, 0x20),
            (0, 0xD0),
            (1, 0x40),
            (1, 0xFE),
            (9, 0x10),
            (9, 0x33),
            (0, 0xFF),
        ];
        let (mut whole, mut expected) = chip();
        write(&mut whole, &mut expected, &writes);
        for killed_after in 0..writes.len() {
            let (mut first, mut store) = chip();
            write(&mut first, &mut store, &writes[..killed_after]);
            write(&mut Chip::new(3 * BLOCK), &mut store, &writes);
            assert_eq!(store.0, expected.0, "killed after {killed_after}");
        }
    }
}
