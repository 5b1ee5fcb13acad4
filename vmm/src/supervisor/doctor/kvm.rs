//! What KVM must and may offer.
//!
//! Contains unsafe code: the two ioctls of `/dev/kvm` that ask for its version and capabilities.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::supervisor::config::Topology;
use kvm_bindings as kvm;
use thiserror::Error;

/// The device.
pub const PATH: &str = "/dev/kvm";
/// The only version of the interface since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Why KVM cannot be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device does not exist.
    #[error(
        "no {PATH}: the kernel has no KVM, its module is not loaded (modprobe kvm_intel or kvm_amd), or virtualization is off in the firmware or not passed to this virtual machine"
    )]
    Missing,
    /// It exists and may not be opened.
    #[error(
        "no permission to open {PATH}: add your user to the group kvm (sudo usermod -aG kvm $USER) and log in again"
    )]
    Permission,
    /// It cannot be opened for another reason.
    #[error("cannot open {PATH}: {0}")]
    Open(io::Error),
    /// It is not KVM, or not the KVM that we know.
    #[error("{PATH} speaks API version {0}, not {API_VERSION}")]
    Version(i32),
    /// Capabilities that the machine needs.
    #[error("this KVM lacks {0}: a newer kernel is needed")]
    Capabilities(String),
    /// Fewer CPUs than asked for.
    #[error("cpus: {wanted} is too many for this host: its KVM allows {most} in one machine")]
    Cpus {
        /// What was asked for.
        wanted: u32,
        /// `KVM_CAP_MAX_VCPUS`.
        most: i32,
    },
    /// Sparser APIC ids than it has.
    #[error(
        "cpus: the last APIC id would be {last}, and this host's KVM goes up to {most}: have sockets, cores and threads in powers of two"
    )]
    ApicIds {
        /// The last one.
        last: u32,
        /// One less than `KVM_CAP_MAX_VCPU_ID`.
        most: i32,
    },
}

/// A capability of KVM (Documentation/virt/kvm/api.rst).
#[derive(Debug)]
pub struct Capability {
    /// The number for `KVM_CHECK_EXTENSION`.
    number: u32,
    /// Its name without `KVM_CAP_`.
    pub name: &'static str,
    /// Whether no machine runs without it.
    pub needed: bool,
    /// What it is for, or what is lost without it.
    pub purpose: &'static str,
}

const fn needed(number: u32, name: &'static str, purpose: &'static str) -> Capability {
    Capability { number, name, needed: true, purpose }
}

const fn optional(number: u32, name: &'static str, purpose: &'static str) -> Capability {
    Capability { number, name, needed: false, purpose }
}

