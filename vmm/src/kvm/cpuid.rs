//! CPUID of each vCPU: what the supervisor computed for all of them, with the vCPU's own numbers.
//!
//! Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use bulkhead_ipc::channel::message::Processors;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::KvmError;

/// The CPUID table of the vCPU with this APIC id.
///
/// # Errors
/// The table is longer than what KVM takes.
pub(super) fn table(processors: &Processors, id: u32) -> Result<CpuId, KvmError> {
    let above = |shift: u8| id.checked_shr(shift.into()).unwrap_or(0);
    let entries = processors.cpuid.iter().map(|leaf| {
        let [mut eax, mut ebx, mut ecx, mut edx] = leaf.registers;
        match leaf.leaf {
            1 => ebx = ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => edx = id,
            // AMD: extended APIC id; the core in its package; the package, which is a node.
            0x8000_001e => {
                let package = above(processors.package_shift);
                let first = package.checked_shl(processors.package_shift.into()).unwrap_or(0);
                let core = (id ^ first).checked_shr(processors.core_shift.into()).unwrap_or(0);
                // Nothing, rather than a lie, where it does not fit.
                let fits = if core > 0xff { 0 } else { u32::MAX };
                (eax, ebx, ecx) = (id, (ebx & !0xff | core) & fits, (ecx & !0xff | package & 0xff) & fits);
            }
            _ => {}
        }
        let (function, index, flags) = (leaf.leaf, leaf.subleaf, leaf.flags);
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
    });
    CpuId::from_entries(&entries.collect::<Vec<_>>()).map_err(|_| KvmError::TableTooLong("CPUID"))
}

/// Width of guest-physical addresses in bits (leaf 8000_0008h, EAX bits 7–0); 36 on processors that do not say.
pub fn address_bits(processors: &Processors) -> u8 {
    let leaf = processors.cpuid.iter().find(|entry| entry.leaf == 0x8000_0008);
    let [eax, ..] = leaf.map_or([0; 4], |leaf| leaf.registers);
    u8::try_from(eax & 0xff).ok().filter(|bits| *bits >= 32).unwrap_or(36)
}

#[cfg(test)]
mod tests {
    use bulkhead_ipc::channel::message::CpuidLeaf;

    use super::*;

    #[test]
    fn every_vcpu_has_its_own_numbers() {
        let leaf = |leaf, registers| CpuidLeaf { leaf, subleaf: 0, flags: 0, registers };
        let processors = Processors {
            present: 1,
            apic_ids: vec![0, 13],
            core_shift: 1,
            package_shift: 3,
            cpuid: vec![
                leaf(1, [1, 0x000c_3456, 3, 4]),
                leaf(0xb, [1, 2, 0x100, 0]),
                leaf(0x8000_001e, [0, 0x100, 0, 0]),
            ],
        };
        let table = table(&processors, 13).unwrap();
        let registers: Vec<_> =
            table.as_slice().iter().map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]).collect();
        assert_eq!(registers, [[1, 0x0d0c_3456, 3, 4], [1, 2, 0x100, 13], [13, 0x102, 1, 0]]);
        assert_eq!(address_bits(&processors), 36);
        let table = super::table(&processors, 0x123).unwrap();
        let ids: Vec<_> = table.as_slice().iter().map(|entry| (entry.eax, entry.ebx, entry.edx)).collect();
        assert_eq!(ids, [(1, 0x230c_3456, 4), (1, 2, 0x123), (0x123, 0x101, 0)]);
        // 256 cores and more of one package.
        let processors = Processors { core_shift: 0, package_shift: 12, ..processors };
        for (id, expected) in [(0xff, [0xff, 0x1ff, 0]), (0x100, [0x100, 0, 0])] {
            let table = super::table(&processors, id).unwrap();
            let entry = table.as_slice().last().unwrap();
            assert_eq!([entry.eax, entry.ebx, entry.ecx], expected);
        }
    }
}
