//! The PC: a tree of buses and devices like the block diagram of the 82441FX PMC, the 82371SB PIIX3 and the 82371AB PIIX4.
//!
//! ```text
//! CPU ── I440Fx ── PciBus 0 ──┬─ host bridge 00:00.0
//!                             ├─ PIIX3 00:01.0 ── IsaBus ── RTC, i8042, UART, fw_cfg …
//!                             ├─ PIIX4 PM 00:01.3
//!                             └─ further functions from 00:02.0
//! ```
//!
//! Knows neither KVM nor files nor processes: what it needs comes through [`Host`].

mod acpi;
mod address;
mod config;
mod dma;
mod flat_view;
mod generation;
mod host;
mod i440fx;
mod irq;
pub mod isa;
mod memory_map;
pub mod pci;
mod piix3;
mod piix4_pm;
mod setup;
mod sync;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod timers;
mod tree;

use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use bulkhead_ipc::memory::{Direction, GuestRam};

use address::{CycleKind, next_cycle};
pub use config::{AcpiTables, AttachError, BuildError, MachineConfig};
pub use dma::{DmaView, NotBusMaster};
use flat_view::FlatView;
use generation::Generation;
pub use host::{Host, MappedDoorbell, PowerEvent, ResetSource, Space};
use i440fx::{HostBridge, I440Fx};
use irq::InterruptRouter;
use isa::{DebugExit, DebugPort, Dma, FwCfg, I8042, IsaBus, MemoryRange, Port92, PvPanic, Rtc};
pub use isa::{IrqLine, IsaDevice, PortRange};
pub use memory_map::{Backing, MemoryChip, MemorySlot};
pub use pci::{InterruptPin, PciFunction};
use pci::{PciBus, Pin, SlotFunction};
use piix3::{IsaBridge, Piix3};
use piix4_pm::Piix4Pm;
use sync::lock;
use timers::Timers;
use tree::{Endpoint, Topology};

/// The slots on bus 0.
const SLOTS: u8 = 32;
/// The slots of the host bridge and of the PIIX3.
const CHIPSET_SLOTS: u8 = 2;

/// The machine. Shared by all vCPU threads.
pub struct Machine {
    config: MachineConfig,
    host: Arc<dyn Host>,
    ram: GuestRam,
    root: I440Fx,
    isa: Arc<IsaBus>,
    host_bridge: Arc<HostBridge>,
    pm: Arc<Piix4Pm>,
    fw_cfg: Arc<FwCfg>,
    generation: Generation,
    rtc: Arc<Rtc>,
    timers: Arc<Timers>,
    router: Arc<InterruptRouter>,
    topology: Arc<Topology>,
    view: ArcSwap<FlatView>,
    /// Held while the view is derived and told to the host, so that the last one told is the last one derived.
    deriving: Mutex<()>,
    /// One for each slot, held by an access to its configuration space until its effects are complete. A function that waits
    /// for its device's process makes no access to another slot wait.
    configuring: [Mutex<()>; SLOTS as usize],
    /// Held by a write to a firmware chip until the map shows what it did: another write might undo it meanwhile.
    writing_chip: Mutex<()>,
}

