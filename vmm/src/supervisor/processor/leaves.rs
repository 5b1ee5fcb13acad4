//! The topology, and what every guest sees, in CPUID.
//!
//! Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use bulkhead_ipc::channel::message::CpuidLeaf;

use crate::supervisor::config::Topology;

const LEAF_1_ECX_X2APIC: u32 = 1 << 21;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const EXT_1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT_1_ECX_SVM: u32 = 1 << 2;
const EXT_1_ECX_TOPOEXT: u32 = 1 << 22;
/// EBX of leaf 0: "Auth", "Hygo".
const VENDOR_AMD: u32 = u32::from_le_bytes(*b"Auth");
const VENDOR_HYGON: u32 = u32::from_le_bytes(*b"Hygo");
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const HAS_SUBLEAVES: u32 = 1;
/// Levels of leaves 0Bh and 1Fh.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// KVM's features in EAX of its leaf (Linux, Documentation/virt/kvm/x86/cpuid.rst): bits 11–5 of a message's address belong to the destination.
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 1 << 15;

/// Puts in what KVM can do and does not say: it depends on how the interrupt controllers are made.
pub(super) fn complete(cpuid: &mut [CpuidLeaf], tsc_deadline: bool) {
    for entry in cpuid.iter_mut().filter(|entry| entry.leaf == 1) {
        let [.., ecx, _] = &mut entry.registers;
        *ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_X2APIC;
        set(ecx, LEAF_1_ECX_TSC_DEADLINE, tsc_deadline);
    }
}

/// Puts in all that is the same for all processors. Their own numbers are zero.
pub(super) fn adjust(cpuid: &mut Vec<CpuidLeaf>, topology: &Topology) {
    if topology.reached_by_io_apic().is_some() {
        offer_wide_ids(cpuid);
    }
    let last = cpuid.iter().find(|entry| entry.leaf == 0).map_or(0, |entry| entry.registers[0]);
    cpuid.retain(|entry| !matches!(entry.leaf, 0xb | 0x1f));
    if topology.threads > 1 || topology.reached_by_io_apic().is_some() {
        offer_topology_extensions(cpuid);
    }
    for entry in cpuid.iter_mut() {
        adjust_leaf(entry, topology);
    }
    for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= last) {
        cpuid.extend(extended_topology(leaf, topology));
    }
}

/// Leaf 0Bh alone has ids of more than 8 bits. What both tell is ours alone, so the host need not have them. The core enters kernels
/// in x2APIC mode, so that no model may mask it.
fn offer_wide_ids(cpuid: &mut [CpuidLeaf]) {
    for entry in cpuid {
        let [eax, _, ecx, _] = &mut entry.registers;
        match entry.leaf {
            0 => *eax = (*eax).max(0xb),
            1 => *ecx |= LEAF_1_ECX_X2APIC,
            KVM_FEATURES => *eax |= KVM_FEATURE_MSI_EXT_DEST_ID,
            _ => {}
        }
    }
}

/// AMD: without TOPOEXT a guest takes threads for cores, and Linux does not look at leaf 0Bh. What it tells is ours alone, so the host need not have it.
fn offer_topology_extensions(cpuid: &mut Vec<CpuidLeaf>) {
    let vendor = cpuid.iter().find(|entry| entry.leaf == 0).map(|entry| entry.registers[1]);
    if !vendor.is_some_and(|vendor| [VENDOR_AMD, VENDOR_HYGON].contains(&vendor)) {
        return;
    }
    for entry in cpuid.iter_mut() {
        let [eax, _, ecx, _] = &mut entry.registers;
        match entry.leaf {
            0x8000_0000 => *eax = (*eax).max(0x8000_001e),
            0x8000_0001 => *ecx |= EXT_1_ECX_TOPOEXT,
            _ => {}
        }
    }
    if cpuid.iter().all(|entry| entry.leaf != 0x8000_001e) {
        cpuid.push(CpuidLeaf { leaf: 0x8000_001e, subleaf: 0, flags: 0, registers: [0; 4] });
    }
}

