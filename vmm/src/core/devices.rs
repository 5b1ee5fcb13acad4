//! The device processes: opening a session with each, and giving each device its place on the buses.
//!
//! Two steps at the start, because the first needs nothing of the virtual machine and spends its time waiting: it runs on a thread of
//! its own while KVM builds the machine.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_ipc::channel::message::{DeviceLink, LinkKind};
use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vfio_user::ClientError;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::CoreError;
use super::assembly::Core;
use super::platform::Platform;
use super::register_device::{RegisterDevice, RegisterDeviceConfig};
use super::reports::Reports;
use crate::kvm::FunctionMessages;
use crate::virtio::{Backend, DeviceType, Settings, VirtioPci};

/// How long a device process that is ready may take to open its session: others' successors wait meanwhile.
const HOT_PLUG_LIMIT: Duration = Duration::from_secs(1);

/// A device whose process has answered.
pub(super) enum Greeted {
    /// With its slot.
    Virtio(u8, Settings, Backend),
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
    links.into_iter().map(|(link, stream)| greet_one(&link, stream, None, reports)).collect()
}

/// Opens the session with a device process, for which a virtio device has the usual time or that of `limit`.
fn greet_one(
    link: &DeviceLink,
    stream: UnixStream,
    limit: Option<Duration>,
    reports: &Arc<Reports>,
) -> Result<Greeted, CoreError> {
    let (virtio_id, slot) = match link.kind {
        LinkKind::VirtioVhostUser { virtio_id, slot } => (virtio_id, slot),
        LinkKind::Registers => return greet_registers(&link.id, stream, reports),
        LinkKind::Flash => return Ok(Greeted::Flash(stream)),
    };
    let kind = DeviceType::from_id(virtio_id);
    // The supervisor replaces the process, or says that it will not.
    let mut settings = Settings { hold_on_failure: true, ..Settings::new(&link.id, kind) };
    settings.start_limit = limit.unwrap_or(settings.start_limit);
    match Backend::open(&settings, stream) {
        Ok(backend) => Ok(Greeted::Virtio(slot, settings, backend)),
        Err(source) => Err(CoreError::Virtio { id: link.id.clone(), source }),
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
    /// By slot.
    pub virtio: BTreeMap<u8, Arc<VirtioPci>>,
    pub registers: Vec<Arc<RegisterDevice>>,
    pub flash: Option<UnixStream>,
}

/// Gives the devices their places.
pub(super) fn attach(
    devices: Vec<Greeted>,
    platform: &Platform,
    ram: &GuestRam,
    reports: &Arc<Reports>,
) -> Result<Attached, CoreError> {
    let mut attached = Attached::default();
    for device in devices {
        match device {
            Greeted::Virtio(slot, settings, backend) => {
                let device = attach_virtio(slot, settings, backend, platform, ram, reports)?;
                attached.virtio.insert(slot, device);
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
    let pin = match platform.machine.attach_pci(slot, device.clone()) {
        Ok(pin) => pin,
        Err(error) => {
            platform.doorbells.forget(slot);
            return Err(error.into());
        }
    };
    device.connect_pin(Arc::new(pin));
    Ok(device)
}

impl Core {
    /// Puts the function of a device process, which is ready, into its slot and tells the guest.
    ///
    /// # Errors
    /// The process does not answer as it must, the slot is taken, or KVM or the kernel refused something: then nothing is left of it.
    pub(super) fn add_device(
        &self,
        link: &DeviceLink,
        stream: UnixStream,
    ) -> Result<(u8, Arc<VirtioPci>), CoreError> {
        let reports = self.reports.clone();
        match greet_one(link, stream, Some(HOT_PLUG_LIMIT), &reports)? {
            Greeted::Virtio(slot, settings, backend) => {
                let device = attach_virtio(slot, settings, backend, &self.platform, &self.ram, &reports)?;
                self.virtio().insert(slot, device.clone());
                self.platform.machine.announce_pci(slot);
                Ok((slot, device))
            }
            Greeted::Registers(..) | Greeted::Flash(_) => Err(CoreError::NotPluggable(link.id.clone())),
        }
    }

    /// Asks the guest to let go of the virtio device of this name or, with `force`, takes it out of its slot and tells the
    /// guest afterwards. Returns the slot that is empty now.
    ///
    /// # Errors
    /// There is no such device.
    pub(super) fn remove_device(&self, id: &str, force: bool) -> Result<Option<u8>, CoreError> {
        let found = self.virtio().iter().find(|(_, device)| device.id() == id).map(|(slot, _)| *slot);
        let slot = found.ok_or_else(|| CoreError::NotPluggable(id.to_owned()))?;
        if !force {
            self.platform.machine.request_eject(slot);
            return Ok(None);
        }
        self.platform.machine.detach_pci(slot)?;
        self.platform.machine.announce_pci(slot);
        Ok(Some(slot))
    }

    /// Takes back the function that was put into a slot a moment ago.
    pub(super) fn pull_out(&self, slot: u8) {
        let _ = self.platform.machine.detach_pci(slot);
        self.release_slot(slot);
    }

    /// Lets go of all that belonged to the function that was in a slot, which the bus has let go of. Returns it: its
    /// descriptors are closed with it.
    pub(super) fn release_slot(&self, slot: u8) -> Option<Arc<VirtioPci>> {
        let device = self.virtio().remove(&slot)?;
        self.platform.doorbells.forget(slot);
        device.disconnect_backend();
        Some(device)
    }
}
