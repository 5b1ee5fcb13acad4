//! The flat view is the tree.

use proptest::prelude::*;

use super::super::address::CycleKind;
use super::super::tree::Node;
use super::*;

/// What a guest, or an operator, does to the topology.
#[derive(Clone, Debug)]
enum Change {
    Bar { slot: u64, register: u64, value: u32 },
    Command { slot: u64, value: u16 },
    PmBase { value: u32 },
    PmEnable { value: u8 },
    ChipSelects { value: u8 },
    Attach { slot: u8 },
    Detach { slot: u8 },
    Reset,
}

fn slot() -> impl Strategy<Value = u8> {
    2_u8..6
}

/// Addresses that meet each other, RAM, the APICs and the ends of their spaces.
fn address() -> impl Strategy<Value = u32> {
    prop_oneof![
        (0_u32..64).prop_map(|n| 0xE000_0000 + n * 0x80),
        (0_u32..64).prop_map(|n| n * 8),
        (0_u32..16).prop_map(|n| 0xCE0 + n * 8),
        (0_u32..16).prop_map(|n| 0x5F0 + n * 8),
        Just(0xFEC0_0000),
        Just(0xFEE0_0000),
        Just(u32::try_from(RAM).unwrap() - 0x80),
        Just(u32::MAX),
        Just(0xFFF0),
        any::<u32>(),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (slot(), 0_u64..6, address()).prop_map(|(slot, bar, value)| Change::Bar {
            slot: slot.into(), register: 0x10 + 4 * bar, value: if bar == 1 && value != u32::MAX { value & 3 } else { value } }),
        4 => (slot(), any::<u16>()).prop_map(|(slot, value)| Change::Command { slot: slot.into(), value }),
        2 => address().prop_map(|value| Change::PmBase { value }),
        1 => any::<u8>().prop_map(|value| Change::PmEnable { value }),
        1 => any::<u8>().prop_map(|value| Change::ChipSelects { value }),
        4 => slot().prop_map(|slot| Change::Attach { slot }),
        1 => slot().prop_map(|slot| Change::Detach { slot }),
        1 => Just(Change::Reset),
    ]
}

fn apply(machine: &Machine, change: &Change) {
    match *change {
        Change::Bar { slot, register, value } => config_write(machine, (slot, 0), register, 4, value.into()),
        Change::Command { slot, value } => config_write(machine, (slot, 0), 4, 2, value.into()),
        Change::PmBase { value } => config_write(machine, (1, 3), 0x40, 4, value.into()),
        Change::PmEnable { value } => config_write(machine, (1, 3), 0x80, 1, value.into()),
        Change::ChipSelects { value } => config_write(machine, (1, 0), 0x4E, 1, value.into()),
        Change::Attach { slot } => drop(machine.attach_pci(slot, TestFunction::new(slot))),
        Change::Detach { slot } => drop(machine.detach_pci(slot)),
        Change::Reset => machine.reset(),
    }
}

/// Compares one look-up with one walk.
fn check(machine: &Machine, kind: CycleKind, address: u64) -> Result<(), TestCaseError> {
    let view = machine.view.load();
    let found = view.resolve(kind, address);
    let walked = machine.root.claim(kind, address);
    let same = match (&found.endpoint, &walked) {
        (None, None) => true,
        (Some(endpoint), Some(claim)) => endpoint.is(&claim.endpoint) && found.offset == claim.offset,
        _ => false,
    };
    prop_assert!(same, "{:?} {:#x}: walk claims: {}", kind, address, walked.is_some());
    prop_assert!(found.last >= address);
    Ok(())
}

