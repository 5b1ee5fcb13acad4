//! Register state in which a vCPU is entered.



use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use super::{KvmError, call};

/// Local vector table entries of the LAPIC, by offset in its register page (Intel SDM volume 3A, table 11-1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes in bits 8–10 of an entry (figure 11-8).
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

/// Connects LINT0 to the PICs and LINT1 to NMI, as a PC's firmware leaves every LAPIC.
pub(super) fn set_up_lapic(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    set_register(&mut lapic, LVT_LINT0, DELIVERY_EXTINT);
    set_register(&mut lapic, LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (target, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *target = byte.cast_signed();
    }
}
