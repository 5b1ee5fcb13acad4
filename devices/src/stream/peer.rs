//! Who is at the other end of a stream.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollFlags};
use tracing::{debug, warn};

use super::backlog::Backlog;
use super::end::End;
use super::said::Said;
use super::typed::Typed;
use super::watch::{Tag, Watches};

/// Time between two attempts at the last output, milliseconds.
const LAST_STEP: u16 = 2;

/// The descriptors that a device starts with.
#[derive(Debug, Default)]
pub struct Ends {
    /// Where bytes for the guest come from.
    pub input: Option<End>,
    /// Where bytes from the guest go.
    pub output: Option<End>,
    /// Where bytes for the guest wait for it.
    pub typed: Option<Typed>,
    /// What passes on bytes of the guest that have numbers.
    pub said: Option<Said>,
}

impl Ends {
    /// Two descriptors, or one, or none.
    pub fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self { input: input.map(End::new), output: output.map(End::new), ..Self::default() }
    }

    /// The same, with bytes for the guest in memory that outlives the process.
    #[must_use]
    pub fn keeping(self, typed: Typed) -> Self {
        Self { typed: Some(typed), ..self }
    }

    /// The same, with bytes of the guest that have numbers passed on once.
    #[must_use]
    pub fn passing(self, said: Said) -> Self {
        Self { said: Some(said), ..self }
    }
}

/// A stream that was attached.
#[derive(Debug)]
struct Attached {
    end: End,
    /// It may still send: no end of its bytes was seen.
    talks: bool,
    /// It may still read: neither a hang-up nor an error was seen.
    listens: bool,
}

/// The first ends, and who has taken their place.
#[derive(Debug, Default)]
struct Places {
    first: Ends,
    attached: Option<Attached>,
}

impl Places {
    fn input(&self) -> Option<&End> {
        match &self.attached {
            Some(attached) => attached.talks.then_some(&attached.end),
            None => self.first.input.as_ref(),
        }
    }

    fn output(&self) -> Option<&End> {
        match &self.attached {
            Some(attached) if attached.listens => Some(&attached.end),
            _ => self.first.output.as_ref(),
        }
    }

    /// What the present peer says is over.
    fn end_input(&mut self) {
        match &mut self.attached {
            Some(attached) => attached.talks = false,
            None => self.first.input = None,
        }
    }

    /// The present output is of no more use.
    fn end_output(&mut self) {
        match &mut self.attached {
            Some(attached) if attached.listens => attached.listens = false,
            _ => self.first.output = None,
        }
    }
}

/// The present peer of a stream, and what is kept for it.
///
/// A device calls [`Self::woken`] when its loop reports the stream, moves bytes, and calls [`Self::watch`] before its loop waits.
#[derive(Debug, Default)]
pub struct Peer {
    places: Places,
    backlog: Backlog,
    watches: Watches,
    /// The output would take nothing when it was asked last.
    blocked: bool,
    /// The input was not ready when it was asked last, and nothing was reported since.
    quiet: bool,
    /// The guest waits for a peer that does not read for as long as it takes.
    patient: bool,
    /// What the peer has sent; none where memory for it could not be had.
    typed: Option<Typed>,
    /// What passes on bytes of the guest that have numbers, and the number of the newest.
    said: Option<Said>,
    newest: u64,
}

impl Peer {
    /// A stream with its first ends.
    pub fn new(mut first: Ends) -> Self {
        let typed = first.typed.take().or_else(|| Typed::new(None, 0).ok());
        let said = first.said.take();
        let mut this = Self { places: Places { first, attached: None }, typed, said, ..Self::default() };
        this.places_changed();
        this
    }

    /// The same, for a guest that waits for a slow peer: nothing is dropped while there is one.
    pub fn patient(first: Ends) -> Self {
        Self { patient: true, ..Self::new(first) }
    }

    /// Whether somebody reads what the guest says.
    pub fn is_present(&self) -> bool {
        self.places.output().is_some()
    }

    /// Lets `stream` take the place of the present peer. What was kept goes there first.
    pub fn attach(&mut self, stream: End) {
        debug!("a peer is attached");
        self.places.attached = Some(Attached { end: stream, talks: true, listens: true });
        self.places_changed();
        self.flush();
    }