/// The capabilities that are looked at.
pub const CAPABILITIES: &[Capability] = &[
    needed(kvm::KVM_CAP_USER_MEMORY, "USER_MEMORY", "guest RAM in the core's memory"),
    needed(kvm::KVM_CAP_IRQCHIP, "IRQCHIP", "PIC, IOAPIC and local APICs in the kernel"),
    needed(kvm::KVM_CAP_PIT2, "PIT2", "the timer 8254 in the kernel"),
    needed(kvm::KVM_CAP_SET_TSS_ADDR, "SET_TSS_ADDR", "real mode on Intel"),
    needed(kvm::KVM_CAP_EXT_CPUID, "EXT_CPUID", "the CPU's features for the guest"),
    needed(kvm::KVM_CAP_MP_STATE, "MP_STATE", "more than one CPU"),
    needed(kvm::KVM_CAP_IRQ_ROUTING, "IRQ_ROUTING", "interrupts of PCI devices"),
    needed(kvm::KVM_CAP_IRQFD, "IRQFD", "interrupts from device processes"),
    needed(kvm::KVM_CAP_IOEVENTFD, "IOEVENTFD", "queue notifications to device processes"),
    needed(kvm::KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", "stopping a CPU without a race"),
    optional(
        kvm::KVM_CAP_IOEVENTFD_ANY_LENGTH,
        "IOEVENTFD_ANY_LENGTH",
        "without it notifications of some widths pass through the core",
    ),
    optional(kvm::KVM_CAP_ADJUST_CLOCK, "ADJUST_CLOCK", "without it the guest's clock jumps after a pause"),
    optional(kvm::KVM_CAP_READONLY_MEM, "READONLY_MEM", "without it no firmware in read-only memory"),
    optional(
        kvm::KVM_CAP_X86_USER_SPACE_MSR,
        "X86_USER_SPACE_MSR",
        "without it unknown MSRs are the kernel's choice",
    ),
    optional(
        kvm::KVM_CAP_DIRTY_LOG_RING,
        "DIRTY_LOG_RING",
        "without it dirty pages are found by bitmap, which is slower",
    ),
    optional(kvm::KVM_CAP_X2APIC_API, "X2APIC_API", "without it no APIC ids above 254"),
    optional(kvm::KVM_CAP_SPLIT_IRQCHIP, "SPLIT_IRQCHIP", "without it no interrupt remapping for guests"),
];

nix::ioctl_write_int_bad!(
    /// `KVM_GET_API_VERSION`: the version; the argument is 0.
    kvm_get_api_version,
    0xAE00
);
nix::ioctl_write_int_bad!(
    /// `KVM_CHECK_EXTENSION`: 0, or what the capability offers.
    kvm_check_extension,
    0xAE03
);

fn version(kvm: &File) -> i32 {
    // SAFETY: the descriptor is open, and the call takes no pointer.
    unsafe { kvm_get_api_version(kvm.as_raw_fd(), 0) }.unwrap_or(-1)
}

fn extension(kvm: &File, number: u32) -> i32 {
    let Ok(number) = i32::try_from(number) else { return 0 };
    // SAFETY: the descriptor is open, and the call takes a number and no pointer.
    unsafe { kvm_check_extension(kvm.as_raw_fd(), number) }.unwrap_or(0)
}

impl Capability {
    /// Whether this KVM has it.
    pub fn present(&self, kvm: &File) -> bool {
        extension(kvm, self.number) > 0
    }
}

/// Opens `/dev/kvm` and checks its version.
pub fn open() -> Result<File, KvmError> {
    let kvm = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(PATH).map_err(
        |error| match error.kind() {
            io::ErrorKind::NotFound => KvmError::Missing,
            io::ErrorKind::PermissionDenied => KvmError::Permission,
            _ if error.raw_os_error() == Some(libc::ENODEV) => KvmError::Missing,
            _ => KvmError::Open(error),
        },
    )?;
    match version(&kvm) {
        API_VERSION => Ok(kvm),
        other => Err(KvmError::Version(other)),
    }
}

/// Refuses a KVM that lacks what this machine needs, or allows fewer CPUs than wanted.
pub fn check(kvm: &File, topology: &Topology) -> Result<(), KvmError> {
    let wide = topology.reached_by_io_apic().is_some();
    let needed =
        |capability: &&Capability| capability.needed || wide && capability.number == kvm::KVM_CAP_X2APIC_API;
    let missing: Vec<String> = CAPABILITIES
        .iter()
        .filter(needed)
        .filter(|capability| !capability.present(kvm))
        .map(|capability| format!("KVM_CAP_{} ({})", capability.name, capability.purpose))
        .collect();
    if !missing.is_empty() {
        return Err(KvmError::Capabilities(missing.join(", ")));
    }
    let (wanted, most) = (topology.count(), max_cpus(kvm));
    if i64::from(wanted) > i64::from(most) {
        return Err(KvmError::Cpus { wanted, most });
    }
    // A kernel that does not know of it has as many as CPUs (KVM_CAP_MAX_VCPU_ID).
    let most = extension(kvm, kvm::KVM_CAP_MAX_VCPU_ID).max(most).saturating_sub(1);
    match topology.last_apic_id() {
        last if i64::from(last) > i64::from(most) => Err(KvmError::ApicIds { last, most }),
        _ => Ok(()),
    }
}

/// The most CPUs that one machine may have.
pub fn max_cpus(kvm: &File) -> i32 {
    extension(kvm, kvm::KVM_CAP_MAX_VCPUS).max(extension(kvm, kvm::KVM_CAP_NR_VCPUS)).max(1)
}
