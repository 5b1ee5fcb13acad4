//! A PS/2 keyboard: the commands of "IBM Personal System/2 Hardware Interface Technical Reference", keyboard and auxiliary
//! device controller, section 4. Scan code sets 1, 2 and 3. What set 3 does with single keys (commands FB–FD) is
//! acknowledged without effect.

use std::collections::VecDeque;

use bulkhead_ipc::channel::message::Key;
use serde::{Deserialize, Serialize};

/// Keys that wait for room, at the most: what a person types ahead.
pub const WAITING: usize = 256;

const ACK: u8 = 0xFA;
const RESEND: u8 = 0xFE;
/// Basic assurance test passed.
const BAT_PASSED: u8 = 0xAA;
const IDENTITY: [u8; 2] = [0xAB, 0x83];
/// Prefixes: of keys that the AT keyboard did not have, and of a release in set 2.
const EXTENDED: u8 = 0xE0;
const RELEASE: u8 = 0xF0;
/// Keys whose codes are sequences of their own.
const PAUSE: u16 = 0xE114;
const PRINT: u16 = 0xE07C;
/// Print Screen is sent as if a Shift key were held.
const PRINT_SHIFT: u8 = 0x12;

/// Codes of set 1 by those of set 2: what the keyboard controller's translation gives.
#[rustfmt::skip]
const SET1: [u8; 128] = [
    0x00, 0x43, 0x41, 0x3F, 0x3D, 0x3B, 0x3C, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3E, 0x0F, 0x29, 0x59,
    0x65, 0x38, 0x2A, 0x70, 0x1D, 0x10, 0x02, 0x5A, 0x66, 0x71, 0x2C, 0x1F, 0x1E, 0x11, 0x03, 0x5B,
    0x67, 0x2E, 0x2D, 0x20, 0x12, 0x05, 0x04, 0x5C, 0x68, 0x39, 0x2F, 0x21, 0x14, 0x13, 0x06, 0x5D,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5E, 0x6A, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5F,
    0x6B, 0x33, 0x25, 0x17, 0x18, 0x0B, 0x0A, 0x60, 0x6C, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0C, 0x61,
    0x6D, 0x73, 0x28, 0x74, 0x1A, 0x0D, 0x62, 0x6E, 0x3A, 0x36, 0x1C, 0x1B, 0x75, 0x2B, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7A, 0x0E, 0x7B, 0x7C, 0x4F, 0x7D, 0x4B, 0x47, 0x7E, 0x7F, 0x6F,
    0x52, 0x53, 0x50, 0x4C, 0x4D, 0x48, 0x01, 0x45, 0x57, 0x4E, 0x51, 0x4A, 0x37, 0x49, 0x46, 0x54,
];

/// Codes of set 3 where they differ from those of set 2, which stand first. Other keys with a prefix have none.
#[rustfmt::skip]
const SET3: [(u16, u8); 47] = [
    (0x01, 0x47), (0x03, 0x27), (0x04, 0x17), (0x05, 0x07), (0x06, 0x0F), (0x07, 0x5E), (0x09, 0x4F), (0x0A, 0x3F), (0x0B, 0x2F),
    (0x0C, 0x1F), (0x11, 0x19), (0x13, 0x87), (0x14, 0x11), (0x58, 0x14), (0x5D, 0x5C), (0x61, 0x13), (0x64, 0x86), (0x67, 0x85),
    (0x6A, 0x5D), (0x76, 0x08), (0x77, 0x76), (0x78, 0x56), (0x79, 0x7C), (0x7B, 0x84), (0x7C, 0x7E), (0x7E, 0x5F), (0x83, 0x37),
    (0x84, 0x57), (0xE011, 0x39), (0xE014, 0x58), (0xE01F, 0x8B), (0xE027, 0x8C), (0xE02F, 0x8D), (0xE04A, 0x77), (0xE05A, 0x79),
    (0xE069, 0x65), (0xE06B, 0x61), (0xE06C, 0x6E), (0xE070, 0x67), (0xE071, 0x64), (0xE072, 0x60), (0xE074, 0x6A), (0xE075, 0x63),
    (0xE07A, 0x6D), (0xE07D, 0x6F), (PRINT, 0x57), (PAUSE, 0x62),
];

