//! The MSI-X table and the message control register (PCI Local Bus Specification 3.0, section 6.8.2).

use super::interrupts::MsiMessage;

/// Bytes of a table entry.
const ENTRY: usize = 16;
/// Vector control, bit 0: masked.
const MASKED: u32 = 1;
/// Message control, bit 15: MSI-X on.
const ENABLE: u16 = 1 << 15;
/// Message control, bit 14: all vectors masked.
const FUNCTION_MASK: u16 = 1 << 14;

/// Table and control. Entries are kept as the bytes that the guest sees.
#[derive(Debug)]
pub(super) struct Msix {
    entries: Vec<[u8; ENTRY]>,
    enabled: bool,
    function_masked: bool,
}

fn word(entry: &[u8; ENTRY], index: usize) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(entry.iter().skip(index * 4)) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}

/// An entry after reset: masked.
fn reset_entry() -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    if let Some(control) = entry.get_mut(12) {
        *control = 1;
    }
    entry
}

impl Msix {
    pub fn new(vectors: u16) -> Self {
        Self { entries: vec![reset_entry(); usize::from(vectors)], enabled: false, function_masked: false }
    }

    /// RST#.
    pub fn reset(&mut self) {
        self.entries.fill(reset_entry());
        self.enabled = false;
        self.function_masked = false;
    }

    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(u16::MAX)
    }

    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The guest wrote the message control register. Says whether it changed.
    pub fn set_control(&mut self, control: u16) -> bool {
        let before = (self.enabled, self.function_masked);
        self.enabled = control & ENABLE != 0;
        self.function_masked = control & FUNCTION_MASK != 0;
        before != (self.enabled, self.function_masked)
    }

    /// The message of a vector; `None` while it is masked or does not exist.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.entries.get(usize::from(vector))?;
        if !self.enabled || self.function_masked || word(entry, 3) & MASKED != 0 {
            return None;
        }
        let address = u64::from(word(entry, 1)) << 32 | u64::from(word(entry, 0));
        Some(MsiMessage { address, data: word(entry, 2) })
    }

    /// Reads the table; beyond its end zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = self.entries.as_flattened().iter().skip(start);
        data.fill_with(|| bytes.next().copied().unwrap_or(0));
    }

    /// Writes the table. Returns the first and the last vector that it touched.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<(u16, u16)> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let last = start.saturating_add(data.len().saturating_sub(1));
        for (byte, new) in self.entries.as_flattened_mut().iter_mut().skip(start).zip(data) {
            *byte = *new;
        }
        // The reserved bits of vector control stay zero.
        for entry in self.entries.iter_mut().skip(start / ENTRY).take(last / ENTRY - start / ENTRY + 1) {
            for (byte, mask) in entry.iter_mut().skip(12).zip([1, 0, 0, 0]) {
                *byte &= mask;
            }
        }
        let vector = |offset: usize| u16::try_from(offset / ENTRY).ok();
        let first = vector(start).filter(|first| *first < self.vectors())?;
        Some((first, vector(last).unwrap_or(u16::MAX)))
    }
}
