//! The core's main thread: control messages, the machine's end, and what device processes signal outside their data path.
//! Where it would have to wait for one of them, it leaves the work to the [`device_thread`].
//!
//! While a machine is at work this thread sleeps: notifications and interrupts pass it by (ioeventfd, irqfd).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use bulkhead_ipc::channel::message::{Descriptors, FromCore, MachineEnd, ToCore};
use bulkhead_ipc::channel::{Channel, ChannelError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::assembly::Core;
use super::device_thread::{self, Job};
use super::{CoreError, SEND_DEADLINE};

/// Tokens of the loop's own descriptors; device `n` has `DEVICES + n`.
const CONTROL: u64 = 0;
const REPORTS: u64 = 1;
const TIMER: u64 = 2;
const DEVICES: u64 = 3;
/// Events taken from the kernel at once.
const BATCH: usize = 16;

/// What the main thread waits for. Made before the process is sealed.
pub(super) struct EventLoop {
    epoll: Epoll,
    /// To the thread that waits where this one must not.
    jobs: Sender<Job>,
}

impl EventLoop {
    /// Registers everything that the loop waits for, and starts the thread that waits for device processes.
    pub(super) fn new(channel: &Channel, core: &Arc<Core>) -> Result<Self, CoreError> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(CoreError::system("epoll_create1"))?;
        let add = |fd, token| {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token)).map_err(CoreError::system("epoll_ctl"))
        };
        add(channel.as_fd(), CONTROL)?;
        add(core.reports.as_fd(), REPORTS)?;
        add(core.timer.as_fd(), TIMER)?;
        for (token, device) in (DEVICES..).zip(&core.virtio) {
            add(device.as_fd(), token)?;
        }
        Ok(Self { epoll, jobs: device_thread::start(core)? })
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
                    CONTROL => control(channel, core, &self.jobs)?,
                    REPORTS => {
                        if let Some(end) = send_reports(channel, core)? {
                            // A machine that is off executes nothing more.
                            core.vcpus.pause();
                            return Ok(end);
                        }
                    }
                    TIMER => {
                        // Taken back first; it is empty when a vCPU has armed the timer anew meanwhile.
                        let _ = nix::unistd::read(core.timer.as_fd(), &mut [0; 8]);
                        core.machine.timer_expired();
                    }
                    token => {
                        let index = usize::try_from(token.saturating_sub(DEVICES)).unwrap_or(usize::MAX);
                        if core.virtio.get(index).is_some_and(|device| device.on_event()) {
                            let _ = self.jobs.send(Job::Request(index));
                        }
                    }
                }
            }
        }
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

/// The thread that does the jobs never ends: each send succeeds.
fn control(channel: &Channel, core: &Core, jobs: &Sender<Job>) -> Result<(), CoreError> {
    match channel.recv(Some(Duration::ZERO)) {
        Ok((ToCore::Stop, _)) => core.machine.press_power_button(),
        Ok((ToCore::DeviceReplaced { id, socket }, descriptors)) => {
            let socket = Descriptors::from(descriptors).take(socket)?;
            let _ = jobs.send(Job::Replace(id, socket));
        }
        Ok((ToCore::DeviceGivenUp { id }, _)) => {
            let _ = jobs.send(Job::GiveUp(id));
        }
        Ok((ToCore::Ping, _)) => channel.send_within(&FromCore::Alive, &[], SEND_DEADLINE)?,
        Ok((ToCore::Start(_), _)) => tracing::warn!("a second start message"),
        Err(ChannelError::Deadline) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

impl AsFd for EventLoop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
