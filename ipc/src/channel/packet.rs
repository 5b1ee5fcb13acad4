//! One packet of a `SOCK_SEQPACKET` socket with its descriptors.
//!
//! Contains unsafe code: `recvmsg` is called directly because the safe wrappers lose the descriptors of a packet whose
//! control data was cut (`MSG_CTRUNC`), which a hostile peer would use to fill our descriptor table.

use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::MAX_DESCRIPTORS;

/// Bytes of control data that hold one `SCM_RIGHTS` message of [`MAX_DESCRIPTORS`] descriptors.
const CONTROL_LENGTH: usize = control_space(MAX_DESCRIPTORS);

const fn control_space(descriptors: usize) -> usize {
    // SAFETY: CMSG_SPACE only computes; the argument is below 4 GiB.
    #[expect(clippy::cast_possible_truncation, reason = "64 descriptors are 256 bytes")]
    unsafe {
        libc::CMSG_SPACE((descriptors * mem::size_of::<RawFd>()) as u32) as usize
    }
}

/// Control data, aligned as `cmsghdr` demands.
#[repr(C)]
union Control {
    bytes: [u8; CONTROL_LENGTH],
    _align: libc::cmsghdr,
}

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
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control { bytes: [0; CONTROL_LENGTH] };
    // SAFETY: msghdr is plain data for which all zero is valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(Errno::E2BIG);
    }
    if !descriptors.is_empty() {
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = control_space(descriptors.len());
        // SAFETY: the control buffer is aligned for cmsghdr and holds MAX_DESCRIPTORS of them, so the first header lies in
        // it, and so do the descriptors behind it, whose number was checked above; RawFd has no padding.
        #[expect(clippy::cast_possible_truncation, reason = "64 descriptors are 256 bytes")]
        unsafe {
            let cmsg = libc::CMSG_FIRSTHDR(&raw const header);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(mem::size_of_val(descriptors) as u32) as usize;
            let data: *mut RawFd = libc::CMSG_DATA(cmsg).cast();
            for (index, descriptor) in descriptors.iter().enumerate() {
                data.add(index).write_unaligned(descriptor.as_raw_fd());
            }
        }
    }
    // SAFETY: header points at a live iovec, whose bytes are only read, and at the live control buffer.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    Errno::result(sent).map(drop)
}

/// Length of the next packet, which stays where it is; 0 at the end of the channel. Does not wait.
pub(super) fn length(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [], flags)
}

/// Receives one packet without waiting; every descriptor that the kernel installed is owned by the result.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control { bytes: [0; CONTROL_LENGTH] };
    // SAFETY: msghdr is plain data for which all zero is valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = CONTROL_LENGTH;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC;
    // SAFETY: header points at a live iovec over `buffer`, which is borrowed mutably, and at the live control buffer.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let length = usize::try_from(Errno::result(length)?).map_err(|_| Errno::EIO)?;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel filled msg_controllen bytes of the control buffer with well-formed messages; the macros stay
    // within them. Each descriptor of an SCM_RIGHTS message was just installed for us and nobody else owns it.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const header);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let data: *const RawFd = libc::CMSG_DATA(cmsg).cast();
                let payload = (*cmsg).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for index in 0..payload / mem::size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(ptr::read_unaligned(data.add(index))));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&raw const header, cmsg);
        }
    }
    Ok(Received { length, descriptors, descriptors_cut: header.msg_flags & libc::MSG_CTRUNC != 0 })
}
