//! The host's side of a network card: a tap, passt, or a socket that joins two machines.
//!
//! Contains unsafe code: a descriptor that the user named by its number.

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bulkhead_ipc::channel::message::NET_KEPT;
use bulkhead_ipc::tap::{Tap, TapError, attach_tap_queue};
use bulkhead_ipc::words;
use nix::fcntl::OFlag;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::unistd::pipe2;
use thiserror::Error;

use super::Listener;
use crate::supervisor::config::net::{Forward, NetTarget, NicConfig, UserNet};

/// The last of what passt said that is passed on, in bytes.
const LAST_WORDS: usize = 600;

/// Why a network card has no host side.
#[derive(Debug, Error)]
pub enum NicError {
    /// The tap.
    #[error("{id}: {source}")]
    Tap {
        /// The card.
        id: String,
        /// Why.
        source: TapError,
    },
    /// There is no passt.
    #[error("{0}: passt is not installed, which user networking needs: apt install passt")]
    NoPasst(String),
    /// It does not start.
    #[error("{id}: cannot start passt: {source}")]
    Passt {
        /// The card.
        id: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A port of the host.
    #[error("{id}: hostfwd: cannot listen on {protocol} port {port} of the host: {source}")]
    Port {
        /// The card.
        id: String,
        /// TCP or UDP.
        protocol: &'static str,
        /// The port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The memory for packets on their way.
    #[error("{id}: memory for packets on their way: {source}")]
    Memory {
        /// The card.
        id: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket.
    #[error("{id}: the socket '{path}': {reason}")]
    Socket {
        /// The card.
        id: String,
        /// Its path.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The descriptor.
    #[error("{id}: descriptor {fd} {reason}")]
    Descriptor {
        /// The card.
        id: String,
        /// Its number.
        fd: i32,
        /// What is wrong.
        reason: String,
    },
}

/// A network card.
#[derive(Debug)]
pub struct Nic {
    /// What it is to be; `link` as it is now.
    pub config: NicConfig,
    /// The way out.
    pub way: Way,
    /// Its number: another when a stream was made anew, or the machine was.
    pub way_number: u64,
    /// Packets on their way, which outlive the process that serves it.
    pub kept: OwnedFd,
    /// What the kernel says of each queue of a tap, as files: its position is the length of the packet that was read last.
    pub positions: Vec<File>,
    /// A machine had it before.
    used: bool,
}

/// Where a network card's packets go.
#[derive(Debug)]
pub enum Way {
    /// A tap.
    Tap(Tap),
    /// A stream of packets.
    Stream(Stream),
    /// A socket that keeps packets apart.
    Datagrams(OwnedFd),
}

/// A stream of packets, and who is at its other end.
#[derive(Debug)]
pub struct Stream {
    /// The device's end; none while there is no peer.
    pub end: Option<OwnedFd>,
    /// passt, which ends when the stream does.
    passt: Option<Passt>,
    /// Where the other machine connects to, unless this one connects to the other.
    pub listener: Option<Listener>,
}

#[derive(Debug)]
struct Passt {
    child: Child,
    said: File,
}

impl Drop for Passt {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Passt {
    /// Starts passt with one end of a stream; the other is returned. passt confines itself: namespaces, an empty root and a
    /// seccomp filter of its own. It stays in the host's network, which it is for, and ends with the stream.
    fn start(id: &str, user: &UserNet) -> Result<(Self, OwnedFd), NicError> {
        let failed = |source| NicError::Passt { id: id.to_owned(), source };
        let (device, theirs) = UnixStream::pair().map_err(failed)?;
        // What nobody reads is lost, and makes nobody wait.
        let (said, says) =
            pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| failed(errno.into()))?;
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--fd", "0"]);
        for (option, udp) in [("-t", false), ("-u", true)] {
            for forward in user.forwards.iter().filter(|forward| forward.udp == udp) {
                let address = forward.address.map_or_else(String::new, |address| format!("{address}/"));
                command.args([option, &format!("{address}{}:{}", forward.host, forward.guest)]);
            }
        }
        if let Some((address, prefix, gateway)) = user.address {
            command.args(["-a", &address.to_string(), "-n", &prefix.to_string(), "-g", &gateway.to_string()]);
        }
        if let Some(dns) = user.dns {
            command.args(["--dns-forward", &dns.to_string()]);
        }
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::from(says));
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => NicError::NoPasst(id.to_owned()),
            _ => failed(error),
        })?;
        Ok((Self { child, said: said.into() }, device.into()))
    }

    /// The end of what it said.
    fn last_words(&mut self) -> String {
        let mut said = Vec::new();
        let mut part = [0; 4096];
        while let Ok(count @ 1..) = self.said.read(&mut part) {
            said.extend_from_slice(part.get(..count).unwrap_or_default());
        }
        let text = String::from_utf8_lossy(&said);
        let lines: Vec<&str> =
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains("syslog")).collect();
        let text = lines.join("; ");
        let start =
            text.char_indices().map(|(at, _)| at).find(|at| text.len().saturating_sub(*at) <= LAST_WORDS);
        text.get(start.unwrap_or(0)..).unwrap_or_default().escape_debug().to_string()
    }
}

