//! The one thread of a UART process.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{FromDevice, Progress, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::{Connection, Served};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::UartError;
use super::device::UartDevice;
use crate::stream::End;

const CORE: u64 = 0;
const CONTROL: u64 = 1;
const LINE: u64 = 2;

/// Four character times at 115200 bit/s are 0.35 ms; this is the least that epoll can wait.
const CHARACTER_TIMEOUT: Duration = Duration::from_millis(1);

/// How long the last output may take when the process stops.
const FINAL_FLUSH: Duration = Duration::from_millis(500);

/// What a turn of the loop came to.
#[derive(PartialEq, Eq)]
enum Turn {
    GoOn,
    Stop,
}

/// Core, supervisor and line of one UART.
#[derive(Debug)]
pub struct EventLoop<'a> {
    epoll: Epoll,
    connection: Connection,
    device: UartDevice,
    channel: &'a Channel,
    timeout_at: Option<Instant>,
}

impl<'a> EventLoop<'a> {
    /// Registers the core's stream and the control channel.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(connection: Connection, device: UartDevice, channel: &'a Channel) -> Result<Self, UartError> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(UartError::system("epoll_create1"))?;
        let events = [(connection.as_fd(), CORE), (channel.as_fd(), CONTROL)];
        for (fd, token) in events {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
                .map_err(UartError::system("epoll_ctl"))?;
        }
        Ok(Self { epoll, connection, device, channel, timeout_at: None })
    }

    /// Asks the scheduler not to interrupt the vCPU for each posted write where both share a CPU (SCHED_BATCH, sched(7)): the
    /// characters of a burst then come in few wake-ups. A core that waits for an answer sleeps, so that it loses nothing.
    /// Call it before the process is sealed. A refusal costs speed only.
    pub fn prefer_batches(&self) {
        if let Err(error) = super::schedule::batch() {
            tracing::debug!(%error, "SCHED_BATCH is refused");
        }
    }

    /// Every descriptor that the process holds beyond standard input, output and error.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let fixed = [self.epoll.0.as_fd(), self.connection.as_fd(), self.channel.as_fd()];
        fixed.into_iter().chain(self.device.descriptors()).collect()
    }

    /// Serves until the core or the supervisor ends it.
    ///
    /// # Errors
    /// The core breaks the register protocol or a system call fails.
    pub fn run(mut self) -> Result<(), UartError> {
        let mut events = [EpollEvent::empty(); 4];
        self.move_characters(true);
        let result = loop {
            let timeout = self.timeout();
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => break Err(UartError::System { call: "epoll_wait", error }),
            };
            let ready = events.get(..count).unwrap_or_default();
            match self.turn(ready) {
                Ok(Turn::GoOn) => {}
                Ok(Turn::Stop) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // What the guest has read is not to come again.
        self.device.settle_received();
        // The reader has a moment to take what the guest said last.
        self.device.line.finish(FINAL_FLUSH);
        self.device.pump();
        self.device.line.flush();
        // What was not read in time the core has, too, and sends to a successor.
        self.device.publish_delivered();
        result
    }

    fn turn(&mut self, ready: &[EpollEvent]) -> Result<Turn, UartError> {
        let mut woken = false;
        for event in ready {
            let turn = match event.data() {
                CORE => match self.connection.serve(&mut self.device)? {
                    Served::Open => Turn::GoOn,
                    Served::Closed => Turn::Stop,
                },
                CONTROL => self.control()?,
                _ => {
                    woken = true;
                    Turn::GoOn
                }
            };
            if turn == Turn::Stop {
                return Ok(Turn::Stop);
            }
        }
        self.expire();
        self.move_characters(woken);
        Ok(Turn::GoOn)
    }

    /// Moves characters both ways as far as they go. `woken`: the line was reported.
    fn move_characters(&mut self, woken: bool) {
        self.device.settle_received();
        self.fetch(woken);
        self.device.line.flush();
        self.device.pump();
        self.device.line.flush();
        self.device.publish_delivered();
        self.device.line.watch(&self.epoll, |flags| EpollEvent::new(flags, LINE));
    }

    fn control(&mut self) -> Result<Turn, UartError> {
        let (message, mut descriptors) = match self.channel.recv::<ToDevice>(Some(Duration::ZERO)) {
            Ok(received) => received,
            Err(ChannelError::Deadline) => return Ok(Turn::GoOn),
            Err(ChannelError::PeerClosed) => return Ok(Turn::Stop),
            Err(error) => return Err(error.into()),
        };
        match message {
            ToDevice::Attach => {
                if let (Some(peer), true) = (descriptors.pop(), descriptors.is_empty()) {
                    self.device.line.attach(End::new(peer));
                } else {
                    tracing::warn!("Attach without exactly one descriptor is ignored");
                }
            }
            ToDevice::Ping => self.channel.send(&FromDevice::Alive(Progress::Fine), &[])?,
            ToDevice::Stop => return Ok(Turn::Stop),
            ToDevice::Resize { .. }
            | ToDevice::AttachWay(_)
            | ToDevice::Keys { .. }
            | ToDevice::Link { .. }
            | ToDevice::DiskSize { .. } => {}
            message @ (ToDevice::Start(_)
            | ToDevice::Take(_)
            | ToDevice::Balloon { .. }
            | ToDevice::AttachPort(_)) => {
                tracing::warn!(?message, "a control message that this device does not know");
            }
        }
        Ok(Turn::GoOn)
    }

    /// Takes what the receiver has room for: at once when the line was reported, otherwise only when the receiver is at
    /// most half full, not again for each character that the guest takes.
    fn fetch(&mut self, mut woken: bool) {
        if woken {
            self.device.line.woken();
        }
        while woken || self.device.receive_low() {
            woken = false;
            if !self.device.fetch() {
                return;
            }
        }
    }

    /// How long to wait: until the reader counts as stuck or the character timeout.
    fn timeout(&mut self) -> EpollTimeout {
        if !self.device.timeout_armed() {
            self.timeout_at = None;
        } else if self.timeout_at.is_none() {
            self.timeout_at = Instant::now().checked_add(CHARACTER_TIMEOUT);
        }
        let next = [self.timeout_at, self.device.line.deadline()].into_iter().flatten().min();
        match next {
            None => EpollTimeout::NONE,
            Some(next) => {
                // Rounded up, so that the last fraction of a millisecond is not a busy loop.
                let left = next.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
                EpollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX))
            }
        }
    }

    fn expire(&mut self) {
        if self.timeout_at.is_none() && self.device.line.deadline().is_none() {
            return;
        }
        let now = Instant::now();
        if self.timeout_at.is_some_and(|at| now >= at) {
            self.timeout_at = None;
            self.device.character_timeout();
        }
        self.device.line.expire(now);
    }
}

#[cfg(test)]
#[path = "event_loop_tests.rs"]
mod tests;
