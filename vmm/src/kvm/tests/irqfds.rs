//! virtio functions that a guest sets up, masks, moves and ejects at random: KVM has the irqfds, with their messages, and the
//! ioeventfds that their registers imply, and none of functions that are gone.

use std::io;
use std::time::Instant;

use kvm_bindings::kvm_lapic_state;

use super::*;
use crate::virtio::tests::driver::{CONFIG_VECTOR, Driver, QUEUE_SELECT, QUEUE_VECTOR, STATUS};
use crate::virtio::tests::peer::{Peer, Script};
use crate::virtio::tests::{Failures, settings};
use crate::virtio::{Backend, MsiHost, MsiMessage, VirtioPci};

const PLACES: std::ops::RangeInclusive<u8> = 4..=5;
/// A source for the configuration and one for each of two queues; a vector for each.
const SOURCES: u16 = 3;
const NO_VECTOR: u16 = 0xFFFF;
/// Messages to the only CPU, and to one that is not there.
const HERE: u32 = 0xFEE0_0000;
const NOWHERE: u32 = 0xFEE0_1000;
/// Registers of a local APIC (Intel SDM volume 3, table 11-1): spurious vector with its enable bit, interrupt requests.
const SVR: usize = 0xF0;
const IRR: usize = 0x200;

/// The host of a function's messages, which remembers each eventfd that it was ever told of: a duplicate keeps KVM from
/// letting go of it by itself.
struct Remembering {
    host: FunctionMessages,
    events: Mutex<BTreeMap<u16, EventFd>>,
}

impl MsiHost for Remembering {
    fn connect(&self, source: u16, event: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.events.lock().unwrap().insert(source, event.try_clone()?);
        self.host.connect(source, event, message)
    }
    fn disconnect(&self, source: u16, event: &EventFd) {
        self.host.disconnect(source, event);
    }
}

struct Plugged {
    driver: Driver,
    messages: Arc<Remembering>,
    _peer: Peer,
}

struct Guest {
    rig: Rig,
    interrupts: Arc<Interrupts>,
    vcpu: VcpuFd,
    plugged: BTreeMap<u8, Plugged>,
    /// What functions that are gone had told of.
    gone: Vec<Arc<Remembering>>,
}

impl Guest {
    fn new() -> Self {
        let rig = Rig::new(true);
        let interrupts = Arc::new(Interrupts::new(&rig.vm));
        interrupts.connect_lines().unwrap();
        let vcpu = rig.vm.fd.create_vcpu(0).unwrap();
        let mut guest = Self { rig, interrupts, vcpu, plugged: BTreeMap::new(), gone: Vec::new() };
        PLACES.for_each(|slot| guest.plug(slot));
        guest
    }

    /// A new function, which its driver has set up: all vectors are on.
    fn plug(&mut self, slot: u8) {
        if self.plugged.contains_key(&slot) {
            return;
        }
        let (stream, peer) = Peer::start(Script::default());
        let host = FunctionMessages::new(self.interrupts.clone());
        let messages = Arc::new(Remembering { host, events: Mutex::default() });
        let settings = settings();
        let backend = Backend::open(&settings, stream).unwrap();
        let observer = Arc::new(Failures::default());
        let device =
            VirtioPci::new(settings, backend, self.rig.ram.clone(), messages.clone(), observer).unwrap();
        self.rig.host.doorbells.register(slot, device.clone());
        self.rig.machine.attach_pci(slot, device.clone()).unwrap();
        self.plugged.insert(slot, Plugged { driver: Driver::new(device), messages, _peer: peer });
        for bar in 0..2 {
            let base = 0xE000_0000 | u32::from(slot) << 20 | bar << 16;
            self.act(&Act::Bar(slot, bar, base));
        }
        self.act(&Act::Command(slot, 6));
        self.act(&Act::Control(slot, 0x8000));
        for vector in 0..SOURCES {
            let data = 0x40 + u32::from(slot) * 4 + u32::from(vector);
            for (word, value) in (0..).zip([HERE, 0, data, 0]) {
                self.act(&Act::Table(slot, vector * 16 + word * 4, value.to_le_bytes().to_vec()));
            }
            self.act(&Act::Vector(slot, vector, vector));
        }
    }

    /// What is left of a function that the bus has let go of goes, as in the core.
    fn forget(&mut self, slot: u8) {
        let Some(Plugged { driver, messages, _peer }) = self.plugged.remove(&slot) else { return };
        self.rig.host.doorbells.forget(slot);
        driver.device.disconnect_backend();
        self.gone.push(messages);
    }

    /// Writes to a register in one of a function's BARs, wherever it lies, or does not.
    fn write(&self, slot: u8, bar: u8, offset: u64, data: &[u8]) {
        let Some(plugged) = self.plugged.get(&slot) else { return };
        let bars = plugged.driver.device.config().bars();
        let bar = bars.iter().find(|it| it.index == bar).unwrap();
        self.rig.machine.write(Space::Memory, bar.address + offset, data);
    }

