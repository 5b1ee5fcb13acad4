//! What the machine asks of whoever runs it, and what it tells it.
//!
//! The core implements [`Host`] over KVM; a test implements it with a recorder.

use std::time::Duration;

use super::memory_map::MemorySlot;
use super::pci::DoorbellId;

/// The two address spaces of an x86 processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// I/O ports, 0000–FFFF.
    Port,
    /// Physical memory addresses.
    Memory,
}

impl Space {
    /// The highest address of the space.
    #[must_use]
    pub const fn last(self) -> u64 {
        match self {
            Self::Port => 0xFFFF,
            Self::Memory => u64::MAX,
        }
    }
}

/// Who asked for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetSource {
    /// The reset control register of the PIIX3, port CF9 (290550).
    ResetControl,
    /// The turbo reset control register of the 82441FX, configuration register 93 (290549, section 3.2.26).
    TurboResetControl,
    /// System control port A, port 92 bit 0.
    Port92,
    /// A pulse on output P2.0 of the keyboard controller, command FE at port 64.
    KeyboardController,
}

/// The guest changes the machine's power state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Sleep state S5 (soft off) through PM1_CNT.
    PowerOff,
    /// The guest reset the machine. The host stops the vCPUs, calls [`super::Machine::reset`] and starts anew, or ends the machine.
    Reset(ResetSource),
    /// The guest's kernel panicked, and says so through pvpanic.
    Panicked,
    /// The guest wrote this to the debug exit port.
    DebugExit(u8),
}

/// A doorbell at the place where the guest sees it now: what an ioeventfd is registered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappedDoorbell {
    /// The device's name for it, unique in its function.
    pub id: DoorbellId,
    /// The place on PCI bus 0 that it belongs to, as [`super::SlotFunction::place`] names it.
    pub slot: u8,
    /// Its address space.
    pub space: Space,
    /// Its address there.
    pub address: u64,
    /// The length of the write that rings it, in bytes; 0 stands for any length.
    pub length: u8,
    /// The value that rings it, if not any.
    pub datamatch: Option<u64>,
}

/// What the machine needs from whoever runs it. Methods are called from vCPU threads and must not call back into the machine.
pub trait Host: Send + Sync {
    /// Sets the level of an interrupt input of the PICs and the I/O APIC. `gsi` is the ISA interrupt number, 0–15.
    fn set_irq(&self, gsi: u8, level: bool);

    /// The guest powers off or resets the machine.
    fn power(&self, event: PowerEvent);

    /// The map changed: these are all the doorbells that the guest can reach now, sorted.
    fn topology_changed(&self, doorbells: &[MappedDoorbell]);

    /// The guest ejected the function that was in this place on PCI bus 0: the bus has let go of it.
    fn pci_ejected(&self, _slot: u8) {}

    /// The guest let a CPU go, the index of which is given: it must run no more.
    fn cpu_ejected(&self, _cpu: u16) {}

    /// The memory map changed: these are all slots now, by address, none overlapping another. When this returns the guest sees
    /// them. While one is replaced no vCPU may be in the guest, and none of its dirty pages may be lost.
    fn memory_changed(&self, slots: &[MemorySlot]);

    /// The guest wrote to RAM at this guest-physical address, and had to leave for it. The write is done.
    fn ram_written(&self, _address: u64) {}

    /// The machine wants [`super::Machine::timer_expired`] to be called, from a thread that holds no lock of the machine, once
    /// [`monotonic`](Self::monotonic) has reached this; nothing replaces what it wanted before by nothing.
    fn set_timer(&self, deadline: Option<Duration>);

    /// Time that never goes back, from an arbitrary start.
    fn monotonic(&self) -> Duration;

    /// Time since 1970-01-01 00:00:00 UTC.
    fn wall_clock(&self) -> Duration;
}
