//! The 82371SB PIIX3, PCI-to-ISA bridge (290550).
//!
//! Decodes its reset control register by itself and takes by subtractive decode what no function on PCI claimed.

mod isa_bridge;
mod reset_control;

use std::sync::Arc;

#[cfg(test)]
pub(super) use isa_bridge::REGISTERS;
pub(super) use isa_bridge::{IsaBridge, PIRQRC};
pub(super) use reset_control::{PORT as RESET_CONTROL_PORT, ResetControl};

use super::address::CycleKind;
use super::isa::IsaBus;
use super::tree::{Claim, Decoded, Node};

/// The bridge's lower side: what it forwards to the ISA bus.
pub(super) struct Piix3 {
    pub(super) function: Arc<IsaBridge>,
    pub(super) isa: Arc<IsaBus>,
}

impl Node for Piix3 {
    fn claim(&self, kind: CycleKind, address: u64) -> Option<Claim> {
        let claim = self.isa.claim(kind, address)?;
        let port = u16::try_from(claim.offset).ok()?;
        self.function.forwards(port).then_some(claim)
    }

    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>) {
        let mut below = Vec::new();
        self.isa.decoded(kind, &mut below);
        for range in below {
            self.keep_forwarded(range, ranges);
        }
    }
}

impl Piix3 {
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
