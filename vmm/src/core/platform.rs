//! The machine without its devices: KVM's part, the chipset, the vCPUs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_ipc::channel::message::Processors;
use bulkhead_ipc::memory::GuestRam;

use super::CoreError;
use super::host::CoreHost;
use super::reports::Reports;
use crate::kvm::{Doorbells, Interrupts, Vcpu, Vm, address_bits};
use crate::machine::{Machine, MachineConfig};

/// What devices are attached to.
pub(super) struct Platform {
    pub vm: Vm,
    pub interrupts: Arc<Interrupts>,
    pub doorbells: Arc<Doorbells>,
    pub machine: Arc<Machine>,
}

impl Platform {
    /// Creates the virtual machine with all vCPUs that it may have.
    pub(super) fn create(
        kvm: OwnedFd,
        ram: &GuestRam,
        processors: &Processors,
        reports: &Arc<Reports>,
    ) -> Result<(Self, Vec<Vcpu>), CoreError> {
        let vm = Vm::create(kvm, ram)?;
        let interrupts = Arc::new(Interrupts::new(&vm)?);
        let doorbells = Arc::new(Doorbells::new(&vm));
        let Processors { present, apic_ids, .. } = processors;
        let config = MachineConfig {
            cpus: *present,
            apic_ids: apic_ids.clone(),
            address_bits: address_bits(processors),
        };
        let host = CoreHost::new(interrupts.clone(), doorbells.clone(), reports.clone());
        let machine = Machine::new(config, ram.clone(), Arc::new(host))?;
        let vcpus = apic_ids
            .iter()
            .map(|id| Vcpu::create(&vm, processors, *id, machine.clone()))
            .collect::<Result<_, _>>()?;
        Ok((Self { vm, interrupts, doorbells, machine }, vcpus))
    }
}