/// Turns set 2 into set 1, byte by byte: the prefix of a release becomes bit 7 of what follows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translation {
    release: bool,
}

impl Translation {
    /// What comes of a byte; nothing yet of a prefix.
    pub fn translate(&mut self, byte: u8) -> Option<u8> {
        if byte == RELEASE {
            self.release = true;
            return None;
        }
        let code = match byte {
            0x83 => 0x41,
            0x84 => 0x54,
            _ => SET1.get(usize::from(byte)).copied().unwrap_or(byte),
        };
        Some(code | u8::from(std::mem::take(&mut self.release)) << 7)
    }
}

/// The keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyboard {
    /// Answers to commands, which go before codes.
    answers: VecDeque<u8>,
    /// Bytes of keys.
    codes: VecDeque<u8>,
    /// Keys that have not become codes.
    keys: VecDeque<Key>,
    /// Scan code set, 1 to 3.
    set: u8,
    /// Set 3 tells of releases.
    releases: bool,
    scanning: bool,
    /// The command that takes the next byte.
    pending: Option<u8>,
    /// The byte sent last.
    last: u8,
}

impl Default for Keyboard {
    /// After its power-on test.
    fn default() -> Self {
        let (answers, codes, keys) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Self { answers, codes, keys, set: 2, releases: true, scanning: true, pending: None, last: 0 }
    }
}

impl Keyboard {
    /// A key is pressed or released. Nobody hears of it while scanning is off, or when too many wait already.
    pub fn press(&mut self, key: Key) {
        if self.scanning && self.keys.len() < WAITING {
            self.keys.push_back(key);
        }
    }

    /// Takes the byte that it sends next.
    pub fn send(&mut self) -> Option<u8> {
        if self.answers.is_empty() && self.codes.is_empty() {
            let key = self.keys.pop_front()?;
            self.encode(key);
        }
        let byte = self.answers.pop_front().or_else(|| self.codes.pop_front())?;
        self.last = byte;
        Some(byte)
    }

    /// Takes a byte of the controller.
    pub fn receive(&mut self, byte: u8) {
        // A command in place of an argument ends the one before.
        match self.pending.take().filter(|_| byte < 0xED) {
            // Indicators and typematic rate: there is nobody to see them, and the host repeats keys itself.
            Some(0xED | 0xF3) => self.answer(&[ACK]),
            // Any number of keys.
            Some(kind @ 0xFB..=0xFD) => {
                self.pending = Some(kind);
                self.answer(&[ACK]);
            }
            Some(_) => match byte {
                0 => self.answer(&[ACK, self.set]),
                1..=3 => {
                    self.set = byte;
                    self.answer(&[ACK]);
                }
                _ => self.answer(&[RESEND]),
            },
            None => self.command(byte),
        }
    }

