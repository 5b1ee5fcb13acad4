//! The dirty log: SET_LOG_BASE.

use std::os::fd::BorrowedFd;

use super::{Frontend, FrontendError};
use crate::vhost_user::connection::Kind;
use crate::vhost_user::message::{FrontendReq, VhostUserLog, VhostUserProtocolFeatures, encode};

impl Frontend {
    /// SET_LOG_BASE: gives the back end the shared memory in which it marks the pages that it writes.
    /// `size` and `offset` in bytes; one bit for each 4 KiB page of guest-physical memory.
    ///
    /// The back end answers always, with or without REPLY_ACK; with what differs between implementations
    /// (nothing, eight bytes, the request's own payload), so that only the answer itself counts.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_log_base(
        &mut self,
        size: u64,
        offset: u64,
        file: BorrowedFd<'_>,
    ) -> Result<(), FrontendError> {
        let request = FrontendReq::SET_LOG_BASE;
        self.need(request, VhostUserProtocolFeatures::LOG_SHMFD)?;
        let payload = encode(&VhostUserLog::new(size, offset));
        let deadline = self.deadline(self.limits.exchange);
        self.transmit(request, Kind::Request, &payload, &[file], deadline)?;
        let message = self.reply(request, 0, deadline)?;
        let length = message.payload.len();
        if length > size_of::<VhostUserLog>() {
            return Err(self.bad_reply(request, "size", length as u64, "at most 16"));
        }
        Ok(())
    }
}
