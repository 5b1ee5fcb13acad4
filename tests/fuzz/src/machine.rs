//! Port and memory accesses, and PCI configuration, on the machine tree with functions whose BARs the guest moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_ipc::memory::GuestRam;
use bulkhead_vmm::machine::pci::{
    BarKind, ConfigSpace, ConfigSpaceBuilder, Doorbell, DoorbellId, Identity, Pin,
};
use bulkhead_vmm::machine::{
    Host, Machine, MachineConfig, MappedDoorbell, MemorySlot, PciFunction, PowerEvent, Space,
};

use crate::script::Script;

/// Bytes of RAM.
pub const RAM: u64 = 2 << 20;
/// The most of a script that is carried out, operations.
const LONGEST: usize = 300;

/// A host that only has a clock, which every look moves on.
#[derive(Default)]
struct Clock(AtomicU64);

impl Host for Clock {
    fn set_irq(&self, gsi: u8, _level: bool) {
        assert!(gsi < 16);
    }

    fn power(&self, _event: PowerEvent) {}

    fn topology_changed(&self, doorbells: &[MappedDoorbell]) {
        assert!(doorbells.is_sorted());
    }

    fn memory_changed(&self, slots: &[MemorySlot]) {
        let disjoint = |pair: &[MemorySlot]| match pair {
            [a, b] => a.address.checked_add(a.size).is_some_and(|end| end <= b.address),
            _ => true,
        };
        assert!(slots.windows(2).all(disjoint), "{slots:?}");
    }

    fn set_timer(&self, _deadline: Option<Duration>) {}

    fn monotonic(&self) -> Duration {
        Duration::from_micros(self.0.fetch_add(977, Ordering::Relaxed))
    }

    fn wall_clock(&self) -> Duration {
        self.monotonic()
    }
}

/// A function with a BAR of each kind.
struct Function(ConfigSpace);

impl Function {
    fn new() -> Option<Arc<Self>> {
        let mut builder =
            ConfigSpaceBuilder::new(Identity { vendor: 0x1AF4, device: 0x1000, ..Identity::default() });
        builder.bar(0, BarKind::Io, 64).ok()?;
        builder.bar(1, BarKind::Memory32, 0x1000).ok()?;
        builder.bar(2, BarKind::Memory64 { prefetchable: true }, 0x4000).ok()?;
        builder.interrupt_pin(Pin::A);
        Some(Arc::new(Self(builder.build())))
    }
}

impl PciFunction for Function {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let size = [64, 0x1000, 0x4000].get(usize::from(bar)).copied().unwrap_or(0);
        let end = offset + data.len() as u64;
        assert!(end <= size && matches!(data.len(), 1 | 2 | 4) && offset.is_multiple_of(data.len() as u64));
        data.fill(bar);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.bar_read(bar, offset, &mut data.to_vec());
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let doorbell = |bar, id| Doorbell { id: DoorbellId(id), bar, offset: 16, length: 2, datamatch: None };
        vec![doorbell(0, 1), doorbell(2, 2)]
    }

    fn reset(&self) {}
}

/// A machine with three functions on its bus, BARs placed.
pub fn new_machine() -> Option<(GuestRam, Arc<Machine>)> {
    let ram = GuestRam::create(RAM).ok()?;
    let config = MachineConfig::new(2, 40);
    let machine = Machine::new(config, ram.clone(), Arc::new(Clock::default())).ok()?;
    for slot in 2..5 {
        machine.attach_pci(slot, Function::new()?).ok()?;
    }
    machine.assign_resources();
    Some((ram, machine))
}

/// Addresses where something is, and its neighbours.
fn address(script: &mut Script<'_>) -> u64 {
    let kind = script.u8();
    let near = u64::from(script.u16());
    match kind % 8 {
        0 | 1 => near,
        2 => 0xC_0000 + (near << 2),
        3 => RAM - 16 + (near & 31),
        4 => 0xE000_0000 + (near << 4),
        5 => (1 << 32) - (near & 0xFF),
        6 => u64::MAX - (near & 0xF),
        _ => script.u64(),
    }
}

/// Reads and writes of any size at any address of both spaces, with resets and timers between them.
pub fn accesses(input: &[u8]) {
    let Some((_, machine)) = new_machine() else { return };
    let mut script = Script(input);
    for _ in 0..LONGEST {
        if !script.goes_on() {
            return;
        }
        let operation = script.u8();
        let space = if operation & 1 == 0 { Space::Port } else { Space::Memory };
        let length = usize::from(operation >> 4);
        match operation >> 1 & 7 {
            0..=2 => machine.read(space, address(&mut script), &mut vec![0; length]),
            3..=5 => {
                let at = address(&mut script);
                machine.write(space, at, script.bytes(length));
            }
            6 => machine.timer_expired(),
            _ if length == 0 => machine.reset(),
            _ => machine.press_power_button(),
        }
    }
}

