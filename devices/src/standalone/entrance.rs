//! Where front ends come in: a path, a descriptor that was inherited, or the socket of systemd (sd_listen_fds(3)).
//!
//! Contains unsafe code: taking ownership of an inherited descriptor by its number.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::sockopt::{AcceptConn, SockType as SockTypeOption};
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt};
use thiserror::Error;
use tracing::info;

use super::arguments::Socket;

/// The number of systemd's first descriptor.
const FIRST_ACTIVATED: i32 = 3;

/// Why nobody can come in.
#[derive(Debug, Error)]
pub enum EntranceError {
    /// The path is taken.
    #[error("the socket '{path}' is in use by another process: choose another path or stop that process", path = .0.display())]
    InUse(PathBuf),
    /// There is a file of another kind.
    #[error("'{path}' exists and is no socket: it is left alone", path = .0.display())]
    NoSocket(PathBuf),
    /// It cannot be made.
    #[error("cannot listen on '{path}': {error}", path = path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The descriptor is none, or no socket.
    #[error("descriptor {number} is no Unix stream socket: {reason}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What is wrong with it.
        reason: String,
    },
    /// systemd has opened none for this process, or several.
    #[error("socket activation: {0}")]
    Activation(String),
}

/// Where front ends come in.
#[derive(Debug)]
pub enum Entrance {
    /// One that is there already.
    Connected(UnixStream),
    /// Any that come.
    Listening(Door),
}

/// A listening socket; its file is removed with it if this process has made it.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    /// Path, device and inode.
    file: Option<(PathBuf, (u64, u64))>,
}

impl Door {
    /// The socket.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Somebody else may have replaced it.
        if let Some((path, file)) = &self.file
            && identity(path).is_ok_and(|now| now == *file)
        {
            let _gone = fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Entrance {
    /// Opens it.
    ///
    /// # Errors
    /// [`EntranceError`].
    pub fn open(socket: &Socket) -> Result<Self, EntranceError> {
        match socket {
            Socket::Path(path) => bind(path).map(Self::Listening),
            Socket::Descriptor(number) => inherit(*number),
            Socket::Activated => {
                let variable = |name| std::env::var(name).unwrap_or_default();
                check_activation(&variable("LISTEN_PID"), &variable("LISTEN_FDS"), std::process::id())
                    .map_err(EntranceError::Activation)?;
                inherit(FIRST_ACTIVATED)
            }
        }
    }
}

/// The variables of sd_listen_fds(3) name this process and one socket.
fn check_activation(pid: &str, sockets: &str, own: u32) -> Result<(), String> {
    if pid.parse() != Ok(own) {
        return Err(format!("LISTEN_PID is {pid:?}, and this process is {own}"));
    }
    match sockets {
        "1" => Ok(()),
        other => Err(format!("one socket is needed, and LISTEN_FDS is {other:?}")),
    }
}

/// Listens on a path. A socket that nobody listens on any more is replaced; nothing else is.
fn bind(path: &Path) -> Result<Door, EntranceError> {
    let failed = |error| EntranceError::Bind { path: path.to_owned(), error };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(EntranceError::NoSocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                info!(path = %path.display(), "a socket that an earlier process left behind is replaced");
                fs::remove_file(path).map_err(failed)?;
            }
            // Also one whose queue is full, or that this user may not use.
            _ => return Err(EntranceError::InUse(path.to_owned())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let file = identity(path).map_err(failed)?;
    Ok(Door { listener, file: Some((path.to_owned(), file)) })
}

/// Takes an inherited socket over.
fn inherit(number: i32) -> Result<Entrance, EntranceError> {
    let failed = |reason: String| EntranceError::Descriptor { number, reason };
    let call = |errno: nix::errno::Errno| failed(errno.to_string());
    // Our own descriptors are all close-on-exec, which an inherited one cannot be: it came through an exec.
    // SAFETY: the number is only asked about; F_GETFD fails for one that is not open.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    match flags {
        -1 => return Err(failed(io::Error::last_os_error().to_string())),
        flags if flags & libc::FD_CLOEXEC != 0 => return Err(failed("it was not inherited".to_owned())),
        _ => {}
    }
    // SAFETY: it is open and was inherited, as the flag says, so no other owner exists in this program; it gets the flag
    // now, and a second call for the same number is refused.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(call)?;
    let kind = getsockopt(&socket, SockTypeOption).map_err(call)?;
    let address: SockaddrStorage = getsockname(socket.as_raw_fd()).map_err(call)?;
    if address.family() != Some(AddressFamily::Unix) || kind != SockType::Stream {
        return Err(failed("it is a socket of another kind".to_owned()));
    }
    if getsockopt(&socket, AcceptConn).map_err(call)? {
        return Ok(Entrance::Listening(Door { listener: socket.into(), file: None }));
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|error| failed(error.to_string()))?;
    Ok(Entrance::Connected(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let door = bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        assert!(matches!(bind(&path), Err(EntranceError::InUse(_))), "one that is listened on");
        drop(door);
        assert!(!path.exists(), "a door leaves no file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(EntranceError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn the_socket_of_a_successor_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let door = bind(&path).unwrap();
        fs::rename(&path, folder.path().join("kept")).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(door);
        assert!(path.exists());
    }

    #[test]
    fn activation_is_for_this_process_and_one_socket() {
        assert_eq!(check_activation("7", "1", 7), Ok(()));
        for (pid, sockets) in [("8", "1"), ("", "1"), ("7", "2"), ("7", "0"), ("7", ""), ("x", "1")] {
            assert!(check_activation(pid, sockets, 7).is_err(), "{pid} {sockets}");
        }
    }
}
