//! The way out of the machine: a tap, a datagram socket, or a stream of packets that each begin with their length.
//!
//! Contains unsafe code: `pwritev2` with a packet that lies in guest memory, and `Send` for the list that it takes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_ipc::memory::LentVector;
use bulkhead_ipc::tap::VNET_HEADER;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::read;

/// Largest packet with its Ethernet header, bytes: 64 KiB of segments to be made of it, or the largest datagram of passt.
pub const LARGEST: usize = 65_550;
/// Smallest packet: an Ethernet header.
pub const SMALLEST: usize = 14;
/// Bytes of a packet's length on a stream, in network order.
const LENGTH: usize = 4;
/// Bytes collected for a stream before the guest has to wait.
const OUTBOX: usize = 128 << 10;
/// Bytes taken from a stream at once.
const INBOX: usize = 128 << 10;

/// What `struct virtio_net_hdr_v1` is: flags, GSO, checksum, and in the last two bytes the number of buffers.
pub type Header = [u8; VNET_HEADER];

/// Where packets go and come from.
#[derive(Debug)]
pub enum Port {
    /// A queue of a tap.
    Tap(Arc<File>),
    /// A packet a datagram. Without a peer nothing is there.
    Datagrams(Option<OwnedFd>),
    /// QEMU's and passt's framing. Without a peer nothing is there.
    Stream(Option<OwnedFd>),
}

/// Whether something came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A packet, in the inbox.
    Packet,
    /// Nothing now.
    Nothing,
    /// The peer has gone, or sends what is no packet.
    Lost,
}

/// What became of a packet on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// It is on its way.
    Sent,
    /// It cannot be sent: no peer, or the host refuses it.
    Dropped,
    /// There is no room now.
    Full,
}

/// A packet from outside, and on a stream what follows it.
#[derive(Debug)]
pub struct Inbox {
    buffer: Vec<u8>,
    header: Header,
    body: Range<usize>,
    /// Of a stream: what was read and not consumed.
    filled: Range<usize>,
}

/// Packets for a stream.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Inbox {
    /// Room for one packet, or for many of a stream. Memory is used as packets come.
    pub fn new(port: &Port) -> Self {
        let size = if matches!(port, Port::Stream(_)) { INBOX } else { LARGEST + VNET_HEADER };
        Self { buffer: vec![0; size], header: [0; VNET_HEADER], body: 0..0, filled: 0..0 }
    }

    /// The header of virtio and the packet.
    pub fn packet(&self) -> (&Header, &[u8]) {
        (&self.header, self.buffer.get(self.body.clone()).unwrap_or_default())
    }

    /// The packet is done with.
    pub fn consume(&mut self) {
        self.filled.start = self.filled.start.max(self.body.end).min(self.filled.end);
        self.body = 0..0;
    }

    /// What was read of a stream and is not done with.
    pub fn left(&self) -> &[u8] {
        self.buffer.get(self.filled.clone()).unwrap_or_default()
    }

    /// Another peer begins, of which these bytes were read already.
    pub fn restart(&mut self, bytes: &[u8]) {
        let bytes = bytes.get(..bytes.len().min(self.buffer.len())).unwrap_or_default();
        if let Some(place) = self.buffer.get_mut(..bytes.len()) {
            place.copy_from_slice(bytes);
        }
        (self.filled, self.body) = (0..bytes.len(), 0..0);
    }

    fn next_frame(&mut self) -> Option<Result<(), ()>> {
        let unread = self.buffer.get(self.filled.clone())?;
        let (length, rest) = unread.split_first_chunk::<LENGTH>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > LARGEST {
            return Some(Err(()));
        }
        rest.get(..length)?;
        let start = self.filled.start.saturating_add(LENGTH);
        self.body = start..start.saturating_add(length);
        Some(Ok(()))
    }

    fn receive_frame(&mut self, peer: BorrowedFd<'_>) -> Input {
        loop {
            match self.next_frame() {
                Some(Ok(())) => return Input::Packet,
                Some(Err(())) => return Input::Lost,
                None => {}
            }
            if self.filled.start > 0 {
                self.buffer.copy_within(self.filled.clone(), 0);
                self.filled = 0..self.filled.len();
            }
            let Some(room) = self.buffer.get_mut(self.filled.end..) else { return Input::Lost };
            match recv(peer.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Input::Lost,
                Ok(count) => self.filled.end = self.filled.end.saturating_add(count),
                Err(Errno::EAGAIN) => return Input::Nothing,
                Err(Errno::EINTR) => {}
                Err(_) => return Input::Lost,
            }
        }
    }

    fn settle(&mut self, result: nix::Result<usize>, skipped: usize) -> Input {
        match result {
            Ok(count) => {
                self.body = VNET_HEADER..count.saturating_add(skipped).max(VNET_HEADER);
                Input::Packet
            }
            // A tap that is down has nothing; a datagram's peer may come back.
            Err(_) => Input::Nothing,
        }
    }

    /// Takes a packet from the port. One that is there is not done with and stays.
    pub fn receive(&mut self, port: &Port) -> Input {
        if !self.body.is_empty() {
            return Input::Packet;
        }
        match port {
            Port::Tap(tap) => {
                let result = read(tap.as_fd(), &mut self.buffer);
                let input = self.settle(result, 0);
                if let Some(header) = self.buffer.first_chunk() {
                    self.header = *header;
                }
                input
            }
            Port::Datagrams(Some(peer)) => {
                let Some(room) = self.buffer.get_mut(VNET_HEADER..) else { return Input::Nothing };
                let result = recv(peer.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT);
                self.settle(result, VNET_HEADER)
            }
            Port::Stream(Some(peer)) => {
                let peer = peer.as_fd();
                self.receive_frame(peer)
            }
            Port::Datagrams(None) | Port::Stream(None) => Input::Nothing,
        }
    }
}

