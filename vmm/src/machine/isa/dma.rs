//! The two DMA controllers and their page registers (290550, section 2.5.1), as far as firmware looks: a register file. Nothing on
//! this bus requests DMA, so that nothing is ever transferred.

use std::sync::Mutex;

use super::super::sync::lock;
use super::{IsaDevice, PortRange};

/// Page registers without a channel keep what is written to them, as on a PC: the first is the power-on self-test port, which
/// drivers write to for a short delay.
const PAGES: PortRange = PortRange { first: 0x80, count: 16 };
/// Registers of a controller beyond the four pairs of address and count.
const MASK_BIT: usize = 0xA;
const CLEAR_POINTER: usize = 0xC;
const MASTER_CLEAR: usize = 0xD;
const CLEAR_MASKS: usize = 0xE;
const MASKS: usize = 0xF;

/// One 8237.
#[derive(Default)]
struct Controller {
    /// Base address and word count of channels 0–3, alternating.
    words: [[u8; 2]; 8],
    /// The next access to one of them means its high byte.
    high: bool,
    /// The channels that are not masked.
    open: u8,
}

impl Controller {
    /// Writes a register, or reads it where there is nothing to write.
    fn access(&mut self, register: usize, write: Option<u8>) -> u8 {
        if let Some([low, high]) = self.words.get_mut(register) {
            let byte = if self.high { high } else { low };
            self.high = !self.high;
            *byte = write.unwrap_or(*byte);
            return *byte;
        }
        match (register, write) {
            (MASK_BIT, Some(value)) => {
                let bit = 1 << (value & 3);
                self.open = if value & 4 != 0 { self.open & !bit } else { self.open | bit };
            }
            (CLEAR_POINTER, Some(_)) => self.high = false,
            (MASTER_CLEAR, Some(_)) => (self.high, self.open) = (false, 0),
            (CLEAR_MASKS, Some(_)) => self.open = 0x0F,
            (MASKS, Some(value)) => self.open = !value & 0x0F,
            (MASKS, None) => return !self.open,
            // Command, request and mode say how to transfer. Status: nothing requested, no terminal count.
            _ => {}
        }
        0
    }
}

/// Both controllers: the first at 00–0F, the second at every other port of C0–DF.
#[derive(Default)]
pub(in super::super) struct Dma(Mutex<([Controller; 2], [u8; 16])>);

impl Dma {
    fn access(&self, port: u16, write: Option<u8>) -> u8 {
        let mut state = lock(&self.0);
        let ([first, second], pages) = &mut *state;
        match port {
            0x00..=0x0F => first.access(port.into(), write),
            0xC0..=0xDF => second.access(usize::from(port - 0xC0) / 2, write),
            _ => pages.get_mut(usize::from(port.wrapping_sub(PAGES.first))).map_or(0xFF, |page| {
                *page = write.unwrap_or(*page);
                *page
            }),
        }
    }
}

impl IsaDevice for Dma {
    fn name(&self) -> &str {
        "DMA controllers"
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: 0x00, count: 16 }, PAGES, PortRange { first: 0xC0, count: 32 }]
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(self.access(port, None));
    }

    fn write(&self, port: u16, data: &[u8]) {
        if let [value] = data {
            self.access(port, Some(*value));
        }
    }

    fn reset(&self) {
        *lock(&self.0) = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(dma: &Dma, port: u16) -> u8 {
        let mut data = [0];
        dma.read(port, &mut data);
        data[0]
    }

    #[test]
    fn words_are_written_and_read_low_byte_first() {
        let dma = Dma::default();
        for (address, clear) in [(0x02, 0x0C), (0xC4, 0xD8)] {
            dma.write(address, &[0x34]);
            dma.write(address, &[0x12]);
            assert_eq!((get(&dma, address), get(&dma, address)), (0x34, 0x12));
            dma.write(address, &[0x78]);
            dma.write(clear, &[0]);
            assert_eq!((get(&dma, address), get(&dma, address)), (0x78, 0x12));
        }
    }

    #[test]
    fn masks_are_set_by_master_clear_and_one_by_one() {
        let dma = Dma::default();
        for (base, stride) in [(0x00, 1), (0xC0, 2)] {
            let port = |register: u16| base + register * stride;
            dma.write(port(0xE), &[0]);
            assert_eq!(get(&dma, port(0xF)), 0xF0);
            dma.write(port(0xA), &[0x06]);
            assert_eq!(get(&dma, port(0xF)), 0xF4);
            dma.write(port(0xD), &[0]);
            assert_eq!(get(&dma, port(0xF)), 0xFF);
            assert_eq!(get(&dma, port(0x8)), 0);
        }
    }

    #[test]
    fn page_registers_keep_what_is_written() {
        let dma = Dma::default();
        for port in 0x80..=0x8F {
            dma.write(port, &[u8::try_from(port).unwrap()]);
        }
        for port in 0x80..=0x8F {
            assert_eq!(u16::from(get(&dma, port)), port);
        }
        dma.reset();
        assert_eq!(get(&dma, 0x87), 0);
    }
}
