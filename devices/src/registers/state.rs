//! The file with what a successor needs: the device's state, written as a whole before an access is answered.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Size of the file, in bytes: a page, so that the kernel writes all of the state or nothing of it.
pub const STATE_SIZE: usize = 4096;

/// The file, and why it can no longer be written.
#[derive(Debug)]
pub struct StateFile {
    file: File,
    failure: Option<io::Error>,
}

impl From<File> for StateFile {
    fn from(file: File) -> Self {
        Self { file, failure: None }
    }
}

impl AsFd for StateFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl StateFile {
    /// What a predecessor left; `None`: there was none, or it left what makes no sense, for it may have been broken into.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let mut bytes = [0; STATE_SIZE];
        let mut filled = 0;
        while let Some(space) = bytes.get_mut(filled..).filter(|space| !space.is_empty()) {
            match self.file.read_at(space, filled as u64)? {
                0 => break,
                count => filled = filled.saturating_add(count),
            }
        }
        let stored = bytes.get(..filled).unwrap_or_default();
        if stored.is_empty() {
            return Ok(None);
        }
        let state = postcard::from_bytes(stored);
        Ok(state
            .inspect_err(|error| tracing::warn!(%error, "the device's state makes no sense: it is reset"))
            .ok())
    }

    /// Stores the state for a successor.
    pub fn store(&mut self, state: &impl Serialize) {
        let mut bytes = [0; STATE_SIZE];
        let stored = match postcard::to_slice(state, &mut bytes) {
            Ok(used) => self.file.write_all_at(used, 0),
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = stored {
            self.failure.get_or_insert(error);
        }
    }

    /// Why the state can no longer be stored, once.
    pub const fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }
}
