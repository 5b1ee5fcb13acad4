//! Packets from outside that the guest has not got yet. They survive the process: a successor goes on with them.
//!
//! Of a stream many are read at once, of the other ways out one at a time. `recvmmsg` notes for a successor what came. A tap is no
//! socket, and what `read` returns is lost with the process. But the kernel's driver makes the length of a packet the position of the open
//! file that it was read from, which the process cannot ask for, but its supervisor: it hands over a file that says so. Whether a packet
//! came at all is told by a mark in the room for it, in a place where no packet's header has it. On a host without such a file the mark
//! and the lengths in an IP header tell where a packet ends, and one that is not IP and ends like the mark may lose its end.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_ipc::tap::VNET_HEADER;
use nix::errno::Errno;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::unistd::read;

use super::port::{Header, LARGEST, LENGTH, Port, SMALLEST};
use crate::kept::{HEAD, Kept};

/// Bytes taken from a stream at once. There are two areas of that size: what is left of one goes to the beginning of the other.
const AREA: usize = 128 << 10;
/// A packet with its header.
const PACKET: usize = LARGEST + VNET_HEADER;
/// Bytes of the memory that outlives the process.
pub const KEPT: usize = HEAD + 2 * AREA;
/// What unused room for a packet of a tap is filled with. No packet's header begins so: flags of that value do not exist.
const MARK: u8 = 0xA5;

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

/// How packets come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tap,
    /// A packet with nothing in it is one.
    Datagrams,
    /// A socket that keeps packets apart and ends with its peer: nothing is what comes then.
    Packets,
    Stream,
}

/// What a successor must know, in one word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    /// What was read and not given to the guest, within its area.
    filled: Range<usize>,
    /// It is the second area.
    second: bool,
    /// The first packet is being given to a guest whose used ring has this index; when it has another, the guest has got it.
    giving: Option<u16>,
    /// A packet from a tap is done with, and its room is not filled with the mark yet.
    spent: bool,
}

impl State {
    fn pack(&self) -> u64 {
        let place = |value: usize, at: u32| (value as u64 & 0xF_FFFF) << at;
        let giving = self.giving.map_or(0, |used| 1 << 56 | u64::from(used) << 40);
        let flags = u64::from(self.second) << 57 | u64::from(self.spent) << 58;
        place(self.filled.start, 0) | place(self.filled.end, 20) | giving | flags
    }

    fn unpack(word: u64) -> Self {
        let place = |at: u32| usize::try_from(word >> at & 0xF_FFFF).unwrap_or(0);
        let giving = (word >> 56 & 1 == 1).then(|| u16::try_from(word >> 40 & 0xFFFF).unwrap_or(0));
        Self { filled: place(0)..place(20), second: word >> 57 & 1 == 1, giving, spent: word >> 58 & 1 == 1 }
    }
}

/// A packet from outside, and on a stream what follows it.
#[derive(Debug)]
pub struct Inbox {
    kept: Kept,
    kind: Kind,
    state: State,
    header: Header,
    /// The packet that is to be given to the guest, within its area.
    body: Range<usize>,
    /// What a predecessor left is known.
    begun: bool,
    /// It says how long the packet is that was read last.
    position: Option<Arc<File>>,
}

/// Where an IP packet in this Ethernet frame ends, as its header says it.
fn ip_end(frame: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?));
    let tag = if word(12)? == 0x8100 { 4 } else { 0 };
    let length = |at: usize| word(at.checked_add(tag)?).map(usize::from);
    let start = tag.checked_add(SMALLEST)?;
    match word(tag.checked_add(12)?)? {
        0x0800 => start.checked_add(length(16)?),
        0x86DD => start.checked_add(40)?.checked_add(length(18)?),
        _ => None,
    }
}

/// The position of an open file as its `fdinfo` says it (proc(5)).
fn position(info: &File) -> Option<usize> {
    let mut text = [0; 256];
    let count = info.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(text.get(..count)?).ok()?;
    text.lines().find_map(|line| line.strip_prefix("pos:")?.trim().parse().ok())
}

/// Length of a packet with its header that lies in marked room; `None`: none came. `position`: what the kernel says of it.
fn marked_length(room: &[u8], position: Option<usize>) -> Option<usize> {
    if room.first() == Some(&MARK) {
        return None;
    }
    if let Some(length) = position.filter(|length| (1..=room.len()).contains(length)) {
        return Some(length);
    }
    let written = room.iter().rposition(|byte| *byte != MARK)?.saturating_add(1);
    let said = room.get(VNET_HEADER..).and_then(ip_end).map_or(0, |end| end.saturating_add(VNET_HEADER));
    Some(written.max(said).min(room.len()))
}

impl Inbox {
    /// Packets of `port`, in memory that may outlive the process; for a tap with the `fdinfo` of its queue, if the host has it. To be
    /// called before the process is sealed.
    pub fn new(port: &Port, kept: Kept, position: Option<Arc<File>>) -> Self {
        let kind = match port {
            Port::Tap(_) => Kind::Tap,
            Port::Datagrams(Some(peer)) if getsockopt(peer, sockopt::SockType) == Ok(SockType::SeqPacket) => {
                Kind::Packets
            }
            Port::Datagrams(_) => Kind::Datagrams,
            Port::Stream(_) => Kind::Stream,
        };
        let (state, header) = Default::default();
        Self { kept, kind, state, header, body: 0..0, begun: false, position }
    }

