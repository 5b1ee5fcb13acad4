//! What a vCPU was doing when it could not go on: registers and the bytes at RIP.

use std::fmt::Write;

use bulkhead_ipc::memory::GuestRam;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

/// Long mode active (AMD APM volume 2, EFER).
const EFER_LMA: u64 = 1 << 10;
/// An x86 instruction is at most this long.
const INSTRUCTION: usize = 15;

/// One line with the registers that tell most, and the instruction's bytes. What KVM does not give is left out.
pub(super) fn describe(vcpu: &VcpuFd, ram: &GuestRam) -> String {
    let mut line = String::new();
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "registers unavailable".into();
    };
    // Writing to a String cannot fail.
    let _ = write!(
        line,
        "rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} cs {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        sregs.cs.selector,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer
    );
    let linear = if sregs.efer & EFER_LMA == 0 { sregs.cs.base.wrapping_add(regs.rip) } else { regs.rip };
    match vcpu.translate_gva(linear) {
        Ok(translation) if translation.valid != 0 => {
            let mut bytes = [0; INSTRUCTION];
            match ram.memory().read(&mut bytes, GuestAddress(translation.physical_address)) {
                Ok(read) => {
                    line.push_str(", bytes at rip");
                    for byte in bytes.iter().take(read) {
                        let _ = write!(line, " {byte:02x}");
                    }
                }
                Err(_) => line.push_str(", rip is outside RAM"),
            }
        }
        _ => line.push_str(", rip is not mapped"),
    }
    line
}