    fn act(&mut self, act: &Act) {
        let blocks =
            |slot| self.plugged.get(slot).map(|it| (it.driver.common, it.driver.table, it.driver.msix));
        match act {
            Act::Command(slot, value) => self.rig.config(*slot, 4, &[*value, 0]),
            Act::Bar(slot, bar, base) => self.rig.config(*slot, 0x10 + 4 * bar, &base.to_le_bytes()),
            Act::Control(slot, value) => {
                let Some((.., msix)) = blocks(slot) else { return };
                self.rig.config(*slot, u32::from(msix) + 2, &value.to_le_bytes());
            }
            Act::Table(slot, offset, data) => {
                let Some((_, table, _)) = blocks(slot) else { return };
                self.write(*slot, table.bar, table.offset + u64::from(*offset), data);
            }
            Act::Vector(slot, source, vector) => {
                let Some((common, ..)) = blocks(slot) else { return };
                let put = |register, value: u16| {
                    self.write(*slot, common.bar, common.offset + register, &value.to_le_bytes());
                };
                match source.checked_sub(1) {
                    None => put(CONFIG_VECTOR, *vector),
                    Some(queue) => {
                        put(QUEUE_SELECT, queue);
                        put(QUEUE_VECTOR, *vector);
                    }
                }
            }
            Act::Status(slot, status) => {
                let Some((common, ..)) = blocks(slot) else { return };
                self.write(*slot, common.bar, common.offset + STATUS, &[*status]);
            }
            Act::Plug(slot) => self.plug(*slot),
            Act::PullOut(slot) => {
                assert_eq!(self.rig.machine.detach_pci(*slot).is_ok(), self.plugged.contains_key(slot));
                self.forget(*slot);
            }
            Act::Eject(slot) => {
                self.rig.machine.write(Space::Port, 0xAE08, &(1_u32 << slot).to_le_bytes());
                assert!(self.rig.machine.detach_pci(*slot).is_err(), "it is ejected already");
                self.forget(*slot);
            }
            Act::Reset => self.rig.machine.reset(),
        }
    }

    /// The message that a source's registers imply.
    fn implied(&self, slot: u8, source: u16) -> Option<(u32, u32)> {
        let driver = &self.plugged.get(&slot)?.driver;
        let vector = match source.checked_sub(1) {
            None => driver.get16(CONFIG_VECTOR),
            Some(queue) => {
                let before = driver.get16(QUEUE_SELECT);
                driver.put16(QUEUE_SELECT, queue);
                let vector = driver.get16(QUEUE_VECTOR);
                driver.put16(QUEUE_SELECT, before);
                vector
            }
        };
        let control = driver.config_u32(driver.msix) >> 16;
        let bus_master = driver.config_u8(4) & 4 != 0;
        let word = |index: u64| {
            let entry = u64::from(vector) * 16 + index * 4;
            u32::from_le_bytes(driver.get(driver.table, entry))
        };
        let on = control & 0x8000 != 0 && control & 0x4000 == 0 && bus_master;
        (vector != NO_VECTOR && on && word(3) & 1 == 0).then(|| (word(0), word(2)))
    }

    /// A second irqfd of one eventfd is refused, whatever it is for.
    fn is_connected(&self, event: &EventFd) -> bool {
        let fd = &self.rig.vm.fd;
        let probe = fd.register_irqfd(event, 5);
        probe.map(|()| fd.unregister_irqfd(event, 5).unwrap()).is_err()
    }