    /// Where packets go is this way; a predecessor's packets are another's unless it was the same. `used`: index of the guest's used
    /// ring. To be called when no predecessor works any more.
    pub fn begin(&mut self, way: u64, used: u16) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let info = self.position.take();
        if self.kept.way() != way {
            self.restart(way);
            return;
        }
        self.state = State::unpack(self.kept.word());
        if let Some((from, count)) = self.kept.unsettled() {
            let start = if self.state.second { from.saturating_sub(AREA) } else { from };
            self.state.filled.end = start.saturating_add(count);
        }
        let Range { start, end } = self.state.filled;
        // The predecessor may have been broken into.
        let end = end.min(if self.kind == Kind::Stream { AREA } else { PACKET });
        self.state.filled = start.min(end)..end;
        if self.kind == Kind::Tap && !self.state.spent && self.state.filled.is_empty() {
            let room = self.kept.bytes().get(..PACKET).unwrap_or_default();
            self.state.filled = 0..marked_length(room, info.and_then(|info| position(&info))).unwrap_or(0);
        }
        let given = self.state.giving.take().is_some_and(|before| before != used);
        self.save();
        self.kept.settle();
        // All of it, once: the predecessor may have been broken into.
        if self.state.spent || self.kind == Kind::Tap && self.state.filled.is_empty() {
            self.state.filled = 0..PACKET;
            self.mark();
        }
        if given && self.next_packet() == Some(Ok(())) {
            self.consume();
        }
    }

    /// Another way out begins.
    pub fn restart(&mut self, way: u64) {
        (self.state, self.body) = (State::default(), 0..0);
        // The way counts last: a successor of a process killed before does the same again.
        self.kept.begin(0);
        if self.kind == Kind::Tap {
            self.state.filled = 0..PACKET;
            self.mark();
        }
        self.kept.set_way(way);
    }

    fn save(&self) {
        self.kept.set_word(self.state.pack());
    }

    /// Fills the room of a packet of a tap with the mark.
    fn mark(&mut self) {
        if let Some(room) = self.kept.bytes_mut().get_mut(self.state.filled.clone()) {
            room.fill(MARK);
        }
        self.state = State::default();
        self.save();
    }

    /// Where the area begins.
    const fn area(&self) -> usize {
        if self.state.second { AREA } else { 0 }
    }

    fn bytes(&self, range: Range<usize>) -> &[u8] {
        let area = self.area();
        let range = range.start.saturating_add(area)..range.end.saturating_add(area);
        self.kept.bytes().get(range).unwrap_or_default()
    }

    /// The header of virtio and the packet.
    pub fn packet(&self) -> (&Header, &[u8]) {
        (&self.header, self.bytes(self.body.clone()))
    }

    /// The packet is given to a guest whose used ring has this index before.
    pub fn give(&mut self, used: u16) {
        self.state.giving = Some(used);
        self.save();
    }

    /// The packet is done with.
    pub fn consume(&mut self) {
        self.state.giving = None;
        let Range { start, end } = self.state.filled;
        match self.kind {
            Kind::Tap => self.state.spent = true,
            Kind::Datagrams | Kind::Packets => self.state.filled = 0..0,
            Kind::Stream => self.state.filled.start = start.max(self.body.end).min(end),
        }
        self.save();
        if self.state.spent {
            self.mark();
        }
        self.body = 0..0;
    }

    /// Finds the first packet in what was read; `Err`: it is none.
    fn next_packet(&mut self) -> Option<Result<(), ()>> {
        let unread = self.bytes(self.state.filled.clone());
        if self.kind != Kind::Stream {
            let skip = if self.kind == Kind::Tap { VNET_HEADER } else { 0 };
            self.header = unread.first_chunk().copied().filter(|_| skip > 0).unwrap_or_default();
            let end = self.state.filled.end;
            self.body = skip.min(end)..end;
            return (end > 0).then_some(Ok(()));
        }
        let (length, rest) = unread.split_first_chunk::<LENGTH>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > LARGEST {
            return Some(Err(()));
        }
        rest.get(..length)?;
        let start = self.state.filled.start.saturating_add(LENGTH);
        self.body = start..start.saturating_add(length);
        Some(Ok(()))
    }

    /// Makes room behind what was read of a stream. What lies there is not touched before the copy of it counts.
    fn make_room(&mut self) {
        let Range { start, end } = self.state.filled;
        if start == 0 {
            return;
        }
        if start < end {
            let (from, to) = (self.area(), AREA.saturating_sub(self.area()));
            let range = from.saturating_add(start)..from.saturating_add(end);
            self.kept.bytes_mut().copy_within(range, to);
            self.state.second = !self.state.second;
        }
        self.state.filled = 0..end.saturating_sub(start);
        self.save();
    }

    /// Receives from a socket behind what was read.
    fn receive_from(&mut self, socket: BorrowedFd<'_>, size: usize) -> nix::Result<usize> {
        let end = self.state.filled.end;
        let room = size.saturating_sub(end);
        let count = self.kept.receive(socket, self.area().saturating_add(end), room)?;
        self.state.filled.end = end.saturating_add(count);
        self.save();
        self.kept.settle();
        Ok(count)
    }

    fn receive_frame(&mut self, peer: BorrowedFd<'_>) -> Input {
        loop {
            match self.next_packet() {
                Some(Ok(())) => return Input::Packet,
                Some(Err(())) => return Input::Lost,
                None => {}
            }
            self.make_room();
            match self.receive_from(peer, AREA) {
                Ok(0) => return Input::Lost,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Input::Nothing,
                Err(_) => return Input::Lost,
            }
        }
    }

    fn receive_tap(&mut self, tap: BorrowedFd<'_>) -> nix::Result<usize> {
        let room = self.kept.bytes_mut().get_mut(..PACKET).unwrap_or_default();
        let count = read(tap, room)?;
        self.state.filled = 0..count;
        self.save();
        Ok(count)
    }

    /// Takes a packet from the port. One that is there is not done with and stays.
    pub fn receive(&mut self, port: &Port) -> Input {
        if !self.body.is_empty() {
            return Input::Packet;
        }
        if self.kind != Kind::Stream && self.next_packet().is_some() {
            return Input::Packet;
        }
        let result = match port {
            Port::Tap(tap) => self.receive_tap(tap.as_fd()),
            Port::Datagrams(Some(peer)) => self.receive_from(peer.as_fd(), LARGEST),
            Port::Stream(Some(peer)) => return self.receive_frame(peer.as_fd()),
            Port::Datagrams(None) | Port::Stream(None) => return Input::Nothing,
        };
        match result {
            Ok(0) if self.kind == Kind::Packets => Input::Lost,
            // An empty datagram is done with at once.
            Ok(_) => {
                self.next_packet();
                Input::Packet
            }
            // A tap that is down has nothing; a datagram's peer may come back.
            Err(_) => Input::Nothing,
        }
    }
}