impl Outbox {
    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// What is not sent.
    pub fn left(&self) -> &[u8] {
        self.bytes.get(self.sent..).unwrap_or_default()
    }

    /// Another peer begins, to which this is to be sent first.
    pub fn restart(&mut self, bytes: &[u8]) {
        self.bytes.clear();
        self.sent = 0;
        self.bytes.extend_from_slice(bytes.get(..bytes.len().min(OUTBOX)).unwrap_or_default());
    }

    /// Appends a packet of `len` bytes, which `fill` writes; false if there is no room for it, or `fill` failed.
    fn append(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> bool) -> bool {
        let before = self.bytes.len();
        let start = before.saturating_add(LENGTH);
        let end = start.saturating_add(len);
        if end > OUTBOX {
            return false;
        }
        self.bytes.extend_from_slice(&u32::try_from(len).unwrap_or(0).to_be_bytes());
        self.bytes.resize(end, 0);
        let filled = self.bytes.get_mut(start..end).is_some_and(fill);
        if !filled {
            self.bytes.truncate(before);
        }
        filled
    }
}

impl Port {
    /// Its descriptor.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => Some(tap.as_fd()),
            Self::Datagrams(peer) | Self::Stream(peer) => peer.as_ref().map(AsFd::as_fd),
        }
    }

    /// Sends what is collected for a stream. False: the peer has gone.
    pub fn flush(&self, outbox: &mut Outbox) -> bool {
        let Self::Stream(Some(peer)) = self else {
            outbox.restart(&[]);
            return true;
        };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !outbox.is_empty() {
            match send(peer.as_raw_fd(), outbox.left(), flags) {
                Ok(count) => outbox.sent = outbox.sent.saturating_add(count).min(outbox.bytes.len()),
                Err(Errno::EAGAIN) => return true,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    outbox.restart(&[]);
                    return false;
                }
            }
        }
        outbox.restart(&[]);
        true
    }

    /// Sends a packet of `len` bytes by a socket; `fill` writes it to where it is collected.
    pub fn send(&self, outbox: &mut Outbox, len: usize, mut fill: impl FnMut(&mut [u8]) -> bool) -> Output {
        match self {
            Self::Stream(Some(_)) => {
                if outbox.append(len, &mut fill) {
                    return Output::Sent;
                }
                if outbox.bytes.is_empty() || !self.flush(outbox) {
                    return Output::Dropped;
                }
                if !outbox.is_empty() {
                    return Output::Full;
                }
                if outbox.append(len, fill) { Output::Sent } else { Output::Dropped }
            }
            Self::Datagrams(Some(peer)) => {
                outbox.restart(&[]);
                let packed = outbox.append(len, fill);
                let packet = outbox.bytes.get(LENGTH..).unwrap_or_default();
                let result = match packed {
                    true => send(peer.as_raw_fd(), packet, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
                    false => Err(Errno::EINVAL),
                };
                outbox.restart(&[]);
                match result {
                    Ok(_) => Output::Sent,
                    Err(Errno::EAGAIN) => Output::Full,
                    Err(_) => Output::Dropped,
                }
            }
            _ => Output::Dropped,
        }
    }
}

/// Storage for the pieces of a packet, empty but during [`send_to_tap`].
#[derive(Debug, Default)]
pub struct Pieces(Vec<libc::iovec>);

// SAFETY: between calls it holds no pointer.
unsafe impl Send for Pieces {}

