//! The back end: a daemon that serves one virtio device to one front end at a time.
//!
//! - [`device`]: what a device type gives: features, configuration, workers;
//! - [`daemon`]: the message loop, its rules for answers, negotiation;
//! - `rings`: set-up, start and stop of rings; `session`: memory, dirty log, in-flight area, status;
//! - [`vring`] and [`chain`]: a running ring and its requests, on the data path;
//! - [`inflight`]: what survives this process;
//! - [`worker`] and [`poll_worker`]: the threads that serve queues.
//!
//! One control thread reads the socket; each worker has a thread of its own, owns the rings that it serves, and shares no lock with
//! anyone. The front end may be any that follows the "Vhost-user Protocol" document of QEMU, and the habits of
//! real ones are tolerated: SET_OWNER late or never, SET_VRING_ENABLE before SET_FEATURES and for queues never set up,
//! NEED_REPLY on anything. A bad message is refused, logged, and answered where an answer is due; the connection goes on.

pub mod chain;
pub mod daemon;
pub mod device;
pub mod inflight;
mod memory_table;
pub mod poll_worker;
mod rings;
mod session;
pub mod vring;
pub mod worker;

pub use chain::{Chain, ChainError, Segment};
pub use daemon::{Daemon, DaemonError, no_jail};
pub use device::{QueueWorker, VirtioDevice};
pub use poll_worker::{Next, PollWorker, QueueHandler};
pub use vring::{Vring, VringError};
pub use worker::{EnterThread, HostCall, WorkerError};
