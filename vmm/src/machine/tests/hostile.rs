//! A guest that does anything at all.

use std::sync::Barrier;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Access {
    Read(Space, u64, usize),
    Write(Space, u64, Vec<u8>),
    Config((u64, u64), u64, Vec<u8>),
    Reset,
}

fn space() -> impl Strategy<Value = Space> {
    prop_oneof![Just(Space::Port), Just(Space::Memory)]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0_u64..0x1_0010,
        0xAFE0_u64..0xAFF0,
        0x600_u64..0x650,
        Just(u64::MAX),
        u64::MAX - 9..=u64::MAX,
        RAM - 8..RAM + 8,
        0x9_FFF0_u64..0x10_0010,
        0xFFFF_FFF0_u64..0x1_0000_0010,
        0xE000_0000_u64..0xE001_0000,
        prop_oneof![Just(0x510), Just(0x511), Just(0x514), Just(0x518), Just(0x70), Just(0x71), Just(0x64)],
    ]
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        4 => (space(), address(), 0_usize..17).prop_map(|(space, address, size)| Access::Read(space, address, size)),
        4 => (space(), address(), proptest::collection::vec(any::<u8>(), 0..17))
            .prop_map(|(space, address, data)| Access::Write(space, address, data)),
        4 => ((0_u64..32, 0_u64..8), 0_u64..256, proptest::collection::vec(any::<u8>(), 1..5))
            .prop_map(|(at, register, data)| Access::Config(at, register, data)),
        1 => Just(Access::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_sequence_of_accesses_panics(accesses in proptest::collection::vec(access(), 1..200)) {
        let (_, machine) = machine_with(2, vec![Rom::chip(0xFFFC_0000, &[0; 0x4_0000])]);
        for slot in 2..5 {
            machine.attach_pci(slot, TestFunction::new(slot)).unwrap();
        }
        machine.assign_resources();
        for access in accesses {
            match access {
                Access::Read(space, address, size) => machine.read(space, address, &mut vec![0; size]),
                Access::Write(space, address, data) => machine.write(space, address, &data),
                Access::Config(at, register, data) => {
                    select(&machine, at.0, at.1, register);
                    machine.write(Space::Port, 0xCFC + (register & 3), &data);
                }
                Access::Reset => machine.reset(),
            }
        }
    }

    #[test]
    fn what_nobody_claims_reads_all_ones(address in 0x0010_0000_0000_u64..u64::MAX, size in 0_usize..17) {
        let (_, machine) = machine(1);
        let mut data = vec![0; size];
        machine.read(Space::Memory, address, &mut data);
        prop_assert_eq!(data, vec![0xFF; size]);
    }
}

/// A machine with some functions and all that a guest can see of what it did to it.
struct Seen {
    host: Arc<Recorder>,
    machine: Arc<Machine>,
    functions: Vec<Arc<TestFunction>>,
}

impl Seen {
    fn new() -> Self {
        let (host, machine) = machine_with(2, vec![Rom::chip(0xFFFC_0000, &[0xA5; 0x4_0000])]);
        let functions: Vec<_> = (2..5).map(TestFunction::new).collect();
        for (slot, function) in (2..).zip(&functions) {
            machine.attach_pci(slot, function.clone()).unwrap();
        }
        machine.assign_resources();
        Self { host, machine, functions }
    }

    /// The cycles of a 32-bit bus, found byte by byte: the longest power of two up to a dword that is left and aligned.
    fn cycles(address: u64, length: usize) -> Vec<std::ops::Range<usize>> {
        let (mut at, mut cycles) = (0, Vec::new());
        while at < length {
            let fits = |width: &usize| {
                at + width <= length && (address % 4 + at as u64).is_multiple_of(*width as u64)
            };
            let width = [4, 2, 1].into_iter().find(fits).unwrap();
            cycles.push(at..at + width);
            at += width;
        }
        cycles
    }

