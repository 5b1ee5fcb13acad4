//! Tap interfaces of Linux (Documentation/networking/tuntap.rst): made, opened and set up by who has the right to, and the two calls
//! that a device process makes on what it was handed.
//!
//! Contains unsafe code: `ioctl` with the structures that it takes.

use std::ffi::{c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use thiserror::Error;

const DEVICE: &str = "/dev/net/tun";

const TUNSETIFF: c_ulong = 0x4004_54CA;
const TUNGETIFF: c_ulong = 0x8004_54D2;
const TUNSETOFFLOAD: c_ulong = 0x4004_54D0;
const TUNSETVNETHDRSZ: c_ulong = 0x4004_54D8;
const TUNSETQUEUE: c_ulong = 0x4004_54D9;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Offloads of TUNSETOFFLOAD: checksums.
pub const TUN_F_CSUM: u32 = 0x01;
/// TCP segmentation, IPv4.
pub const TUN_F_TSO4: u32 = 0x02;
/// TCP segmentation, IPv6.
pub const TUN_F_TSO6: u32 = 0x04;
/// TCP segmentation with ECN bits.
pub const TUN_F_TSO_ECN: u32 = 0x08;
/// UDP fragmentation.
pub const TUN_F_UFO: u32 = 0x10;
/// UDP segmentation, IPv4 (Linux 6.2).
pub const TUN_F_USO4: u32 = 0x20;
/// UDP segmentation, IPv6 (Linux 6.2).
pub const TUN_F_USO6: u32 = 0x40;

const OLD_OFFLOADS: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO;
const USO: u32 = TUN_F_USO4 | TUN_F_USO6;

/// Bytes of `struct virtio_net_hdr_v1`, which stands before each packet.
pub const VNET_HEADER: usize = 12;
/// The longest name of an interface, bytes.
const MAX_NAME: usize = 15;
/// Most queues of a tap (MAX_TAP_QUEUES).
pub const MAX_QUEUES: u16 = 256;

/// Why there is no tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// A name that no interface has.
    #[error("'{0}' is no name of an interface: 1 to {MAX_NAME} characters without '/' or blanks")]
    Name(String),
    /// The driver.
    #[error("cannot open {DEVICE}: {0}{hint}", hint = match .0.kind() {
        io::ErrorKind::NotFound => ": load the module tun (modprobe tun)",
        io::ErrorKind::PermissionDenied => ": this user may not use taps",
        _ => "",
    })]
    Driver(io::Error),
    /// No such interface, and no right to make it.
    #[error(
        "there is no interface '{0}' and this user may not make one: sudo ip tuntap add {0} mode tap user $USER"
    )]
    Missing(String),
    /// Somebody else's.
    #[error(
        "the interface '{0}' belongs to another user: root can change that (ip tuntap add {0} mode tap user NAME)"
    )]
    NotOwner(String),
    /// In use.
    #[error("the tap '{0}' is in use by another machine or program")]
    Busy(String),
    /// Something else.
    #[error(
        "the interface '{0}' exists and is no tap, or has not the queues that are needed (ip tuntap add … multi_queue)"
    )]
    NotTap(String),
    /// A descriptor that is none.
    #[error("the descriptor is no tap: {0}")]
    Descriptor(io::Error),
    /// It cannot be set up.
    #[error("the tap '{name}': cannot {what}: {source}")]
    SetUp {
        /// Its name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    /// Name of the interface.
    pub name: String,
    /// One descriptor for each queue, non-blocking; with each packet goes a header of [`VNET_HEADER`] bytes.
    pub queues: Vec<File>,
    /// The offloads that the kernel knows, `TUN_F_…`; none is on.
    pub offloads: u32,
}

fn request(name: &str, flags: u16) -> libc::ifreq {
    // SAFETY: a structure of plain bytes, for which zeroes are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(MAX_NAME).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags.cast_signed();
    request
}

