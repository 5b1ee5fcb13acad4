//! One vCPU: its creation, and what each exit from the guest means.
//!
//! Contains unsafe code: port accesses are read from the page that KVM shares with us, since string
//! instructions move more than one element and only that page tells the element's size.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bulkhead_ipc::channel::message::{FIRST_WIDE_APIC_ID, Processors};
use bulkhead_ipc::memory::GuestRam;
use kvm_bindings::{KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::vcpu_threads::{Gate, Seat};
use super::{KvmError, Vm, call, cpuid, exit_report, msrs, registers};
use crate::boot::Entry;
use crate::machine::{Machine, Space};

/// Why a vCPU can not go on.
#[derive(Debug)]
pub enum VcpuStop {
    /// A triple fault: on a PC the chipset resets the machine.
    TripleFault,
    /// KVM or the guest's state is beyond use; the sentence has registers and the bytes at RIP.
    Failed(String),
}

/// What one entry into the guest came to.
pub(super) enum Step {
    /// The guest may be entered again.
    Continue,
    /// Somebody wanted this vCPU out of the guest.
    Interrupted,
    /// It is over.
    Stop(VcpuStop),
}

/// One vCPU, owned by its thread while it runs.
pub struct Vcpu {
    apic_id: u32,
    /// Some processor of the machine has an id of more than 8 bits.
    wide_ids: bool,
    fd: VcpuFd,
    machine: Arc<Machine>,
    ram: GuestRam,
}

impl Vcpu {
    /// Creates the vCPU with this local APIC id, with its CPUID, MSRs and LAPIC as after firmware. Application processors wait for INIT-SIPI.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn create(
        vm: &Vm,
        processors: &Processors,
        apic_id: u32,
        machine: Arc<Machine>,
    ) -> Result<Self, KvmError> {
        let fd = vm.fd.create_vcpu(u64::from(apic_id)).map_err(call("KVM_CREATE_VCPU"))?;
        let table = cpuid::table(processors, apic_id)?;
        fd.set_cpuid2(&table).map_err(call("KVM_SET_CPUID2"))?;
        msrs::set_up(&fd)?;
        registers::set_up_lapic(&fd)?;
        let wide_ids = processors.apic_ids.last() >= Some(&FIRST_WIDE_APIC_ID);
        Ok(Self { apic_id, wide_ids, fd, machine, ram: vm.ram.clone() })
    }

    /// Sets the state in which a kernel is entered; for the boot processor alone.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn enter_at(&self, entry: &Entry) -> Result<(), KvmError> {
        // A multiboot kernel, which alone finds a number in RAX, need not know of x2APIC mode.
        registers::set_entry(&self.fd, entry, self.wide_ids && entry.rax == 0)
    }

    /// The vCPU's descriptor number, for the check of all descriptors before the process is sealed.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(super) fn run_page(&mut self) -> *mut kvm_run {
        self.fd.get_kvm_run()
    }

    pub(super) fn clear_immediate_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Enters the guest once, when `gate` lets it, and answers what it exits for.
    pub(super) fn step(&mut self, gate: &Gate, seat: &Seat) -> Step {
        gate.enter_guest(seat);
        let exit = self.fd.run();
        gate.leave_guest(seat);
        match exit {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => self.port_access(),
            Ok(VcpuExit::MmioRead(address, data)) => self.machine.read(Space::Memory, address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.machine.write(Space::Memory, address, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
            Ok(VcpuExit::Shutdown) => return Step::Stop(VcpuStop::TripleFault),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return self.failed(&format!(
                    "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
                ));
            }
            Ok(VcpuExit::InternalError) => return self.failed("KVM cannot emulate the guest's instruction"),
            Ok(other) => {
                let what = format!("unexpected exit {other:?}");
                return self.failed(&what);
            }
            Err(error) if error.errno() == libc::EINTR => return Step::Interrupted,
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => return self.failed(&format!("KVM_RUN failed: {error}")),
        }
        Step::Continue
    }

    fn failed(&self, what: &str) -> Step {
        Step::Stop(VcpuStop::Failed(format!(
            "vCPU {}: {what}; {}",
            self.apic_id,
            exit_report::describe(&self.fd, &self.ram)
        )))
    }

    /// Answers a port access, element by element: `rep insb` brings many elements in one exit.
    fn port_access(&mut self) {
        let run = self.fd.get_kvm_run();
        // SAFETY: called for KVM_EXIT_IO alone, for which the kernel has filled in this member of the union.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let length = size.saturating_mul(io.count as usize);
        let Ok(offset) = usize::try_from(io.data_offset) else { return };
        // SAFETY: the kernel places the data inside the mapping that begins at `run` (KVM_GET_VCPU_MMAP_SIZE
        // bytes, mapped whole by kvm-ioctls): `offset + count * size` lies within it. Nothing else refers to
        // those bytes while the vCPU is out of the guest and `self.fd` is borrowed.
        let data = unsafe {
            std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(offset), length)
        };
        let port = u64::from(io.port);
        let input = u32::from(io.direction) == KVM_EXIT_IO_IN;
        for element in data.chunks_exact_mut(size.max(1)) {
            if input {
                self.machine.read(Space::Port, port, element);
            } else {
                self.machine.write(Space::Port, port, element);
            }
        }
    }
}
