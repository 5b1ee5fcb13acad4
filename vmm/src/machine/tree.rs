//! The tree: who claims a cycle. Each node claims it, passes it on, or leaves it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_ipc::memory::MappedFile;

use super::address::CycleKind;
use super::isa::IsaDevice;
use super::memory_map::MemoryChip;
use super::pci::PciFunction;

/// Where a cycle ends.
#[derive(Clone)]
pub(super) enum Endpoint {
    /// Guest RAM. The offset is the guest-physical address.
    Dram,
    /// Interrupt controllers and timer, which the host's kernel answers before an access gets here: claimed so that
    /// nothing else is found there.
    InKernel,
    /// CONFADD of the host bridge, CF8.
    ConfigAddress,
    /// CONFDATA of the host bridge, CFC–CFF.
    ConfigData,
    /// A BAR of a PCI function.
    Bar(Arc<dyn PciFunction>, u8),
    /// A range that a PCI function decodes otherwise.
    Window(Arc<dyn PciFunction>, u8),
    /// A device on the ISA bus. The offset is the port.
    Isa(Arc<dyn IsaDevice>),
    /// A ROM or flash. The offset is the address in its memory.
    Chip(Arc<dyn MemoryChip>),
    /// A file, which only the guest looks into. The offset is the guest-physical address.
    File(Arc<MappedFile>),
}

impl Endpoint {
    /// The widest cycle that it takes, in bytes.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::Isa(device) => device.width(),
            _ => 4,
        }
    }

    /// Whether both are the same register block of the same device.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dram, Self::Dram)
            | (Self::InKernel, Self::InKernel)
            | (Self::ConfigAddress, Self::ConfigAddress)
            | (Self::ConfigData, Self::ConfigData) => true,
            (Self::Bar(a, i), Self::Bar(b, j)) | (Self::Window(a, i), Self::Window(b, j)) => {
                i == j && std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
            }
            (Self::Isa(a), Self::Isa(b)) => std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b)),
            (Self::Chip(a), Self::Chip(b)) => std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b)),
            (Self::File(a), Self::File(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// A cycle found its end.
#[derive(Clone)]
pub(super) struct Claim {
    /// Who answers.
    pub(super) endpoint: Endpoint,
    /// The offset there.
    pub(super) offset: u64,
}

/// A range of addresses that ends in one place.
#[derive(Clone)]
pub(super) struct Decoded {
    /// The first address.
    pub(super) first: u64,
    /// The last address.
    pub(super) last: u64,
    /// Who answers.
    pub(super) endpoint: Endpoint,
    /// The offset of `first` there.
    pub(super) offset: u64,
}

impl Decoded {
    /// What an address within the range means, nothing outside of it.
    pub(super) fn claim(&self, address: u64) -> Option<Claim> {
        let distance = address.checked_sub(self.first).filter(|_| address <= self.last)?;
        Some(Claim { endpoint: self.endpoint.clone(), offset: self.offset.wrapping_add(distance) })
    }
}

/// A bridge or bus.
pub(super) trait Node {
    /// Who answers a cycle at `address`, by asking what is here and then what is below.
    fn claim(&self, kind: CycleKind, address: u64) -> Option<Claim>;

    /// All that [`claim`](Self::claim) can answer, strongest first: a range counts where no earlier one lies.
    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>);
}

/// Counts the changes of what the tree decodes. Whoever changes something bumps it; whoever derived something compares.
#[derive(Debug, Default)]
pub(super) struct Topology(AtomicU64);

impl Topology {
    /// What is decoded changed.
    pub(super) fn changed(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of changes so far.
    pub(super) fn generation(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}
