//! The processors that a guest sees: what KVM offers of the host's, reduced by a model, with the topology put in.
//!
//! Computed here and not in the core, which only adds each processor's own number: no line of it runs where the guest is.

mod leaves;
mod model;

use bulkhead_ipc::channel::message::{CpuidLeaf, Processors};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};
pub use model::{CpuModel, ModelError};
use thiserror::Error;

use super::config::Topology;

/// Why a guest cannot have the processors that it is to have.
#[derive(Debug, Error)]
pub enum ProcessorError {
    /// KVM does not say what it offers.
    #[error("KVM does not tell what processors it can show to a guest: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// What the core needs to make the processors, of which the first `present` are there at the start.
///
/// # Errors
/// KVM says nothing, or the host lacks what the model requires.
pub fn processors(topology: &Topology, model: &CpuModel, present: u8) -> Result<Processors, ProcessorError> {
    let kvm = Kvm::new()?;
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let mut cpuid: Vec<CpuidLeaf> = supported.as_slice().iter().map(leaf).collect();
    leaves::complete(&mut cpuid, kvm.check_extension(Cap::TscDeadlineTimer));
    model.apply(&mut cpuid)?;
    leaves::adjust(&mut cpuid, topology);
    let shift = |shift| u8::try_from(shift).unwrap_or(0);
    Ok(Processors {
        present,
        apic_ids: topology.apic_ids(),
        core_shift: shift(topology.core_shift()),
        package_shift: shift(topology.package_shift()),
        cpuid,
    })
}

fn leaf(entry: &kvm_bindings::kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        leaf: entry.function,
        subleaf: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}
