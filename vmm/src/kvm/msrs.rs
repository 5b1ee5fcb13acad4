//! Model-specific registers that firmware would have set before it starts an operating system.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, call};

/// IA32_MISC_ENABLE and its fast-string bit (Intel SDM volume 4, table 2-2).
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs on, everything write-back (Intel SDM volume 3A, section 12.11.2.1).
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets them on one vCPU.
///
/// # Errors
/// KVM refused the call, or one of the registers.
pub fn set_up(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [entry(MISC_ENABLE, MISC_ENABLE_FAST_STRING), entry(MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::TableTooLong("MSR"))?;
    // KVM stops at the first register that it does not know; hosts without MISC_ENABLE (AMD) still take it
    // under KVM, so a short count is an error.
    let set = vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
    if set == entries.len() {
        Ok(())
    } else {
        Err(KvmError::Call { call: "KVM_SET_MSRS", source: kvm_ioctls::Error::new(libc::EINVAL) })
    }
}
