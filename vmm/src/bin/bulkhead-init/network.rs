//! Interfaces of the guest: up, with an address and a way out (netdevice(7)).
//!
//! Contains unsafe code: the ioctls, whose structures have unions.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A request for `interface`, all else zero.
fn request(interface: &str) -> libc::ifreq {
    // SAFETY: all zero is a valid `ifreq`: an empty name, and a union of integers, addresses and null pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let places = request.ifr_name.iter_mut().take(libc::IFNAMSIZ.saturating_sub(1));
    for (place, byte) in places.zip(interface.bytes()) {
        *place = byte.cast_signed();
    }
    request
}

/// `sockaddr_in` of an address.
fn address(address: Ipv4Addr) -> libc::sockaddr {
    let mut bytes = [0_u8.cast_signed(); 14];
    // Two bytes of port come before it.
    for (place, byte) in bytes.iter_mut().skip(2).zip(address.octets()) {
        *place = byte.cast_signed();
    }
    libc::sockaddr { sa_family: u16::try_from(libc::AF_INET).unwrap_or(2), sa_data: bytes }
}

/// A socket, only to ask the kernel by.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no memory.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn ask<T>(socket: &OwnedFd, what: libc::Ioctl, request: &T) -> io::Result<()> {
    // SAFETY: callers give the structure that the ioctl reads; it is live during the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), what, std::ptr::from_ref(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Switches an interface on.
///
/// # Errors
/// There is none of that name.
pub fn up(interface: &str) -> io::Result<()> {
    let mut wanted = request(interface);
    wanted.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).unwrap_or(1);
    ask(&socket()?, libc::SIOCSIFFLAGS, &wanted)
}

/// The mask of a prefix of 0 to 32 bits.
fn mask(prefix: &str) -> io::Result<u32> {
    let bits = prefix.parse().ok().and_then(|prefix| 32_u32.checked_sub(prefix));
    let bits = bits.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a prefix of {prefix} bits: an IPv4 address has 0 to 32"),
        )
    })?;
    Ok(u32::MAX.checked_shl(bits).unwrap_or(0))
}

/// Gives an interface its address, switches it on, and sends through it what is for elsewhere. `entry` is a record of the plan:
/// `INTERFACE ADDRESS/PREFIX [ROUTER]`.
///
/// # Errors
/// The record is none, or the kernel refuses.
pub fn configure(entry: &str) -> io::Result<()> {
    let bad = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut words = entry.split(' ');
    let (interface, own) = (words.next().ok_or_else(bad)?, words.next().ok_or_else(bad)?);
    let (own, prefix) = own.split_once('/').ok_or_else(bad)?;
    let own: Ipv4Addr = own.parse().map_err(|_| bad())?;
    let mask = mask(prefix)?;
    let socket = socket()?;
    let mut wanted = request(interface);
    wanted.ifr_ifru.ifru_addr = address(own);
    ask(&socket, libc::SIOCSIFADDR, &wanted)?;
    wanted.ifr_ifru.ifru_netmask = address(Ipv4Addr::from_bits(mask));
    ask(&socket, libc::SIOCSIFNETMASK, &wanted)?;
    up(interface)?;
    let Some(router) = words.next() else { return Ok(()) };
    // SAFETY: all zero is a valid `rtentry`: integers, addresses of no family, and null pointers.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = address(router.parse().map_err(|_| bad())?);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ask(&socket, libc::SIOCADDRT, &route)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_prefix_has_0_to_32_bits() {
        let masks = ["0", "8", "24", "32"].map(|prefix| mask(prefix).unwrap());
        assert_eq!(masks, [0, 0xFF00_0000, 0xFFFF_FF00, 0xFFFF_FFFF]);
        for prefix in ["33", "-1", "", "4294967295", "x"] {
            let error = configure(&format!("eth0 10.0.2.15/{prefix}")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains("0 to 32"), "{error}");
        }
    }
}
