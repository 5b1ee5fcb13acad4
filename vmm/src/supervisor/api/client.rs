//! The other end of the API: how `bulkhead ps`, `stop`, `console`, `device` and `events` reach a machine.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::geteuid;
use thiserror::Error;

use super::{MachineEntry, Request, Response, packet, socket_name};

/// How long a machine may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Why a machine did not do what it was asked.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens on that name.
    #[error("no machine named '{name}' runs{running}")]
    NoMachine {
        /// What was asked for.
        name: String,
        /// "; these do: …", or nothing.
        running: String,
    },
    /// Another user's process listens on that name.
    #[error(
        "the socket of '{name}' belongs to user id {uid}, which is neither you nor root: it is not asked"
    )]
    Foreign {
        /// The machine.
        name: String,
        /// Who listens.
        uid: u32,
    },
    /// It answered with a refusal.
    #[error("{0}")]
    Refused(String),
    /// It did not answer.
    #[error("the machine did not answer within {} s", .0.as_secs())]
    Deadline(Duration),
    /// It ended while it was asked.
    #[error("the machine ended")]
    Ended,
    /// The answer makes no sense: another version, most likely.
    #[error("the machine answered something unknown; is it of another version? ({0})")]
    Answer(String),
    /// A system call failed.
    #[error("cannot talk to the machine: {0}")]
    Io(#[from] io::Error),
}

/// Name and owner of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// User id of its owner.
    pub uid: u32,
    /// Its name.
    pub name: String,
}

/// The machines that this user may ask: all for root, else the own ones.
pub fn list() -> io::Result<Vec<Address>> {
    let mut found = parse(&fs::read_to_string("/proc/net/unix")?);
    let me = geteuid().as_raw();
    found.retain(|address| me == 0 || address.uid == me);
    Ok(found)
}

/// Machines among the sockets of `/proc/net/unix` (proc(5)): listening ones (flag `__SO_ACCEPTCON`) by our names.
fn parse(table: &str) -> Vec<Address> {
    let mut found: Vec<Address> = Vec::new();
    for line in table.lines().skip(1) {
        let mut columns = line.split_whitespace();
        let (Some(flags), Some(path)) = (columns.nth(3), columns.nth(3)) else { continue };
        let listening = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 0x10000 != 0);
        let Some((uid, name)) = path.strip_prefix("@bulkhead/").and_then(|rest| rest.split_once('/')) else {
            continue;
        };
        if let (true, Ok(uid)) = (listening, uid.parse()) {
            found.push(Address { uid, name: name.to_owned() });
        }
    }
    found.sort_by(|a, b| (&a.name, a.uid).cmp(&(&b.name, b.uid)));
    found
}

/// A connection to a machine.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Connection {
    /// Connects to a machine by name: one's own, or, for root, that of any user.
    pub fn to_name(name: &str) -> Result<Self, ClientError> {
        let me = geteuid().as_raw();
        match Self::to(&Address { uid: me, name: name.to_owned() }) {
            Err(ClientError::NoMachine { .. }) => {}
            other => return other,
        }
        let machines = list().unwrap_or_default();
        if let Some(other) = machines.iter().find(|address| address.name == name) {
            return Self::to(other);
        }
        let names: Vec<&str> = machines.iter().map(|address| address.name.as_str()).collect();
        let running =
            if names.is_empty() { String::new() } else { format!("; these do: {}", names.join(", ")) };
        Err(ClientError::NoMachine { name: name.escape_debug().to_string(), running })
    }

    /// Connects to a machine and checks who it is.
    pub fn to(address: &Address) -> Result<Self, ClientError> {
        let Address { uid, name } = address;
        let no_machine = || ClientError::NoMachine { name: name.clone(), running: String::new() };
        let socket = packet::connect_to(&socket_name(*uid, name)).map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => no_machine(),
            _ if error.raw_os_error() == Some(libc::ENAMETOOLONG) => no_machine(),
            _ => ClientError::Io(error),
        })?;
        let peer = packet::peer_uid(socket.as_fd())?;
        if peer == *uid || peer == 0 {
            Ok(Self { socket })
        } else {
            Err(ClientError::Foreign { name: name.clone(), uid: peer })
        }
    }

    /// Asks and waits for the answer.
    pub fn ask(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<Response, ClientError> {
        self.ask_within(request, fd, ANSWER_DEADLINE)
    }

    /// Asks something that takes its time.
    pub fn ask_within(
        &self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Response, ClientError> {
        let bytes = serde_json::to_vec(request).map_err(|error| ClientError::Answer(error.to_string()))?;
        packet::send(self.socket.as_fd(), &bytes, fd)?;
        if !self.readable(Some(limit))? {
            return Err(ClientError::Deadline(limit));
        }
        self.next_packet()
    }

    /// Waits for the next packet of an answer that has several, without bound.
    pub fn next_packet(&self) -> Result<Response, ClientError> {
        while !self.readable(None)? {}
        let (bytes, _) = packet::receive(self.socket.as_fd())?;
        if bytes.is_empty() {
            return Err(ClientError::Ended);
        }
        match serde_json::from_slice(&bytes) {
            Ok(Response::Error { message }) => Err(ClientError::Refused(message)),
            Ok(response) => Ok(response),
            Err(error) => Err(ClientError::Answer(error.to_string())),
        }
    }

    /// The machine and its processes.
    pub fn machine(&self) -> Result<MachineEntry, ClientError> {
        match self.ask(&Request::Ps, None)? {
            Response::Machine(machine) => Ok(machine),
            other => Err(ClientError::Answer(format!("{other:?}"))),
        }
    }

    /// Waits until the machine closes the connection, which it does when it has ended. False when `timeout` passed.
    pub fn wait_for_end(&self, timeout: Duration) -> Result<bool, ClientError> {
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if !self.readable(Some(left))? {
                return Ok(false);
            }
            match packet::receive(self.socket.as_fd()) {
                Ok((bytes, _)) if bytes.is_empty() => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Ok(true),
            }
        }
    }

    fn readable(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = timeout.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_listening_machines() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0005 01 1234 @bulkhead/1000/web\n\
            0000000000000000: 00000003 00000000 00000000 0005 03 1235 @bulkhead/1000/web\n\
            0000000000000000: 00000002 00000000 00010000 0005 01 1236 @bulkhead/0/db\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 1237 /run/bulkhead/0/x\n\
            0000000000000000: 00000002 00000000 00000000 0002 01 1238\n";
        let names = parse(table);
        assert_eq!(names, [Address { uid: 0, name: "db".into() }, Address { uid: 1000, name: "web".into() }]);
    }

    #[test]
    fn a_machine_that_does_not_run_is_no_machine() {
        let error = Connection::to_name("no-such-machine").unwrap_err();
        assert!(error.to_string().starts_with("no machine named 'no-such-machine' runs"), "{error}");
        assert!(matches!(Connection::to_name(&"x".repeat(200)), Err(ClientError::NoMachine { .. })));
    }
}
