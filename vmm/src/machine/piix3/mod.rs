//! The 82371SB PIIX3, PCI-to-ISA bridge (290550).
//!
//! Decodes its reset control register by itself and takes by subtractive decode what no function on PCI claimed.

mod isa_bridge;
mod reset_control;

use std::sync::Arc;

pub(super) use isa_bridge::{IsaBridge, PIRQRC};
pub(super) use reset_control::{PORT as RESET_CONTROL_PORT, ResetControl};

use super::address::CycleKind;
use super::host::Space;
use super::isa::IsaBus;
use super::memory_map::MemoryChip;
use super::tree::{Claim, Decoded, Endpoint, Node};

/// Where the end of the BIOS shows below 1 MiB, first and last address, and how far below its own place that is.
const BIOS_ALIAS: (u64, u64) = (0xE_0000, 0xF_FFFF);
const BIOS_OFFSET: u64 = (1 << 32) - (1 << 20);

/// The bridge's lower side: what it forwards to the ISA bus.
pub(super) struct Piix3 {
    pub(super) function: Arc<IsaBridge>,
    pub(super) isa: Arc<IsaBus>,
    /// Firmware, selected by BIOSCS#: wherever it lies, whatever XBCS says of its upper and lower parts, since firmware of
    /// more than 64 KiB could not start otherwise.
    pub(super) chips: Vec<Arc<dyn MemoryChip>>,
}

impl Node for Piix3 {
    fn claim(&self, kind: CycleKind, address: u64) -> Option<Claim> {
        if kind.space() == Space::Memory {
            return self.firmware().iter().find_map(|range| range.claim(address));
        }
        let claim = self.isa.claim(kind, address)?;
        let port = u16::try_from(claim.offset).ok()?;
        self.function.forwards(port).then_some(claim)
    }

    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>) {
        if kind.space() == Space::Memory {
            ranges.extend(self.firmware());
            return;
        }
        let mut below = Vec::new();
        self.isa.decoded(kind, &mut below);
        for range in below {
            self.keep_forwarded(range, ranges);
        }
    }
}

impl Piix3 {
    /// Where firmware decodes.
    fn firmware(&self) -> Vec<Decoded> {
        let mut ranges = Vec::new();
        for chip in &self.chips {
            for region in chip.memory().regions() {
                let (first, offset) = (region.guest_address, region.guest_address);
                let Some(last) = region.size.checked_sub(1).and_then(|rest| first.checked_add(rest)) else {
                    continue;
                };
                ranges.push(Decoded { first, last, endpoint: Endpoint::Chip(chip.clone()), offset });
                let (alias_first, alias_last) = BIOS_ALIAS;
                let (low, high) = (first.max(alias_first + BIOS_OFFSET), last.min(alias_last + BIOS_OFFSET));
                if low <= high {
                    let (first, last) = (low - BIOS_OFFSET, high - BIOS_OFFSET);
                    ranges.push(Decoded { first, last, endpoint: Endpoint::Chip(chip.clone()), offset: low });
                }
            }
        }
        ranges
    }

    /// Adds those parts of `range` that the bridge forwards.
    fn keep_forwarded(&self, range: Decoded, ranges: &mut Vec<Decoded>) {
        let ports = range.first..=range.last;
        if ports.clone().all(|port| u16::try_from(port).is_ok_and(|port| self.function.forwards(port))) {
            ranges.push(range);
            return;
        }
        for port in ports {
            if u16::try_from(port).is_ok_and(|port| self.function.forwards(port)) {
                let offset = range.offset.wrapping_add(port.wrapping_sub(range.first));
                ranges.push(Decoded { first: port, last: port, endpoint: range.endpoint.clone(), offset });
            }
        }
    }
}
