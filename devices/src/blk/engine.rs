//! io_uring for one queue: the disk's operations, and the eventfds that wake the queue. The operations of an image in a format go to
//! its threads instead.
//!
//! Contains unsafe code: submission entries carry raw pointers. The engine owns the guest buffers of every operation under
//! way, gives nobody access to them until the kernel is done, and is not dropped before that, so that the pointers in a
//! submission stay valid whatever its user does.
//!
//! The ring is restricted to the operations below, on the files that it was given, before it is enabled: seccomp does not see
//! what goes through it. Eventfds come and go later, so they stand in an epoll instance, which is one of those files.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_ipc::memory::{Direction, GuestRam, LentVector};
use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue, types};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::pool::{Done, Io, Operation, Pool};

/// Entries of the submission queue. When it is full it is submitted early.
const SUBMISSIONS: u32 = 64;
/// Entries of the completion queue: every slot, and the wake-ups.
const COMPLETIONS: u32 = 512;
/// Most operations under way.
pub const MAX_SLOTS: usize = 256;
/// Most entries of a vector (IOV_MAX).
const MAX_IOVECS: usize = 1024;
/// Bytes of zero written at once where the disk cannot make them itself. Large enough to be mapped afresh when it is
/// allocated: only read, it stays the kernel's zero page.
const ZEROES: usize = 256 * 1024;
/// A read or write of so many bytes is submitted by itself. Of several that follow each other on the disk and are submitted together the
/// kernel makes one: they end together, the driver's next ones begin together, and between these the disk has nothing to do.
const LARGE: usize = 64 * 1024;
/// The token of a wake-up; those of operations are their slots.
const WOKEN: u64 = u64::MAX;
/// The disk's index in the registered files.
const DISK: Fixed = Fixed(0);
/// The same without O_DIRECT.
const CACHED: Fixed = Fixed(1);
/// The eventfds that wake the queue.
const WATCHED: Fixed = Fixed(2);
/// No file has this index.
const NONE: RawFd = -1;
/// IORING_ENTER_GETEVENTS.
const GETEVENTS: u32 = 1;
/// IOSQE_FIXED_FILE.
const FIXED_FILE: u8 = 1;

/// What the engine reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The operation of a slot ended: bytes moved, or an errno.
    Done { slot: usize, result: Result<usize, i32> },
    /// A watched descriptor became readable.
    Woken,
}

struct Slot {
    buffers: LentVector,
    busy: bool,
}

/// The image's threads, and where they say what they have done.
struct Images {
    pool: Arc<Pool>,
    done: Arc<Done>,
}

/// What the operations are carried out on.
#[derive(Debug)]
pub enum Disk<'a> {
    /// A raw image or block device, and the same without O_DIRECT if it is open with that.
    Raw(&'a File, Option<&'a File>),
    /// An image in a format.
    Image(Arc<Pool>),
}

/// The engine of a queue.
pub struct Engine {
    uring: IoUring,
    epoll: Epoll,
    images: Option<Images>,
    slots: Vec<Slot>,
    busy: usize,
    /// Nobody hears of what wakes the epoll instance, until there is room in the ring to listen again.
    deaf: bool,
    zeroes: Vec<u8>,
}

fn build() -> io::Result<IoUring> {
    let plain = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(COMPLETIONS).setup_r_disabled();
        builder
    };
    // Completions run in this thread when it asks for them, and a flag says that there are some (Linux 6.1); without that a wait is
    // interrupted for each.
    plain()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(SUBMISSIONS)
        .or_else(|_| plain().build(SUBMISSIONS))
}

