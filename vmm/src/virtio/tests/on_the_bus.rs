//! The function in a machine: reached through configuration mechanism #1 and the memory map, interrupting through the PIIX3.

use bulkhead_ipc::memory::Direction;

use crate::machine::pci::DoorbellId;
use crate::machine::{Host, Machine, MachineConfig, MappedDoorbell, MemorySlot, PowerEvent, Space};

use super::*;

const SLOT: u8 = 3;

#[derive(Default)]
struct Recorder {
    irqs: Mutex<BTreeMap<u8, bool>>,
    doorbells: Mutex<Vec<MappedDoorbell>>,
}

impl Host for Recorder {
    fn set_irq(&self, gsi: u8, level: bool) {
        self.irqs.lock().unwrap().insert(gsi, level);
    }

    fn power(&self, event: PowerEvent) {
        panic!("{event:?}");
    }

    fn topology_changed(&self, doorbells: &[MappedDoorbell]) {
        *self.doorbells.lock().unwrap() = doorbells.to_vec();
    }

    fn memory_changed(&self, _: &[MemorySlot]) {}

    fn set_timer(&self, _: Option<Duration>) {}

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    fn wall_clock(&self) -> Duration {
        Duration::ZERO
    }
}

fn select(machine: &Machine, offset: u16) {
    let address = 0x8000_0000 | u32::from(SLOT) << 11 | u32::from(offset & 0xFC);
    machine.write(Space::Port, 0xCF8, &address.to_le_bytes());
}

fn config_read(machine: &Machine, offset: u16) -> u32 {
    select(machine, offset);
    let mut data = [0; 4];
    machine.read(Space::Port, 0xCFC, &mut data);
    u32::from_le_bytes(data)
}

fn config_write(machine: &Machine, offset: u16, data: &[u8]) {
    select(machine, offset);
    machine.write(Space::Port, 0xCFC + u64::from(offset & 3), data);
}

#[test]
fn the_guest_reaches_it_through_the_chipset() {
    let (scaffold, peer) = scaffold();
    let host = Arc::new(Recorder::default());
    let config = MachineConfig::new(1, 40);
    let machine = Machine::new(config, scaffold.ram.clone(), Arc::clone(&host) as Arc<dyn Host>).unwrap();
    let pin = machine.attach_pci(SLOT, Arc::clone(&scaffold.device) as _).unwrap();
    scaffold.device.connect_pin(Arc::new(pin));
    machine.assign_resources();

    assert_eq!(config_read(&machine, 0), 0x1042_1AF4);
    let bar = u64::from(config_read(&machine, 0x10) & !0xF);
    assert_ne!(bar, 0);
    let seen: Vec<_> = host.doorbells.lock().unwrap().iter().map(|bell| (bell.id, bell.address)).collect();
    assert_eq!(seen, [(DoorbellId(0), bar + 0x3000), (DoorbellId(1), bar + 0x3004)]);

    let mut queues = [0; 2];
    machine.read(Space::Memory, bar + 0x12, &mut queues);
    assert_eq!(queues, [2, 0]);
    // A 64-bit access to a 64-bit field.
    machine.write(Space::Memory, bar + 0x20, &0x0000_0001_2345_6780u64.to_le_bytes());
    let mut ring = [0; 8];
    machine.read(Space::Memory, bar + 0x20, &mut ring);
    assert_eq!(ring, 0x0000_0001_2345_6780u64.to_le_bytes());
    // The same through the window.
    let window = scaffold.driver.window;
    config_write(&machine, window + 4, &[0]);
    config_write(&machine, window + 8, &0x20u32.to_le_bytes());
    config_write(&machine, window + 12, &4u32.to_le_bytes());
    assert_eq!(config_read(&machine, window + 16), 0x2345_6780);

    // Bus master starts the queues, the pin arrives at an IRQ, reading the ISR status releases it.
    config_write(&machine, 4, &6u16.to_le_bytes());
    scaffold.driver.start();
    peer.call(0);
    let irq = u8::try_from(config_read(&machine, 0x3C) & 0xFF).unwrap();
    let level = || host.irqs.lock().unwrap().get(&irq).copied().unwrap_or(false);
    wait_until(&scaffold.device, level);
    assert_ne!(config_read(&machine, 4) & 1 << 19, 0, "interrupt status");
    let mut isr = [0];
    machine.read(Space::Memory, bar + 0x1000, &mut isr);
    assert_eq!(isr, [1]);
    assert!(!level());
    machine.reset();
    assert_eq!(scaffold.driver.status(), 0);
}

