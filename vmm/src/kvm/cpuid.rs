//! The processor that the guest sees: the host's features as KVM offers them, one socket, one core for each vCPU.
//!
//! Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::KvmError;

const LEAF_1_ECX_X2APIC: u32 = 1 << 21;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const EXT_1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT_1_ECX_SVM: u32 = 1 << 2;

/// The CPUID table of vCPU `id` of `cpus`, made from what the host supports.
///
/// # Errors
/// The table grew beyond what KVM takes.
pub fn table(supported: &CpuId, id: u8, cpus: u8, tsc_deadline: bool) -> Result<CpuId, KvmError> {
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    for entry in &mut entries {
        adjust(entry, id, cpus, tsc_deadline);
    }
    if supported.as_slice().iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        entries.extend(extended_topology(id, cpus));
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::TableTooLong("CPUID"))
}

/// Width of guest-physical addresses in bits (leaf 8000_0008h, EAX bits 7–0); 36 on processors that do not say.
pub fn address_bits(supported: &CpuId) -> u8 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.and_then(|entry| u8::try_from(entry.eax & 0xff).ok()).filter(|bits| *bits >= 32).unwrap_or(36)
}

fn adjust(entry: &mut kvm_cpuid_entry2, id: u8, cpus: u8, tsc_deadline: bool) {
    let apic_id = u32::from(id);
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (u32::from(cpus) << 16) | (apic_id << 24);
            entry.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_X2APIC;
            // Guests get no virtualization of their own: it is the largest piece of KVM that they could attack.
            entry.ecx &= !LEAF_1_ECX_VMX;
            set(&mut entry.ecx, LEAF_1_ECX_TSC_DEADLINE, tsc_deadline);
            set(&mut entry.edx, LEAF_1_EDX_HTT, cpus > 1);
        }
        // Intel: cache sharing and cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { u32::from(cpus) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x0000_3fff) | (sharing << 14) | ((u32::from(cpus) - 1).min(63) << 26);
        }
        0x8000_0001 => {
            entry.ecx &= !EXT_1_ECX_SVM;
            set(&mut entry.ecx, EXT_1_ECX_CMP_LEGACY, cpus > 1);
        }
        // AMD: number of cores less one, and how many bits of the APIC id name the core.
        0x8000_0008 => entry.ecx = (u32::from(cpus) - 1) | (core_bits(cpus) << 12),
        // AMD: the SVM leaf goes with the feature.
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { u32::from(cpus) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x0000_3fff) | (sharing << 14);
        }
        // AMD: extended APIC id; one thread for each core; one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
        _ => {}
    }
}

/// Leaf 0Bh: one thread for each core, all cores in one package.
fn extended_topology(id: u8, cpus: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift, count, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | (kind << 8),
        edx: u32::from(id),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, core_bits(cpus), u32::from(cpus), 2), level(2, 0, 0, 0)]
}

/// Bits of the APIC id that tell the cores of one package apart.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on { *register |= bits } else { *register &= !bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: 0xb, ..Default::default() }
    }

    fn find(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_the_same_package() {
        let supported = CpuId::from_entries(&[entry(0, 0), entry(1, 0)]).unwrap();
        for cpus in [1, 2, 3, 4, 8, 200] {
            for id in 0..cpus {
                let table = table(&supported, id, cpus, true).unwrap();
                assert_eq!(find(&table, 1, 0).ebx >> 24, u32::from(id));
                let package = find(&table, 0xb, 1);
                assert_eq!(package.edx >> package.eax, 0, "all cores are in package 0");
                assert_eq!(package.ebx, u32::from(cpus));
            }
        }
    }

    #[test]
    fn nested_virtualization_is_never_offered() {
        let mut features = entry(1, 0);
        features.ecx = u32::MAX;
        let mut extended = entry(0x8000_0001, 0);
        extended.ecx = u32::MAX;
        let supported = CpuId::from_entries(&[features, extended]).unwrap();
        let table = table(&supported, 0, 1, false).unwrap();
        assert_eq!(find(&table, 1, 0).ecx & (LEAF_1_ECX_VMX | LEAF_1_ECX_TSC_DEADLINE), 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx & EXT_1_ECX_SVM, 0);
    }
}
