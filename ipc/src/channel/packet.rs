//! One packet of a `SOCK_SEQPACKET` socket with its descriptors.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::MAX_DESCRIPTORS;
use crate::rights;

/// What `recvmsg` gave.
pub(super) struct Received {
    /// Length of the packet before it was cut to the buffer; 0 at the end of the channel.
    pub(super) length: usize,
    /// The descriptors that were installed.
    pub(super) descriptors: Vec<OwnedFd>,
    /// More descriptors came than fit, or than this process may hold.
    pub(super) descriptors_cut: bool,
}

/// Sends one packet without waiting and without `SIGPIPE`.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::E2BIG);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags);
    sent.map(drop).map_err(|errno| Errno::from_raw(errno.raw_os_error()))
}

/// Length of the next packet, which stays where it is; 0 at the end of the channel. Does not wait.
pub(super) fn length(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [], flags)
}

/// Receives one packet without waiting; every descriptor that the kernel installed is owned by the result, or closed.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received, Errno> {
    let rights::Received { bytes, descriptors, count, lost } =
        rights::receive(socket, buffer, MAX_DESCRIPTORS, RecvFlags::TRUNC)?;
    Ok(Received { length: bytes, descriptors, descriptors_cut: lost || count > MAX_DESCRIPTORS })
}
