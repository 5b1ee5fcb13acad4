//! The machine without its devices: KVM's part, the chipset, the vCPUs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_ipc::channel::message::{Boot, CoreStart, FIRST_WIDE_APIC_ID, LinkKind};
use bulkhead_ipc::memory::{GuestRam, MappedFile};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::CoreError;
use super::host::CoreHost;
use super::reports::Reports;
use crate::kvm::{Doorbells, Gate, Interrupts, MemorySlots, Vcpu, Vm, address_bits};
use crate::machine::{Machine, MachineConfig, MemoryChip};

/// What devices are attached to.
pub(super) struct Platform {
    pub vm: Vm,
    pub interrupts: Arc<Interrupts>,
    pub doorbells: Arc<Doorbells>,
    pub machine: Arc<Machine>,
    pub memory: Arc<MemorySlots>,
    /// Where the vCPUs are to stand.
    pub gate: Arc<Gate>,
    /// The machine's next deadline.
    pub timer: Arc<TimerFd>,
}

impl Platform {
    /// Creates the virtual machine that `start` describes, with all vCPUs that it may have.
    pub(super) fn create(
        kvm: OwnedFd,
        ram: &GuestRam,
        start: &CoreStart,
        (firmware, files): (Vec<Arc<dyn MemoryChip>>, Vec<Arc<MappedFile>>),
        reports: &Arc<Reports>,
    ) -> Result<(Self, Vec<Vcpu>), CoreError> {
        let CoreStart { processors, generation, debug_exit, .. } = start;
        let vm = Vm::create(kvm, ram)?;
        let interrupts = Arc::new(Interrupts::new(&vm));
        let doorbells = Arc::new(Doorbells::new(&vm));
        let config = MachineConfig {
            cpus: processors.present,
            apic_ids: processors.apic_ids.clone(),
            address_bits: address_bits(processors),
            generation: *generation,
            debug_exit: *debug_exit,
            keyboard: start.devices.iter().any(|link| link.kind == LinkKind::Keyboard),
            firmware,
            files,
        };
        let gate = Arc::new(Gate::default());
        let memory = Arc::new(MemorySlots::new(&vm, gate.clone()));
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags);
        let timer = Arc::new(timer.map_err(CoreError::system("timerfd_create"))?);
        let host = CoreHost::new(
            interrupts.clone(),
            doorbells.clone(),
            memory.clone(),
            reports.clone(),
            timer.clone(),
        );
        let machine = Machine::new(config, ram.clone(), Arc::new(host))?;
        // A kernel that is started directly finds RAM as firmware leaves it; see `create_chips` why this comes first.
        if matches!(start.boot, Boot::Kernel { .. }) {
            machine.shadow_ram();
        }
        vm.create_chips()?;
        if processors.apic_ids.last() >= Some(&FIRST_WIDE_APIC_ID) {
            vm.widen_apic_ids()?;
        }
        interrupts.connect_lines()?;
        let vcpus = processors
            .apic_ids
            .iter()
            .map(|id| Vcpu::create(&vm, processors, *id, machine.clone()))
            .collect::<Result<_, _>>()?;
        Ok((Self { vm, interrupts, doorbells, machine, memory, gate, timer }, vcpus))
    }
}
