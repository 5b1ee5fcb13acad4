//! Packets for a stream that are not sent yet. They survive the process: a successor goes on with them, in the middle of one if that
//! is where its predecessor was.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::port::{LENGTH, Output, Port};
use crate::kept::{HEAD, Kept};

/// Bytes collected for a stream before the guest has to wait.
const ROOM: usize = 128 << 10;
/// Bytes of the memory that outlives the process.
pub const KEPT: usize = HEAD + ROOM;

/// Packets for a stream.
#[derive(Debug)]
pub struct Outbox {
    kept: Kept,
    /// Bytes collected, and those of them that are sent.
    length: usize,
    sent: usize,
    begun: bool,
}

impl Outbox {
    /// Packets in memory that may outlive the process.
    pub const fn new(kept: Kept) -> Self {
        Self { kept, length: 0, sent: 0, begun: false }
    }

    /// Where packets go is this way; a predecessor's packets are another's unless it was the same. To be called when no predecessor
    /// works any more.
    pub fn begin(&mut self, way: u64) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        if self.kept.way() != way {
            self.restart(way);
            return;
        }
        let word = self.kept.word();
        // The predecessor may have been broken into.
        self.length = usize::try_from(word & u64::from(u32::MAX)).unwrap_or(0).min(ROOM);
        self.sent = usize::try_from(word >> 32).unwrap_or(0);
        if let Some((from, count)) = self.kept.unsettled().filter(|_| self.length > 0) {
            self.sent = from.saturating_add(count);
        }
        self.sent = self.sent.min(self.length);
        self.save();
        self.kept.settle();
    }

    /// Another way out begins.
    pub fn restart(&mut self, way: u64) {
        (self.length, self.sent) = (0, 0);
        self.kept.begin(way);
    }

    fn save(&self) {
        self.kept.set_word(self.length as u64 | (self.sent as u64) << 32);
    }

    /// Forgets what was collected, or knows that it is sent.
    pub fn clear(&mut self) {
        if self.length > 0 {
            (self.length, self.sent) = (0, 0);
            self.save();
        }
    }

    /// Whether all is sent.
    pub const fn is_empty(&self) -> bool {
        self.sent == self.length
    }

    /// Appends a packet of `len` bytes, which `fill` writes; false if there is no room for it, or `fill` failed.
    pub fn append(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> bool) -> bool {
        let start = self.length.saturating_add(LENGTH);
        let end = start.saturating_add(len);
        let place = self.kept.bytes_mut().get_mut(self.length..end).filter(|_| end <= ROOM);
        let Some((length, packet)) = place.and_then(<[u8]>::split_first_chunk_mut::<LENGTH>) else {
            return false;
        };
        *length = u32::try_from(len).unwrap_or(0).to_be_bytes();
        if !fill(packet) {
            return false;
        }
        // It is there once it is whole.
        self.length = end;
        self.save();
        true
    }

    /// Sends what is collected. False: the peer has gone.
    pub fn flush(&mut self, peer: BorrowedFd<'_>) -> bool {
        while !self.is_empty() {
            match self.kept.send(peer, self.sent, self.length.saturating_sub(self.sent)) {
                Ok(count) => {
                    self.sent = self.sent.saturating_add(count).min(self.length);
                    self.save();
                    self.kept.settle();
                }
                Err(Errno::EAGAIN) => return true,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    self.clear();
                    return false;
                }
            }
        }
        self.clear();
        true
    }

    /// Sends one packet of `len` bytes, which `fill` writes, as a datagram.
    pub fn send_one(
        &mut self,
        peer: BorrowedFd<'_>,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Output {
        let Some(place) = self.kept.bytes_mut().get_mut(..len) else { return Output::Dropped };
        if !fill(place) {
            return Output::Dropped;
        }
        match send(peer.as_raw_fd(), place, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Output::Sent,
            Err(Errno::EAGAIN) => Output::Full,
            Err(_) => Output::Dropped,
        }
    }
}

/// Memory for the packets for `port`.
///
/// # Errors
/// As [`Kept::new`].
pub fn memory(port: &Port, file: Option<&std::fs::File>, offset: u64) -> io::Result<Kept> {
    // A tap gets its packets from the guest's memory.
    Kept::new(file, offset, if matches!(port, Port::Tap(_)) { 0 } else { ROOM })
}
