//! What the members of a limit group tell each other: devices whose processes trust nobody share one rate limit.
//!
//! The supervisor makes one piece of memory for each place of a group and one that says which places are taken. A member's process
//! maps its own for writing and all others for reading, and keeps no descriptor: nobody can write what another says. All
//! places exist from the start, so that nobody need be told of a member that comes later, and what a member has said stays when
//! its process is replaced. No lock is shared, and reading costs no system call. What members make of the words is theirs to
//! judge: any value may stand there.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::words::{self, Words, WordsError};

/// The most members of a group.
pub const MEMBERS: usize = 16;
/// Words of a place.
const WORDS: usize = 8;

/// A kind of tokens, by the place of its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Tokens {
    /// Bytes.
    Bandwidth = 0,
    /// Requests or packets.
    Operations = 2,
}

/// What a member says of one kind of tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Word {
    /// What it, and who had its place before, has used so far: nanoseconds of the group's rate, modulo 2^64.
    pub used: u64,
    /// When the group's bucket is full again, as far as it knows: nanoseconds of CLOCK_MONOTONIC.
    pub full_at: u64,
}

fn load(words: &Words, kind: Tokens) -> Word {
    let place = kind as usize;
    // The other way round than they are stored: whoever sees the moment sees the use that led to it.
    let full_at = words.load(place.wrapping_add(1));
    Word { used: words.load(place), full_at }
}

/// The supervisor's end of a group.
#[derive(Debug)]
pub struct GroupMemory {
    roll: (OwnedFd, Words),
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    /// Open for writing.
    file: OwnedFd,
    /// Open for reading.
    readable: OwnedFd,
    words: Words,
}

impl GroupMemory {
    /// Makes the memory of a group without members.
    ///
    /// # Errors
    /// The host refuses memory or descriptors.
    pub fn create() -> std::io::Result<Self> {
        let other = |error: WordsError| std::io::Error::other(error);
        let file = words::create(c"limit-group", 1).map_err(other)?;
        let words = Words::map(file.as_fd(), 1, true).map_err(other)?;
        let roll = (readable(&file)?, words);
        let mut places = Vec::with_capacity(MEMBERS);
        for _ in 0..MEMBERS {
            let file = words::create(c"limit-member", WORDS).map_err(other)?;
            let words = Words::map(file.as_fd(), WORDS, true).map_err(other)?;
            places.push(Place { readable: readable(&file)?, file, words });
        }
        Ok(Self { roll, places })
    }

    /// Takes a free place; `None`: there is none.
    #[must_use]
    pub fn join(&self) -> Option<usize> {
        let taken = self.roll.1.load(0);
        let (number, place) = self.places.iter().enumerate().find(|(number, _)| !is_taken(taken, *number))?;
        // Who had it may have been broken into, and have left anything. What was used stays: others have seen it, and count what comes on
        // top of it.
        let used = [Tokens::Bandwidth, Tokens::Operations].map(|kind| kind as usize);
        (0..WORDS).filter(|word| !used.contains(word)).for_each(|word| place.words.store(word, 0));
        self.roll.1.store(0, taken | 1 << number);
        Some(number)
    }

    /// Gives a place up; its process has ended.
    pub fn leave(&self, place: usize) {
        if place < MEMBERS {
            self.roll.1.store(0, self.roll.1.load(0) & !(1 << place));
        }
    }

    /// What the process in this place is given: the roll, and every place, of which it may write its own.
    pub fn descriptors(&self, own: usize) -> (BorrowedFd<'_>, impl Iterator<Item = BorrowedFd<'_>>) {
        let places = self.places.iter().enumerate();
        let places = places.map(
            move |(number, place)| if number == own { place.file.as_fd() } else { place.readable.as_fd() },
        );
        (self.roll.0.as_fd(), places)
    }
}

fn is_taken(roll: u64, place: usize) -> bool {
    roll.checked_shr(u32::try_from(place).unwrap_or(u32::MAX)).is_some_and(|roll| roll & 1 == 1)
}

/// The same memory, open for reading alone: a mapping of it can never be made writable.
fn readable(file: &OwnedFd) -> std::io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

/// A member's end.
#[derive(Debug)]
pub struct GroupView {
    roll: Words,
    places: Vec<Words>,
    own: usize,
}