/// Every address where something could begin or end, and its neighbours.
fn probes(machine: &Machine, kind: CycleKind) -> Vec<u64> {
    let mut probes = machine.view.load().boundaries(kind);
    for slot in 2_u8..6 {
        let at = super::super::SlotFunction { slot, function: 0 };
        let bars = machine.root.bus.function(at).map(|function| function.config().bars()).unwrap_or_default();
        probes.extend(bars.iter().flat_map(|bar| [bar.address, bar.address + (bar.size - 1)]));
    }
    probes.push(config_read(machine, (1, 3), 0x40, 2) & 0xFFC0);
    probes.extend([0, 0xFFFF, 0xFFFF_FFFF, u64::MAX]);
    probes.into_iter().flat_map(|at| [at.wrapping_sub(1), at, at.wrapping_add(1)]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_look_up_ends_where_a_walk_ends(changes in proptest::collection::vec(change(), 1..40),
                                             random in proptest::collection::vec(any::<u64>(), 16)) {
        let (_, machine) = machine(1);
        for change in &changes {
            apply(&machine, change);
        }
        for kind in CycleKind::ALL {
            for address in probes(&machine, kind) {
                check(&machine, kind, address)?;
            }
            for address in &random {
                check(&machine, kind, address & kind.space().last())?;
                check(&machine, kind, address & 0xFFF)?;
            }
        }
    }

    #[test]
    fn doorbells_lie_where_writes_reach_their_bars(changes in proptest::collection::vec(change(), 1..40)) {
        let (host, machine) = machine(1);
        for change in &changes {
            apply(&machine, change);
        }
        let told = host.recorded().doorbells;
        let mut expected = Vec::new();
        for (at, function) in machine.root.bus.functions_in_order() {
            for doorbell in function.doorbells() {
                let bars = function.config().bars();
                let bar = bars.iter().find(|bar| bar.index == doorbell.bar).unwrap();
                let address = bar.address.wrapping_add(doorbell.offset);
                let kind = CycleKind::write(bar.kind.space(), doorbell.length.into());
                let view = machine.view.load();
                let found = view.resolve(kind, address);
                let endpoint = super::super::tree::Endpoint::Bar(function.clone(), bar.index);
                if found.endpoint.is_some_and(|there| there.is(&endpoint)) && found.offset == doorbell.offset {
                    expected.push((doorbell.id, at.slot, address));
                }
            }
        }
        expected.sort();
        let told: Vec<_> = told.iter().map(|doorbell| (doorbell.id, doorbell.slot, doorbell.address)).collect();
        prop_assert_eq!(told, expected);
    }
}

#[test]
fn doorbells_appear_move_and_vanish_with_their_bar() {
    let (host, machine) = machine(1);
    machine.attach_pci(2, TestFunction::new(2)).unwrap();
    config_write(&machine, (2, 0), 0x10, 4, 0xE000_0000);
    assert!(host.recorded().doorbells.is_empty(), "memory decode is off");
    config_write(&machine, (2, 0), 4, 2, 2);
    let addresses = || -> Vec<u64> { host.recorded().doorbells.iter().map(|bell| bell.address).collect() };
    assert_eq!(addresses(), [0xE000_0800, 0xE000_0804]);
    config_write(&machine, (2, 0), 0x14, 4, 1);
    assert_eq!(addresses(), [0x1_E000_0800, 0x1_E000_0804]);
    config_write(&machine, (2, 0), 4, 2, 0);
    assert!(addresses().is_empty());
    config_write(&machine, (2, 0), 4, 2, 2);
    machine.detach_pci(2).unwrap();
    assert!(addresses().is_empty());
}

#[test]
fn ram_hides_a_bar() {
    let (host, machine) = machine(1);
    let function = TestFunction::new(2);
    machine.attach_pci(2, function.clone()).unwrap();
    config_write(&machine, (2, 0), 4, 2, 2);
    config_write(&machine, (2, 0), 0x10, 4, RAM - 0x1000);
    write(&machine, Space::Memory, RAM - 0x800, 4, 0x1122_3344);
    assert_eq!(function.writes(), []);
    assert_eq!(read(&machine, Space::Memory, RAM - 0x800, 4), 0x1122_3344);
    assert!(host.recorded().doorbells.is_empty());
}

#[test]
fn lowest_slot_wins_where_bars_overlap() {
    let (_, machine) = machine(1);
    let functions = [3_u8, 2].map(|slot| {
        let function = TestFunction::new(slot);
        machine.attach_pci(slot, function.clone()).unwrap();
        config_write(&machine, (slot.into(), 0), 0x18, 4, 0xE000_0000);
        config_write(&machine, (slot.into(), 0), 4, 2, 2);
        function
    });
    write(&machine, Space::Memory, 0xE000_0010, 1, 7);
    assert_eq!(functions[1].writes(), [(2, 0x10, vec![7])]);
    config_write(&machine, (2, 0), 4, 2, 0);
    write(&machine, Space::Memory, 0xE000_0010, 1, 7);
    assert_eq!(functions[0].writes(), [(2, 0x10, vec![7])]);
}
