//! One process of the machine, as the supervisor sees it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::jail::{Exit, JailError, JailedProcess, PANIC_EXIT_CODE, PolicyName, ViolationListener};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::logs::LogPipe;

/// What a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The process that has KVM and guest memory.
    Core,
    /// A disk.
    Blk,
    /// The entropy device.
    Rng,
    /// The virtio console.
    Console,
    /// The serial port.
    Uart,
    /// The chip with firmware's variables.
    Flash,
    /// The keyboard and its controller.
    Keyboard,
    /// The vsock.
    Vsock,
    /// The balloon.
    Balloon,
    /// The watchdog.
    Watchdog,
    /// Persistent memory.
    Pmem,
    /// A network card.
    Net,
    /// A shared directory.
    Fs,
    /// The process that started the others.
    Supervisor,
    /// What stands before a back end that is not ours.
    Relay,
}

impl Role {
    /// The word for the command line of `bulkhead-device` and for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Blk => "blk",
            Self::Rng => "rng",
            Self::Console => "console",
            Self::Uart => "uart",
            Self::Flash => "flash",
            Self::Keyboard => "keyboard",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
            Self::Watchdog => "watchdog",
            Self::Pmem => "pmem",
            Self::Net => "net",
            Self::Fs => "fs",
            Self::Supervisor => "supervisor",
            Self::Relay => "relay",
        }
    }
}

impl Role {
    /// The policy of a thread of this name, or of the main thread.
    pub fn policy_of(self, thread: Option<&str>) -> PolicyName {
        match (self, thread) {
            (Self::Core | Self::Supervisor, None) => PolicyName::CoreMain,
            (Self::Core | Self::Supervisor, Some("devices")) => PolicyName::CoreDevices,
            (Self::Core | Self::Supervisor, Some(_)) => PolicyName::CoreVcpu,
            (Self::Blk, None) => PolicyName::BlkMain,
            (Self::Blk, Some(name)) if name.starts_with("image-") => PolicyName::BlkImage,
            (Self::Blk, Some(_)) => PolicyName::BlkQueue,
            (Self::Rng, None) => PolicyName::RngMain,
            (Self::Rng, Some(_)) => PolicyName::RngQueue,
            (Self::Console, None) => PolicyName::ConsoleMain,
            (Self::Console, Some(_)) => PolicyName::ConsoleQueue,
            (Self::Uart, _) => PolicyName::UartMain,
            (Self::Flash, _) => PolicyName::FlashMain,
            (Self::Keyboard, _) => PolicyName::KeyboardMain,
            (Self::Watchdog, _) => PolicyName::WatchdogMain,
            (Self::Vsock, None) => PolicyName::VsockMain,
            (Self::Vsock, Some(_)) => PolicyName::VsockQueue,
            (Self::Balloon, None) => PolicyName::BalloonMain,
            (Self::Balloon, Some(_)) => PolicyName::BalloonQueue,
            (Self::Pmem, None) => PolicyName::PmemMain,
            (Self::Pmem, Some(_)) => PolicyName::PmemQueue,
            (Self::Net, None) => PolicyName::NetMain,
            (Self::Net, Some(_)) => PolicyName::NetQueue,
            (Self::Relay, _) => PolicyName::RelayMain,
            (Self::Fs, None) => PolicyName::FsMain,
            (Self::Fs, Some(_)) => PolicyName::FsQueue,
        }
    }
}

/// How far a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It was started and has not reported READY.
    Starting,
    /// It serves, under its seccomp policies.
    Ready,
    /// It has ended and was reaped.
    Ended,
}

/// A process of the machine. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Process {
    /// Its name: `core`, or the id of the device.
    pub id: String,
    /// What it is.
    pub role: Role,
    /// The process itself.
    pub jailed: JailedProcess,
    /// The control channel.
    pub channel: Channel,
    /// What it writes to standard output and error.
    pub log: LogPipe,
    /// One for each of its seccomp policies, from READY on.
    pub listeners: Vec<ViolationListener>,
    /// How far it is.
    pub state: State,
    /// Whether why it ends was reported already.
    pub explained: bool,
}

impl Process {
    /// The step of the jail's construction that failed, if one did. It does not wait, and must be asked before the process
    /// is reaped.
    pub fn jail_error(&mut self) -> Option<JailError> {
        match self.jailed.confirm(Duration::ZERO) {
            // How it ended says more than that it ended; and one that lives has not failed.
            Ok(()) | Err(JailError::Deadline | JailError::Vanished) => None,
            Err(error) => Some(error),
        }
    }

    /// It has said READY, with the listeners of its policies.
    pub fn ready(&mut self, policies: &[PolicyName], listeners: Vec<OwnedFd>) {
        self.state = State::Ready;
        // It runs, so its jail is complete; asking closes the descriptor on which it would have reported.
        let _none = self.jail_error();
        let pairs = policies.iter().zip(listeners);
        self.listeners = pairs.map(|(policy, listener)| ViolationListener::new(*policy, listener)).collect();
    }

    /// Whether it has ended, reaped or not.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.jailed.as_fd(), PollFlags::POLLIN)];
        self.state == State::Ended || poll(&mut fds, PollTimeout::ZERO) != Ok(0)
    }

    /// Kills it; when it is gone the pidfd says so.
    pub fn kill(&self) -> Result<(), String> {
        if self.state == State::Ended {
            return Ok(());
        }
        self.jailed.kill().map_err(|error| format!("cannot kill process {}: {error}", self.jailed.pid()))
    }
}

/// "was killed by SIGSEGV (segmentation fault)", "ended with exit code 1", …
pub fn describe(exit: Exit) -> String {
    match exit {
        Exit::Code(PANIC_EXIT_CODE) => "panicked (its message stands above)".to_owned(),
        Exit::Code(code) => format!("ended by itself with exit code {code}"),
        Exit::Signal(number) => {
            let name =
                Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |s| s.to_string());
            let meaning = match number {
                libc::SIGKILL => " (by another program, or by the kernel for want of memory)",
                libc::SIGSYS => " (a system call that its seccomp policy forbids)",
                libc::SIGSEGV | libc::SIGBUS => " (it touched memory that it does not have)",
                libc::SIGXFSZ => " (it exceeded the file size that it may write)",
                _ => "",
            };
            format!("was killed by {name}{meaning}")
        }
    }
}

/// A borrowed descriptor list in the making: [`Fds::add`] gives each descriptor its index in the message.
#[derive(Default)]
pub struct Fds<'a>(pub Vec<std::os::fd::BorrowedFd<'a>>);

impl<'a> Fds<'a> {
    /// Appends a descriptor and returns its index, which messages carry in one byte; more than
    /// [`bulkhead_ipc::channel::MAX_DESCRIPTORS`] are refused when the message is sent.
    pub fn add(&mut self, fd: &'a impl AsFd) -> bulkhead_ipc::channel::message::FdIndex {
        self.add_borrowed(fd.as_fd())
    }

    /// The same with one that is borrowed already.
    pub fn add_borrowed(
        &mut self,
        fd: std::os::fd::BorrowedFd<'a>,
    ) -> bulkhead_ipc::channel::message::FdIndex {
        let index = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        self.0.push(fd);
        bulkhead_ipc::channel::message::FdIndex(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_described_for_people() {
        assert_eq!(describe(Exit::Code(3)), "ended by itself with exit code 3");
        assert!(describe(Exit::Code(101)).contains("panicked"));
        assert!(describe(Exit::Signal(11)).starts_with("was killed by SIGSEGV"));
        assert!(describe(Exit::Signal(40)).starts_with("was killed by signal 40"));
    }
}
