//! Interrupt routing: ISA lines to PIC and IOAPIC, MSI-X vectors by irqfd.
//!
//! Contains unsafe code: the eventfd type of KVM's crate is made from a descriptor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, Vm, call};
use crate::virtio::{MsiHost, MsiMessage};

/// Inputs of the IOAPIC; message-signalled interrupts get the numbers above.
const IOAPIC_PINS: u32 = 24;

/// Routes of all interrupts of a machine.
pub struct Interrupts {
    vm: Arc<VmFd>,
    limit: usize,
    messages: Mutex<BTreeMap<u32, MsiMessage>>,
}

impl Interrupts {
    /// No routes yet.
    pub fn new(vm: &Vm) -> Self {
        let limit = usize::try_from(vm.kvm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        Self { vm: vm.handle(), limit, messages: Mutex::default() }
    }

    /// Sets the routes of a PC, once there are interrupt controllers: ISA IRQ n reaches PIC input n and IOAPIC pin n, but IRQ 0
    /// reaches IOAPIC pin 2.
    ///
    /// # Errors
    /// KVM refused the table.
    pub fn connect_lines(&self) -> Result<(), KvmError> {
        self.commit(&self.lock())
    }

    /// Sets the level of ISA IRQ or IOAPIC pin `gsi`.
    ///
    /// # Errors
    /// KVM refused it, for instance since no such pin exists.
    pub fn set_line(&self, gsi: u8, level: bool) -> Result<(), KvmError> {
        self.vm.set_irq_line(u32::from(gsi), level).map_err(call("KVM_IRQ_LINE"))
    }

    /// Lets writes to `event` pulse the edge-triggered input `gsi`.
    ///
    /// # Errors
    /// KVM refused it, or no descriptor is left.
    pub fn connect_line(&self, event: BorrowedFd<'_>, gsi: u8) -> Result<(), KvmError> {
        self.vm.register_irqfd(&duplicate(event)?, u32::from(gsi)).map_err(call("KVM_IRQFD"))
    }

    /// Lets writes to `event` send `message` for as long as the machine lives; otherwise as [`Self::connect_message`].
    ///
    /// # Errors
    /// As there, or no descriptor is left.
    pub fn connect_forever(&self, event: BorrowedFd<'_>, message: MsiMessage) -> Result<(), KvmError> {
        self.connect_message(&duplicate(event)?, message).map(drop)
    }

    /// Lets writes to `event` send `message` to the guest's LAPICs. A write that came before is delivered now.
    /// Returns the number by which [`Self::disconnect_message`] undoes it.
    ///
    /// # Errors
    /// No route is left, or KVM refused it.
    pub fn connect_message(&self, event: &EventFd, message: MsiMessage) -> Result<u32, KvmError> {
        let mut messages = self.lock();
        let gsi = (IOAPIC_PINS..)
            .take(self.limit)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or(KvmError::NoRoute(self.limit))?;
        messages.insert(gsi, message);
        let connected = self
            .commit(&messages)
            .and_then(|()| self.vm.register_irqfd(event, gsi).map_err(call("KVM_IRQFD")));
        if let Err(error) = connected {
            messages.remove(&gsi);
            return Err(error);
        }
        Ok(gsi)
    }

    /// Undoes [`Self::connect_message`]: later writes to `event` stay in it.
    ///
    /// # Errors
    /// KVM refused it.
    pub fn disconnect_message(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        let mut messages = self.lock();
        self.vm.unregister_irqfd(event, gsi).map_err(call("KVM_IRQFD"))?;
        // The stale route is harmless without an irqfd; it goes with the next table.
        messages.remove(&gsi);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, MsiMessage>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), KvmError> {
        let entries: Vec<_> =
            line_routes().chain(messages.iter().map(|(gsi, message)| message_route(*gsi, message))).collect();
        let table =
            KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::TableTooLong("interrupt routing"))?;
        self.vm.set_gsi_routing(&table).map_err(call("KVM_SET_GSI_ROUTING"))
    }
}

fn duplicate(event: BorrowedFd<'_>) -> Result<EventFd, KvmError> {
    let failed = |error: io::Error| kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO));
    let duplicate = event.try_clone_to_owned().map_err(failed).map_err(call("KVM_IRQFD"))?;
    // SAFETY: the duplicate is owned and an eventfd by the caller's word; KVM refuses anything else.
    Ok(unsafe { EventFd::from_raw_fd(duplicate.into_raw_fd()) })
}

fn line_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..16).map(|irq| {
        let chip = if irq < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        chip_route(irq, chip, irq % 8)
    });
    // IOAPIC pin 2 belongs to IRQ 0 (the MADT says so); ISA IRQ 2 is the cascade of the PICs and has no pin.
    let ioapic = (0..IOAPIC_PINS)
        .filter(|irq| *irq != 2)
        .map(|irq| chip_route(irq, KVM_IRQCHIP_IOAPIC, if irq == 0 { 2 } else { irq }));
    pic.chain(ioapic)
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_route(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let low = u32::try_from(message.address & u64::from(u32::MAX)).unwrap_or(0);
    entry.u.msi.address_lo = low;
    // What a guest that knows of KVM_FEATURE_MSI_EXT_DEST_ID has of the destination in bits 11–5, where KVM looks for it: the
    // upper half is there for interrupt remapping, which this machine has not.
    entry.u.msi.address_hi = (low & 0xFE0) << 3;
    entry.u.msi.data = message.data;
    entry
}

/// The interrupt messages of one PCI function, as virtio asks for them: by source, not by route.
pub struct FunctionMessages {
    interrupts: Arc<Interrupts>,
    routes: Mutex<BTreeMap<u16, u32>>,
}

impl FunctionMessages {
    /// A function without messages.
    pub fn new(interrupts: Arc<Interrupts>) -> Self {
        Self { interrupts, routes: Mutex::default() }
    }
}

impl MsiHost for FunctionMessages {
    fn connect(&self, source: u16, event: &EventFd, message: MsiMessage) -> io::Result<()> {
        let route = self.interrupts.connect_message(event, message).map_err(io::Error::other)?;
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).insert(source, route);
        Ok(())
    }

    fn disconnect(&self, source: u16, event: &EventFd) {
        let route = self.routes.lock().unwrap_or_else(PoisonError::into_inner).remove(&source);
        if let Some(route) = route
            && let Err(error) = self.interrupts.disconnect_message(event, route)
        {
            tracing::error!(source, %error, "interrupt message still connected");
        }
    }
}
