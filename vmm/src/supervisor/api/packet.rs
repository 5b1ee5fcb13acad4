//! Packets and their descriptors on `SOCK_SEQPACKET` sockets of the API.
//!
//! Contains unsafe code: descriptors that the kernel just made for this process become owned.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt,
};

use super::MAX_PACKET;

/// The most descriptors that one packet can carry (`SCM_MAX_FD`, unix(7)). With room for all of them none is ever lost.
const MAX_FDS: usize = 253;

/// Sends one packet without waiting.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    Ok(())
}

/// Receives one packet without waiting, empty at the end of the connection.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: recvmsg made these descriptors for this process just now, and nobody else knows them.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let (length, cut) = (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
    if cut {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet longer than 64 KiB"));
    }
    bytes.truncate(length);
    Ok((bytes, fds))
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?)
}

/// Listens on an abstract name.
pub fn listen_on(name: &str) -> io::Result<OwnedFd> {
    let listener = new_socket()?;
    bind(listener.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    listen(&listener, Backlog::new(16)?)?;
    Ok(listener)
}

/// Connects to an abstract name.
pub fn connect_to(name: &str) -> io::Result<OwnedFd> {
    let connection = new_socket()?;
    connect(connection.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    Ok(connection)
}

/// Accepts one connection if there is one.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 made this descriptor for this process just now, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The user id of the process at the other end: of the one that connected, or that called `listen`.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(getsockopt(&socket, sockopt::PeerCredentials)?.uid())
}

/// Whether a descriptor is a Unix stream socket, the only thing that is attached to a console.
pub fn is_stream_socket(fd: BorrowedFd<'_>) -> bool {
    let unix = getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream);
    unix && nix::sys::socket::getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok()
}