    /// Every descriptor that the stream holds.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let Places { first, attached } = &self.places;
        let attached = attached.iter().map(|attached| &attached.end);
        first.input.iter().chain(&first.output).chain(attached).map(AsFd::as_fd)
    }

    /// Others than before may read and write.
    fn places_changed(&mut self) {
        let attached = &mut self.places.attached;
        if attached.as_ref().is_some_and(|attached| !attached.talks && !attached.listens) {
            debug!("the attached peer has gone");
            *attached = None;
        }
        self.quiet = false;
        self.blocked = false;
        self.backlog.set_reader(self.places.output().is_some());
    }

    /// Something may have been reported about the stream: there may be input, or room, or an attached peer has gone.
    pub fn woken(&mut self) {
        self.quiet = false;
        let hang_up = PollFlags::POLLHUP | PollFlags::POLLERR;
        if let Some(attached) = &self.places.attached
            && attached.listens
            // A stream that only ended its own direction goes on reading: that is no hang-up.
            && attached.end.poll(hang_up).intersects(hang_up)
        {
            self.output_ended();
        }
        self.flush();
    }

    /// The input, if reading it will not block: bytes, an end or an error are waiting. Tell [`Self::settle_read`] what
    /// reading came to.
    pub fn ready_input(&mut self) -> Option<BorrowedFd<'_>> {
        if self.quiet {
            return None;
        }
        let input = self.places.input()?;
        self.quiet = input.poll(PollFlags::POLLIN).is_empty();
        if self.quiet { None } else { Some(input.as_fd()) }
    }

    /// Bytes of the peer behind the first `known` that the guest has not got, `most` at most; if there are none, they are read
    /// now. `used`: index of the guest's used ring, if it has one; its ring, or what stands for it, must run.
    pub fn input(&mut self, known: usize, most: usize, used: Option<u16>) -> &[u8] {
        let there = self.typed.as_mut().map_or(0, |typed| {
            typed.begin(used);
            typed.unread().len()
        });
        if there <= known && most > 0 && self.ready_input().is_some() {
            let input = self.places.input().cloned();
            if let (Some(input), Some(typed)) = (input, &mut self.typed) {
                let result = typed.fill(&input, most);
                self.settle_read(result);
            }
        }
        let unread = self.typed.as_ref().and_then(|typed| typed.unread().get(known..)).unwrap_or_default();
        unread.get(..most).unwrap_or(unread)
    }

    /// The guest has got so many of these bytes.
    pub fn taken(&mut self, count: usize) {
        if let Some(typed) = self.typed.as_mut().filter(|_| count > 0) {
            typed.taken(count);
        }
    }

    /// What a predecessor, or this process, has answered to the read with this number.
    pub fn answered(&mut self, number: u64) -> Option<u8> {
        let typed = self.typed.as_mut()?;
        typed.begin(None);
        typed.answered(number)
    }

    /// The read with this number is answered so, with so many of these bytes.
    pub fn answer(&mut self, number: u64, value: u8, count: usize) {
        if let Some(typed) = &mut self.typed {
            typed.answer(number, value, count);
        }
    }

    /// So many of these bytes are given to the guest by `publish`, before which its used ring has this index.
    pub fn give(&mut self, count: usize, used: u16, publish: impl FnOnce()) {
        match &mut self.typed {
            Some(typed) => typed.give(count, used, publish),
            None => publish(),
        }
    }

    /// Takes note of what reading the input came to; returns the number of bytes, none at its end or after an error.
    pub fn settle_read(&mut self, result: io::Result<usize>) -> usize {
        match result {
            Ok(0) => self.input_ended(),
            Ok(count) => return count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.quiet = true,
            Err(error) => {
                // EIO: a terminal's other end has hung up.
                let gone = [Errno::EIO, Errno::ECONNRESET];
                if !gone.iter().any(|gone| error.raw_os_error() == Some(*gone as i32)) {
                    warn!(%error, "a stream's input failed and is given up");
                }
                self.input_ended();
            }
        }
        0
    }

    fn input_ended(&mut self) {
        self.places.end_input();
        if self.places.attached.as_ref().is_some_and(|attached| !attached.listens) {
            self.places_changed();
        }
    }

    fn output_ended(&mut self) {
        self.places.end_output();
        self.places_changed();
    }

    /// Bytes that [`Self::say`] can take now. With a peer that is merely slow it may be none; then the device waits, and
    /// comes back when it is woken or at [`Self::deadline`].
    pub fn room(&self) -> usize {
        self.backlog.room()
    }

    /// Goes on with the numbers of the guest's bytes where a predecessor was that works no more: returns that of the byte which needs
    /// nobody's care any more.
    pub fn begin_said(&mut self) -> u64 {
        self.newest = self.said.as_mut().map_or(0, |said| said.begin(self.places.first.output.as_ref()));
        self.newest
    }

    /// The newest byte that was said has this number, and those that wait have those before.
    pub const fn set_newest(&mut self, number: u64) {
        self.newest = number;
    }

    /// The guest says something; [`Self::flush`] sends it.
    pub fn say(&mut self, bytes: &[u8]) {
        self.backlog.push(bytes);
    }

    /// A predecessor of this process has taken these of the guest before all that waits.
    pub fn say_first(&mut self, bytes: &[u8]) {
        let later = self.backlog.take_all();
        self.backlog.push(bytes);
        self.backlog.push(&later);
        self.flush();
    }

    /// Bytes that wait for a reader.
    pub fn waiting(&self) -> usize {
        self.backlog.len()
    }

    /// Takes what waits for a reader away.
    pub fn take_waiting(&mut self) -> Vec<u8> {
        self.backlog.take_all()
    }

    /// Writes what waits, as far as the peer takes it without blocking.
    pub fn flush(&mut self) {
        loop {
            let front = self.backlog.front();
            let Some(output) = self.places.output().filter(|_| !front.is_empty()) else {
                self.blocked = false;
                return;
            };
            let result = match &mut self.said {
                Some(said) => {
                    let is_first = self.places.first.output.as_ref().is_some_and(|first| first.is(output));
                    said.write((output, is_first), &mut self.backlog, self.newest)
                }
                None => output.write(front).map(|count| self.backlog.take(count)),
            };
            match result {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.blocked = true;
                    self.backlog.refused(Instant::now());
                    return;
                }
                Err(errno) => {
                    if !matches!(errno, Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) {
                        warn!(%errno, "a stream's output failed and is given up");
                    }
                    self.output_ended();
                }
            }
        }
    }

    /// When the guest will have waited long enough for the peer, if it waits.
    pub fn deadline(&self) -> Option<Instant> {
        self.backlog.deadline().filter(|_| !self.patient)
    }

    /// Stops waiting for a peer whose time is over at `now`.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            // It may have taken less than epoll reports.
            self.flush();
        }
        if self.patient {
            return;
        }
        self.backlog.expire(now);
    }

    /// Gives the peer so much time to take what the guest said last.
    pub fn finish(&mut self, limit: Duration) {
        let begin = Instant::now();
        self.flush();
        while self.blocked && begin.elapsed() < limit {
            // Not the descriptor is waited for: one that is ready for a little may still not take the next piece.
            let _ = poll(&mut [], PollTimeout::from(LAST_STEP));
            self.flush();
        }
        if self.blocked {
            warn!(bytes = self.waiting(), "the last output was not read in time");
        }
        self.backlog.report();
    }

    /// Makes epoll report what the stream waits for, with events that `tag` makes. Cheap when nothing has changed.
    pub fn watch(&mut self, epoll: &Epoll, tag: Tag) {
        let output = self.places.output().filter(|_| self.blocked);
        let input = match &self.places.attached {
            // A hang-up is to be noticed even after the end of its input.
            Some(attached) => Some(&attached.end),
            None => self.places.first.input.as_ref(),
        };
        let wanted = match (input, output) {
            (Some(input), Some(output)) if input.is(output) => {
                [Some((input, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT)), None]
            }
            _ => [input.map(|end| (end, EpollFlags::EPOLLIN)), output.map(|end| (end, EpollFlags::EPOLLOUT))],
        };
        self.watches.set(wanted, epoll, tag);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
