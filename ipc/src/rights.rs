//! Receiving from a socket with the descriptors that come along.
//!
//! Every descriptor that the kernel installs is owned or closed here, also those of a message whose control data was cut: a
//! hostile peer must not be able to fill this process's descriptor table.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// What the kernel can deliver in one message (SCM_MAX_FD). The control buffer holds them all.
const KERNEL_MAX_DESCRIPTORS: usize = 253;

/// What one receive brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes; 0 at the end of the stream.
    pub bytes: usize,
    /// The descriptors, close-on-exec, up to the limit.
    pub descriptors: Vec<OwnedFd>,
    /// How many arrived.
    pub count: usize,
    /// The kernel could not deliver all: this process has reached its limit.
    pub lost: bool,
}

/// Receives what is there, without waiting, with further `flags`. Of more than `limit` descriptors the rest are counted and closed.
///
/// # Errors
/// Those of recvmsg(2), EAGAIN among them.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    limit: usize,
    flags: RecvFlags,
) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
    let lost = message.flags.contains(ReturnFlags::CTRUNC);
    let mut received = Received { bytes: message.bytes, descriptors: Vec::new(), count: 0, lost };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            for descriptor in rights {
                received.count = received.count.saturating_add(1);
                if received.count <= limit {
                    received.descriptors.push(descriptor);
                }
            }
        }
    }
    Ok(received)
}
