//! The receiver FIFO: 16 characters, each with the errors it arrived with (PC16550D, section 8.4).

use super::registers::lsr;

/// Depth of both FIFOs.
pub const DEPTH: usize = 16;

/// One received character.
#[derive(Debug, Clone, Copy, Default)]
struct Character {
    byte: u8,
    /// PE, FE and BI, until they have shown up in the LSR.
    errors: u8,
    /// It came from outside, not by the loopback.
    outside: bool,
}

/// Receiver FIFO, or, one deep, the receiver buffer of the character mode.
#[derive(Debug, Default)]
pub struct ReceiveFifo {
    characters: [Character; DEPTH],
    length: usize,
}

impl ReceiveFifo {
    /// Characters in it.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Characters in it that came from outside.
    pub fn came_from_outside(&self) -> usize {
        self.characters.iter().take(self.length).filter(|character| character.outside).count()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends a character with its errors, or `None`: it comes from outside. False when all `depth` places are taken.
    pub fn push(&mut self, byte: u8, errors: Option<u8>, depth: usize) -> bool {
        if self.length >= depth {
            return false;
        }
        let Some(place) = self.characters.get_mut(self.length) else { return false };
        *place = Character { byte, errors: errors.unwrap_or(0), outside: errors.is_none() };
        self.length = self.length.saturating_add(1);
        true
    }

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<u8> {
        if self.length == 0 {
            return None;
        }
        let byte = self.characters.first().map(|character| character.byte);
        self.characters.copy_within(1.., 0);
        self.length = self.length.saturating_sub(1);
        byte
    }

    /// Errors of the oldest, which is the one that the next read of RBR returns (section 8.3); shown once.
    pub fn reveal_errors(&mut self) -> u8 {
        match self.characters.first_mut() {
            Some(character) if self.length > 0 => std::mem::take(&mut character.errors),
            _ => 0,
        }
    }

    /// LSR bit 7: an error among the characters that have not been revealed.
    pub fn has_errors(&self) -> bool {
        self.characters.iter().take(self.length).any(|character| character.errors & lsr::ERRORS != 0)
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.length = 0;
    }
}

/// Transmitter FIFO. It holds characters only while the output cannot take them.
#[derive(Debug, Default)]
pub struct TransmitFifo {
    bytes: [u8; DEPTH],
    length: usize,
}

impl TransmitFifo {
    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many it has.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Appends; when all `depth` places are taken the newest is overwritten, as a full holding register is.
    pub fn push(&mut self, byte: u8, depth: usize) {
        let place = self.length.min(depth.clamp(1, DEPTH).saturating_sub(1));
        if let Some(slot) = self.bytes.get_mut(place) {
            *slot = byte;
            self.length = place.saturating_add(1);
        }
    }

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<u8> {
        if self.length == 0 {
            return None;
        }
        let byte = self.bytes.first().copied();
        self.bytes.copy_within(1.., 0);
        self.length = self.length.saturating_sub(1);
        byte
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.length = 0;
    }
}