    /// The vectors that wait in the local APIC once one comes, or after a while; none do afterwards.
    fn arrived(&self, expected: bool) -> Vec<usize> {
        let end = Instant::now() + Duration::from_millis(if expected { 2000 } else { 5 });
        let bits = |lapic: &kvm_lapic_state| -> Vec<usize> {
            let byte = |vector: usize| lapic.regs[IRR + vector / 32 * 16 + vector % 32 / 8];
            (0..256).filter(|vector| byte(*vector) >> (vector % 8) & 1 != 0).collect()
        };
        loop {
            let mut lapic = self.vcpu.get_lapic().unwrap();
            let found = bits(&lapic);
            if !found.is_empty() || Instant::now() > end {
                lapic.regs[IRR..IRR + 0x80].fill(0);
                (lapic.regs[SVR], lapic.regs[SVR + 1]) = (-1, 1);
                self.vcpu.set_lapic(&lapic).unwrap();
                return found;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn check(&self) {
        self.rig.check();
        let doorbells = self.rig.host.told.lock().unwrap().1.clone();
        self.arrived(false);
        for (slot, Plugged { driver, messages, .. }) in &self.plugged {
            for source in 0..SOURCES {
                let implied = self.implied(*slot, source);
                let events = messages.events.lock().unwrap();
                let Some(event) = events.get(&source) else {
                    assert_eq!(implied, None, "slot {slot} source {source} never had a message");
                    continue;
                };
                assert_eq!(self.is_connected(event), implied.is_some(), "slot {slot} source {source}");
                event.write(1).unwrap();
                let sent = implied.filter(|(address, _)| *address == HERE);
                let expected: Vec<_> =
                    sent.iter().map(|(_, data)| usize::from(data.to_le_bytes()[0])).collect();
                assert_eq!(self.arrived(!expected.is_empty()), expected, "slot {slot} source {source}");
                let _ = event.read();
            }
            for bell in driver.device.doorbells() {
                let bars = driver.device.config().bars();
                let bar = bars.iter().find(|it| it.index == bell.bar).unwrap();
                let address = bar.address + bell.offset;
                let told = |it: &MappedDoorbell| (it.slot, it.id, it.address) == (*slot, bell.id, address);
                let event = driver.device.doorbell_event(bell.id).unwrap().eventfd();
                let rings = self.rig.rings(event, &IoEventAddress::Mmio(address));
                assert_eq!(rings, doorbells.iter().any(told), "slot {slot} {:?}", bell.id);
            }
        }
        let gone = self.gone.iter().flat_map(|messages| messages.events.lock().unwrap().clone_all());
        for event in gone {
            assert!(!self.is_connected(&event), "an irqfd of a function that is gone");
        }
    }

    /// All functions go: no irqfd is left, and the first route is free again.
    fn finish(mut self) {
        PLACES.for_each(|slot| self.act(&Act::PullOut(slot)));
        self.check();
        let event = EventFd::new(0).unwrap();
        let message = MsiMessage { address: HERE.into(), data: 0x40 };
        assert_eq!(self.interrupts.connect_message(&event, message).unwrap(), 24, "a route is left");
    }
}

trait CloneAll {
    fn clone_all(&self) -> Vec<EventFd>;
}

impl CloneAll for BTreeMap<u16, EventFd> {
    fn clone_all(&self) -> Vec<EventFd> {
        self.values().map(|event| event.try_clone().unwrap()).collect()
    }
}

#[derive(Clone, Debug)]
enum Act {
    Command(u8, u8),
    Bar(u8, u32, u32),
    /// MSI-X message control.
    Control(u8, u16),
    /// Bytes somewhere in the MSI-X table.
    Table(u8, u16, Vec<u8>),
    /// The vector of a source.
    Vector(u8, u16, u16),
    Status(u8, u8),
    Plug(u8),
    PullOut(u8),
    Eject(u8),
    Reset,
}

fn act() -> impl Strategy<Value = Act> {
    let slot = || PLACES.start().to_owned()..=PLACES.end().to_owned();
    let word = |word: u16, value: BoxedStrategy<u32>| {
        (slot(), 0..SOURCES, value).prop_map(move |(slot, vector, value)| {
            Act::Table(slot, vector * 16 + word * 4, value.to_le_bytes().to_vec())
        })
    };
    let base = prop_oneof![Just(0xE080_0000_u32), Just(0xE090_0000), Just(0x8_0000), Just(0xFFFF_0000)];
    let control = prop_oneof![3 => Just(0x8000_u16), 1 => Just(0xC000), 1 => Just(0x4000), 1 => Just(0)];
    let vector = prop_oneof![4 => 0..SOURCES, 1 => Just(NO_VECTOR), 1 => any::<u16>()];
    prop_oneof![
        3 => (slot(), prop_oneof![2 => Just(6_u8), 2 => Just(2), 1 => 0_u8..8]).prop_map(|(slot, value)| Act::Command(slot, value)),
        1 => (slot(), 0_u32..2, base).prop_map(|(slot, bar, base)| Act::Bar(slot, bar, base)),
        4 => (slot(), control).prop_map(|(slot, value)| Act::Control(slot, value)),
        2 => word(0, prop_oneof![Just(HERE), Just(NOWHERE)].boxed()),
        2 => word(2, (0x40_u32..0x60).boxed()),
        4 => word(3, (0_u32..4).boxed()),
        // Masks by single bytes, and writes across two entries.
        2 => (slot(), 0..SOURCES, any::<bool>())
            .prop_map(|(slot, vector, masked)| Act::Table(slot, vector * 16 + 12, vec![masked.into()])),
        1 => (slot(), 0..SOURCES).prop_map(|(slot, vector)| Act::Table(slot, vector * 16 + 12, vec![0, 0, 0, 0, 0, 0x10, 0xE0, 0xFE])),
        4 => (slot(), 0..SOURCES, vector).prop_map(|(slot, source, vector)| Act::Vector(slot, source, vector)),
        1 => (slot(), prop_oneof![Just(0_u8), Just(3), Just(15)]).prop_map(|(slot, value)| Act::Status(slot, value)),
        2 => slot().prop_map(Act::Plug),
        1 => slot().prop_map(Act::PullOut),
        1 => slot().prop_map(Act::Eject),
        1 => Just(Act::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn irqfds_are_what_the_registers_imply(acts in proptest::collection::vec(act(), 1..40)) {
        let mut guest = Guest::new();
        guest.check();
        for act in &acts {
            guest.act(act);
        }
        guest.check();
        guest.finish();
    }
}
