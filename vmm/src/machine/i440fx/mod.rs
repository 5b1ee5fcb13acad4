//! The 82441FX PMC: what the CPU's accesses meet first (290549).
//!
//! Claims DRAM, the APICs' addresses and its two configuration ports; posts everything else to PCI bus 0.

mod config_mechanism;
mod host_bridge;

use std::sync::Arc;

use bulkhead_ipc::memory::MappedFile;

pub(super) use config_mechanism::ConfigMechanism;
pub(super) use host_bridge::HostBridge;

use super::address::CycleKind;
use super::isa::IN_KERNEL_PORTS;
use super::pci::PciBus;
use super::tree::{Claim, Decoded, Endpoint, Node};

/// First and last address of the I/O APIC's page and of the local APICs' (290549, section 4.1, system memory map).
const APICS: [(u64, u64); 2] = [(0xFEC0_0000, 0xFEC0_0FFF), (0xFEE0_0000, 0xFEEF_FFFF)];

/// The root of the tree.
pub(super) struct I440Fx {
    /// First and last address of each region of RAM.
    dram: Vec<(u64, u64)>,
    /// Files that the guest sees as memory, beyond RAM.
    files: Vec<Arc<MappedFile>>,
    /// The function that holds PAM, SMRAM and FDHC.
    function: Arc<HostBridge>,
    /// CF8 and CFC.
    pub(super) mechanism: ConfigMechanism,
    /// What is below.
    pub(super) bus: Arc<PciBus>,
}

impl I440Fx {
    pub(super) fn new(
        dram: Vec<(u64, u64)>,
        files: Vec<Arc<MappedFile>>,
        function: Arc<HostBridge>,
        bus: Arc<PciBus>,
    ) -> Self {
        Self { dram, files, function, mechanism: ConfigMechanism::default(), bus }
    }

    /// The parts of RAM that answer, offset and address being equal.
    fn dram(&self, write: bool) -> Vec<Decoded> {
        let areas = self.function.dram_areas(write);
        let meet = |(a, b): (u64, u64), (c, d): (u64, u64)| {
            let (first, last) = (a.max(c), b.min(d));
            (first <= last).then_some(Decoded { first, last, endpoint: Endpoint::Dram, offset: first })
        };
        self.dram.iter().flat_map(|ram| areas.iter().filter_map(|area| meet(*ram, *area))).collect()
    }

    /// What the bridge itself claims.
    fn own(&self, kind: CycleKind) -> Vec<Decoded> {
        let range = |(first, last), endpoint, offset| Decoded { first, last, endpoint, offset };
        let data = range((0xCFC, 0xCFF), Endpoint::ConfigData, 0);
        match kind {
            CycleKind::Port | CycleKind::PortDword => {
                let mut own = vec![data];
                // Wherever they are on the board, no access to them comes further than this.
                own.extend(IN_KERNEL_PORTS.iter().filter_map(|ports| {
                    Some(range((ports.first.into(), ports.last()?.into()), Endpoint::InKernel, 0))
                }));
                if kind == CycleKind::PortDword {
                    own.push(range((0xCF8, 0xCFB), Endpoint::ConfigAddress, 0));
                }
                own
            }
            CycleKind::MemoryRead | CycleKind::MemoryWrite => {
                let mut own = self.dram(kind == CycleKind::MemoryWrite);
                own.extend(
                    self.files
                        .iter()
                        .map(|file| range(file.ends(), Endpoint::File(file.clone()), file.ends().0)),
                );
                own.extend(APICS.map(|ends| range(ends, Endpoint::InKernel, 0)));
                own
            }
        }
    }
}

impl Node for I440Fx {
    fn claim(&self, kind: CycleKind, address: u64) -> Option<Claim> {
        self.own(kind).iter().find_map(|range| range.claim(address)).or_else(|| self.bus.claim(kind, address))
    }

    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>) {
        ranges.extend(self.own(kind));
        self.bus.decoded(kind, ranges);
    }
}