    fn config_space(&self) -> Vec<u64> {
        let places = [(0, 0), (1, 0), (1, 3), (2, 0), (3, 0), (4, 0)];
        let dwords =
            places.into_iter().flat_map(|at| (0..256).step_by(4).map(move |register| (at, register)));
        dwords.map(|(at, register)| config_read(&self.machine, at, register, 4)).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Unaligned, straddling, longer than the bus is wide, longer than what is left of the space, of no length: each access is
    /// the cycles that a bus of 32 bits makes of it, and beyond the end of a space there is nothing.
    #[test]
    fn any_access_is_the_cycles_that_it_is_cut_into(accesses in proptest::collection::vec(access(), 1..60)) {
        let (whole, cut) = (Seen::new(), Seen::new());
        for access in &accesses {
            match access {
                Access::Read(space, address, length) => {
                    let (mut at_once, mut parts) = (vec![0; *length], vec![0; *length]);
                    whole.machine.read(*space, *address, &mut at_once);
                    for cycle in Seen::cycles(*address, *length) {
                        match address.checked_add(cycle.start as u64).filter(|at| *at <= space.last()) {
                            Some(at) => cut.machine.read(*space, at, &mut parts[cycle]),
                            None => parts[cycle].fill(0xFF),
                        }
                    }
                    prop_assert_eq!(at_once, parts, "{:?}", access);
                }
                Access::Write(space, address, data) => {
                    whole.machine.write(*space, *address, data);
                    for cycle in Seen::cycles(*address, data.len()) {
                        let at = address.checked_add(cycle.start as u64).filter(|at| *at <= space.last());
                        at.into_iter().for_each(|at| cut.machine.write(*space, at, &data[cycle.clone()]));
                    }
                }
                Access::Config(at, register, data) => for seen in [&whole, &cut] {
                    select(&seen.machine, at.0, at.1, *register);
                    seen.machine.write(Space::Port, 0xCFC + (register & 3), data);
                }
                Access::Reset => [&whole, &cut].into_iter().for_each(|seen| seen.machine.reset()),
            }
            for (whole, cut) in whole.functions.iter().zip(&cut.functions) {
                prop_assert_eq!(whole.writes(), cut.writes(), "{:?}", access);
            }
        }
        let (told, expected) = (whole.host.recorded(), cut.host.recorded());
        prop_assert_eq!(told.doorbells, expected.doorbells);
        prop_assert_eq!((told.edges, told.power, told.ejected), (expected.edges, expected.power, expected.ejected));
        prop_assert_eq!(told.slots.len(), expected.slots.len());
        prop_assert_eq!(whole.config_space(), cut.config_space());
    }
}

#[test]
fn several_vcpus_move_bars_and_flip_pam_at_once() {
    let (host, machine) = machine(4);
    for slot in 2..6 {
        machine.attach_pci(slot, TestFunction::new(slot)).unwrap();
    }
    std::thread::scope(|scope| {
        let machine = &machine;
        scope.spawn(move || {
            for round in 0..200 {
                config_write(machine, (0, 0), 0x59 + round % 7, 1, round);
                write(machine, Space::Memory, 0xC_0000 + (round & 15) * 0x4000, 4, round);
            }
        });
        for slot in 2..6_u64 {
            scope.spawn(move || {
                for round in 0..200 {
                    // The latch is shared, as on hardware: these may hit each other's function.
                    config_write(machine, (slot, 0), 0x10, 4, 0xE000_0000 + slot * 0x1000 + round % 3);
                    config_write(machine, (slot, 0), 4, 2, round & 7);
                    read(machine, Space::Memory, 0xE000_0000 + slot * 0x1000, 4);
                }
            });
        }
    });
    // Whatever came last, what the host was told is what the tree says.
    assert_eq!(host.recorded().doorbells, machine.view.load().doorbells);
    assert_eq!(host.recorded().slots, machine.view.load().slots);
    assert_eq!(machine.view.load().generation, machine.topology.generation());
}

/// A function that waits, at its command register, for somebody to let it go on.
struct Slow {
    config: ConfigSpace,
    entered: Barrier,
    released: Barrier,
}

impl PciFunction for Slow {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn command_changed(&self, _command: Command) {
        self.entered.wait();
        self.released.wait();
    }

    fn reset(&self) {}
}

#[test]
fn a_function_that_waits_for_its_device_process_holds_up_no_other_slot() {
    let (_, machine) = machine(2);
    let identity = Identity { vendor: 0x1234, device: 4, ..Identity::default() };
    let config = ConfigSpaceBuilder::new(identity).build();
    let slow = Arc::new(Slow { config, entered: Barrier::new(2), released: Barrier::new(2) });
    machine.attach_pci(4, slow.clone()).unwrap();
    machine.attach_pci(5, TestFunction::new(5)).unwrap();
    let vcpu = {
        let machine = machine.clone();
        std::thread::spawn(move || config_write(&machine, (4, 0), 4, 2, 7))
    };
    slow.entered.wait();
    // Would wait for ever if it did.
    assert_eq!(config_read(&machine, (5, 0), 0, 4), 0x0005_1234);
    config_write(&machine, (5, 0), 4, 2, 7);
    assert_eq!(config_read(&machine, (5, 0), 4, 2), 7);
    slow.released.wait();
    vcpu.join().unwrap();
}
