//! The decode path against a slow and obvious model of it: for each address the model asks the datasheets' questions in
//! their order. Compared are the tree, the flat view, what accesses do, and the slots and doorbells that the host is told.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::address::CycleKind;
use super::super::memory_map::Backing;
use super::super::tree::{Endpoint, Node};
use super::*;

const ROM: u64 = (1 << 32) - ROM_SIZE;
const ROM_SIZE: u64 = 0x4_0000;
const FIRST_SLOT: u64 = 2;
const LAST_SLOT: u64 = 3;

/// Who answers an address, and what it is called there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Ram(u64),
    Rom(u64),
    Kernel,
    ConfigAddress,
    ConfigData(u64),
    /// Slot, function, window, offset.
    Window(u64, u64, u8, u64),
    /// Slot, BAR, offset.
    Bar(u64, u8, u64),
    Isa(u64),
    Open,
}

/// What the guest has written, by function and register.
#[derive(Clone, Default)]
struct Model {
    bytes: BTreeMap<(u64, u64, u64), u8>,
    locked: bool,
    ram: BTreeMap<u64, u8>,
    writes: Vec<(u64, u8, u64, u8)>,
}

impl Model {
    fn get(&self, at: (u64, u64), register: u64) -> u8 {
        let reset = match (at, register) {
            ((0, 0), 0x72) => 0x02,
            ((1, 0), 0x4E) => 0x03,
            ((1, 3), 0x90) => 0x01,
            ((1, 3), 0xD2) => 0x09,
            _ => 0,
        };
        self.bytes.get(&(at.0, at.1, register)).copied().unwrap_or(reset)
    }

    fn dword(&self, at: (u64, u64), register: u64) -> u64 {
        (0..4).map(|byte| u64::from(self.get(at, register + byte)) << (8 * byte)).sum()
    }

    fn config_write(&mut self, at: (u64, u64), register: u64, value: u8) {
        let value = match (at, register) {
            ((0, 0), 0x59) => value & 0x30,
            ((0, 0), 0x5A..=0x5F) => value & 0x33,
            ((0, 0), 0x68) => value & 0xC0,
            // D_OPEN, D_CLS, D_LCK, G_SMRAME; once locked, D_OPEN is 0 and D_LCK 1 until reset.
            ((0, 0), 0x72) => {
                self.locked |= value & 0x10 != 0;
                if self.locked { value & 0x38 | 0x12 } else { value & 0x78 | 0x02 }
            }
            ((1, 0), 0x4E) => value & 0xF7,
            ((1, 3), 0x40) => value & 0xC0,
            ((1, 3), 0x41) => value,
            ((1, 3), 0x80) => value & 1,
            (_, _) if at.0 >= FIRST_SLOT => value,
            _ => return,
        };
        self.bytes.insert((at.0, at.1, register), value);
    }

    fn reset(&mut self) {
        self.bytes.clear();
        self.locked = false;
    }

    /// Whether DRAM answers at an address below 1 MiB or in a hole.
    fn dram(&self, address: u64, write: bool) -> bool {
        let bit = if write { 2 } else { 1 };
        let pam = |register, high: bool| {
            let value = self.get((0, 0), register);
            (if high { value >> 4 } else { value }) & bit != 0
        };
        match address {
            RAM.. => false,
            0x8_0000..0xA_0000 => self.get((0, 0), 0x68) != 0x40,
            0xA_0000..0xC_0000 => self.get((0, 0), 0x72) & 0x58 == 0x48,
            0xC_0000..0xF_0000 => {
                let area = (address - 0xC_0000) / 0x4000;
                pam(0x5A + area / 2, area % 2 == 1)
            }
            0xF_0000..0x10_0000 => pam(0x59, true),
            _ => true,
        }
    }

    fn memory(&self, address: u64, write: bool) -> Owner {
        if self.dram(address, write) {
            return Owner::Ram(address);
        }
        if matches!(address, 0xFEC0_0000..=0xFEC0_0FFF | 0xFEE0_0000..=0xFEEF_FFFF) {
            return Owner::Kernel;
        }
        for slot in FIRST_SLOT..=LAST_SLOT {
            let at = (slot, 0);
            if self.get(at, 4) & 2 == 0 {
                continue;
            }
            let wide = self.dword(at, 0x14) << 32 | self.dword(at, 0x10) & !0xFFF;
            let narrow = self.dword(at, 0x18) & !0xFF;
            for (bar, base, size) in [(0, wide, 0x1000), (2, narrow, 0x100)] {
                if address >= base && address - base < size {
                    return Owner::Bar(slot, bar, address - base);
                }
            }
        }
        match address {
            ROM..0x1_0000_0000 => Owner::Rom(address),
            0xE_0000..0x10_0000 => Owner::Rom(address + 0xFFF0_0000),
            _ => Owner::Open,
        }
    }

