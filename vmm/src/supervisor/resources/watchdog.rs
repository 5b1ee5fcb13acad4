//! A watchdog, as the supervisor knows it: what outlives its process.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::ResourceError;
use crate::supervisor::config::watchdog::{WatchdogAction, WatchdogConfig};

/// The most that its process keeps for its successor, in bytes.
pub const WATCHDOG_STATE: u64 = 4096;
/// A guest that lets it run out again and again is told of so often.
const NEWS: Duration = Duration::from_secs(1);

/// A watchdog.
#[derive(Debug)]
pub struct Watchdog {
    /// Its id.
    pub id: String,
    /// What follows when it runs out.
    pub action: WatchdogAction,
    /// What its process leaves to its successor.
    pub state: OwnedFd,
    /// It has reset the machine, which is started anew.
    pub expired: bool,
    /// When it was last told of.
    told: Option<Instant>,
}

impl Watchdog {
    /// Makes the memory for its state.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn new(config: &WatchdogConfig) -> Result<Self, ResourceError> {
        let memory = memfd_create(c"watchdog", MFdFlags::MFD_CLOEXEC);
        let state =
            memory.map_err(|errno| ResourceError::Host { what: config.id.clone(), reason: errno.into() })?;
        Ok(Self { id: config.id.clone(), action: config.action, state, expired: false, told: None })
    }

    /// The machine is started anew.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn reset(&self) -> std::io::Result<()> {
        Ok(ftruncate(&self.state, 0)?)
    }

    /// It has run out; false when that was just said.
    pub fn is_news(&mut self, now: Instant) -> bool {
        let news = self.told.is_none_or(|told| now.duration_since(told) >= NEWS);
        self.told = if news { Some(now) } else { self.told };
        news
    }
}
