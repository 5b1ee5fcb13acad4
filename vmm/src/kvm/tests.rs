//! On this host's /dev/kvm: what KVM has is what the machine's tree implies. KVM lists nothing, so it is asked for what must
//! fail: a second slot where one is, a second ioeventfd of one eventfd.
//!
//! Contains unsafe code: memory is given to KVM by host address.

mod irqfds;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Mutex;
use std::time::Duration;

use bulkhead_ipc::memory::{Direction, GuestRam};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuExit, VcpuFd};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::boot::Unpacking;
use crate::machine::pci::{
    BarKind, ConfigSpace, ConfigSpaceBuilder, Doorbell, DoorbellId, Identity, PciFunction,
};
use crate::machine::{
    Host, Machine, MachineConfig, MappedDoorbell, MemoryChip, MemorySlot, PowerEvent, Space,
};
use std::sync::Arc;

const RAM: u64 = 4 << 20;
const ROM: u64 = 0xFFFC_0000;
const PAGE: u64 = 4096;
const SLOTS: std::ops::RangeInclusive<u8> = 2..=3;

/// A host that is KVM, and remembers what it was told.
struct KvmHost {
    memory: MemorySlots,
    doorbells: Doorbells,
    told: Mutex<(Vec<MemorySlot>, Vec<MappedDoorbell>)>,
}

impl Host for KvmHost {
    fn set_irq(&self, _: u8, _: bool) {}
    fn power(&self, _: PowerEvent) {}
    fn topology_changed(&self, doorbells: &[MappedDoorbell]) {
        self.told.lock().unwrap().1 = doorbells.to_vec();
        self.doorbells.update(doorbells).unwrap();
    }
    fn memory_changed(&self, slots: &[MemorySlot]) {
        self.told.lock().unwrap().0 = slots.to_vec();
        self.memory.update(slots).unwrap();
    }
    fn ram_written(&self, address: u64) {
        self.memory.ram_written(address).unwrap();
    }
    fn set_timer(&self, _: Option<Duration>) {}
    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
    fn wall_clock(&self) -> Duration {
        Duration::ZERO
    }
}

struct Rom(GuestRam);

impl MemoryChip for Rom {
    fn name(&self) -> &str {
        "ROM"
    }
    fn memory(&self) -> &GuestRam {
        &self.0
    }
}

/// A function with one memory BAR and one I/O BAR, a doorbell in each.
struct Function {
    config: ConfigSpace,
    events: [EventFd; 2],
}

impl Function {
    fn new() -> Arc<Self> {
        let mut builder = ConfigSpaceBuilder::new(Identity { vendor: 0x1234, ..Identity::default() });
        builder.bar(0, BarKind::Memory32, 0x1000).unwrap();
        builder.bar(1, BarKind::Io, 16).unwrap();
        Arc::new(Self { config: builder.build(), events: [0, 0].map(|_| EventFd::new(0).unwrap()) })
    }
}

impl PciFunction for Function {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn doorbells(&self) -> Vec<Doorbell> {
        let at = |id: u8, offset| Doorbell {
            id: DoorbellId(id.into()),
            bar: id,
            offset,
            length: 0,
            datamatch: None,
        };
        vec![at(0, 0x800), at(1, 8)]
    }
    fn reset(&self) {}
}

impl DoorbellEvents for Function {
    fn event(&self, id: DoorbellId) -> Option<&EventFd> {
        self.events.get(usize::try_from(id.0).unwrap())
    }
}

struct Rig {
    vm: Vm,
    ram: GuestRam,
    host: Arc<KvmHost>,
    machine: Arc<Machine>,
    functions: BTreeMap<u8, Arc<Function>>,
    /// A page to offer KVM.
    spare: GuestRam,
}