impl Machine {
    /// Builds the machine as it is after power-on.
    ///
    /// # Errors
    /// [`BuildError`] when the configuration makes no machine.
    pub fn new(config: MachineConfig, ram: GuestRam, host: Arc<dyn Host>) -> Result<Arc<Self>, BuildError> {
        config.check()?;
        let topology = Arc::new(Topology::default());
        let router = InterruptRouter::new(host.clone());
        let isa = Arc::new(IsaBus::new(topology.clone()));
        let isa_bridge = Arc::new(IsaBridge::new(host.clone(), router.clone(), topology.clone())?);
        let host_bridge = Arc::new(HostBridge::new(config.apic_ids.len(), host.clone(), topology.clone())?);
        let chips = config.firmware.clone();
        let piix3 = Piix3 { function: isa_bridge.clone(), isa: isa.clone(), chips };
        let bus = Arc::new(PciBus::new(Arc::new(piix3), topology.clone(), router.clone()));
        let sci = IrqLine::new(router.clone(), piix4_pm::SCI_IRQ);
        let timers = Timers::new(host.clone());
        let pm = Arc::new(Piix4Pm::new(host.clone(), sci, timers.clone(), &config.apic_ids, config.cpus)?);
        let chipset: [(u8, u8, Arc<dyn PciFunction>); 3] =
            [(0, 0, host_bridge.clone()), (1, 0, isa_bridge.clone()), (1, 3, pm.clone())];
        for (slot, function, device) in chipset {
            bus.attach(SlotFunction { slot, function }, device);
        }
        let memory: Vec<MemoryRange> = ram
            .regions()
            .map(|region| MemoryRange { address: region.guest_address, length: region.size })
            .collect();
        let fw_cfg = Arc::new(FwCfg::new(ram.clone(), config.cpus, &config.apic_ids, &memory));
        let rtc =
            Arc::new(Rtc::new(host.clone(), timers.clone(), IrqLine::new(router.clone(), isa::RTC_IRQ)));
        rtc.describe(&memory, config.cpus);
        attach_isa_devices(&isa, &config, fw_cfg.clone(), &host, rtc.clone())?;
        let dram = memory.iter().filter_map(|range| {
            Some((range.address, range.address.checked_add(range.length.checked_sub(1)?)?))
        });
        let root = I440Fx::new(dram.collect(), config.files.clone(), host_bridge.clone(), bus);
        let machine = Arc::new(Self {
            generation: Generation::new(config.generation),
            config,
            host,
            ram,
            root,
            isa,
            host_bridge,
            pm,
            fw_cfg,
            rtc,
            timers,
            router,
            topology,
            view: ArcSwap::default(),
            deriving: Mutex::new(()),
            configuring: Default::default(),
            writing_chip: Mutex::new(()),
        });
        machine.follow_topology();
        Ok(machine)
    }

