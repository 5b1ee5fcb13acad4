//! The one thread of a UART process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{FromDevice, ToDevice};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::{Connection, Served};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::UartError;
use super::device::UartDevice;
use super::fifo::DEPTH;
use super::output::duplicate;
use super::sink::Sink;

const CORE: u64 = 0;
const CONTROL: u64 = 1;
const INPUT: u64 = 2;
const OUTPUT: u64 = 3;

/// Four character times at 115200 bit/s are 0.35 ms; this is the least that epoll can wait.
const CHARACTER_TIMEOUT: Duration = Duration::from_millis(1);

/// How long the last output may take when the process stops.
const FINAL_FLUSH: Duration = Duration::from_millis(500);

/// Where characters for the guest come from.
#[derive(Debug)]
struct Input {
    fd: OwnedFd,
    /// Waited for now.
    armed: bool,
    /// epoll does not take it: a regular file, which is always readable.
    always_ready: bool,
    /// It is the stream of an attached peer: its end means that the peer is gone, in both directions.
    peer: bool,
}

/// What a turn of the loop came to.
#[derive(PartialEq, Eq)]
enum Turn {
    GoOn,
    Stop,
}

/// Core, supervisor, input and output of one UART.
#[derive(Debug)]
pub struct EventLoop {
    epoll: Epoll,
    connection: Connection,
    device: UartDevice,
    channel: Channel,
    input: Option<Input>,
    /// epoll waits for the output. Descriptors are registered only while they are waited for: a hang-up is reported
    /// whether one asks for it or not, and would wake the loop for ever.
    output_armed: bool,
    timeout_at: Option<Instant>,
}