#[test]
fn the_guest_reads_its_expansion_rom_through_the_chipset() {
    let rom = GuestRam::create_at(0, 0x2000).unwrap();
    rom.view(0, 2, Direction::Write).unwrap().write_bytes(0, &[0x55, 0xAA]).unwrap();
    rom.view(0x1FFF, 1, Direction::Write).unwrap().write(0, 7_u8).unwrap();
    let (stream, _peer) = Peer::start(Script::default());
    let scaffold = scaffold_with(Settings { rom: Some(rom), ..settings() }, stream);
    let host = Arc::new(Recorder::default());
    let machine = Machine::new(MachineConfig::new(1, 40), scaffold.ram.clone(), host).unwrap();
    machine.attach_pci(SLOT, Arc::clone(&scaffold.device) as _).unwrap();
    let read = |address: u64, length: usize| {
        let mut data = vec![0; length];
        machine.read(Space::Memory, address, &mut data);
        data
    };

    config_write(&machine, 0x30, &[0xFE, 0xFF, 0xFF, 0xFF]);
    assert_eq!(config_read(&machine, 0x30), 0xFFFF_E000, "8 KiB, not enabled");
    config_write(&machine, 0x30, &0xFE00_0001_u32.to_le_bytes());
    assert_eq!(read(0xFE00_0000, 2), [0xFF, 0xFF], "the function decodes no memory yet");
    config_write(&machine, 4, &[2]);
    assert_eq!((read(0xFE00_0000, 4), read(0xFE00_1FFF, 1)), (vec![0x55, 0xAA, 0, 0], vec![7]));
    machine.write(Space::Memory, 0xFE00_0000, &[1, 2, 3, 4]);
    assert_eq!(read(0xFE00_0000, 4), [0x55, 0xAA, 0, 0], "a ROM is not written");
    config_write(&machine, 0x30, &0xFE00_0000_u32.to_le_bytes());
    assert_eq!(read(0xFE00_0000, 2), [0xFF, 0xFF]);
}

/// Where a guest puts a BAR, sense or not: a window, RAM, what lies below the firmware, the APICs, the end of the 32-bit space.
const PLACES: [u32; 7] = [0xE000_0000, 0xE010_0000, 0, 0x0004_0000, 0xFEE0_0000, 0xFFFF_0000, 0xFEC0_0000];

#[test]
fn a_queue_runs_on_while_its_bars_move() {
    let (stream, daemon) = own_daemon::daemon(0xEE);
    let scaffold = scaffold_with(settings(), stream);
    let host = Arc::new(Recorder::default());
    let config = MachineConfig::new(1, 40);
    let machine = Machine::new(config, scaffold.ram.clone(), Arc::clone(&host) as Arc<dyn Host>).unwrap();
    let pin = machine.attach_pci(SLOT, Arc::clone(&scaffold.device) as _).unwrap();
    scaffold.device.connect_pin(Arc::new(pin));
    machine.assign_resources();
    own_daemon::start(&scaffold.driver);
    // Bus mastering stays on, or the queue would stop: that is another test's.
    config_write(&machine, 4, &6u16.to_le_bytes());
    let moves = std::thread::spawn({
        let machine = machine.clone();
        move || {
            for (round, place) in PLACES.iter().cycle().take(500).enumerate() {
                config_write(&machine, 0x10, &place.to_le_bytes());
                let command = if round % 5 == 0 { 4_u16 } else { 6 };
                config_write(&machine, 4, &command.to_le_bytes());
            }
        }
    });
    let mut number = 0;
    while !moves.is_finished() || number < 10 {
        own_daemon::post(&scaffold, number);
        scaffold.driver.notify(0);
        number += 1;
        wait_until(&scaffold.device, || own_daemon::used(&scaffold) == number);
    }
    moves.join().unwrap();
    let bells = || -> Vec<u64> { host.doorbells.lock().unwrap().iter().map(|bell| bell.address).collect() };
    for bar in [0xE000_0000_u32, 0xE080_0000] {
        config_write(&machine, 0x10, &bar.to_le_bytes());
        config_write(&machine, 4, &6u16.to_le_bytes());
        let bar = u64::from(bar);
        assert_eq!(bells(), [bar + 0x3000], "one queue has one doorbell, where the BAR is now");
        own_daemon::post(&scaffold, number);
        machine.write(Space::Memory, bar + 0x3000, &0u16.to_le_bytes());
        number += 1;
        wait_until(&scaffold.device, || own_daemon::used(&scaffold) == number);
    }
    config_write(&machine, 0x10, &0x0004_0000_u32.to_le_bytes());
    assert_eq!(bells(), [0; 0], "RAM hides the BAR");
    assert_eq!(scaffold.failures.count(), 0);
    drop((machine, scaffold));
    daemon.join().unwrap();
}