    fn command(&mut self, command: u8) {
        match command {
            0xED | 0xF0 | 0xF3 | 0xFB..=0xFD => {
                self.pending = Some(command);
                self.answer(&[ACK]);
            }
            0xEE => self.answer(&[0xEE]),
            0xF2 => self.answer(&[ACK, IDENTITY[0], IDENTITY[1]]),
            // Enable; disable with defaults; set defaults.
            0xF4 => self.forget(true),
            0xF5 => {
                self.set = 2;
                self.forget(false);
            }
            0xF6 => {
                self.set = 2;
                self.forget(self.scanning);
            }
            // All keys of set 3: typematic, make and break, make, all three.
            0xF7..=0xFA => {
                self.releases = matches!(command, 0xF8 | 0xFA);
                self.answer(&[ACK]);
            }
            0xFE => self.answers.push_front(self.last),
            0xFF => {
                *self = Self::default();
                self.answer(&[ACK, BAT_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn forget(&mut self, scanning: bool) {
        self.codes.clear();
        self.keys.clear();
        self.scanning = scanning;
        self.answer(&[ACK]);
    }

    /// A command comes after the answer to the one before was read, or that answer is of no use any more.
    fn answer(&mut self, bytes: &[u8]) {
        self.answers.clear();
        self.answers.extend(bytes);
    }

    fn encode(&mut self, Key { code, pressed }: Key) {
        if self.set == 3 {
            return self.encode_set3(code, pressed);
        }
        let [prefix, low] = code.to_be_bytes();
        let bytes: &[u8] = match (code, pressed) {
            (PAUSE, true) => &[0xE1, 0x14, 0x77, 0xE1, RELEASE, 0x14, RELEASE, 0x77],
            // It says that it is released at once.
            (PAUSE, false) => &[],
            (PRINT, true) => &[EXTENDED, PRINT_SHIFT, EXTENDED, low],
            (PRINT, false) => &[EXTENDED, RELEASE, low, EXTENDED, RELEASE, PRINT_SHIFT],
            (_, true) if prefix == EXTENDED => &[EXTENDED, low],
            (_, false) if prefix == EXTENDED => &[EXTENDED, RELEASE, low],
            (_, true) => &[low],
            (_, false) => &[RELEASE, low],
        };
        let mut translation = Translation::default();
        let set1 = self.set == 1;
        let convert = |byte: &u8| if set1 { translation.translate(*byte) } else { Some(*byte) };
        self.codes.extend(bytes.iter().filter_map(convert));
    }

    /// One byte for each key, none of which is special.
    fn encode_set3(&mut self, code: u16, pressed: bool) {
        let other = SET3.iter().find(|(set2, _)| *set2 == code).map(|(_, set3)| *set3);
        let Some(byte) = other.or_else(|| u8::try_from(code).ok()) else { return };
        match (pressed, self.releases) {
            (true, _) => self.codes.push_back(byte),
            (false, true) => self.codes.extend([RELEASE, byte]),
            (false, false) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| keyboard.send()).collect()
    }

    fn command(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|byte| keyboard.receive(*byte));
        all(keyboard)
    }

    fn strike(keyboard: &mut Keyboard, code: u16) -> Vec<u8> {
        keyboard.press(Key { code, pressed: true });
        keyboard.press(Key { code, pressed: false });
        all(keyboard)
    }

    #[test]
    fn keys_are_sent_in_the_chosen_set() {
        let mut keyboard = Keyboard::default();
        assert_eq!(strike(&mut keyboard, 0x1C), [0x1C, 0xF0, 0x1C]);
        assert_eq!(strike(&mut keyboard, 0xE071), [0xE0, 0x71, 0xE0, 0xF0, 0x71]);
        assert_eq!(strike(&mut keyboard, PAUSE), [0xE1, 0x14, 0x77, 0xE1, 0xF0, 0x14, 0xF0, 0x77]);
        assert_eq!(command(&mut keyboard, &[0xF0, 1]), [ACK]);
        assert_eq!(command(&mut keyboard, &[0xF0, 0]), [ACK, 1]);
        assert_eq!(strike(&mut keyboard, 0x1C), [0x1E, 0x9E]);
        assert_eq!(strike(&mut keyboard, 0xE071), [0xE0, 0x53, 0xE0, 0xD3]);
        assert_eq!(strike(&mut keyboard, 0x83), [0x41, 0xC1]);
        assert_eq!(strike(&mut keyboard, PAUSE), [0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5]);
        assert_eq!(strike(&mut keyboard, PRINT), [0xE0, 0x2A, 0xE0, 0x37, 0xE0, 0xB7, 0xE0, 0xAA]);
        assert_eq!(command(&mut keyboard, &[0xF0, 4]), [RESEND]);
        assert_eq!(command(&mut keyboard, &[0xF0, 0]), [ACK, 1]);
    }

    /// What Linux's atkbd does with `set=3`.
    #[test]
    fn set_3_has_one_byte_for_each_key() {
        let mut keyboard = Keyboard::default();
        assert_eq!(command(&mut keyboard, &[0xEC]), [RESEND], "an extension that it lacks");
        assert_eq!(command(&mut keyboard, &[0xF0, 3]), [ACK]);
        assert_eq!(command(&mut keyboard, &[0xF0, 0]), [ACK, 3]);
        assert_eq!(command(&mut keyboard, &[0xFA]), [ACK]);
        for (code, byte) in
            [(0x1C, 0x1C), (0x76, 0x08), (0x14, 0x11), (0x58, 0x14), (0xE075, 0x63), (PAUSE, 0x62)]
        {
            assert_eq!(strike(&mut keyboard, code), [byte, RELEASE, byte], "{code:x}");
        }
        assert!(strike(&mut keyboard, 0xE037).is_empty(), "the power key has no code");
        // Make only, of all keys and of some.
        assert_eq!(command(&mut keyboard, &[0xF9]), [ACK]);
        assert_eq!(strike(&mut keyboard, 0x1C), [0x1C]);
        assert_eq!(command(&mut keyboard, &[0xFC]), [ACK]);
        assert_eq!(command(&mut keyboard, &[0x1C]), [ACK]);
        assert_eq!(command(&mut keyboard, &[0x32]), [ACK]);
        assert_eq!(command(&mut keyboard, &[0xF0, 2]), [ACK]);
        assert_eq!(strike(&mut keyboard, 0x1C), [0x1C, RELEASE, 0x1C]);
        let mut codes: Vec<u8> = SET3.iter().map(|(_, code)| *code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), SET3.len() - 1, "only Print Screen and SysRq share a code");
    }

    #[test]
    fn every_code_has_one_translation() {
        let mut codes = SET1;
        codes.sort_unstable();
        assert!(codes.iter().copied().eq(0..128));
    }

    #[test]
    fn commands_are_answered() {
        let mut keyboard = Keyboard::default();
        for (bytes, answer) in [
            (&[0xFF_u8][..], &[ACK, BAT_PASSED][..]),
            (&[0xF2], &[ACK, 0xAB, 0x83]),
            (&[0xED], &[ACK]),
            (&[0x07], &[ACK]),
            (&[0xF3], &[ACK]),
            (&[0x2B], &[ACK]),
            (&[0xEE], &[0xEE]),
            (&[0xF4], &[ACK]),
            (&[0xF6], &[ACK]),
            (&[0xFA], &[ACK]),
            (&[0x01], &[RESEND]),
            // A command in place of an argument.
            (&[0xED, 0xF2], &[ACK, 0xAB, 0x83]),
        ] {
            assert_eq!(command(&mut keyboard, bytes), answer, "{bytes:x?}");
        }
        assert_eq!(command(&mut keyboard, &[0xFE]), [0x83]);
        assert_eq!(command(&mut keyboard, &[0xF0, 0xFF]), [ACK, BAT_PASSED]);
    }

    #[test]
    fn nothing_is_typed_while_scanning_is_off_and_a_reset_forgets() {
        let mut keyboard = Keyboard::default();
        command(&mut keyboard, &[0xF5]);
        assert!(strike(&mut keyboard, 0x1C).is_empty());
        command(&mut keyboard, &[0xF4]);
        keyboard.press(Key { code: 0x1C, pressed: true });
        assert_eq!(command(&mut keyboard, &[0xFF]), [ACK, BAT_PASSED]);
        for _ in 0..2 * WAITING {
            keyboard.press(Key { code: 0x1C, pressed: true });
        }
        assert_eq!(all(&mut keyboard).len(), WAITING);
    }
}
