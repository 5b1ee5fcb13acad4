//! A descriptor in reserve.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

/// When no descriptor is left, a connection can neither be accepted nor refused, and its listening socket stays readable: a loop
/// that waits for it would spin. With this one given up for a moment, the connection is accepted and closed.
#[derive(Debug)]
pub struct Spare(Option<OwnedFd>);

impl Default for Spare {
    fn default() -> Self {
        let mut this = Self(None);
        this.restore();
        this
    }
}

impl Spare {
    /// Accepts with `accept`, and turns the connection away where it cannot be kept.
    pub fn accept<T>(&mut self, accept: impl Fn() -> Result<T, Errno>) -> Option<T> {
        match accept() {
            Ok(connection) => Some(connection),
            Err(Errno::EMFILE | Errno::ENFILE) => {
                self.0 = None;
                drop(accept());
                self.restore();
                None
            }
            Err(_) => None,
        }
    }

    fn restore(&mut self) {
        self.0 = File::open("/dev/null").ok().map(OwnedFd::from);
    }
}