/// A port that somebody else has is better said before passt is started, which says it to nobody.
fn check_ports(id: &str, forwards: &[Forward]) -> Result<(), NicError> {
    for forward in forwards {
        let address = SocketAddr::new(forward.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), forward.host);
        let (protocol, tried) = match forward.udp {
            true => ("UDP", UdpSocket::bind(address).map(drop)),
            false => ("TCP", TcpListener::bind(address).map(drop)),
        };
        tried.map_err(|source| NicError::Port { id: id.to_owned(), protocol, port: forward.host, source })?;
    }
    Ok(())
}

impl Stream {
    fn user(id: &str, user: &UserNet) -> Result<Self, NicError> {
        let (passt, end) = Passt::start(id, user)?;
        Ok(Self { end: Some(end), passt: Some(passt), listener: None })
    }

    /// Connects to who listens, or listens.
    fn socket(id: &str, path: &Path) -> Result<Self, NicError> {
        let socket =
            |reason: String| NicError::Socket { id: id.to_owned(), path: path.display().to_string(), reason };
        match UnixStream::connect(path) {
            Ok(end) => Ok(Self { end: Some(end.into()), passt: None, listener: None }),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                let listener = Listener::bind("net", path).map_err(|error| socket(error.to_string()))?;
                Ok(Self { end: None, passt: None, listener: Some(listener) })
            }
            Err(error) => Err(socket(error.to_string())),
        }
    }
}

impl Nic {
    /// Opens the host's side.
    ///
    /// # Errors
    /// [`NicError`].
    pub fn open(config: &NicConfig) -> Result<Self, NicError> {
        let id = &config.id;
        let tap_error = |source| NicError::Tap { id: id.clone(), source };
        let way = match &config.target {
            NetTarget::Tap(name) => Way::Tap(Tap::open(name, config.queues).map_err(tap_error)?),
            NetTarget::User(user) => {
                check_ports(id, &user.forwards)?;
                Way::Stream(Stream::user(id, user)?)
            }
            NetTarget::Socket(path) => Way::Stream(Stream::socket(id, path)?),
            NetTarget::Descriptor(fd) => adopt(id, *fd)?,
        };
        if let Way::Tap(tap) = &way {
            tap.configure(config.mtu).map_err(tap_error)?;
        }
        let pairs = if let Way::Tap(tap) = &way { tap.queues.len() as u64 } else { 1 };
        // What a host does not say, a successor finds out by other means.
        let position = |queue: &File| File::open(format!("/proc/self/fdinfo/{}", queue.as_raw_fd())).ok();
        let positions = match &way {
            Way::Tap(tap) => tap.queues.iter().filter_map(position).collect(),
            _ => Vec::new(),
        };
        let kept = words::sealed(c"net", pairs.saturating_mul(NET_KEPT))
            .map_err(|errno| NicError::Memory { id: id.clone(), source: errno.into() })?;
        Ok(Self { config: config.clone(), way, way_number: 1, kept, positions, used: false })
    }

