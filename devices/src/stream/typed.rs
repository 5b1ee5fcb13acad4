//! What the host's side has sent and the guest has not got. It survives the process: a successor gives it to the guest.
//!
//! Of a socket `recvmmsg` notes what came. Of anything else the number of bytes that wait is asked for first, and their place is
//! filled with a mark: from that a successor knows what the last `read` of its predecessor brought. Bytes that are like the mark and
//! come last in such a read are lost when the process dies in the very moment between `read` and its next instruction.
//!
//! Contains unsafe code: an ioctl that fills an integer.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use bulkhead_ipc::channel::message::TYPED;
use nix::unistd::read;

use super::end::End;
use crate::kept::{HEAD, Kept};

/// Bytes that wait for the guest at the most.
const ROOM: usize = 4096;
/// Bytes of the memory that outlives the process.
pub const KEPT: usize = HEAD + ROOM;

const _: () = assert!(KEPT as u64 == TYPED);

/// No byte of UTF-8.
const MARK: u8 = 0xFF;

/// What is to be known of bytes that are being given to a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Giving {
    /// Index of its used ring before.
    used: u16,
    /// Where what it has not got begins afterwards.
    start: usize,
}

/// What was answered to a read that has a number, 48 bits, in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Answer {
    number: u64,
    value: u8,
    /// It took a byte of those that wait.
    takes: bool,
}

impl Answer {
    const NUMBER: u64 = (1 << 48) - 1;

    fn pack(self) -> u64 {
        self.number & Self::NUMBER | u64::from(self.value) << 48 | u64::from(self.takes) << 56
    }

    fn unpack(word: u64) -> Self {
        let [.., value, takes] = word.to_le_bytes();
        Self { number: word & Self::NUMBER, value, takes: takes != 0 }
    }

    /// What tells this answer from the one before.
    const fn mark(self) -> u64 {
        self.number & 0xFFFF
    }
}

/// Bytes for the guest.
#[derive(Debug)]
pub struct Typed {
    kept: Kept,
    unread: Range<usize>,
    /// The answer of which these know that they are fewer.
    mark: u64,
    /// Bytes that the `read` under way may bring.
    expected: usize,
    begun: bool,
}

nix::ioctl_read_bad!(bytes_that_wait, libc::FIONREAD, libc::c_int);

/// Number of bytes that a descriptor has; `None`: it does not say.
fn waiting(fd: BorrowedFd<'_>) -> Option<usize> {
    let mut count = 0;
    // SAFETY: the kernel fills an int that lives through the call.
    unsafe { bytes_that_wait(fd.as_raw_fd(), &raw mut count) }.ok()?;
    usize::try_from(count).ok()
}

impl Typed {
    /// Bytes in memory that may outlive the process: [`KEPT`] bytes of `file` from `offset` on, empty at the start.
    ///
    /// # Errors
    /// The file is too small, or the kernel refuses.
    pub fn new(file: Option<&File>, offset: u64) -> io::Result<Self> {
        Ok(Self { kept: Kept::new(file, offset, ROOM)?, unread: 0..0, mark: 0, expected: 0, begun: false })
    }

