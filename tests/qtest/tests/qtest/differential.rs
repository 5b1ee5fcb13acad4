//! This machine and QEMU's `-M pc`, driven by the same accesses: what they answer differs only where a reviewed table says
//! so, with the reason. A row that no longer makes a difference fails as well.
//!
//! The accesses are random from fixed seeds. Debian's QEMU has no `-accel qtest`; with another accelerator and stopped vCPUs
//! (`-S`) it serves qtest all the same, but time stands still.

mod areas;
mod config_space;
mod reviewed;

use super::peer::{OURS, Peer, QEMU};

/// Both programs.
struct Pair {
    ours: Peer,
    theirs: Peer,
}

impl Pair {
    fn start() -> Self {
        let arguments = "-machine pc,smm=off,usb=off,vmport=off,hpet=off -m 64 -nodefaults -no-shutdown -S \
                         -accel tcg -rtc base=2006-06-17T16:01:21,clock=vm";
        Self { ours: Peer::start(OURS, arguments), theirs: Peer::start(QEMU, arguments) }
    }

    /// A line that has to succeed on both; what they say may differ.
    fn both(&mut self, line: &str) -> (String, String) {
        (self.ours.ok(line), self.theirs.ok(line))
    }

    /// A number that both return.
    fn numbers(&mut self, line: &str) -> (u64, u64) {
        (self.ours.number(line), self.theirs.number(line))
    }
}
