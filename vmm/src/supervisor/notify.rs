//! Tells a service manager how far the machine is: the protocol of `sd_notify(3)`, one datagram for each state.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Where the manager listens: a path, or `@` and a name in the abstract name space.
const VARIABLE: &str = "NOTIFY_SOCKET";
/// How long a manager may take to make room for a datagram. The machine must not depend on it.
const SEND_DEADLINE: Duration = Duration::from_millis(100);

/// The manager's socket; without one nothing is sent.
#[derive(Debug, Default)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    ready: bool,
    stopping: bool,
}

impl Notifier {
    /// Takes the socket that the environment names, if any.
    ///
    /// # Errors
    /// It names one that is neither a path nor abstract, or no socket can be made.
    pub fn from_environment() -> io::Result<Self> {
        env::var_os(VARIABLE).map_or_else(|| Ok(Self::default()), |name| Self::new(&name))
    }

    fn new(name: &OsStr) -> io::Result<Self> {
        let invalid =
            |error: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{VARIABLE}: {error}"));
        let address = match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
            [b'/', ..] => SocketAddr::from_pathname(name),
            _ => return Err(invalid("neither a path nor @ and a name")),
        };
        let address = address.map_err(|error| invalid(&error.to_string()))?;
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_DEADLINE))?;
        Ok(Self { socket: Some((socket, address)), ready: false, stopping: false })
    }

    /// `READY=1`: every process of the machine runs. Later calls, after a restart of the guest, say nothing.
    ///
    /// # Errors
    /// Nobody listens, or not in time.
    pub fn ready(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.ready, true) { Ok(()) } else { self.send("READY=1\n") }
    }

    /// `STOPPING=1`: the machine ends and does not start again. Once.
    ///
    /// # Errors
    /// Nobody listens, or not in time.
    pub fn stopping(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.stopping, true) { Ok(()) } else { self.send("STOPPING=1\n") }
    }

    fn send(&self, state: &str) -> io::Result<()> {
        match &self.socket {
            Some((socket, address)) => socket.send_to_addr(state.as_bytes(), address).map(drop),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(manager: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        manager.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn each_state_is_told_once_on_either_kind_of_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("@bulkhead-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        for (manager, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str()),
            (UnixDatagram::bind_addr(&address).unwrap(), OsStr::new(&name)),
        ] {
            let mut notifier = Notifier::new(name).unwrap();
            notifier.ready().unwrap();
            notifier.ready().unwrap();
            notifier.stopping().unwrap();
            notifier.stopping().unwrap();
            assert_eq!([heard(&manager), heard(&manager)], ["READY=1\n", "STOPPING=1\n"]);
            manager.set_nonblocking(true).unwrap();
            assert!(manager.recv(&mut [0; 1]).is_err());
        }
    }

    #[test]
    fn a_manager_that_is_gone_or_does_not_read_is_an_error_and_no_wait() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Notifier::new(folder.path().join("none").as_os_str()).unwrap().ready().is_err());
        assert!(Notifier::new(OsStr::new("vsock:2:1")).is_err());
        let path = folder.path().join("deaf");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let start = std::time::Instant::now();
        while Notifier::new(path.as_os_str()).unwrap().ready().is_ok() {}
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