/// Memory for the packets of `port`.
///
/// # Errors
/// As [`Kept::new`].
pub fn memory(port: &Port, file: Option<&File>, offset: u64) -> io::Result<Kept> {
    let bytes = if matches!(port, Port::Stream(_)) { 2 * AREA } else { PACKET.next_multiple_of(HEAD) };
    Kept::new(file, offset, bytes)
}

#[cfg(test)]
mod tests {

    use super::*;

    const WAY: u64 = 3;

    fn tap_with(file: &File) -> Inbox {
        let port = Port::Tap(Arc::new(tempfile::tempfile().unwrap()));
        Inbox::new(&port, memory(&port, Some(file), 0).unwrap(), None)
    }

    fn byte(file: &File, at: usize) -> u8 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        byte[0]
    }

    #[test]
    fn the_room_for_a_packet_is_marked_before_its_way_counts() {
        for _ in 0..300 {
            let file = tempfile::tempfile().unwrap();
            file.set_len(KEPT as u64).unwrap();
            let mut inbox = tap_with(&file);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // The word that says the way.
                    while byte(&file, 8) != 3 {}
                    assert_eq!(byte(&file, HEAD + PACKET - 1), MARK);
                });
                inbox.begin(WAY, 0);
            });
        }
    }

    #[test]
    fn a_packet_that_ends_like_the_mark_is_whole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(KEPT as u64).unwrap();
        tap_with(&file).begin(WAY, 0);
        // Read by a process that could note nothing any more. No IP, and a tail like the mark.
        let packet = [&[0; VNET_HEADER][..], &[2; 12], &[0x88, 0xB5], &[MARK; 50]].concat();
        file.write_all_at(&packet, HEAD as u64).unwrap();
        let info = tempfile::tempfile().unwrap();
        let text = format!("pos:\t{}\nflags:\t0104002\n", packet.len());
        info.write_all_at(text.as_bytes(), 0).unwrap();
        let mut inbox = tap_with(&file);
        inbox.position = Some(Arc::new(info.try_clone().unwrap()));
        inbox.begin(WAY, 0);
        assert_eq!(inbox.next_packet(), Some(Ok(())));
        assert_eq!(inbox.packet().1, &packet[VNET_HEADER..]);
        // None came: the position is that of one before.
        inbox.consume();
        let mut inbox = tap_with(&file);
        inbox.position = Some(Arc::new(info));
        inbox.begin(WAY, 0);
        assert_eq!(inbox.next_packet(), None);
    }

    #[test]
    fn room_that_a_predecessor_marked_in_part_is_marked_anew() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(KEPT as u64).unwrap();
        tap_with(&file).begin(WAY, 0);
        file.write_all_at(&[7; 100], (HEAD + 50) as u64).unwrap();
        tap_with(&file).begin(WAY, 0);
        assert!((0..PACKET).step_by(50).all(|at| byte(&file, HEAD + at) == MARK));
    }
}
