//! The device processes: opening a session with each, and giving each device its place on the buses.
//!
//! Two steps, because the first needs nothing of the virtual machine and spends its time waiting: it runs on a thread of
//! its own while KVM builds the machine.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_ipc::channel::message::{DeviceLink, LinkKind};
use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vfio_user::ClientError;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::CoreError;
use super::platform::Platform;
use super::register_device::{RegisterDevice, RegisterDeviceConfig};
use super::reports::Reports;
use crate::kvm::FunctionMessages;
use crate::virtio::{Backend, DeviceType, Settings, VirtioPci};

/// The first slot that the chipset leaves to other functions.
const FIRST_SLOT: u8 = 2;

/// A device whose process has answered.
pub(super) enum Greeted {
    Virtio(Settings, Backend),
    /// Which is spoken to when it has its place.
    Flash(UnixStream),
    /// With its ISA interrupt and a duplicate of the eventfd that raises it.
    Registers(RegisterDevice, u8, OwnedFd),
}

/// Opens the sessions with all device processes, one after the other: the last one has been starting meanwhile.
pub(super) fn greet(
    links: Vec<(DeviceLink, UnixStream)>,
    reports: &Arc<Reports>,
) -> Result<Vec<Greeted>, CoreError> {
    let greet = |(link, stream): (DeviceLink, UnixStream)| match link.kind {
        LinkKind::VirtioVhostUser { virtio_id } => greet_virtio(&link.id, virtio_id, stream),
        LinkKind::Registers => greet_registers(&link.id, stream, reports),
        LinkKind::Flash => Ok(Greeted::Flash(stream)),
    };
    links.into_iter().map(greet).collect()
}

fn greet_virtio(id: &str, virtio_id: u16, stream: UnixStream) -> Result<Greeted, CoreError> {
    // The supervisor replaces the process, or says that it will not.
    let settings = Settings { hold_on_failure: true, ..Settings::new(id, DeviceType::from_id(virtio_id)) };
    match Backend::open(&settings, stream) {
        Ok(backend) => Ok(Greeted::Virtio(settings, backend)),
        Err(source) => Err(CoreError::Virtio { id: id.to_owned(), source }),
    }
}

fn greet_registers(id: &str, stream: UnixStream, reports: &Arc<Reports>) -> Result<Greeted, CoreError> {
    let config = RegisterDeviceConfig::com1(id);
    let irq = config.irq;
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let interrupt = EventFd::from_flags(flags).map_err(CoreError::system("eventfd2"))?;
    let duplicate = interrupt.as_fd().try_clone_to_owned().map_err(CoreError::system("dup"))?;
    let (reports, device_id) = (reports.clone(), id.to_owned());
    let on_failure =
        Box::new(move |error: &ClientError| reports.device_failed(&device_id, error.to_string()));
    let device = RegisterDevice::connect(config, stream.into(), interrupt.into(), on_failure)
        .map_err(|source| CoreError::Register { id: id.to_owned(), source })?;
    Ok(Greeted::Registers(device, irq, duplicate))
}

/// The devices in their places.
#[derive(Default)]
pub(super) struct Attached {
    pub virtio: Vec<Arc<VirtioPci>>,
    pub registers: Vec<Arc<RegisterDevice>>,
    pub flash: Option<UnixStream>,
}

/// Gives the devices their places: virtio functions take the slots in the order of the list.
pub(super) fn attach(
    devices: Vec<Greeted>,
    platform: &Platform,
    ram: &GuestRam,
    reports: &Arc<Reports>,
) -> Result<Attached, CoreError> {
    let mut attached = Attached::default();
    let mut slot = FIRST_SLOT;
    for device in devices {
        match device {
            Greeted::Virtio(settings, backend) => {
                let device = attach_virtio(slot, settings, backend, platform, ram, reports)?;
                attached.virtio.push(device);
                slot = slot.saturating_add(1);
            }
            Greeted::Registers(device, irq, interrupt) => {
                // What the device signalled before is in the eventfd, and KVM looks at it now.
                platform.interrupts.connect_line(interrupt.as_fd(), irq)?;
                let device = Arc::new(device);
                platform.machine.attach_isa(device.clone())?;
                attached.registers.push(device);
            }
            Greeted::Flash(stream) => attached.flash = Some(stream),
        }
    }
    Ok(attached)
}

fn attach_virtio(
    slot: u8,
    settings: Settings,
    backend: Backend,
    platform: &Platform,
    ram: &GuestRam,
    reports: &Arc<Reports>,
) -> Result<Arc<VirtioPci>, CoreError> {
    let id = settings.id.clone();
    let messages = Arc::new(FunctionMessages::new(platform.interrupts.clone()));
    let device = VirtioPci::new(settings, backend, ram.clone(), messages, reports.clone())
        .map_err(|source| CoreError::Virtio { id, source })?;
    platform.doorbells.register(slot, device.clone());
    let pin = platform.machine.attach_pci(slot, device.clone())?;
    device.connect_pin(Arc::new(pin));
    Ok(device)
}