fn done(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn with_request(fd: c_int, code: c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each code that is passed here takes an ifreq, which lives through the call.
    done(unsafe { libc::ioctl(fd, code, request as *mut libc::ifreq) })
}

impl Tap {
    /// Opens the tap `name` with `queues` queues; it is made if it is not there and this process may. It goes away
    /// with its last descriptor then.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        let fits = (1..=MAX_NAME).contains(&name.len()) && name != "." && name != "..";
        if !fits || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':') {
            return Err(TapError::Name(name.escape_debug().to_string()));
        }
        // One queue of a tap that was made for several is possible, the other way round is not.
        let mut first = Self::open_queue(name, queues > 1);
        if queues == 1 && matches!(first, Err(TapError::NotTap(_))) {
            first = Self::open_queue(name, true);
        }
        let mut files = vec![first?];
        for _ in 1..queues {
            files.push(Self::open_queue(name, true)?);
        }
        Self::set_up(name.to_owned(), files)
    }

    fn open_queue(name: &str, multi: bool) -> Result<File, TapError> {
        let there = nix::net::if_::if_nametoindex(name).is_ok();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(TapError::Driver)?;
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if multi { IFF_MULTI_QUEUE } else { 0 };
        let name = || name.to_owned();
        match with_request(file.as_raw_fd(), TUNSETIFF, &mut request(&name(), flags)) {
            Ok(()) => Ok(file),
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::EPERM) if there => TapError::NotOwner(name()),
                Some(libc::EPERM) => TapError::Missing(name()),
                Some(libc::EBUSY) => TapError::Busy(name()),
                Some(libc::EINVAL | libc::E2BIG) => TapError::NotTap(name()),
                _ => TapError::SetUp { name: name(), what: "open it", source: error },
            }),
        }
    }

    /// Takes taps that somebody else opened: the queues of one interface.
    ///
    /// # Errors
    /// One is no tap, or lacks the header before each packet.
    pub fn adopt(files: Vec<File>) -> Result<Self, TapError> {
        let mut name = String::new();
        for file in &files {
            let mut request = request("", 0);
            with_request(file.as_raw_fd(), TUNGETIFF, &mut request).map_err(TapError::Descriptor)?;
            // SAFETY: the kernel filled in the flags.
            let flags = unsafe { request.ifr_ifru.ifru_flags }.cast_unsigned();
            let bytes =
                request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
            name = String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned();
            if flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) != IFF_TAP | IFF_NO_PI | IFF_VNET_HDR {
                let reason = "it must be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR";
                return Err(TapError::Descriptor(io::Error::new(io::ErrorKind::InvalidInput, reason)));
            }
            let flags =
                nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL).unwrap_or(0) | libc::O_NONBLOCK;
            let flags = nix::fcntl::OFlag::from_bits_retain(flags);
            nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(flags))
                .map_err(|errno| TapError::Descriptor(errno.into()))?;
        }
        Self::set_up(name, files)
    }

    fn set_up(name: String, queues: Vec<File>) -> Result<Self, TapError> {
        let failed = |what| {
            let name = name.clone();
            move |source| TapError::SetUp { name, what, source }
        };
        let mut offloads = 0;
        for queue in &queues {
            let mut size = c_int::try_from(VNET_HEADER).unwrap_or(0);
            // SAFETY: the kernel reads an int that lives through the call.
            let result = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETVNETHDRSZ, &raw mut size) };
            done(result).map_err(failed("set the size of the packets' header"))?;
            offloads = match set_offloads(queue, OLD_OFFLOADS | USO) {
                Ok(()) => OLD_OFFLOADS | USO,
                Err(_) => OLD_OFFLOADS,
            };
            set_offloads(queue, 0).map_err(failed("turn offloads off"))?;
        }
        Ok(Self { name, queues, offloads })
    }

    /// Puts the interface up, with this MTU if one is given.
    ///
    /// # Errors
    /// It is not as wanted already, and this process may not change it.
    pub fn configure(&self, mtu: Option<u16>) -> Result<(), TapError> {
        let name = &self.name;
        let failed = |what| move |source| TapError::SetUp { name: name.clone(), what, source };
        let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| failed("reach the network")(errno.into()))?;
        let call =
            |code: c_ulong, request: &mut libc::ifreq| with_request(control.as_raw_fd(), code, request);
        if let Some(mtu) = mtu {
            let mut get = request(name, 0);
            call(libc::SIOCGIFMTU as c_ulong, &mut get).map_err(failed("read its MTU"))?;
            // SAFETY: the kernel filled in the MTU.
            if unsafe { get.ifr_ifru.ifru_mtu } != c_int::from(mtu) {
                let mut set = request(name, 0);
                set.ifr_ifru.ifru_mtu = mtu.into();
                call(libc::SIOCSIFMTU as c_ulong, &mut set).map_err(failed("set its MTU"))?;
            }
        }
        let mut flags = request(name, 0);
        call(libc::SIOCGIFFLAGS as c_ulong, &mut flags).map_err(failed("read its flags"))?;
        // SAFETY: the kernel filled in the flags.
        let now = unsafe { flags.ifr_ifru.ifru_flags };
        let up = i16::try_from(libc::IFF_UP).unwrap_or(1);
        if now & up == 0 {
            flags.ifr_ifru.ifru_flags = now | up;
            call(libc::SIOCSIFFLAGS as c_ulong, &mut flags)
                .map_err(failed("put it up (ip link set … up)"))?;
        }
        Ok(())
    }
}

fn set_offloads(queue: &File, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    done(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(offloads)) })
}

/// Says which packets the reader of the tap can take: `TUN_F_…`. It holds for all queues of the interface.
///
/// # Errors
/// What the kernel says.
pub fn set_tap_offloads(queue: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    done(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(offloads)) })
}

/// Begins or ends the use of a queue of a tap that has several; a queue that is so already stays so.
///
/// # Errors
/// What the kernel says.
pub fn attach_tap_queue(queue: BorrowedFd<'_>, attach: bool) -> io::Result<()> {
    let flags = if attach { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
    match with_request(queue.as_raw_fd(), TUNSETQUEUE, &mut request("", flags)) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_can_be_none_are_refused_before_anything_is_opened() {
        for name in ["", ".", "..", "a/b", "a b", "0123456789abcdef", "a:1", "ä"] {
            let error = Tap::open(name, 1).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{name}: {error}");
        }
    }

    #[test]
    fn an_interface_that_is_no_tap_is_refused() {
        // Without the right to make one, the interface must not be there either.
        let error = Tap::open("lo", 1).unwrap_err();
        assert!(
            matches!(error, TapError::NotTap(_) | TapError::NotOwner(_) | TapError::Driver(_)),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_tap_is_not_adopted() {
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Tap::adopt(vec![null]), Err(TapError::Descriptor(_))));
    }
}