impl GroupView {
    /// Maps what [`GroupMemory::descriptors`] gives. To be called before the process is sealed.
    ///
    /// # Errors
    /// They cannot be mapped.
    pub fn map(roll: &OwnedFd, places: &[OwnedFd], own: usize) -> Result<Self, WordsError> {
        let places = places.iter().enumerate();
        let places = places.map(|(number, file)| Words::map(file.as_fd(), WORDS, number == own));
        Ok(Self { roll: Words::map(roll.as_fd(), 1, false)?, places: places.collect::<Result<_, _>>()?, own })
    }

    /// How many members there are, this one among them.
    #[must_use]
    pub fn members(&self) -> u32 {
        self.roll.load(0).count_ones().max(1)
    }

    /// What another member says; nothing of an empty place and of its own.
    #[must_use]
    pub fn other(&self, place: usize, kind: Tokens) -> Option<Word> {
        let words =
            self.places.get(place).filter(|_| place != self.own && is_taken(self.roll.load(0), place))?;
        Some(load(words, kind))
    }

    /// What was used by whoever had this place, also when nobody has it.
    #[must_use]
    pub fn used(&self, place: usize, kind: Tokens) -> u64 {
        self.places.get(place).map_or(0, |words| load(words, kind).used)
    }

    /// What this one, or a predecessor, has said last.
    #[must_use]
    pub fn own(&self, kind: Tokens) -> Word {
        self.places.get(self.own).map_or(Word::default(), |words| load(words, kind))
    }

    /// Says this.
    pub fn say(&self, kind: Tokens, word: Word) {
        let Some(words) = self.places.get(self.own) else { return };
        words.store(kind as usize, word.used);
        words.store((kind as usize).wrapping_add(1), word.full_at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(memory: &GroupMemory, own: usize) -> GroupView {
        let (roll, places) = memory.descriptors(own);
        let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let places: Vec<OwnedFd> = places.map(owned).collect();
        GroupView::map(&owned(roll), &places, own).unwrap()
    }

    #[test]
    fn members_see_what_others_say_and_a_successor_what_its_predecessor_said() {
        let memory = GroupMemory::create().unwrap();
        let (a, b) = (memory.join().unwrap(), memory.join().unwrap());
        let (first, second) = (view(&memory, a), view(&memory, b));
        assert_eq!((a, b, first.members()), (0, 1, 2));
        let word = Word { used: 7, full_at: 9 };
        first.say(Tokens::Operations, word);
        assert_eq!(second.other(a, Tokens::Operations), Some(word));
        assert_eq!(second.other(a, Tokens::Bandwidth), Some(Word::default()));
        assert_eq!((second.other(b, Tokens::Operations), second.other(5, Tokens::Operations)), (None, None));
        assert_eq!(view(&memory, a).own(Tokens::Operations), word);
        memory.leave(a);
        assert_eq!((second.members(), second.other(a, Tokens::Operations)), (1, None));
        // Who comes next owes nothing for who was there; what was used is counted on.
        assert_eq!(second.used(a, Tokens::Operations), 7);
        assert_eq!(memory.join(), Some(a));
        assert_eq!(second.other(a, Tokens::Operations), Some(Word { used: 7, full_at: 0 }));
    }

    #[test]
    fn nobody_writes_what_another_says_or_who_is_there() {
        let memory = GroupMemory::create().unwrap();
        let (_, places) = memory.descriptors(0);
        let mut refused = 0;
        for (number, place) in places.enumerate() {
            let writable = Words::map(place, WORDS, true);
            assert_eq!(writable.is_ok(), number == 0, "{number}");
            refused += usize::from(writable.is_err());
        }
        assert_eq!(refused, MEMBERS - 1);
        assert!(Words::map(memory.descriptors(0).0, 1, true).is_err());
        // A mapping for reading ignores what is stored.
        let view = view(&memory, 0);
        view.roll.store(0, 3);
        assert_eq!(memory.roll.1.load(0), 0);
    }

    #[test]
    fn a_group_has_so_many_places() {
        let memory = GroupMemory::create().unwrap();
        assert_eq!((0..MEMBERS).filter_map(|_| memory.join()).count(), MEMBERS);
        assert_eq!(memory.join(), None);
        memory.leave(3);
        memory.leave(MEMBERS);
        assert_eq!(memory.join(), Some(3));
    }
}
