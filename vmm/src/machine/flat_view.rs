//! The flat view: what the tree decodes, as sorted ranges for a quick look-up. Derived from the tree, never changed by itself.

use bulkhead_ipc::memory::PAGE_SIZE;

use super::address::CycleKind;
use super::host::MappedDoorbell;
use super::memory_map::MemorySlot;
use super::pci::{Doorbell, PciBus};
use super::tree::{Decoded, Endpoint, Node};

/// Disjoint ranges in ascending order.
#[derive(Default)]
struct RangeMap(Vec<Decoded>);

impl RangeMap {
    /// `ranges` come strongest first.
    fn new(ranges: Vec<Decoded>) -> Self {
        let mut map = Self::default();
        for range in ranges {
            map.fill(&range);
        }
        map
    }

    /// Adds those parts of `range` that nothing occupies yet.
    fn fill(&mut self, range: &Decoded) {
        let mut parts = Vec::new();
        let mut next = Some(range.first);
        let overlapping = self.0.iter().skip_while(|taken| taken.last < range.first);
        for taken in overlapping.take_while(|taken| taken.first <= range.last) {
            if let (Some(first), Some(last)) = (next, taken.first.checked_sub(1)) {
                parts.extend(part(range, first, last));
            }
            next = taken.last.checked_add(1);
        }
        if let Some(first) = next {
            parts.extend(part(range, first, range.last));
        }
        if !parts.is_empty() {
            self.0.extend(parts);
            self.0.sort_by_key(|range| range.first);
        }
    }

    /// The range that holds `address`, and the last address that has the same fate (claimed or not).
    fn find(&self, address: u64) -> (Option<&Decoded>, u64) {
        let after = self.0.partition_point(|range| range.first <= address);
        let at = after.checked_sub(1).and_then(|index| self.0.get(index));
        if let Some(range) = at.filter(|range| address <= range.last) {
            return (Some(range), range.last);
        }
        (None, self.0.get(after).map_or(u64::MAX, |next| next.first.wrapping_sub(1)))
    }
}

fn part(range: &Decoded, first: u64, last: u64) -> Option<Decoded> {
    let offset = range.offset.wrapping_add(first.checked_sub(range.first)?);
    (first <= last).then(|| Decoded { first, last, endpoint: range.endpoint.clone(), offset })
}

/// Where an address leads.
pub(super) struct Resolved<'a> {
    /// Who answers; nobody on an open bus.
    pub(super) endpoint: Option<&'a Endpoint>,
    /// The offset there.
    pub(super) offset: u64,
    /// The last address that leads to the same place.
    pub(super) last: u64,
}

/// A picture of the whole tree at one moment.
#[derive(Default)]
pub(super) struct FlatView {
    /// The state of the tree that it shows.
    pub(super) generation: u64,
    ports: RangeMap,
    port_dwords: RangeMap,
    memory_reads: RangeMap,
    memory_writes: RangeMap,
    /// The doorbells that can be reached, sorted.
    pub(super) doorbells: Vec<MappedDoorbell>,
    /// The memory map, by address.
    pub(super) slots: Vec<MemorySlot>,
}

impl FlatView {
    /// Derives the view. `generation` was read before `root` is.
    pub(super) fn derive(generation: u64, root: &impl Node, bus: &PciBus) -> Self {
        let map = |kind| {
            let mut ranges = Vec::new();
            root.decoded(kind, &mut ranges);
            RangeMap::new(ranges)
        };
        let mut view = Self {
            generation,
            ports: map(CycleKind::Port),
            port_dwords: map(CycleKind::PortDword),
            memory_reads: map(CycleKind::MemoryRead),
            memory_writes: map(CycleKind::MemoryWrite),
            doorbells: find_doorbells(root, bus),
            slots: Vec::new(),
        };
        view.slots = view.memory_slots();
        view
    }

    fn map(&self, kind: CycleKind) -> &RangeMap {
        match kind {
            CycleKind::Port => &self.ports,
            CycleKind::PortDword => &self.port_dwords,
            CycleKind::MemoryRead => &self.memory_reads,
            CycleKind::MemoryWrite => &self.memory_writes,
        }
    }

