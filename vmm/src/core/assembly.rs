//! Builds the machine from the supervisor's start message.
//!
//! Two things take time and wait on others: KVM, and the device processes, which are still starting. They go on side by
//! side, each on a thread; what needs both comes after.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use bulkhead_ipc::channel::message::{CoreStart, Descriptors, DeviceLink, MachineEnd};
use bulkhead_ipc::jail::{self, PolicyName};
use bulkhead_ipc::memory::{Direction, GuestRam};
use nix::sys::timerfd::TimerFd;

use super::CoreError;
use super::devices::{self, Attached, Greeted};
use super::huge_pages;
use super::platform::Platform;
use super::register_device::RegisterDevice;
use super::reports::Reports;
use crate::boot::{BootSource, load_kernel};
use crate::kvm::{Gate, Vcpu, VcpuStop, VcpuThreads, Vm};
use crate::machine::{IsaDevice, Machine};
use crate::virtio::VirtioPci;

/// The stack of the thread that opens the sessions with the device processes.
const GREETER_STACK: usize = 256 * 1024;

/// A machine whose vCPUs stand at the gate.
pub(super) struct Core {
    pub machine: Arc<Machine>,
    pub vcpus: VcpuThreads,
    pub virtio: Vec<Arc<VirtioPci>>,
    pub registers: Vec<Arc<RegisterDevice>>,
    pub reports: Arc<Reports>,
    pub timer: Arc<TimerFd>,
    /// All that the process holds, the control channel aside.
    pub descriptors: Vec<RawFd>,
    /// Lives as long as the vCPUs run.
    _vm: Vm,
}

impl Core {
    /// Builds it.
    ///
    /// # Errors
    /// What is wrong with the start message, what KVM or a device process refused, or what is unfit in kernel, initial RAM
    /// file system or command line.
    pub(super) fn assemble(start: CoreStart, mut descriptors: Descriptors) -> Result<Self, CoreError> {
        let kvm = descriptors.take(start.kvm)?;
        let Resources { kernel, initrd, devices } = Resources::take(&start, descriptors)?;
        let ram = GuestRam::create(start.memory_bytes)?;
        if !start.huge_pages {
            ram.refuse_huge_pages();
        }
        let reports = Arc::new(Reports::new().map_err(CoreError::system("eventfd2"))?);
        let (platform, vcpus, greeted) = side_by_side(kvm, &ram, start.cpus, devices, &reports)?;
        let Attached { virtio, registers } = devices::attach(greeted, &platform, &ram, &reports)?;
        let Platform { vm, machine, gate, timer, .. } = platform;
        boot(&machine, &ram, &vcpus, &start.cmdline, &kernel, initrd.as_ref())?;
        let mut held: Vec<RawFd> = vec![reports.as_fd().as_raw_fd()];
        held.extend(vm.descriptors().iter().map(AsRawFd::as_raw_fd));
        held.extend(vcpus.iter().map(Vcpu::raw_fd));
        held.extend(ram.regions().map(|region| region.fd.as_raw_fd()));
        held.extend(virtio.iter().flat_map(|device| device.descriptors()));
        held.extend(registers.iter().flat_map(|device| device.descriptors()));
        held.push(timer.as_fd().as_raw_fd());
        let vcpus = spawn(vcpus, gate, &reports)?;
        if start.huge_pages {
            huge_pages::watch(&ram)?;
        }
        Ok(Self { machine, vcpus, virtio, registers, reports, timer, descriptors: held, _vm: vm })
    }
}

impl Core {
    /// The virtio device of this name.
    pub(super) fn virtio(&self, id: &str) -> Option<&VirtioPci> {
        self.virtio.iter().find(|device| device.id() == id).map(|device| &**device)
    }

    /// The register device of this name.
    pub(super) fn registers(&self, id: &str) -> Option<&RegisterDevice> {
        self.registers.iter().find(|device| device.name() == id).map(|device| &**device)
    }
}

/// Creates the machine without devices, and opens the sessions with the device processes meanwhile.
fn side_by_side(
    kvm: OwnedFd,
    ram: &GuestRam,
    cpus: u8,
    links: Vec<(DeviceLink, UnixStream)>,
    reports: &Arc<Reports>,
) -> Result<(Platform, Vec<Vcpu>, Vec<Greeted>), CoreError> {
    thread::scope(|scope| {
        let greeter = thread::Builder::new()
            .name("greeter".to_owned())
            .stack_size(GREETER_STACK)
            .spawn_scoped(scope, || devices::greet(links, reports))
            .map_err(CoreError::system("clone3"))?;
        let platform = Platform::create(kvm, ram, cpus, reports);
        // A panic ends the process, so there is none to pass on.
        let greeted = greeter.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (platform, vcpus) = platform?;
        Ok((platform, vcpus, greeted?))
    })
}

/// What the start message brought, descriptors in place of their indices.
struct Resources {
    kernel: File,
    initrd: Option<File>,
    devices: Vec<(DeviceLink, UnixStream)>,
}

impl Resources {
    fn take(start: &CoreStart, mut descriptors: Descriptors) -> Result<Self, CoreError> {
        let kernel = descriptors.take(start.kernel)?.into();
        let initrd = start.initrd.map(|initrd| descriptors.take(initrd)).transpose()?.map(File::from);
        let mut devices = Vec::with_capacity(start.devices.len());
        for link in &start.devices {
            devices.push((link.clone(), UnixStream::from(descriptors.take(link.socket)?)));
        }
        descriptors.finish()?;
        Ok(Self { kernel, initrd, devices })
    }
}

/// Places tables and kernel in RAM and the boot processor at the kernel's entry.
fn boot(
    machine: &Machine,
    ram: &GuestRam,
    vcpus: &[Vcpu],
    command_line: &str,
    kernel: &File,
    initrd: Option<&File>,
) -> Result<(), CoreError> {
    machine.assign_resources();
    let tables = machine.acpi_tables();
    let length = u64::try_from(tables.blob.len()).unwrap_or(u64::MAX);
    ram.view(tables.address, length, Direction::Write)?.write_bytes(0, &tables.blob)?;
    let source = BootSource { kernel, initrd, command_line, rsdp: Some(tables.rsdp), reserved: &[] };
    let entry = load_kernel(ram, &source)?;
    vcpus.first().map_or(Ok(()), |boot_processor| boot_processor.enter_at(&entry))?;
    Ok(())
}

fn spawn(vcpus: Vec<Vcpu>, gate: Arc<Gate>, reports: &Arc<Reports>) -> Result<VcpuThreads, CoreError> {
    let reports = reports.clone();
    let prepare = || jail::enter_thread(PolicyName::CoreVcpu).map_err(|error| error.to_string());
    let on_stop = move |stop| {
        reports.end(match stop {
            VcpuStop::TripleFault => {
                tracing::info!("triple fault");
                MachineEnd::Reset
            }
            VcpuStop::Failed(reason) => MachineEnd::Failed(reason),
        });
    };
    Ok(VcpuThreads::spawn(vcpus, gate, prepare, on_stop)?)
}
