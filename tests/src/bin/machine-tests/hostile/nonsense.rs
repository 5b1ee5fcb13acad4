//! Messages that are wrong: made from right ones, by what the message definitions say about sizes, fields and descriptors.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Most descriptors that one message can carry (SCM_MAX_FD).
const MOST: u64 = 253;

/// Numbers, the same for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).flat_map(|_| self.below(256).to_le_bytes().into_iter().take(1)).collect()
    }

    /// A number that finds mistakes more often than others.
    fn edge(&mut self) -> u64 {
        let bit = 1 << self.below(64);
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => bit,
            3 => bit - 1,
            4 => bit + 1,
            5 => self.below(16),
            6 => 4096 + self.below(600),
            _ => self.below(u64::MAX),
        }
    }
}

/// A message: its bytes, header first, and its descriptors.
pub struct Frame {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
    /// Offset and width of the header's fields; the payload follows the last.
    pub fields: &'static [(usize, usize)],
    /// Which of them is the size, and whether it counts the header.
    pub size: (usize, bool),
}

impl Frame {
    fn header(&self) -> usize {
        self.fields.last().map_or(0, |(offset, width)| offset + width)
    }

    fn set(&mut self, offset: usize, width: usize, value: u64) {
        for (byte, value) in self.bytes.iter_mut().skip(offset).take(width).zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Makes the size field tell the truth.
    fn measure(&mut self) {
        let (field, whole) = self.size;
        let length = self.bytes.len() - if whole { 0 } else { self.header().min(self.bytes.len()) };
        if let Some((offset, width)) = self.fields.get(field) {
            self.set(*offset, *width, length as u64);
        }
    }

    /// Makes something wrong, in most cases; the rest is [`Frame::misbehave`]'s.
    pub fn spoil(&mut self, random: &mut Random) {
        let header = self.header();
        let payload = self.bytes.len().saturating_sub(header);
        match random.below(10) {
            0..3 => {
                let field = usize::try_from(random.below(self.fields.len() as u64)).unwrap_or(0);
                if let Some((offset, width)) = self.fields.get(field) {
                    let value = random.edge();
                    self.set(*offset, *width, value);
                }
            }
            3..6 if payload > 0 => {
                let width = 1 << random.below(4);
                let offset =
                    header + usize::try_from(random.below(payload as u64)).unwrap_or(0) / width * width;
                let value = random.edge();
                self.set(offset, width, value);
            }
            6 => {
                let left = random.below(payload as u64);
                self.bytes.truncate(header + usize::try_from(left).unwrap_or(0));
                self.measure();
            }
            7 => {
                let most = if random.one_in(4) { 8192 } else { 32 };
                let more = usize::try_from(1 + random.below(most)).unwrap_or(1);
                let more = random.bytes(more);
                self.bytes.extend(more);
                if random.one_in(2) {
                    self.measure();
                }
            }
            8 => {
                let length = self.bytes.len();
                self.bytes = random.bytes(length);
            }
            _ => {
                let count = if random.one_in(4) { random.below(MOST) + 1 } else { 1 + random.below(4) };
                self.descriptors.extend((0..count).filter_map(|_| descriptor(random)));
            }
        }
    }

    /// Sends it in a way that no peer expects. Returns how many messages that makes, none if nothing more can be sent.
    pub fn misbehave(&self, socket: BorrowedFd<'_>, random: &mut Random) -> u64 {
        match random.below(2000) {
            // Late, just before and after the core's patience ends.
            0 => thread::sleep(Duration::from_millis(700 + random.below(600))),
            // Cut off, and then silence.
            1 => {
                let length = usize::try_from(random.below(self.bytes.len() as u64)).unwrap_or(0);
                send(socket, self.bytes.get(..length).unwrap_or_default(), &[]);
                thread::sleep(Duration::from_millis(1200));
                return 0;
            }
            // Byte by byte, each with a descriptor.
            2..120 => {
                let companion = descriptor(random);
                let companion: Vec<_> = companion.iter().map(AsFd::as_fd).collect();
                let sent = self.bytes.iter().take_while(|byte| send(socket, &[**byte], &companion)).count();
                return u64::from(sent == self.bytes.len());
            }
            // Twice.
            120..400 => return self.send(socket) + self.send(socket),
            400..500 => return 0,
            _ => {}
        }
        self.send(socket)
    }

    /// Sends it; 1 if it was taken.
    pub fn send(&self, socket: BorrowedFd<'_>) -> u64 {
        let descriptors: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        u64::from(send(socket, &self.bytes, &descriptors))
    }
}

/// Something that a message may carry, of any kind.
fn descriptor(random: &mut Random) -> Option<OwnedFd> {
    match random.below(6) {
        0 => EventFd::new().ok().map(OwnedFd::from),
        1 => {
            let memory =
                memfd_create(c"hostile", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).ok()?;
            nix::unistd::ftruncate(&memory, i64::try_from(random.below(8192)).ok()?).ok()?;
            Some(memory)
        }
        2 => nix::unistd::pipe().ok().map(|(read, _)| read),
        3 => File::open("/dev/null").ok().map(OwnedFd::from),
        4 => File::open("/").ok().map(OwnedFd::from),
        _ => std::os::unix::net::UnixStream::pair().ok().map(|(one, _)| one.into()),
    }
}

/// Sends all of `bytes`, the descriptors with the first of them, as long as somebody takes them.
fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
    let mut numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    numbers.truncate(usize::try_from(MOST).unwrap_or(0));
    let mut rest = bytes;
    while !rest.is_empty() {
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights: &[_] = if numbers.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(rest)], rights, flags, None) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(_) => return false,
        }
        numbers.clear();
    }
    true
}
