//! The threads that serve queues, and how the control thread gives them rings and takes them back.
//!
//! The data path never looks at the control thread: a worker checks one atomic of its mailbox each turn.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::Builder;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::write;
use thiserror::Error;
use tracing::error;

use super::device::QueueWorker;
use super::vring::Vring;

/// Stack of a worker, bytes. Only what is touched counts.
const STACK: usize = 128 * 1024;

/// Called on each worker's thread after it is prepared: puts the thread under its seccomp filter.
pub type EnterThread = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Why a worker does not work.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// It could not be set up.
    #[error("a queue worker could not start: {0}")]
    Start(io::Error),
    /// It refused a ring.
    #[error("a queue worker refused the ring: {0}")]
    Refused(io::Error),
    /// Its thread has ended.
    #[error("a queue worker has ended")]
    Gone,
}

enum Command {
    Start(Box<Vring>, SyncSender<io::Result<()>>),
    Stop(u16, SyncSender<Option<Vring>>),
    Quit,
}

/// What a worker tells about itself, without a lock.
#[derive(Debug, Default)]
struct Pulse {
    /// Turns that have come to their end, modulo 2^32.
    turns: AtomicU32,
    waits_for_host: AtomicBool,
    /// The thread is in a system call that the host may keep it in.
    blocked: HostCall,
}

/// Says that a worker's thread is in a system call that may wait for the host: then it does not count as hanging.
#[derive(Clone, Debug, Default)]
pub struct HostCall(Arc<AtomicBool>);

impl HostCall {
    /// Makes the call.
    pub fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        self.0.store(true, Ordering::Relaxed);
        let result = call();
        self.0.store(false, Ordering::Relaxed);
        result
    }
}

/// What the control thread sees of a worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Turns that have come to their end, modulo 2^32.
    pub(super) turns: u32,
    /// As [`QueueWorker::waits_for_host`].
    pub(super) waits: bool,
    /// As [`HostCall`].
    pub(super) blocked: bool,
}

/// The control thread's end of a worker.
pub(super) struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    pulse: Arc<Pulse>,
    descriptors: Vec<RawFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl fmt::Debug for WorkerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerHandle").field("descriptors", &self.descriptors).finish_non_exhaustive()
    }
}

impl WorkerHandle {
    /// Starts the thread and waits until it is prepared and under its filter.
    pub(super) fn spawn(
        name: &str,
        worker: Box<dyn QueueWorker>,
        enter: EnterThread,
    ) -> Result<Self, WorkerError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake =
            EventFd::from_value_and_flags(0, flags).map_err(|errno| WorkerError::Start(errno.into()))?;
        let wake = Arc::new(wake);
        let (commands, mailbox) = channel();
        let (ready, readiness) = sync_channel(1);
        let worker_wake = Arc::clone(&wake);
        let pulse = Arc::new(Pulse::default());
        let worker_pulse = Arc::clone(&pulse);
        let body = move || {
            let mut worker = worker;
            worker.set_host_call(worker_pulse.blocked.clone());
            let prepared = worker.prepare(worker_wake.as_fd()).and_then(|fds| enter().map(|()| fds));
            let failed = prepared.is_err();
            let _ = ready.send(prepared);
            drop(ready);
            drop(enter);
            if !failed {
                serve(worker, &mailbox, &worker_pulse);
            }
        };
        let thread =
            Builder::new().name(name.into()).stack_size(STACK).spawn(body).map_err(WorkerError::Start)?;
        let mut descriptors = readiness.recv().map_err(|_| WorkerError::Gone)?.map_err(WorkerError::Start)?;
        descriptors.push(wake.as_fd().as_raw_fd());
        Ok(Self { commands, wake, pulse, descriptors, thread: Some(thread) })
    }

    /// What the worker tells about itself.
    pub(super) fn pulse(&self) -> Seen {
        Seen {
            turns: self.pulse.turns.load(Ordering::Relaxed),
            waits: self.pulse.waits_for_host.load(Ordering::Relaxed),
            blocked: self.pulse.blocked.0.load(Ordering::Relaxed),
        }
    }

    /// Descriptors that the worker keeps open, its wake-up included.
    pub(super) fn descriptors(&self) -> &[RawFd] {
        &self.descriptors
    }

    fn send(&self, command: Command) -> Result<(), WorkerError> {
        self.commands.send(command).map_err(|_| WorkerError::Gone)?;
        self.wake();
        Ok(())
    }

    /// Makes [`QueueWorker::turn`] return.
    pub(super) fn wake(&self) {
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Gives the worker a ring to serve.
    pub(super) fn start(&self, ring: Vring) -> Result<(), WorkerError> {
        let (answer, result) = sync_channel(1);
        self.send(Command::Start(Box::new(ring), answer))?;
        result.recv().map_err(|_| WorkerError::Gone)?.map_err(WorkerError::Refused)
    }

    /// Takes a ring back, after everything taken from it is finished.
    pub(super) fn stop(&self, index: u16) -> Result<Option<Vring>, WorkerError> {
        let (answer, result) = sync_channel(1);
        self.send(Command::Stop(index, answer))?;
        result.recv().map_err(|_| WorkerError::Gone)
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        let _ = self.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut worker: Box<dyn QueueWorker>, mailbox: &Receiver<Command>, pulse: &Pulse) {
    for turns in (0_u32..=u32::MAX).cycle() {
        pulse.turns.store(turns, Ordering::Relaxed);
        pulse.waits_for_host.store(worker.waits_for_host(), Ordering::Relaxed);
        while let Ok(command) = mailbox.try_recv() {
            match command {
                Command::Start(ring, answer) => {
                    let _ = answer.send(worker.start(*ring));
                }
                Command::Stop(index, answer) => {
                    let mut ring = worker.stop(index);
                    if let Some(ring) = &mut ring {
                        ring.signal();
                    }
                    let _ = answer.send(ring);
                }
                Command::Quit => return,
            }
        }
        if let Err(error) = worker.turn() {
            // Without this thread the device is dead, and a dead process is what a supervisor can repair.
            error!(%error, "a queue worker cannot go on");
            std::process::exit(1);
        }
    }
}

/// An OwnedFd shared between the control thread and a worker.
pub(super) type SharedFd = Arc<OwnedFd>;
