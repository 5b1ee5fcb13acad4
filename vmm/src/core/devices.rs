//! The device processes: opening a session with each, and giving each device its place on the buses.
//!
//! Two steps at the start, because the first needs nothing of the virtual machine and spends its time waiting: it runs on a thread of
//! its own while KVM builds the machine.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, DeviceLink, LinkKind};
use bulkhead_ipc::memory::{GuestRam, SharedRegion};
use bulkhead_ipc::vfio_user::ClientError;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::fstat;

use super::CoreError;
use super::assembly::Core;
use super::keyboard::Keyboard;
use super::platform::Platform;
use super::register_device::{RegisterDevice, RegisterDeviceConfig, RemoteDevice};
use super::remote::Remote;
use super::reports::Reports;
use super::watchdog::{self, Watchdog};
use crate::kvm::FunctionMessages;
use crate::machine::{BuildError, IsaDevice};
use crate::virtio::{Backend, DeviceType, Settings, VirtioPci};

/// How long a device process that is ready may take to open its session: others' successors wait meanwhile.
const HOT_PLUG_LIMIT: Duration = Duration::from_secs(1);

/// A device whose process has answered.
pub(super) enum Greeted {
    /// With its slot.
    Virtio(u8, Settings, Box<Backend>),
    /// Which is spoken to when it has its place.
    Flash(UnixStream),
    /// What answers on the bus, and the way to its process; with a duplicate of the eventfd that raises its interrupt.
    Registers(Arc<dyn IsaDevice>, Arc<dyn RemoteDevice>, OwnedFd),
    /// With its slot, the way to its process, and the eventfd that is to be an NMI.
    Watchdog(u8, Arc<Remote<u8>>, Option<OwnedFd>),
}

/// What leads to a device process, descriptors in place of their indices.
pub(super) struct Line {
    link: DeviceLink,
    stream: UnixStream,
    /// What its function has as expansion ROM.
    rom: Option<GuestRam>,
}

impl Line {
    /// The name of the device.
    pub(super) fn id(&self) -> &str {
        &self.link.id
    }

    /// Takes what `link` names.
    ///
    /// # Errors
    /// A descriptor is missing, or a ROM is none.
    pub(super) fn take(link: &DeviceLink, descriptors: &mut Descriptors) -> Result<Self, CoreError> {
        let stream = descriptors.take(link.socket)?.into();
        let rom = link.rom.map(|rom| map_rom(descriptors.take(rom)?)).transpose()?;
        Ok(Self { link: link.clone(), stream, rom })
    }
}

/// Maps what the supervisor has read from a ROM's file.
pub(super) fn map_rom(fd: OwnedFd) -> Result<GuestRam, CoreError> {
    let size = u64::try_from(fstat(&fd).map_err(CoreError::system("fstat"))?.st_size).unwrap_or(0);
    Ok(GuestRam::attach(vec![SharedRegion { guest_address: 0, size, offset: 0, fd }])?)
}

/// Opens the sessions with all device processes, one after the other: the last one has been starting meanwhile.
pub(super) fn greet(lines: Vec<Line>, reports: &Arc<Reports>) -> Result<Vec<Greeted>, CoreError> {
    lines.into_iter().map(|line| greet_one(line, None, reports)).collect()
}

/// Opens the session with a device process, for which a virtio device has the usual time or that of `limit`.
fn greet_one(line: Line, limit: Option<Duration>, reports: &Arc<Reports>) -> Result<Greeted, CoreError> {
    let Line { link, stream, rom } = line;
    let (kind, slot) = match link.kind {
        LinkKind::VirtioVhostUser { virtio_id, slot } => (DeviceType::from_id(virtio_id), slot),
        LinkKind::Foreign { virtio_id, slot, queues, config_size } => {
            (DeviceType { queues, config_size, multi_queue: true, ..DeviceType::from_id(virtio_id) }, slot)
        }
        LinkKind::Registers | LinkKind::Keyboard | LinkKind::Watchdog { .. } => {
            return greet_registers(&link, stream, reports);
        }
        LinkKind::Flash => return Ok(Greeted::Flash(stream)),
    };
    // The supervisor replaces the process, or says that it will not.
    let mut settings = Settings { hold_on_failure: true, ..Settings::new(&link.id, kind) };
    settings.start_limit = limit.unwrap_or(settings.start_limit);
    settings.rom = rom;
    match Backend::open(&settings, stream) {
        Ok(backend) => Ok(Greeted::Virtio(slot, settings, Box::new(backend))),
        Err(source) => Err(CoreError::Virtio { id: link.id, source }),
    }
}