    /// A vCPU reads. Never fails: what nobody claims reads all ones.
    ///
    /// An access of any length and alignment is cut into cycles of 4, 2 or 1 aligned bytes, lowest address first, as on
    /// a 32-bit bus; beyond the end of the address space the bus is open.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        let (mut next, mut rest) = (Some(address), data);
        while let (Some(address), false) = (next.filter(|at| *at <= space.last()), rest.is_empty()) {
            let width = next_cycle(address, rest.len());
            let (cycle, tail) = rest.split_at_mut(width);
            self.read_cycle(space, address, cycle);
            next = address.checked_add(width as u64);
            rest = tail;
        }
        rest.fill(0xFF);
    }

    /// A vCPU writes. Never fails: what nobody claims drops the write. Cut into cycles like [`read`](Self::read).
    pub fn write(&self, space: Space, address: u64, data: &[u8]) {
        let (mut next, mut rest) = (Some(address), data);
        while let (Some(address), false) = (next.filter(|at| *at <= space.last()), rest.is_empty()) {
            let width = next_cycle(address, rest.len());
            let (cycle, tail) = rest.split_at(width);
            self.write_cycle(space, address, cycle);
            next = address.checked_add(width as u64);
            rest = tail;
        }
    }

    /// Whether a cycle that starts at `address` must be cut: it is wider than who answers takes, or leaves its range.
    fn must_cut(resolved: &flat_view::Resolved<'_>, address: u64, width: usize) -> bool {
        let last = address.saturating_add(width as u64).saturating_sub(1);
        width > 1
            && (last > resolved.last || resolved.endpoint.is_some_and(|endpoint| width > endpoint.width()))
    }

    fn read_cycle(&self, space: Space, address: u64, data: &mut [u8]) {
        let view = self.view.load();
        let resolved = view.resolve(CycleKind::read(space, data.len()), address);
        if Self::must_cut(&resolved, address, data.len()) {
            let half = data.len() / 2;
            let (low, high) = data.split_at_mut(half);
            self.read_cycle(space, address, low);
            self.read_cycle(space, address.saturating_add(half as u64), high);
            return;
        }
        let offset = resolved.offset;
        match resolved.endpoint {
            Some(Endpoint::Bar(function, bar)) => function.bar_read(*bar, offset, data),
            Some(Endpoint::Window(function, window)) => function.window_read(*window, offset, data),
            Some(Endpoint::Isa(device)) => device.read(port(offset), data),
            Some(Endpoint::ConfigAddress) => {
                for (to, from) in data.iter_mut().zip(self.root.mechanism.address().to_le_bytes()) {
                    *to = from;
                }
            }
            Some(Endpoint::ConfigData) => self.config_read(offset, data),
            Some(Endpoint::Dram) => read_memory(&self.ram, offset, data),
            Some(Endpoint::Chip(chip)) if chip.shows_bytes() => read_memory(chip.memory(), offset, data),
            Some(Endpoint::Chip(chip)) => chip.read(offset, data),
            Some(Endpoint::InKernel | Endpoint::File(_)) | None => data.fill(0xFF),
        }
    }

    fn write_cycle(&self, space: Space, address: u64, data: &[u8]) {
        let view = self.view.load();
        let resolved = view.resolve(CycleKind::write(space, data.len()), address);
        if Self::must_cut(&resolved, address, data.len()) {
            let half = data.len() / 2;
            let (low, high) = data.split_at(half);
            self.write_cycle(space, address, low);
            self.write_cycle(space, address.saturating_add(half as u64), high);
            return;
        }
        let offset = resolved.offset;
        match resolved.endpoint {
            Some(Endpoint::Bar(function, bar)) => function.bar_write(*bar, offset, data),
            Some(Endpoint::Window(function, window)) => {
                function.window_write(*window, offset, data);
                self.follow_ejections();
            }
            Some(Endpoint::Isa(device)) => device.write(port(offset), data),
            Some(Endpoint::ConfigAddress) => {
                if let [a, b, c, d] = data {
                    self.root.mechanism.set_address(u32::from_le_bytes([*a, *b, *c, *d]));
                }
            }
            Some(Endpoint::ConfigData) => self.config_write(offset, data),
            Some(Endpoint::Dram) => {
                let view = self.ram.view(offset, data.len() as u64, Direction::Write);
                // The range is RAM by the same regions that the view checks; a refusal drops the write.
                let _ = view.and_then(|view| view.write_bytes(0, data));
                self.host.ram_written(offset);
            }
            Some(Endpoint::Chip(chip)) => {
                let _one_at_a_time = lock(&self.writing_chip);
                let before = chip.shows_bytes();
                chip.write(offset, data);
                if chip.shows_bytes() != before {
                    self.topology.changed();
                    self.follow_topology();
                }
            }
            Some(Endpoint::InKernel | Endpoint::File(_)) | None => {}
        }
    }

    fn config_read(&self, lane: u64, data: &mut [u8]) {
        let Some((at, offset)) = self.root.mechanism.target(lane) else { return data.fill(0xFF) };
        let _one_at_a_time = self.configuring(at.slot);
        self.root.bus.config_read(at, offset, data);
    }

    fn config_write(&self, lane: u64, data: &[u8]) {
        if let Some((at, offset)) = self.root.mechanism.target(lane) {
            let _one_at_a_time = self.configuring(at.slot);
            self.write_register(at, offset, data);
        }
    }

    fn configuring(&self, slot: u8) -> Option<MutexGuard<'_, ()>> {
        self.configuring.get(usize::from(slot)).map(lock)
    }

    /// Writes a configuration register with all that follows from it. The caller holds the slot's `configuring`, or no
    /// vCPU runs yet.
    fn write_register(&self, at: SlotFunction, offset: u16, data: &[u8]) {
        let Some(written) = self.root.bus.config_write(at, offset, data) else { return };
        self.follow_topology();
        if let Some(command) = written.command {
            written.function.command_changed(command);
        }
    }

    /// Derives the flat view anew if the tree has changed since, and tells the host what that moved.
    fn follow_topology(&self) {
        let _one_at_a_time = lock(&self.deriving);
        let generation = self.topology.generation();
        let before = self.view.load();
        if before.generation == generation {
            return;
        }
        let view = FlatView::derive(generation, &self.root, &self.root.bus);
        let view = Arc::new(view);
        self.view.store(view.clone());
        if view.slots != before.slots {
            self.host.memory_changed(&view.slots);
        }
        if view.doorbells != before.doorbells {
            self.host.topology_changed(&view.doorbells);
        }
    }

    /// Plugs a function into a place on bus 0, in slots 2–31, and returns its interrupt pin: the one that its configuration
    /// space names, INTA# when it names none. A `slot` alone means its function 0 (see [`SlotFunction::place`]).
    ///
    /// # Errors
    /// [`AttachError::NoSuchSlot`], [`AttachError::SlotTaken`].
    pub fn attach_pci(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<InterruptPin, AttachError> {
        let at = SlotFunction::from_place(slot);
        if !(CHIPSET_SLOTS..SLOTS).contains(&at.slot) {
            return Err(AttachError::NoSuchSlot(at.slot));
        }
        let _one_at_a_time = self.configuring(at.slot);
        let pin = function.config().interrupt_pin().unwrap_or(Pin::A);
        let disabled = function.config().command().interrupt_disable();
        if !self.root.bus.attach(at, function) {
            return Err(AttachError::SlotTaken(at.slot));
        }
        self.router.set_disabled(at.slot, at.function, disabled);
        self.follow_topology();
        Ok(InterruptPin::new(self.router.clone(), at.slot, at.function, pin))
    }

    /// Unplugs the function in a place (a `slot` alone means its function 0) and releases its interrupt pins.
    ///
    /// # Errors
    /// [`AttachError::NoSuchSlot`] when nothing that can be unplugged is there.
    pub fn detach_pci(&self, slot: u8) -> Result<Arc<dyn PciFunction>, AttachError> {
        let at = SlotFunction::from_place(slot);
        let _one_at_a_time = self.configuring(at.slot);
        let pluggable = (CHIPSET_SLOTS..SLOTS).contains(&at.slot);
        let removed = if pluggable { self.root.bus.detach(at) } else { None };
        let function = removed.ok_or(AttachError::NoSuchSlot(at.slot))?;
        self.router.release(at.slot, at.function);
        if self.root.bus.occupants(at.slot) == 0 {
            self.pm.slot_emptied(at.slot);
        }
        self.follow_topology();
        Ok(function)
    }

    /// Tells the guest by ACPI that the contents of `slot` changed.
    pub fn announce_pci(&self, slot: u8) {
        self.pm.announce_slot(slot);
    }

    /// Asks the guest by ACPI to eject the function in `slot`. When it does, [`Host::pci_ejected`] tells.
    pub fn request_eject(&self, slot: u8) {
        self.pm.request_eject(slot);
    }

    /// Empties the slots that the guest has ejected.
    fn follow_ejections(&self) {
        let slots = self.pm.take_ejected();
        if slots == 0 {
            return;
        }
        let ejected = |place: &u8| slots >> SlotFunction::from_place(*place).slot & 1 != 0;
        for place in (0..=u8::MAX).filter(ejected) {
            if self.detach_pci(place).is_ok() {
                self.host.pci_ejected(place);
            }
        }
    }

    /// Plugs in the possible CPU of this index and tells the guest by ACPI. False when there is none, or it is there.
    pub fn insert_cpu(&self, index: u16) -> bool {
        self.pm.insert_cpu(index)
    }

    /// Asks the guest by ACPI to let a CPU go. When it does, [`Host::cpu_ejected`] tells. False when it is not there, or is the boot processor.
    pub fn request_cpu_removal(&self, index: u16) -> bool {
        self.pm.request_cpu_removal(index)
    }

    /// The way to memory of the function in a place.
    #[must_use]
    pub fn dma_view(&self, slot: u8) -> Option<DmaView> {
        let function = self.root.bus.function(SlotFunction::from_place(slot))?;
        Some(DmaView::new(function, self.ram.clone()))
    }

    /// Puts a device on the ISA bus and returns its interrupt line, if it drives one.
    ///
    /// # Errors
    /// [`AttachError::PortsTaken`].
    pub fn attach_isa(&self, device: Arc<dyn IsaDevice>) -> Result<Option<IrqLine>, AttachError> {
        let irq = device.irq();
        self.isa.attach(device)?;
        self.follow_topology();
        Ok(irq.map(|irq| IrqLine::new(self.router.clone(), irq)))
    }

    /// Resets every register of every device to its reset value and derives the map anew. The caller has stopped the vCPUs.
    pub fn reset(&self) {
        self.root.mechanism.reset();
        self.root.bus.reset();
        self.isa.reset();
        self.config.firmware.iter().for_each(|chip| chip.reset());
        self.router.reset();
        self.follow_topology();
        self.follow_ejections();
    }

    /// Gives firmware these files and the ACPI tables. Called once, when every device is in its place.
    pub fn serve_firmware(self: &Arc<Self>, files: Vec<(String, Vec<u8>)>, boot_menu: bool) {
        let machine = Arc::downgrade(self);
        // Nobody selects anything in a machine that is gone.
        let tables = move || machine.upgrade().map(|machine| machine.firmware_tables()).unwrap_or_default();
        self.fw_cfg.add_files(files, Box::new(tables));
        if boot_menu {
            self.fw_cfg.offer_boot_menu();
        }
    }

    /// Lets RAM answer everywhere below 1 MiB but at the frame buffer, as firmware leaves it.
    pub fn shadow_ram(&self) {
        let _one_at_a_time = self.configuring(0);
        self.host_bridge.shadow();
        self.follow_topology();
    }

    /// The host's clock has reached what [`Host::set_timer`] was told last.
    pub fn timer_expired(&self) {
        self.timers.expired();
        self.pm.timer_expired();
        self.rtc.timer_expired();
    }

    /// The power button was pressed and released.
    pub fn press_power_button(&self) {
        self.pm.press_power_button();
    }
}

fn read_memory(memory: &GuestRam, address: u64, data: &mut [u8]) {
    let view = memory.view(address, data.len() as u64, Direction::Read);
    if view.and_then(|view| view.read_bytes(0, data)).is_err() {
        data.fill(0xFF);
    }
}

fn port(offset: u64) -> u16 {
    u16::try_from(offset).unwrap_or(u16::MAX)
}

/// The devices that every machine has on its ISA bus.
fn attach_isa_devices(
    isa: &IsaBus,
    config: &MachineConfig,
    fw_cfg: Arc<FwCfg>,
    host: &Arc<dyn Host>,
    rtc: Arc<Rtc>,
) -> Result<(), BuildError> {
    let devices: [Arc<dyn IsaDevice>; 6] = [
        rtc,
        Arc::new(Dma::default()),
        Arc::new(Port92::new(host.clone())),
        fw_cfg,
        Arc::new(DebugPort::new()),
        Arc::new(PvPanic::new(host.clone())),
    ];
    for device in devices {
        isa.attach(device)?;
    }
    if !config.keyboard {
        isa.attach(Arc::new(I8042::new(host.clone())))?;
    }
    if config.debug_exit {
        isa.attach(Arc::new(DebugExit(host.clone())))?;
    }
    Ok(())
}