impl Engine {
    /// Sets up an io_uring for the calling thread that can do nothing but this engine's operations.
    ///
    /// # Errors
    /// The kernel has no io_uring, forbids it, or is older than 5.13.
    pub fn new(disk: Disk<'_>) -> io::Result<Self> {
        let uring = build()?;
        let submitter = uring.submitter();
        let mut restrictions = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_op(opcode::PollAdd::CODE),
            Restriction::sqe_flags_allowed(FIXED_FILE),
            Restriction::sqe_flags_required(FIXED_FILE),
        ];
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (disk, cached, images) = match disk {
            Disk::Raw(disk, cached) => (disk.as_raw_fd(), cached.map_or(NONE, AsRawFd::as_raw_fd), None),
            Disk::Image(pool) => (NONE, NONE, Some(Images { pool, done: Arc::new(Done::new()?) })),
        };
        submitter.register_files(&[disk, cached, epoll.0.as_raw_fd()])?;
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        let done = images.as_ref().map(|images| Arc::clone(&images.done));
        let mut engine =
            Self { uring, epoll, images, slots: Vec::new(), busy: 0, deaf: false, zeroes: Vec::new() };
        done.map_or(Ok(()), |done| engine.watch(done.wake.as_fd()))?;
        engine.listen()?;
        engine.enter(false)?;
        Ok(engine)
    }

    /// The descriptors that it keeps open.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let done = self.images.as_ref().map(|images| images.done.wake.as_fd().as_raw_fd());
        [Some(self.uring.as_raw_fd()), Some(self.epoll.0.as_raw_fd()), done].into_iter().flatten().collect()
    }

    /// Gives an operation to the image's threads.
    fn give(&mut self, slot: usize, operation: Operation, offset: u64) -> io::Result<()> {
        let (Some(images), Some(given)) = (&self.images, self.slots.get_mut(slot).filter(|slot| !slot.busy))
        else {
            return Err(busy());
        };
        let empty = GuestRam::empty().lend_vector(Direction::Read);
        let buffers = std::mem::replace(&mut given.buffers, empty);
        given.busy = true;
        self.busy = self.busy.saturating_add(1);
        images.pool.begin(Io { slot, buffers, operation, offset, done: Arc::clone(&images.done) });
        Ok(())
    }

    /// Makes one more slot; `None` when there are enough.
    pub fn add_slot(&mut self, ram: &GuestRam) -> Option<usize> {
        let index = self.slots.len();
        if index >= MAX_SLOTS {
            return None;
        }
        self.slots.push(Slot { buffers: ram.lend_vector(Direction::Read), busy: false });
        Some(index)
    }

    /// The buffers of a slot without an operation under way.
    pub fn buffers(&mut self, slot: usize) -> Option<&mut LentVector> {
        self.slots.get_mut(slot).filter(|slot| !slot.busy).map(|slot| &mut slot.buffers)
    }

    /// Number of operations under way.
    pub fn busy(&self) -> usize {
        self.busy
    }

    /// Lets go of guest memory; no operation may be under way.
    pub fn forget_memory(&mut self) {
        let nothing = GuestRam::empty();
        for slot in self.slots.iter_mut().filter(|slot| !slot.busy) {
            slot.buffers.restart(&nothing, Direction::Read);
        }
    }

    /// Reads from the disk at `offset` into what is left of the slot's buffers.
    /// `cached`: around O_DIRECT.
    pub fn read(&mut self, slot: usize, offset: u64, cached: bool) -> io::Result<()> {
        if self.images.is_some() {
            return self.give(slot, Operation::Read, offset);
        }
        let disk = if cached { CACHED } else { DISK };
        self.transfer(slot, |iovecs, count| opcode::Readv::new(disk, iovecs, count).offset(offset).build())
    }

    /// Writes what is left of the slot's buffers to the disk at `offset`; `durable`: it is on the disk when it is done.
    /// `cached`: around O_DIRECT.
    pub fn write(&mut self, slot: usize, offset: u64, durable: bool, cached: bool) -> io::Result<()> {
        if self.images.is_some() {
            let operation = if durable { Operation::WriteDurably } else { Operation::Write };
            return self.give(slot, operation, offset);
        }
        let disk = if cached { CACHED } else { DISK };
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        self.transfer(slot, |iovecs, count| {
            opcode::Writev::new(disk, iovecs, count).offset(offset).rw_flags(flags).build()
        })
    }

    fn transfer(
        &mut self,
        slot: usize,
        entry: impl FnOnce(*const libc::iovec, u32) -> squeue::Entry,
    ) -> io::Result<()> {
        let Some(slot_ref) = self.slots.get(slot).filter(|slot| !slot.busy) else { return Err(busy()) };
        let iovecs = slot_ref.buffers.iovecs();
        let count = u32::try_from(iovecs.len().min(MAX_IOVECS)).unwrap_or(0);
        let (entry, large) = (entry(iovecs.as_ptr(), count), slot_ref.buffers.len() >= LARGE);
        self.start(slot, entry)?;
        if large { self.submit(0) } else { Ok(()) }
    }

    /// Writes up to `len` bytes of zero at `offset`.
    pub fn write_zeroes(&mut self, slot: usize, offset: u64, len: u64) -> io::Result<()> {
        if self.images.is_some() {
            return self.give(slot, Operation::Zero(len), offset);
        }
        if self.zeroes.is_empty() {
            self.zeroes = vec![0; ZEROES];
        }
        let len = usize::try_from(len).unwrap_or(ZEROES).min(ZEROES);
        let len = u32::try_from(len).unwrap_or(0);
        let entry = opcode::Write::new(DISK, self.zeroes.as_ptr(), len).offset(offset).build();
        self.start(slot, entry)
    }

    /// Makes all completed writes durable.
    pub fn sync(&mut self, slot: usize) -> io::Result<()> {
        if self.images.is_some() {
            return self.give(slot, Operation::Sync, 0);
        }
        self.start(slot, opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build())
    }

    /// fallocate(2), with FALLOC_FL_PUNCH_HOLE or FALLOC_FL_ZERO_RANGE.
    pub fn allocate(&mut self, slot: usize, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        if self.images.is_some() {
            let punch = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
            let operation = if punch { Operation::Discard(len) } else { Operation::Zero(len) };
            return self.give(slot, operation, offset);
        }
        self.start(slot, opcode::Fallocate::new(DISK, len).offset(offset).mode(mode).build())
    }

    /// Reports [`Event::Woken`] whenever `descriptor` becomes readable; it is never read. One that nobody can wait for, as a
    /// regular file, is never reported.
    ///
    /// # Errors
    /// The kernel has no room for more, or it is watched already.
    pub fn watch(&mut self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        match self.epoll.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, 0)) {
            Ok(()) | Err(Errno::EPERM) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Ends a watch. An event of it may still come.
    pub fn unwatch(&mut self, descriptor: BorrowedFd<'_>) {
        // It fails for one that could not be watched.
        let _ = self.epoll.delete(descriptor);
    }

    /// Lets the ring report what wakes the epoll instance, until it says otherwise.
    fn listen(&mut self) -> io::Result<()> {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        self.push(opcode::PollAdd::new(WATCHED, events).multi(true).build().user_data(WOKEN))
    }

    /// Listens again where that ended, before anybody waits: while the ring has no room for it there are completions to come,
    /// which end a wait, and the next one tries again.
    fn hear(&mut self) {
        if self.deaf {
            self.deaf = self.listen().is_err();
        }
    }

    fn start(&mut self, slot: usize, entry: squeue::Entry) -> io::Result<()> {
        if self.slots.get(slot).is_none_or(|slot| slot.busy) {
            return Err(busy());
        }
        self.push(entry.user_data(slot as u64))?;
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.busy = true;
            self.busy = self.busy.saturating_add(1);
        }
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            // SAFETY: pointers in `entry` lead to the iovecs of a slot's buffers, which are not changed or freed while the slot is busy
            // (`buffers` refuses, `Drop` waits) and keep guest memory mapped, or to `zeroes`, which is never changed again and
            // lives as long as the engine. Poll entries have no pointers.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.submit(0)?;
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Submits what was started; waits for an event if `wait`.
    pub fn enter(&mut self, wait: bool) -> io::Result<()> {
        self.hear();
        self.submit(usize::from(wait))
    }

    /// As [`Self::enter`] with waiting, for `longest` at most.
    pub fn enter_for(&mut self, longest: Duration) -> io::Result<()> {
        self.hear();
        let longest = types::Timespec::from(longest);
        let arguments = types::SubmitArgs::new().timespec(&longest);
        Self::entered(self.uring.submitter().submit_with_args(1, &arguments))
    }

    /// Submits what was started, and lets the kernel put what has come where it can be seen; no system call without either.
    pub fn advance(&mut self) -> io::Result<()> {
        let submissions = self.uring.submission();
        let (count, news) = (submissions.len(), submissions.taskrun());
        drop(submissions);
        if count == 0 && !(news && self.busy > 0) {
            return Ok(());
        }
        let count = u32::try_from(count).unwrap_or(SUBMISSIONS);
        // SAFETY: submissions that were pushed are valid (`push`), and no argument is passed.
        let entered = unsafe { self.uring.submitter().enter::<libc::sigset_t>(count, 0, GETEVENTS, None) };
        Self::entered(entered)
    }

    /// Whether an operation may have come to its end.
    pub fn has_news(&mut self) -> bool {
        self.busy > 0
            && (self.uring.submission().taskrun()
                || !self.uring.completion().is_empty()
                || self.images.as_ref().is_some_and(|images| images.done.any()))
    }

    fn submit(&mut self, want: usize) -> io::Result<()> {
        let entered = self.uring.submit_and_wait(want);
        Self::entered(entered)
    }

    fn entered(entered: io::Result<usize>) -> io::Result<()> {
        match entered {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            // Interrupted, or completions must be reaped first: the caller does that and comes back.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next event, if one has come.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            if let Some((slot, buffers, result)) = self.images.as_ref().and_then(|images| images.done.next())
            {
                if let Some(given) = self.slots.get_mut(slot) {
                    given.buffers = buffers;
                }
                return Some(self.ended(slot, result));
            }
            let entry = self.uring.completion().next()?;
            let token = entry.user_data();
            if token == WOKEN {
                // Ended for want of room for its events.
                if !io_uring::cqueue::more(entry.flags()) && entry.result() >= 0 {
                    self.deaf = true;
                    self.hear();
                }
                return Some(Event::Woken);
            }
            let Some(slot) = usize::try_from(token).ok().filter(|slot| *slot < self.slots.len()) else {
                continue;
            };
            let result = entry.result();
            let result = usize::try_from(result).map_err(|_| result.saturating_neg());
            return Some(self.ended(slot, result));
        }
    }

    fn ended(&mut self, slot: usize, result: Result<usize, i32>) -> Event {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.busy = false;
            self.busy = self.busy.saturating_sub(1);
        }
        Event::Done { slot, result }
    }
}

