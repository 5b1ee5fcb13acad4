//! Sockets of every kind.

use super::*;

const EMPTY_NETWORK: &str = "network namespace without interfaces";

fn socket(family: i32, kind: i32, protocol: i32) -> Result<i64> {
    call(libc::SYS_socket, [fd(family), fd(kind), fd(protocol), 0, 0, 0])
}

fn connect(socket: i64, address_bytes: &[u8]) -> Result {
    let length = address_bytes.len() as u64;
    let arguments = [socket.cast_unsigned(), address_bytes.as_ptr() as u64, length, 0, 0, 0];
    let outcome = call(libc::SYS_connect, arguments).map(drop);
    let _closed = call(libc::SYS_close, [socket.cast_unsigned(), 0, 0, 0, 0, 0]);
    outcome
}

/// Each family in turn, whether or not the one before was refused: all must be.
fn families(held: &Held, wanted: impl Fn(i32) -> bool) -> Result {
    let _ = held;
    let mut outcome = Err(libc::EAFNOSUPPORT);
    for family in (0..46).filter(|family| wanted(*family)) {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET, libc::SOCK_RAW] {
            match socket(family, kind, 0) {
                Ok(number) => {
                    let _closed = call(libc::SYS_close, [number.cast_unsigned(), 0, 0, 0, 0, 0]);
                    outcome = Ok(());
                }
                Err(errno) if outcome.is_err() => outcome = Err(errno),
                Err(_) => {}
            }
        }
    }
    outcome
}

/// Families that a network namespace keeps inside.
fn namespaced(family: i32) -> bool {
    matches!(family, libc::AF_UNIX | libc::AF_INET | libc::AF_INET6 | libc::AF_NETLINK | libc::AF_PACKET)
}

fn every_family(held: &Held) -> Result {
    families(held, |_| true)
}

fn other_families(held: &Held) -> Result {
    families(held, |family| !namespaced(family))
}

fn pair(_: &Held) -> Result {
    let mut ends = [0_i32; 2];
    // AF_UNIX, SOCK_DGRAM: no policy needs it.
    call(libc::SYS_socketpair, [1, 2, 0, ends.as_mut_ptr() as u64, 0, 0]).map(drop)
}

fn supervisor(held: &Held) -> Result {
    any(held.users, |uid| {
        let mut name = vec![1, 0, 0];
        name.extend(format!("bulkhead/{uid}/{}", held.machine).bytes());
        connect(socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?, &name)
    })
}

fn internet(_: &Held) -> Result {
    let port_and = |ip: [u8; 4]| [&[2, 0, 0, 53][..], &ip, &[0; 8]].concat();
    any([[127, 0, 0, 1], [169, 254, 169, 254], [8, 8, 8, 8]], |ip| {
        connect(socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?, &port_and(ip))
    })
}

fn raw(_: &Held) -> Result {
    any([(libc::AF_INET, libc::IPPROTO_ICMP), (libc::AF_PACKET, 0x0300)], |(family, protocol)| {
        socket(family, libc::SOCK_RAW, protocol).map(drop)
    })
}

fn host_by_vsock(_: &Held) -> Result {
    // struct sockaddr_vm: family 40, port 1024, the host (2).
    let mut name = [0_u8; 16];
    name[0] = 40;
    name[5] = 4;
    name[8] = 2;
    connect(socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?, &name)
}

/// RTM_NEWLINK: a network interface of its own.
fn interface(_: &Held) -> Result {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)?.cast_unsigned();
    // struct nlmsghdr (length 32, type 16, flags request, acknowledge, create), struct ifinfomsg.
    let mut message = [0_u32; 8];
    message[0] = 32;
    message[1] = 16 | (0x0405 << 16);
    call(libc::SYS_sendto, [socket, address(&message), 32, 0, 0, 0])?;
    let mut answer = [0_i32; 64];
    call(libc::SYS_recvfrom, [socket, answer.as_mut_ptr() as u64, 256, 0, 0, 0])?;
    match answer[4] {
        0 => Ok(()),
        errno => Err(-errno),
    }
}

pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        goal: "make a socket of any family (0 to 45, four types each)",
        calls: &["socket"],
        run: every_family,
        walls: &[],
        gap: Some("sockets can be made; where they lead is the next rows"),
    },
    Attempt {
        goal: "make a socket of a family that no namespace holds",
        calls: &["socket"],
        run: other_families,
        walls: &[(libc::EAFNOSUPPORT, HOST), (libc::EPERM, NO_CAPABILITY), (libc::ESOCKTNOSUPPORT, HOST)],
        gap: Some("AF_ALG, AF_VSOCK and others, as far as the host's kernel has them"),
    },
    Attempt {
        goal: "make a pair of datagram sockets",
        calls: &["socketpair"],
        run: pair,
        walls: &[],
        gap: Some("a pair leads nowhere"),
    },
    Attempt {
        goal: "connect to the supervisor's control socket",
        calls: &["socket"],
        run: supervisor,
        walls: &[(libc::ECONNREFUSED, "network namespace")],
        gap: None,
    },
    Attempt {
        goal: "reach the host, its metadata service or the Internet",
        calls: &["socket"],
        run: internet,
        walls: &[(libc::ENETUNREACH, EMPTY_NETWORK)],
        gap: None,
    },
    Attempt {
        goal: "send raw packets",
        calls: &["socket"],
        run: raw,
        walls: &[(libc::EPERM, NO_CAPABILITY)],
        gap: None,
    },
    Attempt {
        goal: "reach the host by vsock",
        calls: &["socket"],
        run: host_by_vsock,
        walls: &[
            (libc::EAFNOSUPPORT, HOST),
            (libc::ENODEV, HOST),
            (libc::ECONNRESET, HOST),
            (libc::ETIMEDOUT, HOST),
            (libc::EPERM, HOST),
        ],
        gap: Some("vsock has no namespaces"),
    },
    Attempt {
        goal: "make a network interface",
        calls: &["socket"],
        run: interface,
        walls: &[(libc::EPERM, NO_CAPABILITY)],
        gap: None,
    },
];