    /// What of memory needs no exit: reads end in RAM or ROM; writes too where they end in the same RAM.
    fn memory_slots(&self) -> Vec<MemorySlot> {
        let ranges = self.memory_reads.0.iter().chain(&self.memory_writes.0);
        let mut cuts: Vec<u64> = ranges.flat_map(|range| [range.first, range.last.wrapping_add(1)]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        // Joined before they are cut to whole pages: a register that takes writes within a page does not keep reads from it.
        let mut runs: Vec<((u64, u64), &Endpoint, u64, bool)> = Vec::new();
        for (first, end) in cuts.iter().copied().zip(cuts.iter().copied().skip(1)) {
            let read = self.resolve(CycleKind::MemoryRead, first);
            let write = self.resolve(CycleKind::MemoryWrite, first);
            let Some(endpoint) = read.endpoint else { continue };
            let same = write.offset == read.offset && write.endpoint.is_some_and(|other| other.is(endpoint));
            let writable = match endpoint {
                Endpoint::Dram => same,
                Endpoint::File(file) => same && file.is_writable(),
                _ => false,
            };
            match runs.last_mut() {
                Some(((begin, last), other, source, also))
                    if *last == first
                        && !first.is_multiple_of(PAGE_SIZE)
                        && other.is(endpoint)
                        && source.wrapping_add(first.wrapping_sub(*begin)) == read.offset
                        && *also == writable =>
                {
                    *last = end;
                }
                _ => runs.push(((first, end), endpoint, read.offset, writable)),
            }
        }
        let mut slots: Vec<MemorySlot> = Vec::new();
        for (range, endpoint, source, writable) in runs {
            let Some(slot) = MemorySlot::new(range, endpoint, source, writable) else { continue };
            if !slots.last_mut().is_some_and(|last| last.join(&slot)) {
                slots.push(slot);
            }
        }
        slots
    }

    /// Where a cycle leads.
    pub(super) fn resolve(&self, kind: CycleKind, address: u64) -> Resolved<'_> {
        let (range, last) = self.map(kind).find(address);
        let offset = range.map_or(0, |range| range.offset.wrapping_add(address.wrapping_sub(range.first)));
        Resolved { endpoint: range.map(|range| &range.endpoint), offset, last }
    }

    /// Every boundary in the view, for tests.
    #[cfg(test)]
    pub(super) fn boundaries(&self, kind: CycleKind) -> Vec<u64> {
        self.map(kind).0.iter().flat_map(|range| [range.first, range.last]).collect()
    }
}

/// The doorbells of all functions that a guest's write reaches.
fn find_doorbells(root: &impl Node, bus: &PciBus) -> Vec<MappedDoorbell> {
    let mut mapped = Vec::new();
    for (at, function) in bus.functions_in_order() {
        let doorbells = function.doorbells();
        if doorbells.is_empty() {
            continue;
        }
        let command = function.config().command();
        for bar in function.config().bars() {
            let Some((first, last)) = bar.decoded(command) else { continue };
            let endpoint = Endpoint::Bar(function.clone(), bar.index);
            for doorbell in doorbells.iter().filter(|doorbell| doorbell.bar == bar.index) {
                let Doorbell { id, offset, length, datamatch, .. } = *doorbell;
                let span = u64::from(length.max(1)) - 1;
                let Some(address) = first.checked_add(offset) else { continue };
                let Some(end) = address.checked_add(span).filter(|end| *end <= last) else { continue };
                let space = bar.kind.space();
                let kind = CycleKind::write(space, length.into());
                let reaches = |address, offset| {
                    let claim = root.claim(kind, address);
                    claim.is_some_and(|claim| claim.endpoint.is(&endpoint) && claim.offset == offset)
                };
                if reaches(address, offset) && reaches(end, offset.saturating_add(span)) {
                    mapped.push(MappedDoorbell { id, slot: at.place(), space, address, length, datamatch });
                }
            }
        }
    }
    mapped.sort();
    mapped
}
