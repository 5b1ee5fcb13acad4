//! The machine as a whole, with a recorder for a host.

mod flat_view;
mod hostile;
mod hotplug;
mod interrupts;
mod memory_map;
mod platform;
mod reference;
mod registers;

use std::sync::{Arc, Mutex};

use bulkhead_ipc::memory::{Direction, GuestRam};

use super::pci::{
    BarKind, Command, ConfigSpace, ConfigSpaceBuilder, Doorbell, DoorbellId, Identity, PciFunction, Pin,
};
use super::sync::lock;
use super::testing::Recorder;
use super::{Machine, MachineConfig, MemoryChip, Space};

const RAM: u64 = 4 << 20;

/// A machine with 4 MiB of RAM.
fn machine(cpus: u16) -> (Arc<Recorder>, Arc<Machine>) {
    machine_with(cpus, Vec::new())
}

/// The same with firmware.
fn machine_with(cpus: u16, firmware: Vec<Arc<dyn MemoryChip>>) -> (Arc<Recorder>, Arc<Machine>) {
    let host = Recorder::new();
    let ram = GuestRam::create(RAM).unwrap();
    let config = MachineConfig { firmware, ..MachineConfig::new(cpus, 40) };
    let machine = Machine::new(config, ram, host.clone()).unwrap();
    (host, machine)
}

/// A ROM.
struct Rom(GuestRam);

impl Rom {
    fn chip(address: u64, bytes: &[u8]) -> Arc<dyn MemoryChip> {
        let memory = GuestRam::create_at(address, bytes.len() as u64).unwrap();
        memory.view(address, bytes.len() as u64, Direction::Write).unwrap().write_bytes(0, bytes).unwrap();
        Arc::new(Self(memory))
    }
}

impl MemoryChip for Rom {
    fn name(&self) -> &str {
        "ROM"
    }

    fn memory(&self) -> &GuestRam {
        &self.0
    }
}

fn read(machine: &Machine, space: Space, address: u64, width: usize) -> u64 {
    let mut data = [0; 8];
    machine.read(space, address, &mut data[..width]);
    u64::from_le_bytes(data)
}

fn write(machine: &Machine, space: Space, address: u64, width: usize, value: u64) {
    machine.write(space, address, &value.to_le_bytes()[..width]);
}

fn inb(machine: &Machine, port: u64) -> u64 {
    read(machine, Space::Port, port, 1)
}

fn outb(machine: &Machine, port: u64, value: u64) {
    write(machine, Space::Port, port, 1, value);
}

fn select(machine: &Machine, slot: u64, function: u64, register: u64) {
    write(machine, Space::Port, 0xCF8, 4, 0x8000_0000 | slot << 11 | function << 8 | register & 0xFC);
}

/// Reads configuration space by mechanism #1.
fn config_read(machine: &Machine, (slot, function): (u64, u64), register: u64, width: usize) -> u64 {
    select(machine, slot, function, register);
    read(machine, Space::Port, 0xCFC + (register & 3), width)
}

fn config_write(machine: &Machine, (slot, function): (u64, u64), register: u64, width: usize, value: u64) {
    select(machine, slot, function, register);
    write(machine, Space::Port, 0xCFC + (register & 3), width, value);
}

/// A function with a 64-bit BAR of 4 KiB (0), a 32-bit BAR of 256 bytes (2) and an I/O BAR of 16 bytes (4), which
/// remembers what reached it and reads its name and the offset.
struct TestFunction {
    config: ConfigSpace,
    name: u8,
    writes: Mutex<Vec<(u8, u64, Vec<u8>)>>,
    commands: Mutex<Vec<Command>>,
}

impl TestFunction {
    fn new(name: u8) -> Arc<Self> {
        let identity =
            Identity { vendor: 0x1234, device: name.into(), class: 0xFF_00_00, ..Identity::default() };
        let mut builder = ConfigSpaceBuilder::new(identity);
        builder.bar(0, BarKind::Memory64 { prefetchable: true }, 0x1000).unwrap();
        builder.bar(2, BarKind::Memory32, 0x100).unwrap();
        builder.bar(4, BarKind::Io, 0x10).unwrap();
        builder.interrupt_pin(Pin::A);
        Arc::new(Self { config: builder.build(), name, writes: Mutex::default(), commands: Mutex::default() })
    }

    fn writes(&self) -> Vec<(u8, u64, Vec<u8>)> {
        std::mem::take(&mut lock(&self.writes))
    }
}

impl PciFunction for TestFunction {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn command_changed(&self, command: Command) {
        lock(&self.commands).push(command);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte =
                self.name ^ bar << 5 ^ u8::try_from(offset & 0xFF).unwrap() ^ u8::try_from(index).unwrap();
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4) && offset.is_multiple_of(data.len() as u64));
        lock(&self.writes).push((bar, offset, data.to_vec()));
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let doorbell =
            |id, bar, offset| Doorbell { id: DoorbellId(id), bar, offset, length: 2, datamatch: None };
        vec![doorbell(0, 0, 0x800), doorbell(1, 0, 0x804), doorbell(2, 4, 0xE)]
    }

    fn reset(&self) {}
}
