//! Register state in which a vCPU is entered.

use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{KvmError, call};
use crate::boot::{Entry, Mode, Segment};

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

/// Sets the state in which the boot processor enters a kernel.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: &Entry, x2apic: bool) -> Result<(), KvmError> {
    let regs = kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rbx: entry.rbx,
        rax: entry.rax,
        rflags: entry.rflags,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let data = segment(&entry.data);
    sregs.cs = segment(&entry.code);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(&entry.task);
    if let Mode::Long { gdt, .. } = entry.mode {
        sregs.gdt.base = gdt.base;
        sregs.gdt.limit = gdt.limit;
    }
    // As firmware leaves it where there are ids above 254: Linux takes no others for valid in the older mode.
    sregs.apic_base |= u64::from(x2apic) << 10;
    let control = entry.control_registers();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (control.cr0, control.cr3, control.cr4, control.efer);
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))
}

fn segment(from: &Segment) -> kvm_segment {
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.kind,
        present: 1,
        dpl: 0,
        db: from.default_32.into(),
        s: from.code_or_data.into(),
        l: from.long.into(),
        g: from.granularity.into(),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
