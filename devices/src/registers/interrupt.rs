//! An interrupt: the eventfd that the core gives a device for it.

use std::os::fd::OwnedFd;

use bulkhead_ipc::vfio_user::AccessError;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Nothing, until the core connects it.
#[derive(Debug, Default)]
pub struct Interrupt(Option<OwnedFd>);

impl Interrupt {
    /// Takes the eventfd, or gives it up.
    ///
    /// # Errors
    /// The descriptor cannot serve.
    pub fn connect(&mut self, event: Option<OwnedFd>) -> Result<(), AccessError> {
        if let Some(event) = &event {
            // Whatever the peer sent, writing to it must not block.
            let flags = fcntl(event, FcntlArg::F_GETFL).map_err(|_| AccessError::OutOfRange)?;
            let flags = OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK;
            fcntl(event, FcntlArg::F_SETFL(flags)).map_err(|_| AccessError::OutOfRange)?;
        }
        self.0 = event;
        Ok(())
    }

    /// Whether anybody would notice.
    pub const fn is_connected(&self) -> bool {
        self.0.is_some()
    }

    /// Raises it.
    pub fn signal(&self) {
        if let Some(event) = &self.0 {
            // EAGAIN: 2^64 - 2 of them are waiting already. Nothing else can be done about an error here.
            let _ = nix::unistd::write(event, &1_u64.to_ne_bytes());
        }
    }
}
