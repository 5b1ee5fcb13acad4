//! The machine without its devices: KVM's part, the chipset, the vCPUs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_ipc::channel::message::CoreStart;
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
    /// Creates the virtual machine that `start` describes.
    pub(super) fn create(
        kvm: OwnedFd,
        ram: &GuestRam,
        start: &CoreStart,
        reports: &Arc<Reports>,
    ) -> Result<(Self, Vec<Vcpu>), CoreError> {
        let CoreStart { cpus, generation, debug_exit, .. } = *start;
        let vm = Vm::create(kvm, ram, cpus)?;
        let interrupts = Arc::new(Interrupts::new(&vm)?);
        let doorbells = Arc::new(Doorbells::new(&vm));
        let supported = vm.supported_cpuid()?;
        let address_bits = address_bits(&supported);
        let config = MachineConfig { cpus, address_bits, generation, debug_exit };
        let host = CoreHost::new(interrupts.clone(), doorbells.clone(), reports.clone());
        let machine = Machine::new(config, ram.clone(), Arc::new(host))?;
        let vcpus = (0..cpus)
            .map(|id| Vcpu::create(&vm, &supported, id, machine.clone()))
            .collect::<Result<_, _>>()?;
        Ok((Self { vm, interrupts, doorbells, machine }, vcpus))
    }
}