fn busy() -> io::Error {
    io::ErrorKind::ResourceBusy.into()
}

impl Drop for Engine {
    fn drop(&mut self) {
        while self.busy > 0 {
            if self.submit(1).is_err() {
                // The kernel may still write: the buffers must never be freed.
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(std::mem::take(&mut self.zeroes));
                return;
            }
            while self.next_event().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came of one entry, as an errno.
    fn refused(engine: &mut Engine, entry: squeue::Entry) -> i32 {
        engine.push(entry.user_data(7)).unwrap();
        engine.enter(true).unwrap();
        let completion = engine.uring.completion().next().unwrap();
        assert_eq!(completion.user_data(), 7);
        -completion.result()
    }

    #[test]
    fn a_ring_does_nothing_that_its_policy_would_not() {
        let disk = tempfile::tempfile().unwrap();
        let mut engine = Engine::new(Disk::Raw(&disk, None)).unwrap();
        let (path, cwd) = (c"/etc/passwd".as_ptr(), types::Fd(libc::AT_FDCWD));
        let message = nothing();
        let socket = types::Fd(0);
        for entry in [
            opcode::OpenAt::new(cwd, path).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            opcode::Connect::new(socket, std::ptr::null(), 0).build(),
            opcode::Accept::new(socket, std::ptr::null_mut(), std::ptr::null_mut()).build(),
            opcode::SendMsg::new(socket, &raw const message).build(),
            opcode::Send::new(socket, path.cast(), 1).build(),
            opcode::UnlinkAt::new(cwd, path).build(),
            opcode::MkDirAt::new(cwd, path).build(),
            opcode::Read::new(DISK, path.cast_mut().cast(), 0).build(),
            opcode::Nop::new().build(),
            // Allowed, but not with these flags, and not on another file.
            opcode::Fsync::new(DISK).build().flags(squeue::Flags::ASYNC),
            opcode::Fsync::new(socket).build(),
            opcode::PollAdd::new(socket, 1).build(),
        ] {
            assert_eq!(refused(&mut engine, entry), libc::EACCES);
        }
        assert_eq!(refused(&mut engine, opcode::Fsync::new(DISK).build()), 0);
        let more = engine.uring.submitter().register_files_update(0, &[0]).unwrap_err();
        assert_eq!(more.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_ring_that_had_no_room_to_listen_listens_before_it_waits() {
        let disk = tempfile::tempfile().unwrap();
        let mut engine = Engine::new(Disk::Raw(&disk, None)).unwrap();
        // As after a poll that ended when there was no room for another. The first one is still there: whatever wakes
        // the epoll instance is heard twice then.
        engine.deaf = true;
        engine.enter(false).unwrap();
        assert!(!engine.deaf);
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        engine.watch(event.as_fd()).unwrap();
        event.write(1).unwrap();
        engine.enter(true).unwrap();
        let heard =
            std::iter::from_fn(|| engine.next_event()).filter(|it| matches!(it, Event::Woken)).count();
        assert_eq!(heard, 2);
    }

    fn nothing() -> libc::msghdr {
        // SAFETY: plain data, for which zero means "nothing".
        unsafe { std::mem::zeroed() }
    }
}
