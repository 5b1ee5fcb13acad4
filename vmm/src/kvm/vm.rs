//! The virtual machine: its in-kernel interrupt controllers and timer.
//!
//! Contains unsafe code: `/dev/kvm` arrives as a bare descriptor.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use bulkhead_ipc::memory::GuestRam;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
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
    pub(super) cpus: u8,
}

impl Vm {
    /// Creates a machine without anything in it.
    ///
    /// # Errors
    /// The ioctl that failed. What KVM must offer, and for how many vCPUs, the supervisor has asked before.
    pub fn create(kvm: OwnedFd, ram: &GuestRam, cpus: u8) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and open, and ownership moves into `Kvm`; the first ioctl below fails on
        // anything other than /dev/kvm.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        Ok(Self { kvm, fd: Arc::new(fd), ram: ram.clone(), cpus })
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

    /// The descriptor that interrupt routing and doorbells share.
    pub fn handle(&self) -> Arc<VmFd> {
        self.fd.clone()
    }

    /// The descriptors of KVM and of the machine.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        // SAFETY: both belong to `self`, which the result borrows.
        unsafe { [BorrowedFd::borrow_raw(self.kvm.as_raw_fd()), BorrowedFd::borrow_raw(self.fd.as_raw_fd())] }
    }

    /// What the host's processor and KVM can show to a guest, for [`super::Vcpu::create`].
    ///
    /// # Errors
    /// KVM refused to tell.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))
    }
}
