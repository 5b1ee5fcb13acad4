//! The virtual machine: memory slots, in-kernel interrupt controllers and timer.
//!
//! Contains unsafe code: guest RAM is given to KVM by host address, and `/dev/kvm` arrives as a bare descriptor.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use bulkhead_ipc::memory::GuestRam;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, call};

/// Three pages that KVM uses on Intel hosts for real mode; below the firmware's place at the top of 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the identity map of the same purpose, just below.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// One virtual machine. Dropping it ends the guest; its RAM stays until [`GuestRam`] goes.
pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: Arc<VmFd>,
    pub(super) ram: GuestRam,
}

impl Vm {
    /// Creates the machine with interrupt controllers (PIC, IOAPIC, LAPICs), PIT and RAM in place.
    ///
    /// # Errors
    /// The ioctl that failed. What KVM must offer, and for how many vCPUs, the supervisor has asked before.
    pub fn create(kvm: OwnedFd, ram: &GuestRam) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and open, and ownership moves into `Kvm`; the first ioctl below fails on
        // anything other than /dev/kvm.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let vm = Self { kvm, fd: Arc::new(fd), ram: ram.clone() };
        // RAM first: a memory slot takes effect after an SRCU grace period, which lasts some µs here and up to two timer
        // ticks (8 ms) once the interrupt controllers have queued their own, slower one.
        vm.map_ram()?;
        vm.fd.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        vm.fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        // The speaker's port 61 is answered inside KVM too, as its gate belongs to the timer.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))?;
        Ok(vm)
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

    #[expect(clippy::disallowed_methods, reason = "what the host's addresses are for")]
    fn map_ram(&self) -> Result<(), KvmError> {
        for (slot, mapping) in (0..).zip(self.ram.host_mappings()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: mapping.guest_address,
                memory_size: mapping.size,
                userspace_addr: mapping.host_address,
            };
            // SAFETY: the mapping belongs to `self.ram`, which this struct keeps alive as long as the VM;
            // regions do not overlap (an invariant of GuestRam), and the slot numbers are distinct.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}