    fn port(&self, port: u64, dword: bool) -> Owner {
        match port {
            0x20 | 0x21 | 0x40..=0x43 | 0x61 | 0xA0 | 0xA1 | 0x4D0 | 0x4D1 => return Owner::Kernel,
            0xCFC..=0xCFF => return Owner::ConfigData(port - 0xCFC),
            0xCF8..=0xCFB if dword => return Owner::ConfigAddress,
            0xCF9 => return Owner::Window(1, 0, 0, 0),
            _ => {}
        }
        let pmbase = self.dword((1, 3), 0x40) & 0xFFC0;
        if self.get((1, 3), 0x80) & 1 != 0 && port >= pmbase && port - pmbase < 64 {
            return Owner::Window(1, 3, 0, port - pmbase);
        }
        match port {
            0xAFE0..=0xAFE3 => return Owner::Window(1, 3, 1, port - 0xAFE0),
            0xB2 | 0xB3 => return Owner::Window(1, 3, 2, port - 0xB2),
            0xAE00..=0xAE13 => return Owner::Window(1, 3, 4, port - 0xAE00),
            0xAF00..=0xAF0B => return Owner::Window(1, 3, 5, port - 0xAF00),
            _ => {}
        }
        for slot in FIRST_SLOT..=LAST_SLOT {
            let base = self.dword((slot, 0), 0x20) & !0xF;
            if self.get((slot, 0), 4) & 1 != 0 && base <= 0xFFFF && port >= base && port - base < 16 {
                return Owner::Bar(slot, 4, port - base);
            }
        }
        let selects = self.get((1, 0), 0x4E);
        match port {
            0x60 | 0x64 if selects & 2 != 0 => Owner::Isa(port),
            0x70 | 0x71 if selects & 1 != 0 => Owner::Isa(port),
            0x00..=0x0F | 0x80..=0x8F | 0x92 | 0xC0..=0xDF | 0x402 | 0x505 => Owner::Isa(port),
            0x510 | 0x511 | 0x514..=0x51B => Owner::Isa(port),
            _ => Owner::Open,
        }
    }

    fn owner(&self, kind: CycleKind, address: u64) -> Owner {
        match kind {
            CycleKind::Port => self.port(address, false),
            CycleKind::PortDword => self.port(address, true),
            CycleKind::MemoryRead => self.memory(address, false),
            CycleKind::MemoryWrite => self.memory(address, true),
        }
    }

    fn read(&self, address: u64) -> u8 {
        match self.memory(address, false) {
            Owner::Ram(at) => self.ram.get(&at).copied().unwrap_or(0),
            Owner::Rom(at) => rom_byte(at),
            Owner::Bar(slot, bar, offset) => bar_byte(slot, bar, offset),
            _ => 0xFF,
        }
    }

    fn write(&mut self, address: u64, value: u8) {
        match self.memory(address, true) {
            Owner::Ram(at) => drop(self.ram.insert(at, value)),
            Owner::Bar(slot, bar, offset) => self.writes.push((slot, bar, offset, value)),
            _ => {}
        }
    }
}

fn low_byte(value: u64) -> u8 {
    u8::try_from(value & 0xFF).unwrap()
}

fn rom_byte(address: u64) -> u8 {
    low_byte(address ^ address >> 8 ^ address >> 16)
}

/// What a [`TestFunction`] reads.
fn bar_byte(slot: u64, bar: u8, offset: u64) -> u8 {
    low_byte(slot) ^ bar << 5 ^ low_byte(offset)
}

/// The machine under test: two functions, 256 KiB of ROM.
struct Rig {
    host: Arc<Recorder>,
    machine: Arc<Machine>,
    functions: Vec<(u64, Arc<TestFunction>)>,
}

impl Rig {
    fn new() -> Self {
        let bytes: Vec<u8> = (ROM..1 << 32).map(rom_byte).collect();
        let (host, machine) = machine_with(1, vec![Rom::chip(ROM, &bytes)]);
        let functions: Vec<_> =
            (FIRST_SLOT..=LAST_SLOT).map(|slot| (slot, TestFunction::new(low_byte(slot)))).collect();
        for (slot, function) in &functions {
            machine.attach_pci(low_byte(*slot), function.clone()).unwrap();
        }
        Self { host, machine, functions }
    }

