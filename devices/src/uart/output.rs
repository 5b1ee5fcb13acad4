//! What the guest has sent and the host has not taken yet.
//!
//! Nobody attached: the newest [`HISTORY`] bytes are kept for whoever comes. Attached, and the reader is slow: the
//! buffer fills to [`CAPACITY`], then the guest waits (THRE stays clear). A reader that takes nothing for
//! [`STUCK_AFTER`] is not waited for: until it takes something again the oldest bytes are dropped, and counted in the log.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::model::Line;
use super::sink::Sink;

/// Bytes kept while nobody reads.
pub const HISTORY: usize = 64 * 1024;

/// Stream writes that the shadow page may promise at once; the buffer always has room for them beyond [`HISTORY`].
pub const CREDIT: usize = 16 * 1024;

/// Bytes kept for a reader that is attached.
pub const CAPACITY: usize = HISTORY + CREDIT;

/// How long a reader may take nothing while the guest waits.
pub const STUCK_AFTER: Duration = Duration::from_secs(1);

/// The transmit side of the line.
#[derive(Debug)]
pub struct Output {
    buffer: VecDeque<u8>,
    sink: Option<Sink>,
    /// The sink would block.
    blocked: bool,
    /// The sink took nothing for too long: nobody waits for it.
    discarding: bool,
    /// When it took something last, or became blocked.
    progress: Option<Instant>,
    dropped: u64,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            buffer: VecDeque::with_capacity(CAPACITY),
            sink: None,
            blocked: false,
            discarding: false,
            progress: None,
            dropped: 0,
        }
    }
}

impl Output {
    /// Sends to `sink` from now on; what was kept goes there first.
    pub fn attach(&mut self, sink: Sink) {
        self.sink = Some(sink);
        self.blocked = false;
        self.discarding = false;
        self.progress = None;
        self.trim();
        self.report();
    }

    /// Nobody reads any more.
    pub fn detach(&mut self) {
        self.sink = None;
        self.blocked = false;
        self.discarding = false;
        self.progress = None;
        self.trim();
    }

    /// The descriptor that is waited for, to register it.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.sink.as_ref().map(Sink::as_fd)
    }

    /// Whether to wait until the descriptor is writable.
    pub fn blocked(&self) -> bool {
        self.blocked
    }

    /// Characters that can still be taken.
    pub fn room(&self) -> usize {
        if self.sink.is_none() || self.discarding {
            CREDIT
        } else {
            CAPACITY.saturating_sub(self.buffer.len())
        }
    }

    /// Whether anything waits.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Writes what waits, as far as the sink takes it without blocking.
    ///
    /// # Errors
    /// The sink is broken; it has been given up.
    pub fn flush(&mut self) -> Result<(), Errno> {
        while let Some(sink) = &self.sink {
            let (front, _) = self.buffer.as_slices();
            if front.is_empty() {
                self.blocked = false;
                self.progress = None;
                return Ok(());
            }
            match sink.write(front) {
                Ok(count) => {
                    self.buffer.drain(..count.min(self.buffer.len()));
                    self.progress = None;
                    if self.discarding {
                        self.discarding = false;
                        self.report();
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.blocked = true;
                    self.progress.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) => {
                    self.detach();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// When the reader will have been stuck for too long, if it is and the guest waits.
    pub fn deadline(&self) -> Option<Instant> {
        if self.discarding || self.room() > 0 {
            return None;
        }
        self.progress.and_then(|since| since.checked_add(STUCK_AFTER))
    }

    /// Stops waiting for a reader that is stuck at `now`.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| now >= deadline) {
            tracing::warn!(
                seconds = STUCK_AFTER.as_secs(),
                "nobody reads the serial output; dropping the oldest"
            );
            self.discarding = true;
            self.trim();
        }
    }

    /// Bytes dropped and not reported yet.
    #[cfg(test)]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn trim(&mut self) {
        let excess = self.buffer.len().saturating_sub(HISTORY);
        self.buffer.drain(..excess);
        self.dropped = self.dropped.saturating_add(excess as u64);
    }

    fn report(&mut self) {
        if self.dropped > 0 {
            tracing::warn!(bytes = self.dropped, "serial output dropped, nobody read it");
            self.dropped = 0;
        }
    }
}

impl Line for Output {
    fn has_room(&self) -> bool {
        self.room() > 0
    }

    fn transmit(&mut self, byte: u8) {
        if (self.sink.is_none() || self.discarding) && self.buffer.len() >= HISTORY {
            self.buffer.pop_front();
            self.dropped = self.dropped.saturating_add(1);
        }
        self.buffer.push_back(byte);
    }
}

/// A second descriptor for the same stream, so that both directions can be waited for apart.
///
/// # Errors
/// No descriptor is left.
pub fn duplicate(stream: &OwnedFd) -> std::io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}
