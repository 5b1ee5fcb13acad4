//! What the guest says, passed on once, also by a process that is killed while it does so.
//!
//! The bytes of a stream have numbers. Before some are passed on, the number of the last byte before them and how many they are is
//! stored in memory that outlives the process. A successor finds out what became of them: of a socket `sendmmsg` has noted how many
//! went, and a file that nobody else writes to has grown. A pipe or a terminal says nothing, nor does a file that others write
//! to: what was being written to one in the instant of the death is passed on again, at the most one write.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use bulkhead_ipc::channel::message::TYPED;
use nix::errno::Errno;

use super::backlog::Backlog;
use super::end::End;
use crate::kept::{HEAD, Kept};

/// Bytes that are passed on at once.
const MOST: usize = 4096;

const _: () = assert!((HEAD + MOST) as u64 == TYPED);

/// The word has the number of the byte that was passed on last, and above it how many more may have been.
const COUNT_SHIFT: u32 = 48;
const NUMBER: u64 = (1 << COUNT_SHIFT) - 1;

/// The way out.
#[derive(Debug)]
pub struct Said {
    kept: Kept,
    /// The first output is a file to whose end only this device writes.
    own_file: bool,
    begun: bool,
}

impl Said {
    /// Notes go to [`TYPED`] bytes of `file` from `offset` on, empty at the start. `own_file`: the first output is a file to whose end
    /// only this device writes.
    ///
    /// # Errors
    /// The file is too small, or the kernel refuses.
    pub fn new(file: &File, offset: u64, own_file: bool) -> io::Result<Self> {
        Ok(Self { kept: Kept::new(Some(file), offset, MOST)?, own_file, begun: false })
    }

    /// Goes on where a predecessor was that works no more; `first` is the first output. Returns the number of the byte that was
    /// passed on last.
    pub fn begin(&mut self, first: Option<&End>) -> u64 {
        let word = self.kept.word();
        if std::mem::replace(&mut self.begun, true) {
            return word & NUMBER;
        }
        let count = word >> COUNT_SHIFT;
        let went = match (self.kept.unsettled(), self.kept.way().checked_sub(1)) {
            _ if count == 0 => 0,
            (Some((_, sent)), _) => sent as u64,
            (None, Some(size)) => first.and_then(End::size).unwrap_or(size).saturating_sub(size),
            (None, None) => 0,
        };
        let number = (word & NUMBER).saturating_add(went.min(count));
        self.settle(number);
        number
    }

    /// Notes that so many bytes after this number may be passed on from now on.
    fn intend(&self, number: u64, count: usize) {
        self.kept.set_word(number & NUMBER | (count as u64) << COUNT_SHIFT);
    }

    /// Notes that all bytes up to this number are passed on.
    fn settle(&self, number: u64) {
        self.kept.set_word(number & NUMBER);
        self.kept.settle();
        self.kept.set_way(0);
    }

    /// Passes on some of the backlog, whose newest byte has this number. `is_first`: the output is the first.
    ///
    /// # Errors
    /// As [`End::write`].
    pub fn write(
        &mut self,
        (output, is_first): (&End, bool),
        backlog: &mut Backlog,
        newest: u64,
    ) -> Result<(), Errno> {
        let before = newest.saturating_sub(backlog.len() as u64);
        let bytes = backlog.front();
        let bytes = bytes.get(..MOST).unwrap_or(bytes);
        let result = if output.is_socket() {
            self.send(output, bytes, before)
        } else {
            if let Some(size) = output.size().filter(|_| is_first && self.own_file) {
                self.kept.set_way(size.saturating_add(1));
            }
            self.intend(before, bytes.len());
            output.write(bytes)
        };
        let count = result.unwrap_or(0);
        self.settle(before.saturating_add(count as u64));
        backlog.take(count);
        result.and_then(|count| if count == 0 { Err(Errno::EAGAIN) } else { Ok(()) })
    }

    fn send(&mut self, output: &End, bytes: &[u8], before: u64) -> Result<usize, Errno> {
        let place = self.kept.bytes_mut().get_mut(..bytes.len()).ok_or(Errno::EINVAL)?;
        place.copy_from_slice(bytes);
        self.intend(before, bytes.len());
        self.kept.send(output.as_fd(), 0, bytes.len())
    }
}