    /// Goes on where a predecessor was that works no more. `used`: index of the guest's used ring, if it has one; without one the guest
    /// reads byte by byte.
    pub fn begin(&mut self, used: Option<u16>) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let word = self.kept.word();
        let part = |at: u32| usize::try_from(word >> at & 0xFFFF).unwrap_or(0).min(ROOM);
        let (start, mut end, expected) = (part(0), part(16), part(32));
        if let Some((from, count)) = self.kept.unsettled().filter(|(from, _)| *from == end) {
            end = from.saturating_add(count).min(ROOM);
        }
        let came = self.kept.bytes().get(end..end.saturating_add(expected)).unwrap_or_default();
        let came = came.iter().rposition(|byte| *byte != MARK).map_or(0, |last| last.saturating_add(1));
        end = end.saturating_add(came);
        // The predecessor may have been broken into.
        self.unread = start.min(end)..end;
        self.expected = 0;
        let giving = self.kept.way();
        if used.is_none() {
            let answer = Answer::unpack(giving);
            let known = answer.mark() == word >> 48;
            self.mark = answer.mark();
            self.taken(usize::from(answer.takes && !known));
            self.kept.settle();
            return;
        }
        let giving = (giving >> 32 & 1 == 1).then(|| Giving {
            used: u16::try_from(giving & 0xFFFF).unwrap_or(0),
            start: usize::try_from(giving >> 16 & 0xFFFF).unwrap_or(0),
        });
        if giving.is_some_and(|giving| used.is_some_and(|used| used != giving.used)) {
            self.unread.start = giving.unwrap_or_default().start.clamp(start.min(end), end);
        }
        self.save();
        self.kept.settle();
        self.kept.set_way(0);
    }

    fn save(&self) {
        let place = |value: usize, at: u32| (value as u64 & 0xFFFF) << at;
        let Range { start, end } = self.unread;
        self.kept.set_word(place(start, 0) | place(end, 16) | place(self.expected, 32) | self.mark << 48);
    }

    /// What the guest has not got.
    pub fn unread(&self) -> &[u8] {
        self.kept.bytes().get(self.unread.clone()).unwrap_or_default()
    }

    /// The guest has got so many bytes.
    pub fn taken(&mut self, count: usize) {
        self.unread.start = self.unread.start.saturating_add(count).min(self.unread.end);
        self.save();
    }

    /// What was answered to the read with this number, if it is the last that was. No number: it is a new one.
    pub fn answered(&self, number: u64) -> Option<u8> {
        let answer = Answer::unpack(self.kept.way());
        (number != 0 && number == answer.number).then_some(answer.value)
    }

    /// The read with this number is answered so, with so many of the bytes.
    pub fn answer(&mut self, number: u64, value: u8, count: usize) {
        if number != 0 {
            let answer = Answer { number, value, takes: count > 0 };
            self.kept.set_way(answer.pack());
            self.mark = answer.mark();
        }
        self.taken(count);
    }

    /// So many bytes are given to the guest by `publish`, before which its used ring has this index.
    pub fn give(&mut self, count: usize, used: u16, publish: impl FnOnce()) {
        let start = self.unread.start.saturating_add(count).min(self.unread.end);
        self.kept.set_way(u64::from(used) | (start as u64) << 16 | 1 << 32);
        publish();
        self.taken(count);
        self.kept.set_way(0);
    }

    /// Makes room for `most` bytes, as far as that can be. What lies there is not touched before the copy of it counts.
    fn make_room(&mut self, most: usize) -> usize {
        let Range { start, end } = self.unread.clone();
        let length = end.saturating_sub(start);
        if length == 0 || ROOM.saturating_sub(end) < most && length <= start {
            self.kept.bytes_mut().copy_within(start..end, 0);
            self.unread = 0..length;
            self.save();
        }
        ROOM.saturating_sub(self.unread.end).min(most)
    }

    /// Reads at most `most` bytes more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn fill(&mut self, input: &End, most: usize) -> io::Result<usize> {
        let room = self.make_room(most);
        let end = self.unread.end;
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if input.is_socket() {
            let count = self.kept.receive(input.as_fd(), end, room)?;
            self.unread.end = end.saturating_add(count);
            self.save();
            self.kept.settle();
            return Ok(count);
        }
        let count = waiting(input.as_fd()).filter(|count| *count > 0).map_or(room, |count| count.min(room));
        self.expected = count;
        let place = self.kept.bytes_mut().get_mut(end..end.saturating_add(count)).unwrap_or_default();
        place.fill(MARK);
        self.save();
        let place = self.kept.bytes_mut().get_mut(end..end.saturating_add(count)).unwrap_or_default();
        let result = read(input.as_fd(), place);
        self.expected = 0;
        self.unread.end = end.saturating_add(result.unwrap_or(0));
        self.save();
        Ok(result?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn memory() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(KEPT as u64).unwrap();
        file
    }

    fn typed(file: &File, used: u16) -> Typed {
        let mut typed = Typed::new(Some(file), 0).unwrap();
        typed.begin(Some(used));
        typed
    }

    #[test]
    fn a_successor_has_what_the_guest_has_not_got() {
        let (mut peer, input) = UnixStream::pair().unwrap();
        let (reader, mut pipe) = std::io::pipe().unwrap();
        for (input, peer) in [(OwnedFd::from(input), &mut peer as &mut dyn Write), (reader.into(), &mut pipe)]
        {
            let (file, input) = (memory(), End::new(input));
            let mut first = typed(&file, 0);
            peer.write_all(b"some text").unwrap();
            assert_eq!(first.fill(&input, 6).unwrap(), 6);
            first.taken(2);
            assert_eq!(typed(&file, 0).unread(), b"me t");
            let mut first = typed(&file, 0);
            assert_eq!(first.fill(&input, 100).unwrap(), 3);
            first.give(5, 7, || {
                // Killed before, and after the guest has got it.
                let copy = memory();
                let mut bytes = vec![0; KEPT];
                file.read_exact_at(&mut bytes, 0).unwrap();
                copy.write_all_at(&bytes, 0).unwrap();
                assert_eq!(typed(&copy, 7).unread(), b"me text");
                copy.write_all_at(&bytes, 0).unwrap();
                assert_eq!(typed(&copy, 8).unread(), b"xt");
            });
            assert_eq!(typed(&file, 7).unread(), b"xt");
        }
    }

    #[test]
    fn what_a_read_brought_that_nobody_noted_is_there() {
        let file = memory();
        let mut first = typed(&file, 0);
        (first.unread, first.expected) = (3..10, 8);
        first.kept.bytes_mut()[..18].copy_from_slice(b"...unread\0came\xff\xff\xff\xff");
        first.save();
        assert_eq!(typed(&file, 0).unread(), b"unread\0came");
        assert_eq!(typed(&file, 0).unread(), b"unread\0came", "once");
    }

    #[test]
    fn room_is_made_and_nonsense_harms_nobody() {
        let file = memory();
        let (mut peer, input) = UnixStream::pair().unwrap();
        let input = End::new(input.into());
        let mut here = typed(&file, 0);
        for round in 0..3000_u32 {
            peer.write_all(&round.to_le_bytes()).unwrap();
            assert_eq!(here.fill(&input, 16).unwrap(), 4);
            assert_eq!(here.unread(), round.to_le_bytes());
            here.taken(4);
        }
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..500 {
            for at in [0, 8, 16, 64 + 56] {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                file.write_all_at(&(random >> (random % 60)).to_le_bytes(), at).unwrap();
            }
            let mut here = typed(&file, 3);
            peer.write_all(b"x").unwrap();
            let _full = here.fill(&input, 5000);
            here.give(here.unread().len(), 3, || ());
            assert!(here.unread().is_empty());
        }
    }
}
