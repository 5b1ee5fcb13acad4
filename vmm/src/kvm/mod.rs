//! KVM: the virtual machine, its vCPU threads, interrupt routing and doorbells.
//!
//! Only this module and those below it talk to KVM; `machine` and `virtio` see traits.

mod cpuid;
mod doorbells;
mod exit_report;
mod interrupts;
mod memory_slots;
mod msrs;
mod registers;
#[cfg(test)]
mod tests;
mod unpacking_watch;
mod vcpu;
mod vcpu_threads;
mod vm;

pub use cpuid::address_bits;
pub use doorbells::{DoorbellEvents, Doorbells};
pub use interrupts::{FunctionMessages, Interrupts};
pub use memory_slots::MemorySlots;
pub use vcpu::{Vcpu, VcpuStop};
pub use vcpu_threads::{Gate, VcpuThreads};
pub use vm::Vm;

/// Why KVM refused something. The sentence names the call; the kernel's reason follows.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl failed.
    #[error("KVM refused {call}: {source}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// The kernel's answer.
        source: kvm_ioctls::Error,
    },
    /// The interrupt routing table is full.
    #[error("no interrupt route is left: KVM offers {0}")]
    NoRoute(usize),
    /// A table that goes to the kernel is longer than its format allows.
    #[error("the {0} table is too long for KVM")]
    TableTooLong(&'static str),
    /// A vCPU thread could not be made.
    #[error("cannot start the thread of vCPU {id}: {source}")]
    Thread {
        /// The vCPU's number.
        id: usize,
        /// The operating system's answer.
        source: std::io::Error,
    },
}

/// Attaches the ioctl's name to an error of `kvm-ioctls`.
fn call(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { call: name, source }
}
