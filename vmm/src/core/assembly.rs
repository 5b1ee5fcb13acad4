//! Builds the machine from the supervisor's start message.
//!
//! Two things take time and wait on others: KVM, and the device processes, which are still starting. They go on side by
//! side, each on a thread; what needs both comes after.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use bulkhead_ipc::channel::message::{
    Boot, CoreStart, Descriptors, FirmwareFile, LinkKind, MachineEnd, MappedRegion,
};
use bulkhead_ipc::jail::{self, PolicyName};
use bulkhead_ipc::memory::{Direction, GuestRam, MappedFile, SharedRegion};

use super::CoreError;
use super::devices::{self, Attached, Greeted, Line};
use super::flash::Flash;
use super::platform::Platform;
use super::register_device::RemoteDevice;
use super::reports::Reports;
use crate::boot::{BIOS_START, BootSource, Entry, load_firmware, load_kernel};
use crate::kvm::{Gate, Vcpu, VcpuStop, VcpuThreads};
use crate::machine::{BuildError, Machine, MemoryChip};
use crate::virtio::VirtioPci;

/// The stack of the thread that opens the sessions with the device processes.
const GREETER_STACK: usize = 256 * 1024;

/// Where kernels look for the entry point of SMBIOS in a direct boot, at the first address.
const SMBIOS: u64 = 0xF_0000;

/// A machine whose vCPUs stand at the gate.
pub(super) struct Core {
    /// Its `vm` lives as long as the vCPUs run.
    pub platform: Platform,
    pub ram: GuestRam,
    pub vcpus: VcpuThreads,
    /// By slot. No vCPU comes here.
    virtio: Mutex<BTreeMap<u8, Arc<VirtioPci>>>,
    pub registers: Vec<Arc<dyn RemoteDevice>>,
    pub reports: Arc<Reports>,
    /// All that the process holds, the control channel aside.
    pub descriptors: Vec<RawFd>,
}

impl Core {
    /// Builds it.
    ///
    /// # Errors
    /// What is wrong with the start message, what KVM or a device process refused, or what is unfit in kernel, initial RAM
    /// file system or command line.
    pub(super) fn assemble(start: CoreStart, mut descriptors: Descriptors) -> Result<Self, CoreError> {
        let kvm = descriptors.take(start.kvm)?;
        let Resources { image, initrd, variables, roms, devices, files } =
            Resources::take(&start, descriptors)?;
        let ram = GuestRam::create(start.memory_bytes)?;
        if !start.huge_pages {
            ram.refuse_huge_pages();
        }
        let reports = Arc::new(Reports::new().map_err(CoreError::system("eventfd2"))?);
        let mut firmware = match start.boot {
            Boot::Kernel { .. } => Vec::new(),
            Boot::Firmware { .. } => vec![load_firmware(&image)?],
        };
        let flash = variables.map(|memory| add_flash(memory, &start, &mut firmware, &reports)).transpose()?;
        let chips = firmware.clone();
        let (platform, vcpus, greeted) =
            side_by_side(kvm, &ram, &start, (firmware, files), devices, &reports)?;
        let Attached { virtio, mut registers, flash: flash_stream } =
            devices::attach(greeted, &platform, &ram, &reports)?;
        if let Some((flash, stream)) = flash.zip(flash_stream) {
            let failed = |source| CoreError::Register { id: flash.remote.id().to_owned(), source };
            flash.remote.start(stream.into()).map_err(failed)?;
            registers.push(flash.remote.clone());
        }
        match start.boot {
            Boot::Kernel { cmdline, smbios, .. } => {
                place(&ram, SMBIOS, &smbios)?;
                let entry = load(&platform.machine, &ram, &cmdline, &image, initrd.as_ref())?;
                vcpus.first().map_or(Ok(()), |boot_processor| boot_processor.enter_at(&entry))?;
                let unpacking =
                    entry.unpacking.filter(|_| start.huge_pages && ram.can_back_with_huge_pages());
                unpacking.map_or(Ok(()), |unpacking| platform.memory.await_unpacking(unpacking))?;
            }
            Boot::Firmware { files, menu, .. } => {
                let files = files.into_iter().chain(roms).map(|file| (file.name, file.contents)).collect();
                platform.machine.serve_firmware(files, menu);
            }
        }
        let mut held: Vec<RawFd> = vec![reports.as_fd().as_raw_fd()];
        held.extend(platform.vm.descriptors().iter().map(AsRawFd::as_raw_fd));
        held.extend(vcpus.iter().map(Vcpu::raw_fd));
        let memories = chips.iter().map(|chip| chip.memory()).chain([&ram]);
        held.extend(memories.flat_map(|memory| memory.regions().map(|region| region.fd.as_raw_fd())));
        held.extend(virtio.values().flat_map(|device| device.descriptors()));
        held.extend(registers.iter().flat_map(|device| device.descriptors()));
        held.push(platform.timer.as_fd().as_raw_fd());
        let virtio = Mutex::new(virtio);
        let vcpus = spawn(vcpus, platform.gate.clone(), start.processors.present, &reports)?;
        Ok(Self { platform, ram, vcpus, virtio, registers, reports, descriptors: held })
    }
}

impl Core {
    /// The virtio devices by slot; held for a look, never while somebody is waited for.
    pub(super) fn virtio(&self) -> MutexGuard<'_, BTreeMap<u8, Arc<VirtioPci>>> {
        self.virtio.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtio device in this slot.
    pub(super) fn virtio_in(&self, slot: u8) -> Option<Arc<VirtioPci>> {
        self.virtio().get(&slot).cloned()
    }

    /// The virtio device of this name.
    pub(super) fn virtio_named(&self, id: &str) -> Option<Arc<VirtioPci>> {
        self.virtio().values().find(|device| device.id() == id).cloned()
    }