fn adjust_leaf(entry: &mut CpuidLeaf, topology: &Topology) {
    let logical = topology.logical_in_package();
    let share_package = (1 << topology.package_shift()) - 1;
    let share_core = (1 << topology.core_shift()) - 1;
    let [eax, ebx, ecx, edx] = &mut entry.registers;
    match entry.leaf {
        1 => {
            *ebx = *ebx & 0x0000_ffff | logical.min(0xff) << 16;
            // Guests get no virtualization of their own: it is the largest piece of KVM that they could attack.
            *ecx &= !LEAF_1_ECX_VMX;
            set(edx, LEAF_1_EDX_HTT, logical > 1);
        }
        // Intel: which ids share a cache (the third level and above by the package, the others by the core), and how many
        // cores a package has room for.
        4 if *eax & 0x1f != 0 => {
            let sharing: u32 = if *eax >> 5 & 7 >= 3 { share_package } else { share_core };
            let cores: u32 = (1 << (topology.package_shift() - topology.core_shift())) - 1;
            *eax = *eax & 0x0000_3fff | sharing.min(0xfff) << 14 | cores.min(63) << 26;
        }
        0x8000_0001 => {
            *ecx &= !EXT_1_ECX_SVM;
            set(ecx, EXT_1_ECX_CMP_LEGACY, logical > 1);
        }
        // AMD: threads of a package less one, and how many bits of the APIC id tell them apart.
        0x8000_0008 => *ecx = (logical - 1).min(0xff) | topology.package_shift() << 12,
        // AMD: the SVM leaf goes with the feature.
        0x8000_000a => entry.registers = [0; 4],
        0x8000_001d if *eax & 0x1f != 0 => {
            let sharing = if *eax >> 5 & 7 >= 3 { logical - 1 } else { topology.threads - 1 };
            *eax = *eax & 0x0000_3fff | sharing << 14;
        }
        // AMD: threads of a core less one; a package is a node.
        0x8000_001e => (*eax, *ebx, *ecx) = (0, (topology.threads - 1) << 8, 0),
        _ => {}
    }
}

