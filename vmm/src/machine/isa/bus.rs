//! The ISA bus: what the PIIX3 forwards reaches the device that decodes the port.

use std::sync::{Arc, Mutex};

use super::super::address::CycleKind;
use super::super::config::AttachError;
use super::super::host::Space;
use super::super::irq::InterruptRouter;
use super::super::sync::lock;
use super::super::tree::{Claim, Decoded, Endpoint, Node, Topology};

/// A range of I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// How many ports, at least 1.
    pub count: u16,
}

/// A device on the ISA bus. Methods are called from vCPU threads, several at a time.
pub trait IsaDevice: Send + Sync {
    /// What to call it in messages.
    fn name(&self) -> &str;

    /// The ports that it decodes. Never changes.
    fn ports(&self) -> Vec<PortRange>;

    /// The ISA interrupt that it drives, if any.
    fn irq(&self) -> Option<u8> {
        None
    }

    /// The widest access that it takes in one cycle: 1, 2 or 4 bytes. Wider ones are split, as the bus does for 8-bit cards.
    fn width(&self) -> usize {
        1
    }

    /// The guest reads from `port`; `data` is at most [`width`](Self::width) bytes long and `port` a multiple of its length.
    fn read(&self, port: u16, data: &mut [u8]);

    /// The guest writes to `port`.
    fn write(&self, port: u16, data: &[u8]);

    /// RESETDRV.
    fn reset(&self);
}

/// An ISA interrupt line as one device drives it. Clones drive the same source.
#[derive(Clone)]
pub struct IrqLine {
    router: Arc<InterruptRouter>,
    index: usize,
    irq: u8,
}

impl IrqLine {
    pub(in super::super) fn new(router: Arc<InterruptRouter>, irq: u8) -> Self {
        Self { index: router.add_line(irq), router, irq }
    }

    /// Its number, 0–15.
    #[must_use]
    pub const fn irq(&self) -> u8 {
        self.irq
    }

    /// Drives the line high or low. The input is high while any source is.
    pub fn set(&self, level: bool) {
        self.router.set_line(self.index, level);
    }
}

/// Ports that the host's kernel answers before the machine sees them: the 8259s and their ELCRs, the 8254 and its gate.
pub(in super::super) const IN_KERNEL_PORTS: [PortRange; 5] = [
    PortRange { first: 0x20, count: 2 },
    PortRange { first: 0x40, count: 4 },
    PortRange { first: 0x61, count: 1 },
    PortRange { first: 0xA0, count: 2 },
    PortRange { first: 0x4D0, count: 2 },
];
/// The host bridge's own.
const CONFIG_PORTS: PortRange = PortRange { first: 0xCF8, count: 8 };

impl PortRange {
    /// The last port.
    pub(in super::super) fn last(self) -> Option<u16> {
        self.first.checked_add(self.count.checked_sub(1)?)
    }

    fn overlaps(self, other: Self) -> bool {
        match (self.last(), other.last()) {
            (Some(last), Some(other_last)) => self.first <= other_last && other.first <= last,
            _ => false,
        }
    }
}

struct Attached {
    device: Arc<dyn IsaDevice>,
    ports: Vec<PortRange>,
}

/// The bus.
pub(in super::super) struct IsaBus {
    devices: Mutex<Vec<Attached>>,
    topology: Arc<Topology>,
}

impl IsaBus {
    pub(in super::super) fn new(topology: Arc<Topology>) -> Self {
        Self { devices: Mutex::new(Vec::new()), topology }
    }

    /// Puts a device on the bus. Refused when it wants ports that are taken.
    pub(in super::super) fn attach(&self, device: Arc<dyn IsaDevice>) -> Result<(), AttachError> {
        let ports = device.ports();
        let mut devices = lock(&self.devices);
        for (index, range) in ports.iter().enumerate() {
            let taken = devices.iter().flat_map(|attached| &attached.ports);
            let mut taken =
                taken.chain(&IN_KERNEL_PORTS).chain([&CONFIG_PORTS]).chain(ports.iter().take(index));
            if range.last().is_none() || taken.any(|other| other.overlaps(*range)) {
                let name = device.name().to_owned();
                return Err(AttachError::PortsTaken { name, port: range.first });
            }
        }
        devices.push(Attached { device, ports });
        drop(devices);
        self.topology.changed();
        Ok(())
    }

    /// RESETDRV to every device.
    pub(in super::super) fn reset(&self) {
        let devices: Vec<_> = lock(&self.devices).iter().map(|attached| attached.device.clone()).collect();
        for device in devices {
            device.reset();
        }
    }

    /// Whether a device decodes `port`.
    pub(in super::super) fn decodes(&self, port: u16) -> bool {
        let one = PortRange { first: port, count: 1 };
        lock(&self.devices).iter().flat_map(|attached| &attached.ports).any(|ports| ports.overlaps(one))
    }

    fn ranges(&self, kind: CycleKind) -> Vec<Decoded> {
        if kind.space() == Space::Memory {
            return Vec::new();
        }
        let devices = lock(&self.devices);
        let range = |device: &Arc<dyn IsaDevice>, ports: &PortRange| {
            let (first, last) = (u64::from(ports.first), u64::from(ports.last()?));
            Some(Decoded { first, last, endpoint: Endpoint::Isa(device.clone()), offset: first })
        };
        let all = devices.iter().flat_map(|attached| {
            attached.ports.iter().filter_map(move |ports| range(&attached.device, ports))
        });
        all.collect()
    }
}

impl Node for IsaBus {
    fn claim(&self, kind: CycleKind, address: u64) -> Option<Claim> {
        self.ranges(kind).iter().find_map(|range| range.claim(address))
    }

    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>) {
        ranges.extend(self.ranges(kind));
    }
}