    fn owner_of(&self, endpoint: Option<&Endpoint>, offset: u64) -> Owner {
        let place = |function: &Arc<dyn PciFunction>| {
            let all = self.machine.root.bus.functions_in_order();
            let found =
                all.iter().find(|(_, other)| std::ptr::addr_eq(Arc::as_ptr(function), Arc::as_ptr(other)));
            let at = found.unwrap().0;
            (u64::from(at.slot), u64::from(at.function))
        };
        match endpoint {
            None => Owner::Open,
            Some(Endpoint::Dram) => Owner::Ram(offset),
            Some(Endpoint::Chip(_)) => Owner::Rom(offset),
            Some(Endpoint::File(_)) => unreachable!("these machines have no file in memory"),
            Some(Endpoint::InKernel) => Owner::Kernel,
            Some(Endpoint::ConfigAddress) => Owner::ConfigAddress,
            Some(Endpoint::ConfigData) => Owner::ConfigData(offset),
            Some(Endpoint::Bar(function, bar)) => Owner::Bar(place(function).0, *bar, offset),
            Some(Endpoint::Isa(_)) => Owner::Isa(offset),
            Some(Endpoint::Window(function, window)) => {
                let (slot, number) = place(function);
                Owner::Window(slot, number, *window, offset)
            }
        }
    }

    fn check_owner(&self, model: &Model, kind: CycleKind, address: u64) -> Result<(), TestCaseError> {
        let expected = model.owner(kind, address);
        let claim = self.machine.root.claim(kind, address);
        let tree = self
            .owner_of(claim.as_ref().map(|claim| &claim.endpoint), claim.as_ref().map_or(0, |c| c.offset));
        prop_assert_eq!(tree, expected, "tree, {:?} {:#x}", kind, address);
        let view = self.machine.view.load();
        let found = view.resolve(kind, address);
        prop_assert_eq!(
            self.owner_of(found.endpoint, found.offset),
            expected,
            "view, {:?} {:#x}",
            kind,
            address
        );
        Ok(())
    }

    /// What the host was told, page by page.
    fn check_slots(&self, model: &Model, pages: impl Iterator<Item = u64>) -> Result<(), TestCaseError> {
        let slots = self.host.recorded().slots;
        for pair in slots.windows(2) {
            prop_assert!(pair[0].address + pair[0].size <= pair[1].address, "{:?}", pair);
        }
        for page in pages {
            let slot = slots.iter().find(|slot| page >= slot.address && page - slot.address < slot.size);
            let told = slot.map(|slot| {
                let source = slot.source + (page - slot.address);
                let owner =
                    if slot.backing == Backing::Ram { Owner::Ram(source) } else { Owner::Rom(source) };
                (owner, slot.writable)
            });
            // BARs may lie anywhere in the page; every byte counts.
            let bytes = || (page..page + 0x1000).step_by(0x80);
            let whole = |write| {
                let first = model.memory(page, write);
                bytes()
                    .all(|at| match (first, model.memory(at, write)) {
                        (Owner::Ram(a), Owner::Ram(b)) | (Owner::Rom(a), Owner::Rom(b)) => b - a == at - page,
                        _ => false,
                    })
                    .then_some(first)
            };
            let expected = whole(false)
                .map(|owner| (owner, matches!(owner, Owner::Ram(_)) && whole(true) == Some(owner)));
            prop_assert_eq!(told, expected, "page {:#x}", page);
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Config { at: (u64, u64), register: u64, data: Vec<u8> },
    Read { address: u64, length: usize },
    Write { address: u64, data: Vec<u8> },
    Reset,
}

fn base() -> impl Strategy<Value = u32> {
    prop_oneof![
        (0_u32..64).prop_map(|n| 0xE000_0000 + n * 0x80),
        (0_u32..0x50).prop_map(|n| 0xA_0000 + n * 0x1400),
        (0_u32..16).prop_map(|n| 0xFFFB_F800 + n * 0x400),
        (0_u32..16).prop_map(|n| 0x3F_F000 + n * 0x200),
        (0_u32..64).prop_map(|n| n * 0x10),
        (0_u32..32).prop_map(|n| 0xC80 + n * 8),
        Just(0xFEDF_F800),
        Just(u32::MAX),
    ]
}

fn memory_address() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0_u64..0x20, 0_u64..16).prop_map(|(n, low)| 0x8_0000 + n * 0x4000 - 8 + low),
        (0_u64..0x8_0000).prop_map(|low| 0x8_0000 + low),
        (0_u64..32).prop_map(|low| RAM - 16 + low),
        (0_u64..0x4000).prop_map(|low| 0xE000_0000 + low),
        (0_u64..0x10_0000).prop_map(|low| 0xFFF0_0000 + low),
        u64::MAX - 16..=u64::MAX,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let config = |at, register: u64, data: Vec<u8>| Step::Config { at, register, data };
    let dword = move |at, register, value: u32| config(at, register, value.to_le_bytes().to_vec());
    prop_oneof![
        8 => (0x59_u64..0x60, any::<u8>()).prop_map(move |(register, value)| config((0, 0), register, vec![value])),
        2 => any::<u8>().prop_map(move |value| config((0, 0), 0x72, vec![value])),
        1 => any::<u8>().prop_map(move |value| config((0, 0), 0x68, vec![value])),
        1 => any::<u8>().prop_map(move |value| config((1, 0), 0x4E, vec![value])),
        2 => base().prop_map(move |value| dword((1, 3), 0x40, value)),
        1 => any::<u8>().prop_map(move |value| config((1, 3), 0x80, vec![value])),
        6 => (FIRST_SLOT..=LAST_SLOT, prop_oneof![Just(0x10_u64), Just(0x18), Just(0x20)], base())
            .prop_map(move |(slot, register, value)| dword((slot, 0), register, value)),
        1 => (FIRST_SLOT..=LAST_SLOT, prop_oneof![0_u32..2, Just(u32::MAX)]).prop_map(move |(slot, value)| dword((slot, 0), 0x14, value)),
        4 => (FIRST_SLOT..=LAST_SLOT, 0_u8..8).prop_map(move |(slot, value)| config((slot, 0), 4, vec![value])),
        8 => (memory_address(), 0_usize..12).prop_map(|(address, length)| Step::Read { address, length }),
        8 => (memory_address(), proptest::collection::vec(any::<u8>(), 0..12))
            .prop_map(|(address, data)| Step::Write { address, data }),
        1 => Just(Step::Reset),
    ]
}

