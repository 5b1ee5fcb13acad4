//! The processors that a guest sees: what KVM offers of the host's, reduced by a model, with the topology put in.
//!
//! Computed here and not in the core, which only adds each processor's own number: no line of it runs where the guest is.

mod leaves;
mod model;

use std::cell::LazyCell;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

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

type Answer = Result<Vec<CpuidLeaf>, Arc<ProcessorError>>;

/// What the processors can do. KVM takes a while to tell: a thread asks it, and who needs the answer first waits.
#[derive(Debug)]
pub struct Leaves(LazyCell<Answer, Box<dyn FnOnce() -> Answer>>);

impl Leaves {
    /// Asks for processors of this model.
    pub fn ask(topology: Topology, model: CpuModel) -> Self {
        let asking = thread::spawn(move || leaves(&topology, &model).map_err(Arc::new));
        Self(LazyCell::new(Box::new(|| asking.join().unwrap_or_else(|panic| resume_unwind(panic)))))
    }

    /// The answer.
    ///
    /// # Errors
    /// KVM says nothing, or the host lacks what the model requires.
    pub fn get(&self) -> Result<&[CpuidLeaf], Arc<ProcessorError>> {
        self.0.as_deref().map_err(Clone::clone)
    }

    /// What the core needs to make the processors, of which the first `present` are there at the start.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn processors(&self, topology: &Topology, present: u16) -> Result<Processors, Arc<ProcessorError>> {
        let shift = |shift| u8::try_from(shift).unwrap_or(0);
        Ok(Processors {
            present,
            apic_ids: topology.apic_ids(),
            core_shift: shift(topology.core_shift()),
            package_shift: shift(topology.package_shift()),
            cpuid: self.get()?.to_vec(),
        })
    }
}

fn leaves(topology: &Topology, model: &CpuModel) -> Result<Vec<CpuidLeaf>, ProcessorError> {
    let kvm = Kvm::new()?;
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let mut cpuid: Vec<CpuidLeaf> = supported.as_slice().iter().map(leaf).collect();
    leaves::complete(&mut cpuid, kvm.check_extension(Cap::TscDeadlineTimer));
    model.apply(&mut cpuid)?;
    leaves::adjust(&mut cpuid, topology);
    Ok(cpuid)
}

fn leaf(entry: &kvm_bindings::kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        leaf: entry.function,
        subleaf: entry.index,
        flags: entry.flags,
        registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};

    use super::*;
    use crate::supervisor::config::CpuSpec;

    #[test]
    fn kvm_takes_what_is_computed_and_gives_it_back() {
        let vm = Kvm::new().expect("this test needs /dev/kvm").create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let mut tried = 0;
        for (id, text) in [(0, "1"), (5, "6,max=12,sockets=2,threads=2"), (100, "255"), (300, "1024")] {
            let (_, topology) = text.parse::<CpuSpec>().unwrap().resolve().unwrap();
            for name in ["host", "x86-64-v2", "x86-64-v3"] {
                let model = CpuModel::read(name).unwrap();
                // A host may be older than a model.
                let Ok(leaves) = leaves(&topology, &model) else { continue };
                let entry = |leaf: &CpuidLeaf| {
                    let [eax, ebx, ecx, edx] = leaf.registers;
                    let (function, index, flags) = (leaf.leaf, leaf.subleaf, leaf.flags);
                    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
                };
                let entries: Vec<_> = leaves.iter().map(entry).collect();
                let vcpu = vm.create_vcpu(id + tried).unwrap();
                vcpu.set_cpuid2(&CpuId::from_entries(&entries).unwrap()).unwrap();
                let taken = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
                for wanted in entries.iter().filter(|wanted| {
                    matches!(wanted.function, 4 | 0xb | 0x1f | 0x8000_0001 | 0x8000_0008 | 0x8000_001e)
                }) {
                    // Some leaves KVM offers and does not take.
                    let place = |entry: &&kvm_cpuid_entry2| {
                        (entry.function, entry.index) == (wanted.function, wanted.index)
                    };
                    assert_eq!(Some(wanted), taken.as_slice().iter().find(place), "{text}, {name}");
                }
                tried += 1;
            }
        }
        assert!(tried >= 3, "not even host");
    }
}