impl Rig {
    fn new(chips: bool) -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("these tests need /dev/kvm");
        let ram = GuestRam::create(RAM).unwrap();
        let vm = Vm::create(kvm.into(), &ram).unwrap();
        let memory = MemorySlots::new(&vm, Arc::default());
        let host = Arc::new(KvmHost { memory, doorbells: Doorbells::new(&vm), told: Mutex::default() });
        let rom = Rom(GuestRam::create_at(ROM, 0x4_0000).unwrap());
        let config = MachineConfig { firmware: vec![Arc::new(rom)], ..MachineConfig::new(1, 40) };
        let machine = Machine::new(config, ram.clone(), host.clone()).unwrap();
        if chips {
            vm.create_chips().unwrap();
        }
        let functions: BTreeMap<_, _> = SLOTS.map(|slot| (slot, Function::new())).collect();
        for (slot, function) in &functions {
            host.doorbells.register(*slot, function.clone());
            machine.attach_pci(*slot, function.clone()).unwrap();
        }
        let spare = GuestRam::create_at(0, PAGE).unwrap();
        Self { vm, ram, host, machine, functions, spare }
    }

    fn config(&self, slot: u8, register: u32, data: &[u8]) {
        let address = 0x8000_0000 | u32::from(slot) << 11 | register & 0xFC;
        self.machine.write(Space::Port, 0xCF8, &address.to_le_bytes());
        self.machine.write(Space::Port, 0xCFC + u64::from(register & 3), data);
    }

    /// Whether KVM has a slot at a page.
    #[expect(clippy::disallowed_methods, reason = "for KVM")]
    fn mapped(&self, page: u64) -> bool {
        let mut region = kvm_userspace_memory_region {
            slot: 500,
            flags: 0,
            guest_phys_addr: page,
            memory_size: PAGE,
            userspace_addr: self.spare.host_mappings().next().unwrap().host_address,
        };
        // SAFETY: the page belongs to `self.spare`; the slot is deleted right after.
        let added = unsafe { self.vm.fd.set_user_memory_region(region) };
        if added.is_ok() {
            region.memory_size = 0;
            // SAFETY: deletes the slot.
            unsafe { self.vm.fd.set_user_memory_region(region) }.unwrap();
        }
        added.map_err(|error| assert_eq!(error.errno(), libc::EEXIST)).is_err()
    }

    /// Whether KVM has this doorbell.
    fn rings(&self, event: &EventFd, address: &IoEventAddress) -> bool {
        let fd = &self.vm.fd;
        match fd.register_ioevent(event, address, NoDatamatch) {
            Ok(()) => {
                fd.unregister_ioevent(event, address, NoDatamatch).unwrap();
                false
            }
            // Somebody's is there: this one's if it can be taken away.
            Err(error) => {
                assert_eq!(error.errno(), libc::EEXIST);
                let own = fd.unregister_ioevent(event, address, NoDatamatch).is_ok();
                own && fd.register_ioevent(event, address, NoDatamatch).is_ok()
            }
        }
    }

    fn check(&self) {
        let (slots, doorbells) = self.host.told.lock().unwrap().clone();
        let pages = (0xA_0000..0x10_1000).step_by(0x4000).chain((0..0x10_0000).step_by(0x1_F000));
        for page in pages.chain([RAM - PAGE, RAM, 0xE000_0000, ROM, 0xFFFF_F000]) {
            let told = slots.iter().any(|slot| page >= slot.address && page - slot.address < slot.size);
            assert_eq!(self.mapped(page), told, "{page:#x}");
        }
        let bells =
            |slot, id| doorbells.iter().filter(move |bell| (bell.slot, bell.id) == (slot, DoorbellId(id)));
        for (slot, function) in &self.functions {
            for (id, event) in (0..).zip(&function.events) {
                let bars = function.config.bars();
                let bar = bars[usize::try_from(id).unwrap()];
                let address = bar.address + if id == 0 { 0x800 } else { 8 };
                let told = bells(*slot, id).any(|bell| bell.address == address);
                let address =
                    if id == 0 { IoEventAddress::Mmio(address) } else { IoEventAddress::Pio(address) };
                assert_eq!(self.rings(event, &address), told, "slot {slot} doorbell {id}");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Config(u8, u32, Vec<u8>),
    Reset,
}

fn change() -> impl Strategy<Value = Change> {
    let function = || SLOTS.start().to_owned()..=SLOTS.end().to_owned();
    let base = prop_oneof![
        Just(0xE000_0000_u32),
        Just(0xE000_1000),
        Just(0x8_0000),
        Just(0xC_8000),
        Just(0xFFFF_F000),
        Just(0xC000),
        Just(0xC010),
        Just(0x600)
    ];
    prop_oneof![
        6 => (0x59_u32..0x60, any::<u8>()).prop_map(|(register, value)| Change::Config(0, register, vec![value])),
        1 => Just(Change::Config(0, 0x72, vec![0x4A])),
        1 => Just(Change::Config(0, 0x72, vec![0x0A])),
        1 => prop_oneof![Just(0), Just(0x40), Just(0x80)].prop_map(|hole| Change::Config(0, 0x68, vec![hole])),
        4 => (function(), 0_u32..2, base)
            .prop_map(|(slot, bar, base)| Change::Config(slot, 0x10 + 4 * bar, base.to_le_bytes().to_vec())),
        4 => (function(), 0_u8..4).prop_map(|(slot, command)| Change::Config(slot, 4, vec![command])),
        1 => Just(Change::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn kvm_has_what_the_tree_implies(changes in proptest::collection::vec(change(), 1..30)) {
        let rig = Rig::new(false);
        rig.check();
        for change in &changes {
            match change {
                Change::Config(slot, register, data) => rig.config(*slot, *register, data),
                Change::Reset => rig.machine.reset(),
            }
        }
        rig.check();
    }
}

/// Real-mode code at 1000h that stores a byte to each of these segments and halts.
fn program(segments: &[u16]) -> Vec<u8> {
    let store = |segment: &u16| {
        let [low, high] = segment.to_le_bytes();
        // mov ax, segment; mov ds, ax; mov [0], al
        [0xB8, low, high, 0x8E, 0xD8, 0xA2, 0x00, 0x00]
    };
    segments.iter().flat_map(store).chain([0xF4]).collect()
}

/// A vCPU that is about to run such code.
fn vcpu(rig: &Rig, segments: &[u16]) -> VcpuFd {
    let code = program(segments);
    rig.ram.view(0x1000, code.len() as u64, Direction::Write).unwrap().write_bytes(0, &code).unwrap();
    rig.ram.take_dirty();
    let vcpu = rig.vm.fd.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).unwrap();
    vcpu
}

fn dirty_pages(rig: &Rig) -> Vec<u64> {
    rig.host.memory.harvest().unwrap();
    rig.ram.take_dirty().pages().collect()
}

#[test]
fn a_guest_that_unpacks_leaves_once_and_no_write_of_it_is_lost() {
    let rig = Rig::new(false);
    let mut vcpu = vcpu(&rig, &[0x0311, 0x8022, 0x0433, 0x9044]);
    rig.host.memory.await_unpacking(Unpacking { above: 0x7_F123, size: 0x1_0000 }).unwrap();
    rig.host.memory.set_logging(true).unwrap();
    let VcpuExit::MmioWrite(address, data) = vcpu.run().unwrap() else { panic!("it wrote above") };
    assert_eq!((address, data), (0x8_0220, &[0x22][..]));
    rig.machine.write(Space::Memory, 0x3_0000, &[1]);
    rig.machine.write(Space::Memory, address, &[0x22]);
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    assert_eq!(dirty_pages(&rig), [0x3000, 0x4000, 0x3_0000, 0x8_0000, 0x9_0000]);
    for (address, expected) in [(0x3110, 0x11), (0x8_0220, 0x22), (0x4330, 0x33), (0x9_0440, 0x44)] {
        let view = rig.ram.view(address, 1, Direction::Read).unwrap();
        assert_eq!(view.read::<u8>(0).unwrap(), expected, "{address:#x}");
    }
}

#[test]
fn no_dirty_page_is_lost_when_slots_are_replaced() {
    let rig = Rig::new(false);
    rig.machine.shadow_ram();
    let mut vcpu = vcpu(&rig, &[0x0300, 0xC000, 0xD400, 0xF000]);
    rig.host.memory.set_logging(true).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
    // Three ways for a slot to go: read-only, gone, and gone by a reset; and one that stays.
    rig.config(0, 0x5C, &[0x13]);
    rig.config(0, 0x5A, &[0x30]);
    rig.machine.reset();
    assert_eq!(dirty_pages(&rig), [0x3000, 0xC_0000, 0xD_4000, 0xF_0000]);
    rig.host.memory.set_logging(false).unwrap();
    assert!(dirty_pages(&rig).is_empty());
}

#[test]
fn messages_are_connected_exactly_while_they_are_wanted() {
    let rig = Rig::new(true);
    let interrupts = Interrupts::new(&rig.vm);
    interrupts.connect_lines().unwrap();
    let events: Vec<_> = (0..8).map(|_| EventFd::new(0).unwrap()).collect();
    let mut routes = BTreeMap::new();
    // A sequence that fills, thins out and fills again.
    for step in [0, 1, 2, 3, 1, 4, 3, 5, 1, 0, 6, 7, 3, 0, 2, 7] {
        let event = &events[step];
        match routes.remove(&step) {
            Some(route) => interrupts.disconnect_message(event, route).unwrap(),
            None => {
                let message = crate::virtio::MsiMessage { address: 0xFEE0_0000, data: 0x40 };
                let route = interrupts.connect_message(event, message).unwrap();
                assert!(routes.values().all(|other| *other != route));
                routes.insert(step, route);
            }
        }
        for (index, event) in events.iter().enumerate() {
            // A second irqfd of one eventfd is refused, whatever it is for.
            let probe = rig.vm.fd.register_irqfd(event, 5);
            assert_eq!(probe.is_err(), routes.contains_key(&index), "event {index} after step {step}");
            if probe.is_ok() {
                rig.vm.fd.unregister_irqfd(event, 5).unwrap();
            }
        }
    }
}