    /// A machine starts: its guest begins with one queue, and a stream at its beginning.
    ///
    /// # Errors
    /// A stream that is not the first cannot be made.
    pub fn begin(&mut self) -> Result<(), NicError> {
        if let Way::Tap(tap) = &self.way
            && tap.queues.len() > 1
        {
            for (number, queue) in tap.queues.iter().enumerate() {
                let _as_it_was = attach_tap_queue(queue.as_fd(), number == 0);
            }
        }
        if std::mem::replace(&mut self.used, true) {
            return self.reconnect();
        }
        Ok(())
    }

    /// The stream, if packets go by one.
    pub fn stream(&self) -> Option<&Stream> {
        if let Way::Stream(stream) = &self.way { Some(stream) } else { None }
    }

    /// Another peer has connected.
    pub fn connected(&mut self, peer: UnixStream) {
        self.way_number = self.way_number.saturating_add(1);
        if let Way::Stream(stream) = &mut self.way {
            stream.end = Some(peer.into());
        }
    }

    /// The stream has ended. Why, as far as it is known.
    pub fn disconnect(&mut self) -> String {
        let Way::Stream(stream) = &mut self.way else { return String::new() };
        stream.end = None;
        match stream.passt.take() {
            Some(mut passt) => {
                let _ended_by_itself = passt.child.kill();
                let _reaped = passt.child.wait();
                passt.last_words()
            }
            None => String::new(),
        }
    }

    /// Makes the stream anew, where this side does that.
    ///
    /// # Errors
    /// passt does not start, or nobody listens.
    pub fn reconnect(&mut self) -> Result<(), NicError> {
        let id = self.config.id.clone();
        self.disconnect();
        self.way_number = self.way_number.saturating_add(1);
        let Way::Stream(stream) = &mut self.way else { return Ok(()) };
        match &self.config.target {
            NetTarget::User(user) => *stream = Stream::user(&id, user)?,
            NetTarget::Socket(path) if stream.listener.is_none() => {
                let connected = UnixStream::connect(path).map_err(|error| NicError::Socket {
                    id,
                    path: path.display().to_string(),
                    reason: error.to_string(),
                })?;
                stream.end = Some(connected.into());
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a stream without a peer is to be made anew by this side.
    pub fn reconnects(&self) -> bool {
        match (&self.way, &self.config.target) {
            (Way::Stream(stream), NetTarget::User(_) | NetTarget::Socket(_)) => stream.listener.is_none(),
            _ => false,
        }
    }

    /// The device's end of a stream.
    pub fn end(&self) -> Option<BorrowedFd<'_>> {
        self.stream().and_then(|stream| stream.end.as_ref()).map(AsFd::as_fd)
    }
}

/// Takes a copy of a descriptor that whoever started this process has left open.
fn adopt(id: &str, fd: i32) -> Result<Way, NicError> {
    let refused = |reason: String| NicError::Descriptor { id: id.to_owned(), fd, reason };
    // SAFETY: the call does not touch memory; a number that is no descriptor is an error of its own.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(refused("is not open: whoever starts bulkhead must leave it open".to_owned()));
    }
    // SAFETY: the copy was just made, and is nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
    let kind = file.metadata().map_err(|error| refused(error.to_string()))?.file_type();
    if !kind.is_socket() {
        let tap = Tap::adopt(vec![file]).map_err(|source| NicError::Tap { id: id.to_owned(), source })?;
        return Ok(Way::Tap(tap));
    }
    match getsockopt(&file, sockopt::SockType) {
        Ok(SockType::Stream) => {
            Ok(Way::Stream(Stream { end: Some(file.into()), passt: None, listener: None }))
        }
        Ok(SockType::Datagram | SockType::SeqPacket) => Ok(Way::Datagrams(file.into())),
        _ => Err(refused("is a socket of another kind than stream or datagram".to_owned())),
    }
}