/// Sends a packet by a tap: its beginning from here, the rest from guest memory.
pub fn send_to_tap(tap: &File, beginning: &[u8], rest: &LentVector, pieces: &mut Pieces) -> Output {
    let Pieces(iovecs) = pieces;
    iovecs.push(libc::iovec { iov_base: beginning.as_ptr().cast_mut().cast(), iov_len: beginning.len() });
    iovecs.extend_from_slice(rest.iovecs());
    let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: `iovecs` holds `count` entries, of `beginning` and of guest memory that `rest` keeps mapped; the kernel only reads
    // them. An offset of -1 makes it a plain write.
    let result = unsafe { libc::pwritev2(tap.as_raw_fd(), iovecs.as_ptr(), count, -1, 0) };
    iovecs.clear();
    if result >= 0 {
        return Output::Sent;
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => Output::Full,
        // Down, or a header that makes no sense.
        _ => Output::Dropped,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    fn stream() -> (Port, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Port::Stream(Some(ours.into())), theirs)
    }

    fn frame(body: &[u8]) -> Vec<u8> {
        [&u32::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat()
    }

    fn copy(packet: &'static [u8]) -> impl FnMut(&mut [u8]) -> bool {
        move |place| {
            place.copy_from_slice(packet);
            true
        }
    }

    #[test]
    fn packets_of_a_stream_come_whole_however_they_arrive() {
        let (port, mut peer) = stream();
        let mut inbox = Inbox::new(&port);
        let bytes = [frame(b"one"), frame(b""), frame(&[7; 60_000])].concat();
        let mut lengths = Vec::new();
        for piece in bytes.chunks(3) {
            peer.write_all(piece).unwrap();
            while inbox.receive(&port) == Input::Packet && lengths.len() < 2 {
                lengths.push(inbox.packet().1.len());
                inbox.consume();
            }
        }
        assert_eq!(lengths, [3, 0]);
        assert_eq!(inbox.receive(&port), Input::Packet);
        assert_eq!(inbox.packet().1, [7; 60_000]);
        assert_eq!(inbox.left().len(), 60_004);
        inbox.consume();
        assert_eq!(inbox.receive(&port), Input::Nothing);
        drop(peer);
        assert_eq!(inbox.receive(&port), Input::Lost);
    }

    #[test]
    fn a_length_that_no_packet_has_ends_the_peer() {
        let (port, mut peer) = stream();
        peer.write_all(&[0, 1, 0, 15]).unwrap();
        assert_eq!(Inbox::new(&port).receive(&port), Input::Lost);
    }

    #[test]
    fn a_peer_that_does_not_read_makes_the_guest_wait_and_nothing_is_torn() {
        let (port, mut peer) = stream();
        let mut outbox = Outbox::default();
        let mut sent = 0;
        let result = loop {
            match port.send(&mut outbox, 1000, |place| {
                place.fill(9);
                true
            }) {
                Output::Sent => sent += 1,
                other => break other,
            }
        };
        assert_eq!(result, Output::Full);
        let mut received = vec![0; sent * 1004];
        let reader = std::thread::spawn(move || {
            peer.read_exact(&mut received).unwrap();
            received
        });
        while !outbox.is_empty() {
            assert!(port.flush(&mut outbox));
            std::thread::yield_now();
        }
        let expected = frame(&[9; 1000]);
        assert!(reader.join().unwrap().chunks(1004).all(|packet| packet == expected));
    }

    #[test]
    fn what_is_left_goes_on_with_a_successor() {
        let (port, mut peer) = stream();
        let mut inbox = Inbox::new(&port);
        peer.write_all(&frame(b"whole")[..6]).unwrap();
        assert_eq!(inbox.receive(&port), Input::Nothing);
        let left = inbox.left().to_vec();
        let mut successor = Inbox::new(&port);
        successor.restart(&left);
        peer.write_all(&frame(b"whole")[6..]).unwrap();
        assert_eq!(successor.receive(&port), Input::Packet);
        assert_eq!(successor.packet().1, b"whole");
    }

    #[test]
    fn datagrams_are_packets() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let port = Port::Datagrams(Some(ours.into()));
        let (mut inbox, mut outbox) = (Inbox::new(&port), Outbox::default());
        theirs.send(b"to the guest").unwrap();
        assert_eq!(inbox.receive(&port), Input::Packet);
        assert_eq!(inbox.packet(), (&[0; 12], &b"to the guest"[..]));
        assert_eq!(port.send(&mut outbox, 4, copy(b"back")), Output::Sent);
        let mut bytes = [0; 64];
        let count = theirs.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"back");
        drop(theirs);
        assert_eq!(port.send(&mut outbox, 4, copy(b"gone")), Output::Dropped);
    }
}
