//! The way out of the machine: a tap, a datagram socket, or a stream of packets that each begin with their length.
//!
//! Contains unsafe code: `pwritev2` with a packet that lies in guest memory, and `Send` for the list that it takes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_ipc::memory::LentVector;
use bulkhead_ipc::tap::VNET_HEADER;
use nix::sys::socket::{Shutdown, shutdown};

use super::outbox::Outbox;

/// Largest packet with its Ethernet header, bytes: 64 KiB of segments to be made of it, or the largest datagram of passt.
pub const LARGEST: usize = 65_550;
/// Smallest packet: an Ethernet header.
pub const SMALLEST: usize = 14;
/// Bytes of a packet's length on a stream, in network order.
pub const LENGTH: usize = 4;

/// What `struct virtio_net_hdr_v1` is: flags, GSO, checksum, and in the last two bytes the number of buffers.
pub type Header = [u8; VNET_HEADER];

/// Where packets go and come from.
#[derive(Debug)]
pub enum Port {
    /// A queue of a tap.
    Tap(Arc<File>),
    /// A packet a datagram, or a message of a connection. Without a peer nothing is there.
    Datagrams(Option<OwnedFd>),
    /// QEMU's and passt's framing. Without a peer nothing is there.
    Stream(Option<OwnedFd>),
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
    /// It cannot be sent, and the stream may have ended within another: the peer is to be left.
    Lost,
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
        match self {
            Self::Stream(Some(peer)) => outbox.flush(peer.as_fd()),
            _ => {
                outbox.clear();
                true
            }
        }
    }

    /// The peer is not to be heard of again, by nobody who has the socket.
    pub fn hang_up(&self) {
        if let Self::Stream(Some(peer)) = self {
            // It has done so itself, mostly.
            let _ = shutdown(peer.as_raw_fd(), Shutdown::Both);
        }
    }

    /// Sends a packet of `len` bytes by a socket; `fill` writes it to where it is collected.
    pub fn send(&self, outbox: &mut Outbox, len: usize, mut fill: impl FnMut(&mut [u8]) -> bool) -> Output {
        match self {
            Self::Stream(Some(_)) => {
                if outbox.append(len, &mut fill) {
                    return Output::Sent;
                }
                if outbox.is_empty() {
                    return Output::Dropped;
                }
                if !self.flush(outbox) {
                    return Output::Lost;
                }
                if !outbox.is_empty() {
                    return Output::Full;
                }
                if outbox.append(len, fill) { Output::Sent } else { Output::Dropped }
            }
            Self::Datagrams(Some(peer)) => outbox.send_one(peer.as_fd(), len, fill),
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
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

    use super::super::inbox::{Inbox, Input};
    use super::super::{inbox, outbox};
    use super::*;

    const WAY: u64 = 3;

    fn inbox_of(port: &Port, file: Option<&File>) -> Inbox {
        let mut inbox = Inbox::new(port, inbox::memory(port, file, 0).unwrap(), None);
        inbox.begin(WAY, 0);
        inbox
    }

    fn outbox_of(port: &Port, file: Option<&File>) -> Outbox {
        let mut outbox = Outbox::new(outbox::memory(port, file, inbox::KEPT as u64).unwrap());
        outbox.begin(WAY);
        outbox
    }

    fn memory() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(super::super::NET_KEPT).unwrap();
        file
    }

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
        let mut inbox = inbox_of(&port, None);
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
        inbox.consume();
        assert_eq!(inbox.receive(&port), Input::Nothing);
        drop(peer);
        assert_eq!(inbox.receive(&port), Input::Lost);
    }

    #[test]
    fn a_length_that_no_packet_has_ends_the_peer() {
        let (port, mut peer) = stream();
        peer.write_all(&[0, 1, 0, 15]).unwrap();
        assert_eq!(inbox_of(&port, None).receive(&port), Input::Lost);
    }

    #[test]
    fn a_peer_that_does_not_read_makes_the_guest_wait_and_nothing_is_torn() {
        let (port, mut peer) = stream();
        let mut outbox = outbox_of(&port, None);
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
    fn a_stream_that_fails_within_a_packet_is_lost() {
        let (port, peer) = stream();
        let mut outbox = outbox_of(&port, None);
        let mut send = || {
            port.send(&mut outbox, 1000, |place| {
                place.fill(9);
                true
            })
        };
        while send() == Output::Sent {}
        drop(peer);
        assert_eq!(send(), Output::Lost);
    }

    #[test]
    fn a_successor_goes_on_in_the_middle_of_a_packet_each_way() {
        let (port, mut peer) = stream();
        let file = memory();
        let mut inbox = inbox_of(&port, Some(&file));
        peer.write_all(&[frame(b"first"), frame(b"whole")].concat()[..15]).unwrap();
        assert_eq!(inbox.receive(&port), Input::Packet);
        inbox.give(0);
        let mut successor = inbox_of(&port, Some(&file));
        assert_eq!(successor.receive(&port), Input::Packet);
        assert_eq!(successor.packet().1, b"first", "the used ring does not have it");
        successor.give(0);
        let mut successor = Inbox::new(&port, inbox::memory(&port, Some(&file), 0).unwrap(), None);
        successor.begin(WAY, 1);
        assert_eq!(successor.receive(&port), Input::Nothing, "the guest has it");
        peer.write_all(&[frame(b"first"), frame(b"whole")].concat()[15..]).unwrap();
        assert_eq!(inbox_of(&port, Some(&file)).receive(&port), Input::Packet);
        let mut successor = inbox_of(&port, Some(&file));
        assert_eq!(successor.receive(&port), Input::Packet);
        assert_eq!(successor.packet().1, b"whole");
        // Another way out has nothing to do with it.
        let mut other = Inbox::new(&port, inbox::memory(&port, Some(&file), 0).unwrap(), None);
        other.begin(WAY + 1, 1);
        assert_eq!(other.receive(&port), Input::Nothing);

        let mut outbox = outbox_of(&port, Some(&file));
        assert!(outbox.append(5, copy(b"first")));
        assert!(!outbox.append(7, |place| {
            place.fill(1);
            false
        }));
        let mut successor = outbox_of(&port, Some(&file));
        assert!(successor.append(6, copy(b"second")));
        assert!(port.flush(&mut successor));
        assert!(outbox_of(&port, Some(&file)).is_empty());
        let mut sent = [0; 19];
        peer.read_exact(&mut sent).unwrap();
        assert_eq!(sent[..], [frame(b"first"), frame(b"second")].concat());
    }

    #[test]
    fn memory_that_makes_no_sense_harms_nobody() {
        let (port, mut peer) = stream();
        let file = memory();
        let mut random = 0x1234_5678_9abc_def1_u64;
        for round in 0..2000 {
            drop((inbox_of(&port, Some(&file)), outbox_of(&port, Some(&file))));
            for at in [0, 16, 64 + 56].into_iter().flat_map(|at| [at, at + inbox::KEPT as u64]) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let value = if random.is_multiple_of(4) { u64::MAX } else { random >> (random % 64) };
                file.write_all_at(&value.to_le_bytes(), at).unwrap();
            }
            let mut inbox = inbox_of(&port, Some(&file));
            if round % 2 == 0 {
                peer.write_all(&frame(b"x")).unwrap();
            }
            for _ in 0..10 {
                if inbox.receive(&port) == Input::Packet {
                    inbox.give(7);
                    inbox.consume();
                }
            }
            let mut outbox = outbox_of(&port, Some(&file));
            outbox.append(3, copy(b"abc"));
            port.flush(&mut outbox);
            let mut drain = vec![0; 1 << 18];
            let _all_of_it = nix::sys::socket::recv(peer.as_raw_fd(), &mut drain, MsgFlags::MSG_DONTWAIT);
        }
    }

    #[test]
    fn datagrams_are_packets() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let port = Port::Datagrams(Some(ours.into()));
        let (mut inbox, mut outbox) = (inbox_of(&port, None), outbox_of(&port, None));
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

    #[test]
    fn a_peer_that_keeps_packets_apart_is_lost_when_it_closes_and_an_empty_datagram_is_a_packet() {
        let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap();
        for kind in [SockType::SeqPacket, SockType::Datagram] {
            let (ours, theirs) = pair(kind);
            let port = Port::Datagrams(Some(ours));
            let mut inbox = inbox_of(&port, None);
            nix::unistd::write(&theirs, b"a packet").unwrap();
            assert_eq!(inbox.receive(&port), Input::Packet);
            assert_eq!(inbox.packet().1, b"a packet");
            inbox.consume();
            assert_eq!(inbox.receive(&port), Input::Nothing);
            if kind == SockType::SeqPacket {
                drop(theirs);
                assert_eq!(inbox.receive(&port), Input::Lost);
            } else {
                nix::sys::socket::send(theirs.as_raw_fd(), b"", MsgFlags::empty()).unwrap();
                assert_eq!(inbox.receive(&port), Input::Packet);
                inbox.consume();
                assert_eq!(inbox.receive(&port), Input::Nothing);
            }
        }
    }
}
