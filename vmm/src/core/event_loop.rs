//! The core's main thread: control messages, successors of device processes, the machine's end, and what device processes
//! say outside their data path.
//!
//! While a machine is at work this thread sleeps: notifications and interrupts pass it by (ioeventfd, irqfd).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, FromCore, MachineEnd, ToCore};
use bulkhead_ipc::channel::{Channel, ChannelError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::assembly::Core;
use super::devices::Line;
use super::reports::Ejected;
use super::{CoreError, SEND_DEADLINE};

/// Tokens of the loop's own descriptors; the device in slot `n` has `DEVICES + n`.
const CONTROL: u64 = 0;
const REPORTS: u64 = 1;
const TIMER: u64 = 2;
const DEVICES: u64 = 3;
/// Events taken from the kernel at once.
const BATCH: usize = 16;

/// What the main thread waits for. Made before the process is sealed.
pub(super) struct EventLoop {
    epoll: Epoll,
}

impl EventLoop {
    /// Registers everything that the loop waits for.
    pub(super) fn new(channel: &Channel, core: &Core) -> Result<Self, CoreError> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(CoreError::system("epoll_create1"))?;
        let this = Self { epoll };
        this.add(channel.as_fd(), CONTROL)?;
        this.add(core.reports.as_fd(), REPORTS)?;
        this.add(core.platform.timer.as_fd(), TIMER)?;
        for (slot, device) in &core.virtio {
            this.add(device.as_fd(), token(*slot))?;
        }
        Ok(this)
    }

    fn add(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), CoreError> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        self.epoll.add(fd, event).map_err(CoreError::system("epoll_ctl"))
    }

    /// Serves until the machine ends or the supervisor is gone.
    pub(super) fn run(&self, channel: &Channel, core: &mut Core) -> Result<MachineEnd, CoreError> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(CoreError::system("epoll_wait"))?,
            };
            for event in events.iter().take(count) {
                match event.data() {
                    CONTROL => self.control(channel, core)?,
                    REPORTS => {
                        core.reports.acknowledge();
                        while let Some(ejected) = core.reports.next_ejected() {
                            match ejected {
                                Ejected::Slot(slot) => self.removed(core, slot),
                                Ejected::Cpu(index) => {
                                    core.vcpus.set_online(index.into(), false);
                                    core.reports.tell(FromCore::CpuRemoved { index });
                                }
                            }
                        }
                        if let Some(end) = send_reports(channel, core)? {
                            // A machine that is off executes nothing more.
                            core.vcpus.pause();
                            return Ok(end);
                        }
                    }
                    TIMER => {
                        // Taken back first; it is empty when a vCPU has armed the timer anew meanwhile.
                        let _ = nix::unistd::read(core.platform.timer.as_fd(), &mut [0; 8]);
                        core.platform.machine.timer_expired();
                    }
                    token => {
                        let slot = u8::try_from(token.saturating_sub(DEVICES)).unwrap_or(u8::MAX);
                        if let Some(device) = core.virtio.get(&slot) {
                            device.on_event();
                        }
                    }
                }
            }
        }
    }
}

impl EventLoop {
    fn control(&self, channel: &Channel, core: &mut Core) -> Result<(), CoreError> {
        match channel.recv(Some(Duration::ZERO)) {
            Ok((ToCore::Stop, _)) => core.platform.machine.press_power_button(),
            Ok((ToCore::DeviceReplaced { id, socket }, descriptors)) => {
                let socket = Descriptors::from(descriptors).take(socket)?;
                device_replaced(core, &id, socket);
            }
            Ok((ToCore::DeviceGivenUp { id }, _)) => {
                core.virtio(&id).inspect(|device| {
                    device.disconnect_backend();
                    device.give_up();
                });
                core.registers(&id).inspect(|device| device.give_up());
                core.flash(&id).inspect(|flash| flash.give_up());
            }
            Ok((ToCore::DeviceAdd(link), descriptors)) => {
                let line = Line::take(&link, &mut Descriptors::from(descriptors))?;
                let added = core.add_device(line).and_then(|slot| {
                    let device = core.virtio.get(&slot);
                    let watched = device.map_or(Ok(()), |device| self.add(device.as_fd(), token(slot)));
                    watched.inspect_err(|_| drop(core.pull_out(slot)))
                });
                core.reports.tell(answer(link.id, added));
            }
            Ok((ToCore::DeviceRemove { id, force }, _)) => match core.remove_device(&id, force) {
                Ok(Some(slot)) => self.removed(core, slot),
                Ok(None) => {}
                Err(error) => core.reports.tell(answer(id, Err(error))),
            },
            Ok((ToCore::Cpu { index, insert: true }, _)) => {
                core.vcpus.set_online(index.into(), true);
                core.platform.machine.insert_cpu(index);
            }
            Ok((ToCore::Cpu { index, insert: false }, _)) => {
                core.platform.machine.request_cpu_removal(index);
            }
            Ok((ToCore::Ping, _)) => channel.send_within(&FromCore::Alive, &[], SEND_DEADLINE)?,
            Ok((ToCore::Start(_), _)) => tracing::warn!("a second start message"),
            Err(ChannelError::Deadline) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// A slot is empty: nothing of what was in it stays.
    fn removed(&self, core: &mut Core, slot: u8) {
        if let Some(device) = core.release_slot(slot) {
            let _ = self.epoll.delete(device.as_fd());
            core.reports.tell(FromCore::DeviceRemoved { id: device.id().to_owned() });
        }
    }
}

/// The token of the device in a slot.
fn token(slot: u8) -> u64 {
    DEVICES.saturating_add(slot.into())
}

/// What the supervisor hears of a device that it wants to add or remove.
fn answer(id: String, result: Result<(), CoreError>) -> FromCore {
    match result {
        Ok(()) => FromCore::DeviceAdded { id },
        Err(error) => FromCore::DeviceRefused { id, reason: super::chain(&error) },
    }
}

/// Sends what waits; the machine's end is left to the caller.
fn send_reports(channel: &Channel, core: &Core) -> Result<Option<MachineEnd>, CoreError> {
    while let Some(report) = core.reports.next() {
        match report {
            FromCore::Ended(end) => return Ok(Some(end)),
            report => channel.send_within(&report, &[], SEND_DEADLINE)?,
        }
    }
    Ok(None)
}

/// Connects a device to the successor of its process. It is READY, so that this takes little time, and deadlines bound it.
fn device_replaced(core: &Core, id: &str, socket: OwnedFd) {
    let (virtio, registers, flash) = (core.virtio(id), core.registers(id), core.flash(id));
    // First the predecessor's connection is closed: what fails from here on is the successor's failure.
    virtio.inspect(|device| device.disconnect_backend());
    registers.inspect(|device| device.disconnect());
    flash.inspect(|flash| flash.disconnect());
    core.reports.tell(FromCore::DeviceReplaced { id: id.to_owned() });
    let result = match (virtio, registers, flash) {
        (Some(device), ..) => device.replace_backend(socket.into()).map_err(|error| error.to_string()),
        (_, Some(device), _) => device.replace(socket).map_err(|error| error.to_string()),
        (_, _, Some(flash)) => flash.replace(socket).map_err(|error| error.to_string()),
        // It has just been removed, and the supervisor is about to hear of it.
        (None, None, None) => Ok(()),
    };
    if let Err(reason) = result {
        core.reports.device_failed(id, reason);
    }
}

impl AsFd for EventLoop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