fn greet_registers(
    link: &DeviceLink,
    stream: UnixStream,
    reports: &Arc<Reports>,
) -> Result<Greeted, CoreError> {
    let id = link.id.as_str();
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let interrupt = EventFd::from_flags(flags).map_err(CoreError::system("eventfd2"))?;
    let duplicate = interrupt.as_fd().try_clone_to_owned().map_err(CoreError::system("dup"))?;
    let failed = |source| CoreError::Register { id: id.to_owned(), source };
    if link.kind != LinkKind::Registers {
        let interrupt = Some(interrupt.into());
        let remote = Remote::new(id, interrupt, reports.clone(), |_, _| Ok(()));
        remote.start(stream.into()).map_err(failed)?;
        let remote = Arc::new(remote);
        return Ok(match link.kind {
            LinkKind::Watchdog { slot, nmi } => Greeted::Watchdog(slot, remote, nmi.then_some(duplicate)),
            _ => {
                let keyboard = Keyboard::new(remote.clone(), reports.clone());
                Greeted::Registers(Arc::new(keyboard), remote, duplicate)
            }
        });
    }
    let config = RegisterDeviceConfig::com1(id);
    let (reports, device_id) = (reports.clone(), id.to_owned());
    let on_failure =
        Box::new(move |error: &ClientError| reports.device_failed(&device_id, error.to_string()));
    let device = RegisterDevice::connect(config, stream.into(), interrupt.into(), on_failure);
    let device = Arc::new(device.map_err(failed)?);
    Ok(Greeted::Registers(device.clone(), device, duplicate))
}

/// The devices in their places.
#[derive(Default)]
pub(super) struct Attached {
    /// By slot.
    pub virtio: BTreeMap<u8, Arc<VirtioPci>>,
    pub registers: Vec<Arc<dyn RemoteDevice>>,
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
                let device = attach_virtio(slot, settings, *backend, platform, ram, reports)?;
                attached.virtio.insert(slot, device);
            }
            Greeted::Registers(device, link, interrupt) => {
                // What the device signalled before is in the eventfd, and KVM looks at it now.
                let irq = device.irq().unwrap_or_default();
                platform.interrupts.connect_line(interrupt.as_fd(), irq)?;
                platform.machine.attach_isa(device)?;
                attached.registers.push(link);
            }
            Greeted::Watchdog(slot, link, nmi) => {
                if let Some(nmi) = nmi {
                    platform.interrupts.connect_forever(nmi.as_fd(), watchdog::NMI)?;
                }
                let function = Watchdog::new(link.clone()).map_err(BuildError::from)?;
                platform.machine.attach_pci(slot, Arc::new(function))?;
                attached.registers.push(link);
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
    pub(super) fn add_device(&self, line: Line) -> Result<(u8, Arc<VirtioPci>), CoreError> {
        let (reports, id) = (self.reports.clone(), line.id().to_owned());
        match greet_one(line, Some(HOT_PLUG_LIMIT), &reports)? {
            Greeted::Virtio(slot, settings, backend) => {
                let device = attach_virtio(slot, settings, *backend, &self.platform, &self.ram, &reports)?;
                self.virtio().insert(slot, device.clone());
                self.platform.machine.announce_pci(slot);
                Ok((slot, device))
            }
            Greeted::Registers(..) | Greeted::Watchdog(..) | Greeted::Flash(_) => {
                Err(CoreError::NotPluggable(id))
            }
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