impl EventLoop {
    /// Registers the core's stream and the control channel.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(connection: Connection, device: UartDevice, channel: Channel) -> Result<Self, UartError> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(UartError::system("epoll_create1"))?;
        let events = [(connection.as_fd(), CORE), (channel.as_fd(), CONTROL)];
        for (fd, token) in events {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
                .map_err(UartError::system("epoll_ctl"))?;
        }
        Ok(Self { epoll, connection, device, channel, input: None, output_armed: false, timeout_at: None })
    }

    /// Output goes here from now on.
    ///
    /// # Errors
    /// The descriptor cannot be used.
    pub fn set_output(&mut self, fd: OwnedFd) -> Result<(), UartError> {
        self.forget_output();
        self.device.output.attach(Sink::new(fd).map_err(UartError::system("fstat"))?);
        Ok(())
    }

    /// Input comes from here from now on.
    pub fn set_input(&mut self, fd: OwnedFd) {
        self.replace_input(fd, false);
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
        let input = self.input.iter().map(|input| input.fd.as_fd());
        fixed.into_iter().chain(input).chain(self.device.descriptors()).collect()
    }

    /// The control channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Serves until the core or the supervisor ends it.
    ///
    /// # Errors
    /// The core breaks the register protocol or a system call fails.
    pub fn run(mut self) -> Result<(), UartError> {
        let mut events = [EpollEvent::empty(); 4];
        self.arm_input()?;
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
        self.last_flush();
        result
    }

    fn turn(&mut self, ready: &[EpollEvent]) -> Result<Turn, UartError> {
        for event in ready {
            let turn = match event.data() {
                CORE => match self.connection.serve(&mut self.device)? {
                    Served::Open => Turn::GoOn,
                    Served::Closed => Turn::Stop,
                },
                CONTROL => self.control()?,
                INPUT => {
                    self.read_input();
                    Turn::GoOn
                }
                _ => Turn::GoOn,
            };
            if turn == Turn::Stop {
                return Ok(Turn::Stop);
            }
        }
        self.write_output();
        self.expire();
        self.arm_input()?;
        Ok(Turn::GoOn)
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
                    self.attach(peer)?;
                } else {
                    tracing::warn!("Attach without exactly one descriptor is ignored");
                }
            }
            ToDevice::Ping => self.channel.send(&FromDevice::Alive, &[])?,
            ToDevice::Stop => return Ok(Turn::Stop),
            ToDevice::Resize { .. } => {}
            ToDevice::Start(_) => tracing::warn!("a second Start is ignored"),
        }
        Ok(Turn::GoOn)
    }

    fn attach(&mut self, peer: OwnedFd) -> Result<(), UartError> {
        let Ok(copy) = duplicate(&peer) else {
            tracing::warn!("no descriptor left for a serial peer");
            return Ok(());
        };
        self.set_output(copy)?;
        self.replace_input(peer, true);
        Ok(())
    }

    fn replace_input(&mut self, fd: OwnedFd, peer: bool) {
        self.forget_input();
        self.input = Some(Input { fd, armed: false, always_ready: false, peer });
    }

    /// Takes as much as the receiver has room for, once: the descriptor is readable, so that this does not block.
    fn read_input(&mut self) {
        let Some(input) = &self.input else { return };
        let mut bytes = [0; DEPTH];
        let room = self.device.receive_room().min(DEPTH);
        let space = bytes.get_mut(..room).unwrap_or_default();
        if space.is_empty() {
            return;
        }
        match nix::unistd::read(&input.fd, space) {
            Ok(0) => self.input_ended(),
            Ok(count) => {
                let received = bytes.get(..count).unwrap_or_default();
                self.device.receive(received, count < room);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // A terminal's or a pty's other end has hung up.
            Err(Errno::EIO) => self.input_ended(),
            Err(error) => {
                tracing::warn!(%error, "serial input failed");
                self.input_ended();
            }
        }
    }

    fn input_ended(&mut self) {
        let peer = self.input.as_ref().is_some_and(|input| input.peer);
        self.forget_input();
        if peer {
            self.forget_output();
            self.device.output.detach();
        }
    }

    fn write_output(&mut self) {
        if let Err(error) = self.device.output.flush() {
            tracing::warn!(%error, "serial output failed; it is kept for the next reader");
            self.output_armed = false;
            if self.input.as_ref().is_some_and(|input| input.peer) {
                self.forget_input();
            }
        }
        self.device.pump();
        self.arm_output();
    }

    /// Waits for the output while it is blocked.
    fn arm_output(&mut self) {
        let wanted = self.device.output.blocked();
        if wanted == self.output_armed {
            return;
        }
        let Some(fd) = self.device.output.descriptor() else { return };
        let changed = if wanted {
            self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLOUT, OUTPUT))
        } else {
            self.epoll.delete(fd)
        };
        if changed.is_ok() {
            self.output_armed = wanted;
        }
    }

    /// Waits for input while the receiver has room; takes it at once where it cannot be waited for.
    fn arm_input(&mut self) -> Result<(), UartError> {
        let (room, low) = (self.device.receive_room() > 0, self.device.receive_low());
        let Some(input) = &mut self.input else { return Ok(()) };
        // Not again for each character that the guest takes.
        let wanted = if input.armed { room } else { low };
        if wanted != input.armed && !input.always_ready {
            let changed = if wanted {
                self.epoll.add(&input.fd, EpollEvent::new(EpollFlags::EPOLLIN, INPUT))
            } else {
                self.epoll.delete(&input.fd)
            };
            match changed {
                Ok(()) => input.armed = wanted,
                Err(Errno::EPERM) => input.always_ready = true,
                Err(error) => return Err(UartError::System { call: "epoll_ctl", error }),
            }
        }
        while self.device.receive_room() > 0 && self.input.as_ref().is_some_and(|input| input.always_ready) {
            self.read_input();
        }
        Ok(())
    }

    fn forget_input(&mut self) {
        if let Some(input) = self.input.take()
            && input.armed
        {
            let _ = self.epoll.delete(&input.fd);
        }
    }

    fn forget_output(&mut self) {
        if let Some(fd) = self.device.output.descriptor()
            && self.output_armed
        {
            let _ = self.epoll.delete(fd);
        }
        self.output_armed = false;
    }

    /// How long to wait: until the reader counts as stuck or the character timeout.
    fn timeout(&mut self) -> EpollTimeout {
        if !self.device.timeout_armed() {
            self.timeout_at = None;
        } else if self.timeout_at.is_none() {
            self.timeout_at = Instant::now().checked_add(CHARACTER_TIMEOUT);
        }
        let next = [self.timeout_at, self.device.output.deadline()].into_iter().flatten().min();
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
        if self.timeout_at.is_none() && self.device.output.deadline().is_none() {
            return;
        }
        let now = Instant::now();
        if self.timeout_at.is_some_and(|at| now >= at) {
            self.timeout_at = None;
            self.device.character_timeout();
        }
        self.device.output.expire(now);
        self.device.pump();
    }

    /// Gives the reader a moment to take what the guest said last.
    fn last_flush(&mut self) {
        let end = Instant::now().checked_add(FINAL_FLUSH);
        let mut events = [EpollEvent::empty(); 1];
        let _ = self.epoll.delete(&self.connection);
        let _ = self.epoll.delete(&self.channel);
        self.forget_input();
        while self.device.output.flush().is_ok() && self.device.output.blocked() {
            self.device.pump();
            self.arm_output();
            let left = end.map_or(Duration::ZERO, |end| end.saturating_duration_since(Instant::now()));
            let milliseconds = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
            let timeout = EpollTimeout::from(milliseconds);
            if milliseconds == 0 || self.epoll.wait(&mut events, timeout) == Ok(0) {
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "event_loop_tests.rs"]
mod tests;