    /// The register device of this name.
    pub(super) fn registers(&self, id: &str) -> Option<&dyn RemoteDevice> {
        self.registers.iter().find(|device| device.id() == id).map(|device| &**device)
    }
}

/// Puts the chip with firmware's variables below the ROM.
fn add_flash(
    memory: OwnedFd,
    start: &CoreStart,
    firmware: &mut Vec<Arc<dyn MemoryChip>>,
    reports: &Arc<Reports>,
) -> Result<Arc<Flash>, CoreError> {
    let id = start.devices.iter().find(|link| link.kind == LinkKind::Flash).map_or("", |link| &link.id);
    let size = File::from(memory.try_clone().map_err(CoreError::system("dup"))?).metadata();
    let size = size.map_err(CoreError::system("fstat"))?.len();
    let rom = firmware.iter().flat_map(|chip| chip.memory().regions().map(|region| region.guest_address));
    let address = rom.min().unwrap_or(0).saturating_sub(size);
    let region = SharedRegion { guest_address: address, size, offset: 0, fd: memory };
    let flash = Arc::new(Flash::new(id, address, GuestRam::attach(vec![region])?, reports.clone()));
    firmware.insert(0, flash.clone());
    Ok(flash)
}

/// Creates the machine without devices, and opens the sessions with the device processes meanwhile.
fn side_by_side(
    kvm: OwnedFd,
    ram: &GuestRam,
    start: &CoreStart,
    memory: (Vec<Arc<dyn MemoryChip>>, Vec<Arc<MappedFile>>),
    lines: Vec<Line>,
    reports: &Arc<Reports>,
) -> Result<(Platform, Vec<Vcpu>, Vec<Greeted>), CoreError> {
    thread::scope(|scope| {
        let greeter = thread::Builder::new()
            .name("greeter".to_owned())
            .stack_size(GREETER_STACK)
            .spawn_scoped(scope, || devices::greet(lines, reports))
            .map_err(CoreError::system("clone3"))?;
        let platform = Platform::create(kvm, ram, start, memory, reports);
        // A panic ends the process, so there is none to pass on.
        let greeted = greeter.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (platform, vcpus) = platform?;
        Ok((platform, vcpus, greeted?))
    })
}

/// What the start message brought, descriptors in place of their indices.
struct Resources {
    /// Kernel or firmware.
    image: File,
    initrd: Option<File>,
    /// The memory of firmware's variables.
    variables: Option<OwnedFd>,
    /// Option ROMs as firmware's files.
    roms: Vec<FirmwareFile>,
    devices: Vec<Line>,
    files: Vec<Arc<MappedFile>>,
}

impl Resources {
    fn take(start: &CoreStart, mut descriptors: Descriptors) -> Result<Self, CoreError> {
        let (image, initrd, variables, roms) = match &start.boot {
            Boot::Kernel { kernel, initrd, .. } => (*kernel, *initrd, None, &[][..]),
            Boot::Firmware { image, variables, roms, .. } => (*image, None, *variables, &roms[..]),
        };
        let roms = roms.iter().map(|(name, rom)| {
            let memory = devices::map_rom(descriptors.take(*rom)?)?;
            let mut contents = vec![0; usize::try_from(memory.size()).unwrap_or(0)];
            memory.view(0, memory.size(), Direction::Read)?.read_bytes(0, &mut contents)?;
            Ok::<_, CoreError>(FirmwareFile { name: name.clone(), contents })
        });
        let roms = roms.collect::<Result<_, _>>()?;
        let variables = variables.map(|memory| descriptors.take(memory)).transpose()?;
        let image = descriptors.take(image)?.into();
        let initrd = initrd.map(|initrd| descriptors.take(initrd)).transpose()?.map(File::from);
        let mut devices = Vec::with_capacity(start.devices.len());
        for link in &start.devices {
            devices.push(Line::take(link, &mut descriptors)?);
        }
        let files = start.mapped.iter().map(|mapped| {
            let MappedRegion { address: guest_address, size, writable, .. } = *mapped;
            let fd = descriptors.take(mapped.file)?;
            let region = SharedRegion { guest_address, size, offset: 0, fd };
            Ok::<_, CoreError>(Arc::new(MappedFile::new(region, writable)?))
        });
        let files = files.collect::<Result<_, _>>()?;
        descriptors.finish()?;
        Ok(Self { image, initrd, variables, roms, devices, files })
    }
}

/// Places tables and kernel in RAM; answers how the kernel is entered.
fn load(
    machine: &Machine,
    ram: &GuestRam,
    command_line: &str,
    kernel: &File,
    initrd: Option<&File>,
) -> Result<Entry, CoreError> {
    machine.assign_resources();
    let tables = machine.acpi_tables();
    let room = SMBIOS.saturating_sub(tables.address);
    if tables.blob.len() as u64 > room {
        return Err(BuildError::Tables(room).into());
    }
    place(ram, tables.address, &tables.blob)?;
    let reserved = &[(tables.address, BIOS_START.saturating_sub(tables.address))];
    let source = BootSource { kernel, initrd, command_line, rsdp: Some(tables.rsdp), reserved };
    Ok(load_kernel(ram, &source)?)
}

fn place(ram: &GuestRam, address: u64, bytes: &[u8]) -> Result<(), CoreError> {
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    Ok(ram.view(address, length, Direction::Write)?.write_bytes(0, bytes)?)
}

fn spawn(
    vcpus: Vec<Vcpu>,
    gate: Arc<Gate>,
    present: u16,
    reports: &Arc<Reports>,
) -> Result<VcpuThreads, CoreError> {
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
    Ok(VcpuThreads::spawn(vcpus, gate, present.into(), prepare, on_stop)?)
}
