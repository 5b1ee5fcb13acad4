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
    /// The thread that waits for device processes adds those of devices that come, and removes those that go.
    epoll: Arc<Epoll>,
    /// To that thread.
    jobs: Sender<Job>,
}

impl EventLoop {
    /// Registers everything that the loop waits for, and starts the thread that waits for device processes.
    pub(super) fn new(channel: &Channel, core: &Arc<Core>) -> Result<Self, CoreError> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(CoreError::system("epoll_create1"))?;
        let own = [
            (channel.as_fd(), CONTROL),
            (core.reports.as_fd(), REPORTS),
            (core.platform.timer.as_fd(), TIMER),
        ];
        for (fd, token) in own {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            epoll.add(fd, event).map_err(CoreError::system("epoll_ctl"))?;
        }
        for (slot, device) in &*core.virtio() {
            watch(&epoll, *slot, device.as_fd())?;
        }
        let epoll = Arc::new(epoll);
        let jobs = device_thread::start(core, &epoll)?;
        Ok(Self { epoll, jobs })
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
                    CONTROL => self.control(channel, core)?,
                    REPORTS => {
                        core.reports.acknowledge();
                        while let Some(ejected) = core.reports.next_ejected() {
                            self.ejected(core, ejected);
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
                        if core.virtio_in(slot).is_some_and(|device| device.on_event()) {
                            self.leave(Job::Request(slot));
                        }
                    }
                }
            }
        }
    }

    fn control(&self, channel: &Channel, core: &Core) -> Result<(), CoreError> {
        match channel.recv(Some(Duration::ZERO)) {
            Ok((ToCore::Stop, _)) => core.platform.machine.press_power_button(),
            Ok((ToCore::Pause, _)) => core.vcpus.pause(),
            Ok((ToCore::Resume, _)) => core.vcpus.resume(),
            Ok((ToCore::DeviceReplaced { id, socket }, descriptors)) => {
                self.leave(Job::Replace(id, Descriptors::from(descriptors).take(socket)?));
            }
            Ok((ToCore::DeviceGivenUp { id }, _)) => self.leave(Job::GiveUp(id)),
            Ok((ToCore::DeviceAdd(link), descriptors)) => {
                self.leave(Job::Add(Line::take(&link, &mut Descriptors::from(descriptors))?));
            }
            Ok((ToCore::DeviceRemove { id, force }, _)) => self.leave(Job::Remove { id, force }),
            Ok((ToCore::Cpus { indices, insert: true }, _)) => indices.into_iter().for_each(|index| {
                core.vcpus.set_online(index.into(), true);
                core.platform.machine.insert_cpu(index);
            }),
            Ok((ToCore::Cpus { indices, insert: false }, _)) => indices.into_iter().for_each(|index| {
                core.platform.machine.request_cpu_removal(index);
            }),
            Ok((ToCore::Ping, _)) => channel.send_within(&FromCore::Alive, &[], SEND_DEADLINE)?,
            Ok((ToCore::Start(_), _)) => tracing::warn!("a second start message"),
            Err(ChannelError::Deadline) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn ejected(&self, core: &Core, what: Ejected) {
        match what {
            Ejected::Slot(slot) => self.leave(Job::Release(slot)),
            Ejected::Cpu(index) => {
                core.vcpus.set_online(index.into(), false);
                core.reports.tell(FromCore::CpuRemoved { index });
            }
        }
    }

    /// The thread that does the jobs never ends: each send succeeds.
    fn leave(&self, job: Job) {
        let _ = self.jobs.send(job);
    }
}

/// Watches the descriptor of the device in a slot.
pub(super) fn watch(epoll: &Epoll, slot: u8, fd: BorrowedFd<'_>) -> Result<(), CoreError> {
    let event = EpollEvent::new(EpollFlags::EPOLLIN, DEVICES.saturating_add(slot.into()));
    epoll.add(fd, event).map_err(CoreError::system("epoll_ctl"))
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

impl AsFd for EventLoop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
