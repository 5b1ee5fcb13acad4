//! The KVM capabilities that a machine needs, and those it only profits from.

use kvm_ioctls::Cap;

/// One KVM capability with what is lost without it.
pub struct Capability {
    /// Number for `KVM_CHECK_EXTENSION`.
    pub cap: Cap,
    /// The kernel's name.
    pub name: &'static str,
    /// What a machine cannot do without it.
    pub lost_without: &'static str,
}

/// Without any one of these no machine starts.
pub const REQUIRED: &[Capability] = &[
    Capability { cap: Cap::UserMemory, name: "KVM_CAP_USER_MEMORY", lost_without: "guest RAM" },
    Capability { cap: Cap::Irqchip, name: "KVM_CAP_IRQCHIP", lost_without: "interrupt controllers" },
    Capability { cap: Cap::Pit2, name: "KVM_CAP_PIT2", lost_without: "the interval timer" },
    Capability {
        cap: Cap::SetTssAddr,
        name: "KVM_CAP_SET_TSS_ADDR",
        lost_without: "real mode on Intel hosts",
    },
    Capability { cap: Cap::ExtCpuid, name: "KVM_CAP_EXT_CPUID", lost_without: "processor identification" },
    Capability { cap: Cap::IrqRouting, name: "KVM_CAP_IRQ_ROUTING", lost_without: "MSI-X" },
    Capability { cap: Cap::Irqfd, name: "KVM_CAP_IRQFD", lost_without: "interrupts from device processes" },
    Capability {
        cap: Cap::Ioeventfd,
        name: "KVM_CAP_IOEVENTFD",
        lost_without: "notifications to device processes",
    },
    Capability { cap: Cap::ImmediateExit, name: "KVM_CAP_IMMEDIATE_EXIT", lost_without: "pausing a vCPU" },
];
