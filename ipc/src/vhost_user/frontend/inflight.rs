//! In-flight memory: where a back end notes which requests it works on, so that its successor can repeat them.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};

use super::{Frontend, FrontendError};
use crate::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

/// Largest in-flight memory of one queue: header and 32768 entries of 16 bytes, rounded up to a page; then some.
const MAX_SIZE_PER_QUEUE: u64 = 1 << 20;

/// Shared memory for the requests in flight. The front end only keeps it and never looks inside: its contents are
/// the back end's, and hostile. It may come from the back end ([`Frontend::get_inflight`]) or from somebody whom one trusts more.
#[derive(Debug)]
pub struct InflightMemory {
    /// The memory file.
    pub file: OwnedFd,
    /// Size, bytes.
    pub size: u64,
    /// Start of the memory in the file, bytes.
    pub offset: u64,
    /// For this many queues …
    pub queues: u16,
    /// … of this many entries each.
    pub queue_size: u16,
}

/// The payload as QEMU has it: a C structure with four bytes of padding at its end, 24 bytes in all.
fn payload(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = [size, offset].map(u64::to_le_bytes).concat();
    payload.extend(queues.to_le_bytes());
    payload.extend(queue_size.to_le_bytes());
    payload.extend([0; 4]);
    payload
}

/// Size and offset out of a payload, with padding or, after the letter of the specification, without.
fn parse(payload: &[u8]) -> Option<(u64, u64)> {
    if payload.len() != 24 && payload.len() != 20 {
        return None;
    }
    let (size, rest) = payload.split_first_chunk()?;
    let (offset, _) = rest.split_first_chunk()?;
    Some((u64::from_le_bytes(*size), u64::from_le_bytes(*offset)))
}

impl Frontend {
    /// GET_INFLIGHT_FD: has the back end allocate memory for `queues` queues of `queue_size` entries.
    /// `None` if it has none to give: it answers with size 0, with an error code in place of the memory, or with memory
    /// that is not sealed against shrinking.
    ///
    /// # Errors
    /// A reply whose memory does not lie in its file, or is larger than any such memory can be.
    pub fn get_inflight(
        &mut self,
        queues: u16,
        queue_size: u16,
    ) -> Result<Option<InflightMemory>, FrontendError> {
        let request = FrontendReq::GET_INFLIGHT_FD;
        self.need(request, VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
        let payload = payload(0, 0, queues, queue_size);
        let message = self.query(request, &payload, 1, self.limits.exchange)?;
        if let Ok(code) = <[u8; 8]>::try_from(message.payload.as_slice())
            && u64::from_le_bytes(code) != 0
        {
            return Ok(None);
        }
        let Some((size, offset)) = parse(&message.payload) else {
            let length = message.payload.len() as u64;
            return Err(self.bad_reply(request, "size", length, "24 or 20"));
        };
        if size == 0 {
            return Ok(None);
        }
        let limit = MAX_SIZE_PER_QUEUE.saturating_mul(queues.into());
        if size > limit {
            return Err(self.bad_reply(request, "memory size", size, format!("1 to {limit:#x}")));
        }
        let Some(file) = message.descriptors.into_iter().next() else {
            return Err(self.bad_reply(request, "number of descriptors", 0, "1"));
        };
        // What can be truncated would be a trap for the next process that maps it: better none.
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Ok(None);
        }
        let length = match nix::sys::stat::fstat(&file) {
            Ok(stat) => u64::try_from(stat.st_size).unwrap_or(0),
            Err(_) => 0,
        };
        if offset.checked_add(size).is_none_or(|end| end > length) {
            let expected = format!("memory within a file of {length:#x} bytes");
            return Err(self.bad_reply(request, "memory offset", offset, expected));
        }
        Ok(Some(InflightMemory { file, size, offset, queues, queue_size }))
    }

    /// SET_INFLIGHT_FD: gives the memory to a back end, which resubmits what it finds in flight when its rings start.
    ///
    /// # Errors
    /// As every request, see [`FrontendError`].
    pub fn set_inflight(&mut self, memory: &InflightMemory) -> Result<(), FrontendError> {
        let request = FrontendReq::SET_INFLIGHT_FD;
        self.need(request, VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
        let payload = payload(memory.size, memory.offset, memory.queues, memory.queue_size);
        self.command(request, &payload, &[memory.file.as_fd()])
    }
}
