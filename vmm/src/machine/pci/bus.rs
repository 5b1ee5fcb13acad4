//! PCI bus 0: the functions on it, each of which decodes for itself.

use std::sync::{Arc, Mutex};

use super::super::address::CycleKind;
use super::super::irq::InterruptRouter;
use super::super::sync::lock;
use super::super::tree::{Claim, Decoded, Endpoint, Node, Topology};
use super::config_space::{Command, header};
use super::function::PciFunction;

/// Which function of which slot (device number).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotFunction {
    /// The slot, 0–31.
    pub slot: u8,
    /// The function in it, 0–7.
    pub function: u8,
}

impl SlotFunction {
    /// From one byte: the slot in bits 4:0, the function in bits 7:5. So the slot alone names its function 0.
    #[must_use]
    pub const fn from_place(place: u8) -> Self {
        Self { slot: place & 0x1F, function: place >> 5 }
    }

    /// As one byte.
    #[must_use]
    pub const fn place(self) -> u8 {
        self.slot & 0x1F | self.function << 5
    }
}

/// A function in its place.
#[derive(Clone)]
struct Attached {
    at: SlotFunction,
    function: Arc<dyn PciFunction>,
}

impl Attached {
    /// What the function decodes in a space now.
    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>) {
        let config = self.function.config();
        let command = config.command();
        for bar in config.bars().into_iter().filter(|bar| bar.kind.space() == kind.space()) {
            if let Some((first, last)) = bar.decoded(command) {
                let endpoint = Endpoint::Bar(self.function.clone(), bar.index);
                ranges.push(Decoded { first, last, endpoint, offset: 0 });
            }
        }
        for window in self.function.windows().into_iter().filter(|window| window.space == kind.space()) {
            if let Some(last) =
                window.length.checked_sub(1).and_then(|length| window.address.checked_add(length))
            {
                let endpoint = Endpoint::Window(self.function.clone(), window.id);
                ranges.push(Decoded { first: window.address, last, endpoint, offset: 0 });
            }
        }
    }
}

/// What the bus did with a configuration write.
pub(in super::super) struct ConfigWritten {
    pub(in super::super) function: Arc<dyn PciFunction>,
    /// The new command register, if it changed.
    pub(in super::super) command: Option<Command>,
}

/// The bus. Several functions that decode one address would fight on a real bus; here the lowest slot wins.
pub(in super::super) struct PciBus {
    /// In the order of their slots.
    functions: Mutex<Vec<Attached>>,
    /// The bridge that takes what no function claims: the PIIX3 by subtractive decode.
    subtractive: Arc<dyn Node + Send + Sync>,
    topology: Arc<Topology>,
    router: Arc<InterruptRouter>,
}

impl PciBus {
    pub(in super::super) fn new(
        subtractive: Arc<dyn Node + Send + Sync>,
        topology: Arc<Topology>,
        router: Arc<InterruptRouter>,
    ) -> Self {
        Self { functions: Mutex::new(Vec::new()), subtractive, topology, router }
    }

    fn attached(&self) -> Vec<Attached> {
        lock(&self.functions).clone()
    }

    /// All functions with their places, in order.
    pub(in super::super) fn functions_in_order(&self) -> Vec<(SlotFunction, Arc<dyn PciFunction>)> {
        self.attached().into_iter().map(|entry| (entry.at, entry.function)).collect()
    }

    /// The function at a place.
    pub(in super::super) fn function(&self, at: SlotFunction) -> Option<Arc<dyn PciFunction>> {
        lock(&self.functions).iter().find(|entry| entry.at == at).map(|entry| entry.function.clone())
    }

    /// How many functions are in a slot.
    pub(in super::super) fn occupants(&self, slot: u8) -> usize {
        lock(&self.functions).iter().filter(|entry| entry.at.slot == slot).count()
    }

    /// Puts a function into a place. Refused (false) when the place is taken.
    pub(in super::super) fn attach(&self, at: SlotFunction, function: Arc<dyn PciFunction>) -> bool {
        let mut functions = lock(&self.functions);
        let index = functions.partition_point(|entry| entry.at < at);
        if functions.get(index).is_some_and(|entry| entry.at == at) {
            return false;
        }
        functions.insert(index, Attached { at, function });
        drop(functions);
        self.topology.changed();
        true
    }

    /// Takes a function out of its place.
    pub(in super::super) fn detach(&self, at: SlotFunction) -> Option<Arc<dyn PciFunction>> {
        let mut functions = lock(&self.functions);
        let index = functions.iter().position(|entry| entry.at == at)?;
        let removed = functions.remove(index);
        drop(functions);
        self.topology.changed();
        Some(removed.function)
    }

    /// A configuration read. All ones when there is no such function.
    pub(in super::super) fn config_read(&self, at: SlotFunction, offset: u16, data: &mut [u8]) {
        let Some(function) = self.function(at) else {
            data.fill(0xFF);
            return;
        };
        function.config_will_read(offset, data.len());
        function.config().read(offset, data);
        // Bit 7 of the header type says in function 0 that there are others (section 6.2.1).
        let kind = header::HEADER_TYPE.checked_sub(offset).and_then(|index| data.get_mut(usize::from(index)));
        if let Some(kind) = kind.filter(|_| at.function == 0 && self.occupants(at.slot) > 1) {
            *kind |= 1 << 7;
        }
        // Interrupt status, bit 3 of the status register, follows the pin even while INTx# is disabled (section 6.2.3).
        let status = header::STATUS.checked_sub(offset).and_then(|index| data.get_mut(usize::from(index)));
        if let Some(status) = status.filter(|_| self.router.is_asserted(at.slot, at.function)) {
            *status |= 1 << 3;
        }
    }

    /// A configuration write. Nothing when there is no such function.
    pub(in super::super) fn config_write(
        &self,
        at: SlotFunction,
        offset: u16,
        data: &[u8],
    ) -> Option<ConfigWritten> {
        let function = self.function(at)?;
        let windows = function.windows();
        let written = function.config().write(offset, data);
        function.config_written(offset, data.len());
        if written.decode || windows != function.windows() {
            self.topology.changed();
        }
        let command = written.command.then(|| function.config().command());
        if let Some(command) = command {
            self.router.set_disabled(at.slot, at.function, command.interrupt_disable());
        }
        Some(ConfigWritten { function, command })
    }

    /// RST# to every function.
    pub(in super::super) fn reset(&self) {
        for entry in self.attached() {
            entry.function.config().reset();
            entry.function.reset();
        }
        self.topology.changed();
    }
}

impl Node for PciBus {
    fn claim(&self, kind: CycleKind, address: u64) -> Option<Claim> {
        let positive = self.attached().iter().find_map(|entry| {
            let mut ranges = Vec::new();
            entry.decoded(kind, &mut ranges);
            ranges.iter().find_map(|range| range.claim(address))
        });
        positive.or_else(|| self.subtractive.claim(kind, address))
    }

    fn decoded(&self, kind: CycleKind, ranges: &mut Vec<Decoded>) {
        for entry in self.attached() {
            entry.decoded(kind, ranges);
        }
        self.subtractive.decoded(kind, ranges);
    }
}
