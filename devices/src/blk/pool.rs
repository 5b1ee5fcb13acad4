//! Threads that serve images in formats: a request may need several reads and writes, one after the other, and computes
//! between them. They are the only ones that look into an image. A queue gives them a request and learns of its end by an eventfd.

use std::collections::VecDeque;
use std::hash::RandomState;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::Builder;

use bulkhead_ipc::memory::LentVector;
use bulkhead_ipc::vhost_user::backend::EnterThread;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::write;
use tracing::{error, warn};

use super::image::{Files, Image, describe};

/// Threads of a disk.
const THREADS: usize = 4;
/// Stack of a thread, bytes. Only what is touched counts.
const STACK: usize = 512 * 1024;
/// Most sentences about an image.
const MOST_EXPLAINED: u64 = 10;
/// Most bytes moved in one operation; a longer one is a short one, and its rest another.
const PIECE: usize = 1 << 20;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
    /// Guest to disk, durable.
    WriteDurably,
    /// All writes become durable.
    Sync,
    /// These bytes are not needed.
    Discard(u64),
    /// These bytes become zero.
    Zero(u64),
}

/// A request for the threads.
pub struct Io {
    /// The queue's name for it.
    pub slot: usize,
    /// What is moved.
    pub buffers: LentVector,
    /// What is to be done.
    pub operation: Operation,
    /// Where on the disk, bytes.
    pub offset: u64,
    /// Who hears of the end.
    pub done: Arc<Done>,
}

/// A request that ended: its slot, its buffers, and bytes moved or an errno.
pub type Finished = (usize, LentVector, Result<usize, i32>);

fn event() -> io::Result<EventFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}

/// Where a queue finds what ended.
pub struct Done {
    finished: Mutex<Vec<Finished>>,
    /// Written, and never read, when there is something.
    pub wake: EventFd,
}

impl Done {
    /// For a queue.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { finished: Mutex::default(), wake: event()? })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Finished>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that ended.
    pub fn next(&self) -> Option<Finished> {
        self.lock().pop()
    }

    /// Whether one has ended.
    pub fn any(&self) -> bool {
        !self.lock().is_empty()
    }
}

enum Job {
    Io(Box<Io>),
    /// Opens the image (for writing), or closes it; answers its size in bytes.
    Open(Option<bool>, SyncSender<Result<u64, String>>),
    /// Makes the disk longer, so many bytes in blocks of so many; the answer is [`Pool::grown`].
    Grow(u64, u64),
}

/// The answer of a thread to whoever does not wait for it.
struct Answers {
    /// The disk's size in bytes.
    given: Mutex<Vec<Result<u64, String>>>,
    /// Can be read while there may be one.
    wake: EventFd,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Vec<Result<u64, String>>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, answer: Result<u64, String>) {
        self.lock().push(answer);
        let _ = write(self.wake.as_fd(), &1u64.to_ne_bytes());
    }
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    quit: bool,
}

struct Shared {
    jobs: Mutex<Jobs>,
    more: Condvar,
    files: Files,
    image: RwLock<Option<Image>>,
    grown: Answers,
    explained: AtomicU64,
}

/// The threads of a disk.
pub struct Pool {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("files", &self.shared.files).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts the threads; on return each has run `enter`.
    ///
    /// # Errors
    /// A thread could not be started or put under its filter.
    pub fn start(files: Files, enter: &EnterThread) -> io::Result<Self> {
        let (jobs, more, image) = (Mutex::default(), Condvar::new(), RwLock::default());
        let grown = Answers { given: Mutex::default(), wake: event()? };
        let shared = Arc::new(Shared { jobs, more, files, image, grown, explained: AtomicU64::new(0) });
        let pool = Self { shared };
        for index in 0..THREADS {
            let (shared, enter) = (Arc::clone(&pool.shared), enter.clone());
            let (ready, readiness) = sync_channel(1);
            let body = move || {
                // The keys of this thread's hash maps are drawn with the first, which is a system call.
                let _ = RandomState::new();
                let entered = enter();
                let failed = entered.is_err();
                let _ = ready.send(entered);
                drop((ready, enter));
                if !failed {
                    shared.serve();
                }
            };
            Builder::new().name(format!("image-{index}")).stack_size(STACK).spawn(body)?;
            readiness.recv().map_err(io::Error::other)??;
        }
        Ok(pool)
    }

    /// Opens the image, or opens it again with all that was remembered of it forgotten. Answers the disk's size in bytes.
    ///
    /// # Errors
    /// A sentence for a person.
    pub fn open(&self, write: bool) -> Result<u64, String> {
        self.order(Some(write))
    }

    /// Lets go of the image.
    pub fn close(&self) {
        let _ = self.order(None);
    }

    fn order(&self, open: Option<bool>) -> Result<u64, String> {
        let (answer, result) = sync_channel(1);
        self.shared.give(Job::Open(open, answer));
        result.recv().unwrap_or_else(|_| Err("the image's threads have ended".into()))
    }

    /// Makes the disk longer, whose image no other process has open. Requests wait meanwhile, behind those that were there before; who asks
    /// for it does not, and finds the answer in [`Self::grown`].
    pub fn grow(&self, size: u64, block: u64) {
        self.shared.give(Job::Grow(size, block));
    }

    /// Gives this answer to whoever looks into [`Self::grown`].
    pub fn answer(&self, answer: Result<u64, String>) {
        self.shared.grown.give(answer);
    }

