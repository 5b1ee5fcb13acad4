//! The core's main thread: control messages, the machine's end, and what device processes say outside their data path.
//!
//! While a machine is at work this thread sleeps: notifications and interrupts pass it by (ioeventfd, irqfd).

use bulkhead_ipc::channel::message::{FromCore, MachineEnd, ToCore};
use bulkhead_ipc::channel::{Channel, ChannelError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::os::fd::AsFd;

use super::CoreError;
use super::assembly::Core;

/// Tokens of the loop's own descriptors; device `n` has `DEVICES + n`.
const CONTROL: u64 = 0;
const END: u64 = 1;
const DEVICES: u64 = 2;
/// Events taken from the kernel at once.
const BATCH: usize = 16;

/// What the main thread waits for. Made before the process is sealed.
pub(super) struct EventLoop {
    epoll: Epoll,
}

impl EventLoop {
    /// Registers everything that the loop waits for.
    pub(super) fn new(channel: &Channel, core: &Core) -> Result<Self, CoreError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(CoreError::system("epoll_create1"))?;
        let add = |fd, token| {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token)).map_err(CoreError::system("epoll_ctl"))
        };
        add(channel.as_fd(), CONTROL)?;
        add(core.end.as_fd(), END)?;
        for (token, device) in (DEVICES..).zip(&core.virtio) {
            add(device.as_fd(), token)?;
        }
        Ok(Self { epoll })
    }

    /// Serves until the machine ends or the supervisor is gone.
    pub(super) fn run(&self, channel: &Channel, core: &Core) -> Result<MachineEnd, CoreError> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(CoreError::system("epoll_wait"))?,
            };
            for event in events.iter().take(count) {
                match event.data() {
                    CONTROL => control(channel, core)?,
                    END => {
                        if let Some(reason) = core.end.reason() {
                            return Ok(reason.clone());
                        }
                    }
                    token => device_event(channel, core, token - DEVICES),
                }
            }
        }
    }
}

fn control(channel: &Channel, core: &Core) -> Result<(), CoreError> {
    match channel.recv(Some(std::time::Duration::ZERO)) {
        Ok((ToCore::Stop, _)) => core.machine.press_power_button(),
        Ok((ToCore::Pause, _)) => core.vcpus.pause(),
        Ok((ToCore::Resume, _)) => core.vcpus.resume(),
        Ok((message @ (ToCore::Start(_) | ToCore::DeviceReplaced { .. }), _)) => {
            tracing::warn!(?message, "control message out of place");
        }
        Err(ChannelError::Deadline) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