/// Leaves 0Bh and 1Fh: threads of a core, then cores of a package.
fn extended_topology(leaf: u32, topology: &Topology) -> [CpuidLeaf; 3] {
    let level = |subleaf: u32, shift, count, kind: u32| CpuidLeaf {
        leaf,
        subleaf,
        flags: HAS_SUBLEAVES,
        registers: [shift, count, subleaf | kind << 8, 0],
    };
    [
        level(0, topology.core_shift(), topology.threads, LEVEL_SMT),
        level(1, topology.package_shift(), topology.logical_in_package(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on { *register |= bits } else { *register &= !bits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::config::CpuSpec;

    fn leaf(leaf: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { leaf, subleaf: 0, flags: 0, registers }
    }

    fn adjusted(text: &str, entries: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
        let (_, topology) = text.parse::<CpuSpec>().unwrap().resolve().unwrap();
        let mut cpuid = entries.to_vec();
        adjust(&mut cpuid, &topology);
        cpuid
    }

    fn find(cpuid: &[CpuidLeaf], leaf: u32, subleaf: u32) -> [u32; 4] {
        cpuid.iter().find(|entry| entry.leaf == leaf && entry.subleaf == subleaf).unwrap().registers
    }

    #[test]
    fn threads_cores_and_packages_are_told_in_every_way() {
        let l2 = leaf(4, [0x43, 0, 0, 0]);
        let l3 = CpuidLeaf { subleaf: 3, ..leaf(4, [0x63, 0, 0, 0]) };
        let host = [leaf(0, [0x1f, 0, 0, 0]), leaf(1, [0, 0xff12_3456, 0, 0]), l2, l3];
        let cpuid = adjusted("24,sockets=2,cores=6,threads=2", &host);
        assert_eq!(find(&cpuid, 1, 0)[1], 0x000c_3456);
        assert_ne!(find(&cpuid, 1, 0)[3] & LEAF_1_EDX_HTT, 0);
        for topology in [0xb, 0x1f] {
            assert_eq!(find(&cpuid, topology, 0), [1, 2, 0x100, 0]);
            assert_eq!(find(&cpuid, topology, 1), [4, 12, 0x201, 0]);
            assert_eq!(find(&cpuid, topology, 2), [0, 0, 2, 0]);
        }
        assert_eq!(find(&cpuid, 4, 0)[0], 7 << 26 | 1 << 14 | 0x43);
        assert_eq!(find(&cpuid, 4, 3)[0], 7 << 26 | 15 << 14 | 0x63);
        let host = [0x8000_0008, 0x8000_001e].map(|number| leaf(number, [0x30, 9, 9, 9]));
        let cpuid = adjusted("24,sockets=2,cores=6,threads=2", &host);
        assert_eq!(find(&cpuid, 0x8000_0008, 0), [0x30, 9, 4 << 12 | 11, 9]);
        assert_eq!(find(&cpuid, 0x8000_001e, 0), [0, 1 << 8, 0, 9]);
    }

    #[test]
    fn ids_beyond_8_bits_are_told_by_leaf_0b_and_kvm() {
        let host = [leaf(0, [7, 0, 0, 0]), leaf(1, [0; 4]), leaf(KVM_FEATURES, [1, 0, 0, 0])];
        let cpuid = adjusted("1024", &host);
        assert_eq!(find(&cpuid, 0, 0)[0], 0xb);
        assert_eq!(find(&cpuid, 0xb, 1), [10, 1024, 0x201, 0]);
        assert_eq!(find(&cpuid, 1, 0)[1], 0x00ff_0000, "8 bits say 255 for more");
        assert_eq!(find(&cpuid, KVM_FEATURES, 0)[0], 1 << 15 | 1);
        assert_eq!(find(&adjusted("255", &host), KVM_FEATURES, 0)[0], 1);
        // A model may mask X2APIC.
        let x2apic = |text| find(&adjusted(text, &host), 1, 0)[2] & LEAF_1_ECX_X2APIC;
        assert_eq!((x2apic("255"), x2apic("1024")), (0, LEAF_1_ECX_X2APIC));
        let cpuid = adjusted("1024", &[leaf(0x8000_0008, [0x30, 0, 0, 0])]);
        assert_eq!(find(&cpuid, 0x8000_0008, 0)[2], 10 << 12 | 0xff);
        // 3 * 2048 ids: more than the 12 bits of the field say.
        // 13 bits of ids in a package: more than the field says.
        let cpuid = adjusted("2565,cores=513,threads=5", &[leaf(4, [0x63, 0, 0, 0])]);
        assert_eq!(find(&cpuid, 4, 0)[0], 63 << 26 | 0xfff << 14 | 0x63);
    }

    #[test]
    fn leaves_that_the_host_has_not_are_not_made_up() {
        let cpuid = adjusted("4", &[leaf(0, [0xd, 0, 0, 0]), leaf(0xb, [7; 4])]);
        assert_eq!(find(&cpuid, 0xb, 1), [2, 4, 0x201, 0]);
        assert!(cpuid.iter().all(|entry| entry.leaf != 0x1f));
        assert!(adjusted("4", &[leaf(0, [4, 0, 0, 0])]).iter().all(|entry| entry.leaf != 0xb));
    }

    #[test]
    fn amd_guests_learn_of_threads_whatever_the_host_has() {
        let extended = [leaf(0x8000_0000, [0x8000_000a, 0, 0, 0]), leaf(0x8000_0001, [0; 4])];
        let host = |vendor| [&[leaf(0, [0xd, vendor, 0, 0])], extended.as_slice()].concat();
        let cpuid = adjusted("4,threads=2", &host(VENDOR_AMD));
        assert_eq!(find(&cpuid, 0x8000_0000, 0)[0], 0x8000_001e);
        assert_ne!(find(&cpuid, 0x8000_0001, 0)[2] & EXT_1_ECX_TOPOEXT, 0);
        assert_eq!(find(&cpuid, 0x8000_001e, 0), [0, 1 << 8, 0, 0]);
        let cpuid = adjusted("1024", &host(VENDOR_AMD));
        assert_ne!(
            find(&cpuid, 0x8000_0001, 0)[2] & EXT_1_ECX_TOPOEXT,
            0,
            "Linux takes leaf 0Bh with it alone"
        );
        for cpuid in [adjusted("4", &host(VENDOR_AMD)), adjusted("4,threads=2", &host(0x756e_6547))] {
            assert_eq!(find(&cpuid, 0x8000_0001, 0)[2] & EXT_1_ECX_TOPOEXT, 0);
        }
    }

    #[test]
    fn nested_virtualization_is_never_offered() {
        let host = [leaf(1, [0, 0, u32::MAX, 0]), leaf(0x8000_0001, [0, 0, u32::MAX, 0])];
        let mut cpuid = host.to_vec();
        let (_, topology) = CpuSpec::from(1).resolve().unwrap();
        complete(&mut cpuid, false);
        adjust(&mut cpuid, &topology);
        assert_eq!(find(&cpuid, 1, 0)[2] & (LEAF_1_ECX_VMX | LEAF_1_ECX_TSC_DEADLINE), 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0)[2] & EXT_1_ECX_SVM, 0);
    }
}
