//! The virtual machine: its in-kernel interrupt controllers and timer.
//!
//! Contains unsafe code: `/dev/kvm` arrives as a bare descriptor.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use bulkhead_ipc::memory::GuestRam;
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, call};

/// Three pages that KVM uses on Intel hosts for real mode: above the APICs, below the largest firmware (16 MiB).
const TSS_ADDRESS: usize = 0xfeff_d000;
/// One page for the identity map of the same purpose, just below.
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;

/// One virtual machine. Dropping it ends the guest; its RAM stays until [`GuestRam`] goes.
pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: Arc<VmFd>,
    pub(super) ram: GuestRam,
}

impl Vm {
    /// Creates a machine without anything in it.
    ///
    /// # Errors
    /// The ioctl that failed. What KVM must offer, and for how many vCPUs, the supervisor has asked before.
    pub fn create(kvm: OwnedFd, ram: &GuestRam) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and open, and ownership moves into `Kvm`; the first ioctl below fails on
        // anything other than /dev/kvm.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        Ok(Self { kvm, fd: Arc::new(fd), ram: ram.clone() })
    }

    /// Adds the interrupt controllers (PIC, IOAPIC, LAPICs) and the PIT; before the first vCPU, and after the memory map: a
    /// memory slot takes effect after an SRCU grace period, which lasts some µs before and up to two timer ticks (8 ms) after
    /// the interrupt controllers have queued their own, slower one.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn create_chips(&self) -> Result<(), KvmError> {
        self.fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        // The speaker's port 61 is answered inside KVM too, as its gate belongs to the timer.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))
    }

    /// Lets local APICs have ids of more than 8 bits, also as destinations of messages, and the id 255; before the first vCPU.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn widen_apic_ids(&self) -> Result<(), KvmError> {
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        let cap =
            kvm_enable_cap { cap: KVM_CAP_X2APIC_API, args: [flags.into(), 0, 0, 0], ..Default::default() };
        self.fd.enable_cap(&cap).map_err(call("KVM_ENABLE_CAP"))
    }

    /// The descriptor that interrupt routing and doorbells share.
    pub fn handle(&self) -> Arc<VmFd> {
        self.fd.clone()
    }

    /// The descriptors of KVM and of the machine.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        // SAFETY: both belong to `self`, which the result borrows.
        unsafe { [BorrowedFd::borrow_raw(self.kvm.as_raw_fd()), BorrowedFd::borrow_raw(self.fd.as_raw_fd())] }
    }
}
