//! The host's side of a vsock: its socket, the connector for its process, and its context id.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bulkhead_ipc::connector::Connector;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use nix::unistd::getuid;

use super::{Listener, ResourceError};
use crate::supervisor::config::VsockConfig;

/// What a vsock is connected to.
#[derive(Debug)]
pub struct Vsock {
    /// Its id.
    pub id: String,
    /// The guest's context id.
    pub cid: u32,
    /// The socket that others connect to.
    pub listener: Listener,
    /// Connects and accepts for the device.
    pub connector: Connector,
    /// The device's end of the connector's channel.
    pub for_device: OwnedFd,
    /// Holds the context id.
    _claim: OwnedFd,
}

impl Vsock {
    /// Claims the context id, and listens.
    pub fn open(config: &VsockConfig) -> Result<Self, ResourceError> {
        let field = format!("vsock {}", config.id);
        let claim = claim(config.cid, &field)?;
        let listener = Listener::bind("vsock", &config.path)?;
        let (connector, for_device) = Connector::new(&config.path)
            .map_err(|error| ResourceError::Host { what: field, reason: std::io::Error::other(error) })?;
        Ok(Self { id: config.id.clone(), cid: config.cid, listener, connector, for_device, _claim: claim })
    }

    /// Accepts a connection, if there is one, and gives it to the device.
    ///
    /// # Errors
    /// There is none, or no descriptor for it.
    pub fn accept(&self) -> Result<(), Errno> {
        let stream: UnixStream = self.listener.accept()?;
        self.connector.admit(&stream.into());
        Ok(())
    }
}

/// Claims a context id among the machines of this user, for as long as the descriptor is open: by an abstract name, of which nothing
/// is left behind.
fn claim(cid: u32, field: &str) -> Result<OwnedFd, ResourceError> {
    let host = |errno: Errno| ResourceError::Host {
        what: format!("{field}: cannot claim its context id"),
        reason: errno.into(),
    };
    let name = format!("bulkhead/{}/vsock-cid/{cid}", getuid());
    let address = UnixAddr::new_abstract(name.as_bytes()).map_err(host)?;
    let claim =
        socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(host)?;
    match bind(claim.as_raw_fd(), &address) {
        Ok(()) => Ok(claim),
        Err(Errno::EADDRINUSE) => Err(ResourceError::CidTaken { field: field.to_owned(), cid }),
        Err(errno) => Err(host(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::config::RestartPolicy;

    #[test]
    fn a_context_id_and_a_path_belong_to_one_machine() {
        let folder = tempfile::tempdir().unwrap();
        let config = |name: &str, cid| VsockConfig {
            cid,
            path: folder.path().join(name),
            id: "vsock".into(),
            restart: RestartPolicy::default(),
            addr: None,
        };
        let cid = 0x7000_0000 + std::process::id();
        let first = Vsock::open(&config("a", cid)).unwrap();
        let taken = Vsock::open(&config("b", cid)).unwrap_err().to_string();
        assert!(taken.contains(&format!("context id {cid} belongs to another machine")), "{taken}");
        assert!(!folder.path().join("b").exists());
        let used = Vsock::open(&config("a", cid + 1)).unwrap_err().to_string();
        assert!(used.contains("in use"), "{used}");
        drop(first);
        assert!(!folder.path().join("a").exists());
        Vsock::open(&config("a", cid)).unwrap();
    }
}
