//! epoll with named sources.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What became readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The signalfd.
    Signals,
    /// The listening API socket.
    Api,
    /// A client of the API, by its number.
    Client(u16),
    /// Standard input, a terminal in raw mode.
    Keyboard,
    /// The listening socket of the serial port.
    SerialListener,
    /// The listening socket of the console.
    ConsoleListener,
    /// The control channel of a process, by its index.
    Control(u16),
    /// The pidfd of a process: it has ended.
    Exit(u16),
    /// The log pipe of a process.
    Log(u16),
    /// A seccomp listener: process and index of the listener.
    Violation(u16, u16),
    /// The control channel of the successor beside a process.
    StandbyControl(u16),
    /// Its pidfd.
    StandbyExit(u16),
    /// Its log pipe.
    StandbyLog(u16),
    /// The listening socket of the vsock.
    VsockListener,
    /// What the vsock's process asks of its connector.
    Connector,
    /// The stream of a network card, by its index.
    CableEnd(u16),
    /// The listening socket of a network card.
    CableListener(u16),
    /// The listening socket of a named port, by its index.
    PortListener(u16),
}

impl Source {
    fn encode(self) -> u64 {
        let (tag, a, b): (u64, u16, u16) = match self {
            Self::Signals => (0, 0, 0),
            Self::Api => (1, 0, 0),
            Self::Client(client) => (2, client, 0),
            Self::Keyboard => (3, 0, 0),
            Self::SerialListener => (4, 0, 0),
            Self::ConsoleListener => (5, 0, 0),
            Self::Control(process) => (6, process, 0),
            Self::Exit(process) => (7, process, 0),
            Self::Log(process) => (8, process, 0),
            Self::Violation(process, listener) => (9, process, listener),
            Self::StandbyControl(process) => (10, process, 0),
            Self::StandbyExit(process) => (11, process, 0),
            Self::StandbyLog(process) => (12, process, 0),
            Self::VsockListener => (13, 0, 0),
            Self::Connector => (14, 0, 0),
            Self::CableEnd(card) => (15, card, 0),
            Self::CableListener(card) => (16, card, 0),
            Self::PortListener(port) => (17, port, 0),
        };
        tag << 32 | u64::from(a) << 16 | u64::from(b)
    }

    fn decode(data: u64) -> Option<Self> {
        let a = u16::try_from(data >> 16 & 0xffff).ok()?;
        let b = u16::try_from(data & 0xffff).ok()?;
        Some(match data >> 32 {
            0 => Self::Signals,
            1 => Self::Api,
            2 => Self::Client(a),
            3 => Self::Keyboard,
            4 => Self::SerialListener,
            5 => Self::ConsoleListener,
            6 => Self::Control(a),
            7 => Self::Exit(a),
            8 => Self::Log(a),
            9 => Self::Violation(a, b),
            10 => Self::StandbyControl(a),
            11 => Self::StandbyExit(a),
            12 => Self::StandbyLog(a),
            13 => Self::VsockListener,
            14 => Self::Connector,
            15 => Self::CableEnd(a),
            16 => Self::CableListener(a),
            17 => Self::PortListener(a),
            _ => return None,
        })
    }
}

/// Something to do about a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What it is.
    pub source: Source,
    /// There is something to read.
    pub readable: bool,
    /// The other end is gone, or the descriptor is in error.
    pub hang_up: bool,
}

/// epoll, level-triggered, for reading.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Watches a descriptor.
    pub fn add(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.encode()))?)
    }

    /// Watches a descriptor for its other end to go, whatever there is to read.
    pub fn add_hang_up(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLRDHUP, source.encode()))?)
    }

    /// Stops watching a descriptor. It must be called before the descriptor is closed: a copy of it in another process
    /// would keep it in the set. One that was never added, or was removed, is no error.
    pub fn remove(&self, fd: impl AsFd) {
        let _not_there = self.epoll.delete(fd);
    }

    /// Waits until something happens or `deadline` passes; the latter gives no events.
    pub fn wait(&self, deadline: Option<Instant>) -> io::Result<Vec<Event>> {
        let timeout = deadline.map_or(EpollTimeout::NONE, |deadline| {
            // Rounded up: to wake before the deadline would mean to wait again.
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
            EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
        });
        let mut events = [EpollEvent::empty(); 16];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let happened = events.iter().take(count).filter_map(|event| {
            let flags = event.events();
            Some(Event {
                source: Source::decode(event.data())?,
                readable: flags.contains(EpollFlags::EPOLLIN),
                hang_up: flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR),
            })
        });
        Ok(happened.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_kernel() {
        for source in [
            Source::Signals,
            Source::Api,
            Source::Client(65535),
            Source::Keyboard,
            Source::SerialListener,
            Source::ConsoleListener,
            Source::Control(7),
            Source::Exit(65535),
            Source::Log(0),
            Source::Violation(3, 65535),
            Source::StandbyControl(1),
            Source::StandbyExit(2),
            Source::StandbyLog(65535),
            Source::VsockListener,
            Source::Connector,
        ] {
            assert_eq!(Source::decode(source.encode()), Some(source));
        }
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let poller = Poller::new().unwrap();
        let start = Instant::now();
        let deadline = start + Duration::from_millis(20);
        assert!(poller.wait(Some(deadline)).unwrap().is_empty());
        assert!(start.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn a_hang_up_is_told_from_data() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(&ours, Source::Keyboard).unwrap();
        drop(theirs);
        let events = poller.wait(None).unwrap();
        assert!(events.first().unwrap().hang_up);
        poller.remove(&ours);
        poller.remove(&ours);
    }
}
