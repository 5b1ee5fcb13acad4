//! Builds the machine from the supervisor's start message.
//!
//! The order is that of least waiting: KVM and the kernel image first, while the device processes are still starting; then the
//! connections to them, whose answers are ready by then.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_ipc::channel::message::{CoreStart, Descriptors, DeviceLink, LinkKind, MachineEnd};
use bulkhead_ipc::jail::{self, PolicyName};
use bulkhead_ipc::memory::{Direction, GuestRam};
use bulkhead_ipc::vfio_user::ClientError;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::CoreError;
use super::host::CoreHost;
use super::register_device::{RegisterDevice, RegisterDeviceConfig};
use super::reports::Reports;
use crate::boot::{BootSource, load_kernel};
use crate::kvm::{Doorbells, FunctionMessages, Interrupts, Vcpu, VcpuStop, VcpuThreads, Vm, address_bits};
use crate::machine::{Machine, MachineConfig};
use crate::virtio::{DeviceType, Settings, VirtioPci};

/// The first slot that the chipset leaves to other functions.
const FIRST_SLOT: u8 = 2;

/// A machine whose vCPUs stand at the gate.
pub(super) struct Core {
    pub machine: Arc<Machine>,
    pub vcpus: VcpuThreads,
    pub virtio: Vec<Arc<VirtioPci>>,
    pub reports: Arc<Reports>,
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
        let resources = Resources::take(&start, descriptors)?;
        let ram = GuestRam::create(start.memory_bytes)?;
        let vm = Vm::create(kvm, &ram, start.cpus)?;
        let interrupts = Arc::new(Interrupts::new(&vm)?);
        let doorbells = Arc::new(Doorbells::new(&vm));
        let reports = Arc::new(Reports::new().map_err(CoreError::system("eventfd2"))?);
        let supported = vm.supported_cpuid()?;
        let config = MachineConfig { cpus: start.cpus, address_bits: address_bits(&supported) };
        let host = CoreHost::new(interrupts.clone(), doorbells.clone(), reports.clone());
        let machine = Machine::new(config, ram.clone(), Arc::new(host))?;
        let mut vcpus = Vec::with_capacity(start.cpus.into());
        for id in 0..start.cpus {
            vcpus.push(Vcpu::create(&vm, &supported, id, machine.clone())?);
        }
        let mut devices = Devices {
            machine: &machine,
            ram: &ram,
            interrupts: &interrupts,
            doorbells: &doorbells,
            reports: &reports,
            virtio: Vec::new(),
            registers: Vec::new(),
            next_slot: FIRST_SLOT,
        };
        for (link, stream) in resources.devices {
            devices.connect(&link, stream)?;
        }
        let Devices { virtio, registers, .. } = devices;
        boot(&machine, &ram, &vcpus, &start.cmdline, &resources.kernel, resources.initrd.as_ref())?;
        let mut held: Vec<RawFd> = vec![reports.as_fd().as_raw_fd()];
        held.extend(vm.descriptors().iter().map(AsRawFd::as_raw_fd));
        held.extend(vcpus.iter().map(Vcpu::raw_fd));
        held.extend(ram.regions().map(|region| region.fd.as_raw_fd()));
        held.extend(virtio.iter().flat_map(|device| device.descriptors()));
        held.extend(registers.iter().flat_map(|device| device.descriptors()));
        let vcpus = spawn(vcpus, &reports)?;
        Ok(Self { machine, vcpus, virtio, reports, descriptors: held, _vm: vm })
    }
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

/// The devices as they are connected, one after the other.
struct Devices<'a> {
    machine: &'a Arc<Machine>,
    ram: &'a GuestRam,
    interrupts: &'a Arc<Interrupts>,
    doorbells: &'a Arc<Doorbells>,
    reports: &'a Arc<Reports>,
    virtio: Vec<Arc<VirtioPci>>,
    registers: Vec<Arc<RegisterDevice>>,
    next_slot: u8,
}

impl Devices<'_> {
    fn connect(&mut self, link: &DeviceLink, stream: UnixStream) -> Result<(), CoreError> {
        match link.kind {
            LinkKind::VirtioVhostUser { virtio_id } => self.connect_virtio(&link.id, virtio_id, stream),
            LinkKind::Registers => self.connect_registers(&link.id, stream),
        }
    }

    fn connect_virtio(&mut self, id: &str, virtio_id: u16, stream: UnixStream) -> Result<(), CoreError> {
        let failed = |source| CoreError::Virtio { id: id.to_owned(), source };
        let settings = Settings::new(id, DeviceType::from_id(virtio_id));
        let messages = Arc::new(FunctionMessages::new(self.interrupts.clone()));
        let device = VirtioPci::new(settings, stream, self.ram.clone(), messages, self.reports.clone())
            .map_err(failed)?;
        let slot = self.next_slot;
        self.doorbells.register(slot, device.clone());
        let pin = self.machine.attach_pci(slot, device.clone())?;
        device.connect_pin(Arc::new(pin));
        self.virtio.push(device);
        self.next_slot = self.next_slot.saturating_add(1);
        Ok(())
    }

    fn connect_registers(&mut self, id: &str, stream: UnixStream) -> Result<(), CoreError> {
        let config = RegisterDeviceConfig::com1(id);
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let interrupt = EventFd::from_flags(flags).map_err(CoreError::system("eventfd2"))?;
        self.interrupts.connect_line(interrupt.as_fd(), config.irq)?;
        let reports = self.reports.clone();
        let device_id = id.to_owned();
        let on_failure =
            Box::new(move |error: &ClientError| reports.device_failed(&device_id, error.to_string()));
        let device = RegisterDevice::connect(config, stream.into(), interrupt.into(), on_failure)
            .map_err(|source| CoreError::Register { id: id.to_owned(), source })?;
        let device = Arc::new(device);
        self.machine.attach_isa(device.clone())?;
        self.registers.push(device);
        Ok(())
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

fn spawn(vcpus: Vec<Vcpu>, reports: &Arc<Reports>) -> Result<VcpuThreads, CoreError> {
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
    Ok(VcpuThreads::spawn(vcpus, prepare, on_stop)?)
}