    /// What became of [`Self::grow`]: the disk's size in bytes, or a sentence for a person, which follows the disk's id.
    pub fn grown(&self) -> Vec<Result<u64, String>> {
        let _none_yet = self.shared.grown.wake.read();
        std::mem::take(&mut self.shared.grown.lock())
    }

    /// Can be read when [`Self::grown`] has something.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.shared.grown.wake.as_fd()
    }

    /// Gives a request to the threads.
    pub fn begin(&self, io: Io) {
        self.shared.give(Job::Io(Box::new(io)));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.more.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, job: Job) {
        self.lock().waiting.push_back(job);
        self.more.notify_one();
    }

    fn serve(&self) {
        let mut bytes = Vec::new();
        loop {
            let mut jobs = self.lock();
            let job = loop {
                match jobs.waiting.pop_front() {
                    Some(job) => break job,
                    None if jobs.quit => return,
                    None => jobs = self.more.wait(jobs).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(jobs);
            match job {
                Job::Open(open, answer) => {
                    let _ = answer.send(self.open(open));
                }
                Job::Grow(size, block) => self.grown.give(self.grow(size, block)),
                Job::Io(io) => self.run(*io, &mut bytes),
            }
        }
    }

    fn open(&self, open: Option<bool>) -> Result<u64, String> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        // What it remembers is written before the new one looks.
        *image = None;
        let Some(write) = open else { return Ok(0) };
        let opened = Image::open(&self.files, write)?;
        Ok(image.insert(opened).size())
    }

    fn grow(&self, size: u64, block: u64) -> Result<u64, String> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        let open = image.take();
        // What it remembers is written before.
        let written = open.as_ref().map_or(Ok(()), Image::sync);
        let was_open = open.is_some();
        drop(open);
        let grown = match written {
            Ok(()) => Image::grow(&self.files, size, block).map_err(|error| error.to_string()),
            Err(error) => Err(format!("cannot be written: {}", describe(&error))),
        };
        let opened = Image::open(&self.files, was_open).map_err(|error| {
            error!(%error, "the image cannot be opened again: the guest will see I/O errors");
            format!("fails from here on: its image cannot be opened again: {error}")
        })?;
        let size = opened.size();
        *image = was_open.then_some(opened);
        grown.map(|()| size)
    }

    /// What is wrong with an image has no number; the first few sentences about it are for the log.
    fn explain(&self, error: &io::Error) {
        if error.raw_os_error().is_none() && self.explained.fetch_add(1, Ordering::Relaxed) < MOST_EXPLAINED {
            warn!(error = describe(error), "the image");
        }
    }

    fn run(&self, io: Io, bytes: &mut Vec<u8>) {
        let Io { slot, mut buffers, operation, offset, done } = io;
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let result = match image.as_ref() {
            Some(image) => carry_out(image, &mut buffers, operation, offset, bytes),
            None => Err(io::Error::from_raw_os_error(libc::EIO)),
        };
        drop(image);
        if let Err(error) = &result {
            self.explain(error);
        }
        done.lock().push((slot, buffers, result.map_err(|error| errno(&error))));
        let _ = write(done.wake.as_fd(), &1u64.to_ne_bytes());
    }
}

/// An error of the format itself has no number.
fn errno(error: &io::Error) -> i32 {
    match error.kind() {
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => error.raw_os_error().unwrap_or(libc::EIO),
    }
}

fn carry_out(
    image: &Image,
    buffers: &mut LentVector,
    operation: Operation,
    offset: u64,
    bytes: &mut Vec<u8>,
) -> io::Result<usize> {
    let len = buffers.len().min(PIECE);
    match operation {
        Operation::Read => {
            bytes.resize(len.max(bytes.len()), 0);
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            image.read(bytes, offset)?;
            buffers.store(bytes).map_err(io::Error::other)?;
            Ok(len)
        }
        Operation::Write | Operation::WriteDurably => {
            bytes.resize(len.max(bytes.len()), 0);
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            buffers.load(bytes).map_err(io::Error::other)?;
            image.write(bytes, offset)?;
            if operation == Operation::WriteDurably {
                image.sync()?;
            }
            Ok(len)
        }
        Operation::Sync => image.sync().map(|()| 0),
        Operation::Discard(len) => image.discard(offset, len).map(|()| 0),
        Operation::Zero(len) => image.write_zeroes(offset, len).map(|()| 0),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_ipc::channel::message::ImageFormat;
    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;
    use crate::blk::image::Layer;

    #[test]
    fn who_asks_for_a_longer_disk_does_not_wait_for_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let files = Files { chain: vec![Layer { file, format: ImageFormat::Raw }], data: Vec::new() };
        let pool = Pool::start(files, &(Arc::new(|| Ok(())) as EnterThread)).unwrap();
        pool.open(true).unwrap();
        let told = |limit: u16| poll(&mut [PollFd::new(pool.wake(), PollFlags::POLLIN)], limit).unwrap();
        let in_flight = pool.shared.image.read().unwrap();
        pool.grow(2 << 20, 512);
        assert_eq!((told(0), pool.grown()), (0, Vec::new()));
        drop(in_flight);
        assert_eq!(told(10_000), 1);
        let answers = pool.grown();
        let [Err(reason)] = &answers[..] else { panic!("{answers:?}") };
        assert!(reason.contains("only qcow2 images grow"), "{reason}");
        assert_eq!((told(0), pool.grown()), (0, Vec::new()));
    }
}