/// A script of one access: the operation, then where, then what.
fn access(operation: u8, kind: u8, near: u16, data: &[u8]) -> Vec<u8> {
    [&[operation, kind][..], &near.to_le_bytes(), data].concat()
}

fn port_write(port: u16, data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len()).unwrap_or(0);
    access(length << 4 | 3 << 1, 0, port, data)
}

pub fn access_seeds() -> Vec<Vec<u8>> {
    let select = |address: u32| port_write(0xCF8, &address.to_le_bytes());
    let rtc = |index: u8, value: u8| [port_write(0x70, &[index]), port_write(0x71, &[value])].concat();
    vec![
        [select(0x8000_1010), port_write(0xCFC, &[0xFF; 4]), access(0x40, 0, 0xCFC, &[])].concat(),
        [select(0x8000_0058), port_write(0xCFD, &[0x33, 0x33]), access(0x87, 2, 0, &[7; 8])].concat(),
        [rtc(0x0B, 0x72), rtc(0x0A, 0x26), rtc(5, 0xC0), vec![6 << 1], access(0x10, 0, 0x71, &[])].concat(),
        [port_write(0xB2, &[0xF1]), port_write(0x602, &[0xFF; 2]), port_write(0x604, &[1, 0]), vec![0x1E]]
            .concat(),
        [port_write(0x64, &[0xD1]), port_write(0x60, &[3]), port_write(0x92, &[1]), vec![0x0E]].concat(),
        [access(0x81, 4, 0, &[]), access(0xF7, 3, 0, &[1; 15]), access(0x41, 6, 0, &[])].concat(),
        (0..64_u16).flat_map(|port| port_write(port, &[0xA5])).collect(),
    ]
}

/// Configuration reads and writes, also unaligned and beyond the end, functions plugged in and out, accesses to what moved.
pub fn configuration(input: &[u8]) {
    let Some((_, machine)) = new_machine() else { return };
    let mut script = Script(input);
    for _ in 0..LONGEST {
        if !script.goes_on() {
            return;
        }
        let (operation, devfn, register) = (script.u8(), script.u8() & 0x2F, script.u8());
        let slot = devfn >> 3;
        let length = usize::from(operation >> 4 & 7);
        let lane = 0xCFC + u64::from(operation >> 2 & 3);
        let select = 0x8000_0000 | u32::from(devfn) << 8 | u32::from(register);
        machine.write(Space::Port, 0xCF8, &select.to_le_bytes());
        match operation & 3 {
            0 => machine.read(Space::Port, lane, &mut vec![0; length]),
            1 => machine.write(Space::Port, lane, script.bytes(length)),
            2 => {
                let at = script.u64() >> (operation & 0x30);
                machine.read(Space::Memory, at, &mut [0; 8]);
                machine.write(Space::Port, at & 0xFFFF, &[register; 4]);
            }
            _ if operation & 4 == 0 => {
                let _ = machine.detach_pci(slot);
                if let Some(function) = Function::new().filter(|_| operation & 8 == 0) {
                    let _ = machine.attach_pci(slot, function);
                }
            }
            _ if operation & 8 == 0 => machine.assign_resources(),
            _ => machine.reset(),
        }
    }
}

pub fn configuration_seeds() -> Vec<Vec<u8>> {
    let write = |devfn: u8, register: u8, data: &[u8]| {
        let length = u8::try_from(data.len()).unwrap_or(0);
        [&[length << 4 | 1, devfn, register][..], data].concat()
    };
    let over_ram = [write(0x10, 0x14, &[0; 4]), write(0x10, 4, &[7, 4])].concat();
    let top =
        [write(0x18, 0x18, &[0xFF; 4]), write(0x18, 0x1C, &[0xFF; 4]), write(0x18, 4, &[7, 0])].concat();
    vec![
        over_ram,
        top,
        (0x59..0x60).flat_map(|register| write(0, register, &[0x22])).collect(),
        [write(0, 0x72, &[0x4A]), write(0, 0x72, &[0x1A]), vec![0x0F, 0, 0]].concat(),
        [write(0x0B, 0x40, &[0xC1, 0x0C]), write(0x0B, 0x80, &[1]), vec![2, 0, 0, 0xF8, 0x0C]].concat(),
        [write(8, 0x60, &[0x8B, 0, 1, 13]), vec![3, 0x10, 0], vec![0x0B, 0x18, 0], vec![7, 0, 0]].concat(),
    ]
}