fn apply(rig: &Rig, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    match step {
        Step::Config { at, register, data } => {
            select(&rig.machine, at.0, at.1, *register);
            rig.machine.write(Space::Port, 0xCFC + (register & 3), data);
            for (register, value) in (*register..).zip(data) {
                model.config_write(*at, register, *value);
            }
        }
        Step::Read { address, length } => {
            let mut data = vec![0; *length];
            rig.machine.read(Space::Memory, *address, &mut data);
            let byte = |index| address.checked_add(index).map_or(0xFF, |at| model.read(at));
            let expected: Vec<u8> = (0..*length as u64).map(byte).collect();
            prop_assert_eq!(data, expected, "{:#x}", address);
        }
        Step::Write { address, data } => {
            rig.machine.write(Space::Memory, *address, data);
            for (index, value) in (0..).zip(data) {
                if let Some(at) = address.checked_add(index) {
                    model.write(at, *value);
                }
            }
            let mut seen = Vec::new();
            for (slot, function) in &rig.functions {
                for (bar, offset, data) in function.writes() {
                    seen.extend((offset..).zip(data).map(|(offset, value)| (*slot, bar, offset, value)));
                }
            }
            let mut expected = std::mem::take(&mut model.writes);
            expected.sort_unstable();
            seen.sort_unstable();
            prop_assert_eq!(seen, expected, "{:#x}", address);
        }
        Step::Reset => {
            rig.machine.reset();
            model.reset();
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn decoding_is_what_the_datasheets_say(steps in proptest::collection::vec(step(), 1..60),
                                           random in proptest::collection::vec((memory_address(), any::<u16>()), 16)) {
        let rig = Rig::new();
        let mut model = Model::default();
        for step in &steps {
            apply(&rig, &mut model, step)?;
        }
        for kind in CycleKind::ALL {
            let boundaries = rig.machine.view.load().boundaries(kind);
            let near = boundaries.into_iter().flat_map(|at| [at.wrapping_sub(1), at, at.wrapping_add(1)]);
            for address in near {
                rig.check_owner(&model, kind, address & kind.space().last())?;
            }
            for (address, port) in &random {
                rig.check_owner(&model, kind, if kind.space() == Space::Memory { *address } else { (*port).into() })?;
            }
        }
        let low = (0..RAM + 0x1_0000).step_by(0x1000);
        let bars = (0xE000_0000..0xE000_3000).step_by(0x1000);
        rig.check_slots(&model, low.chain(bars).chain((ROM - 0x2000..1 << 32).step_by(0x1000)))?;
        // What userspace wrote on behalf of the guest, write-only areas included, is marked.
        let dirty: std::collections::BTreeSet<u64> = rig.machine.ram.dirty_pages().pages().collect();
        let written: std::collections::BTreeSet<u64> = model.ram.keys().map(|at| at & !0xFFF).collect();
        prop_assert_eq!(dirty, written);
    }
}
