//! The device's queues: requests out of guest memory, answers into it. A file's bytes go between the page cache and guest memory
//! without a stop in this process.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use bulkhead_ipc::memory::{Direction, LentVector};
use bulkhead_ipc::vhost_user::backend::{Chain, Next, QueueHandler, Segment, Vring, VringError};
use nix::sys::epoll::Epoll;

use super::abi::{IN_HEADER, Opcode};
use super::server::{Payload, Server};
use crate::idle::Idle;

/// Most requests before the control thread gets its turn.
const BATCH: u32 = 64;
/// Longest request but for the data of a write: the largest extended attribute, or a symbolic link, and names.
const MOST_REQUEST: usize = 128 << 10;
/// What is read of a write's request: its headers.
const WRITE_HEAD: usize = IN_HEADER + 40;

/// Serves all queues of a shared directory.
pub(super) struct FsQueue {
    server: Server,
    chain: Chain,
    request: Vec<u8>,
    lent: Option<LentVector>,
    idle: Option<Idle>,
}

/// The buffers of a request, for a file's bytes.
struct Buffers<'a> {
    ring: &'a Vring,
    chain: &'a Chain,
    lent: &'a mut LentVector,
}

impl Buffers<'_> {
    /// Lends `len` bytes of some segments, `skip` bytes in.
    fn lend(
        &mut self,
        segments: &[Segment],
        mut skip: usize,
        len: usize,
        direction: Direction,
    ) -> io::Result<()> {
        self.lent.restart(self.ring.ram(), direction);
        let mut left = len;
        for segment in segments {
            let size = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let passed = skip.min(size);
            skip = skip.saturating_sub(passed);
            let part = size.saturating_sub(passed).min(left);
            if part > 0 {
                let address = segment.address.saturating_add(passed as u64);
                self.lent
                    .push(address, part as u64)
                    .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
                left = left.saturating_sub(part);
            }
        }
        if left == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
    }
}

impl Payload for Buffers<'_> {
    fn fill(&mut self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize> {
        let chain = self.chain;
        self.lend(chain.writable(), super::abi::OUT_HEADER, len, Direction::Write)?;
        let mut done = 0_usize;
        while !self.lent.is_empty() {
            match self.lent.read_at(file, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done = done.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if done == 0 => {
                    self.lent.fail();
                    return Err(error);
                }
                Err(_) => break,
            }
        }
        self.lent.complete(0);
        Ok(done)
    }

    fn drain(&mut self, skip: usize, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize> {
        let chain = self.chain;
        self.lend(chain.readable(), skip, len, Direction::Read)?;
        let mut done = 0_usize;
        while !self.lent.is_empty() {
            match self.lent.write_at(file, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done = done.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        self.lent.complete(0);
        Ok(done)
    }

    fn room(&self) -> usize {
        usize::try_from(self.chain.writable_bytes()).unwrap_or(usize::MAX)
    }
}

impl FsQueue {
    pub(super) fn new(server: Server) -> Self {
        Self { server, chain: Chain::new(), request: Vec::new(), lent: None, idle: None }
    }

    /// Reads the request, without a write's data.
    fn gather(&mut self, ring: &Vring) -> Result<(), VringError> {
        self.request.clear();
        let total = usize::try_from(self.chain.readable_bytes()).unwrap_or(usize::MAX);
        self.copy(ring, total.min(WRITE_HEAD))?;
        let opcode = self.request.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        if opcode == Some(Opcode::Write as u32) {
            return Ok(());
        }
        if total > MOST_REQUEST {
            return Err(VringError::Request("a request is longer than any can be"));
        }
        self.copy(ring, total)
    }

    /// Reads on until `wanted` bytes of the request are there.
    fn copy(&mut self, ring: &Vring, wanted: usize) -> Result<(), VringError> {
        let mut skip = self.request.len();
        for segment in self.chain.readable() {
            let size = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let passed = skip.min(size);
            skip = skip.saturating_sub(passed);
            let have = self.request.len();
            let part = size.saturating_sub(passed).min(wanted.saturating_sub(have));
            if part > 0 {
                let address = segment.address.saturating_add(passed as u64);
                self.request.resize(have.saturating_add(part), 0);
                let place = self.request.get_mut(have..).unwrap_or_default();
                ring.ram().view(address, part as u64, Direction::Read)?.read_bytes(0, place)?;
            }
        }
        Ok(())
    }

    /// Serves the request in the chain; the number of bytes of its answer.
    fn serve_one(&mut self, ring: &Vring) -> Result<u32, VringError> {
        self.gather(ring)?;
        let lent = self.lent.get_or_insert_with(|| ring.ram().lend_vector(Direction::Read));
        let mut payload = Buffers { ring, chain: &self.chain, lent };
        let (answer, beyond) = self.server.serve(&self.request, &mut payload);
        if answer.is_empty() {
            return Ok(0);
        }
        let mut left = answer;
        for segment in self.chain.writable() {
            let part = left.len().min(usize::try_from(segment.len).unwrap_or(usize::MAX));
            let (now, rest) = left.split_at_checked(part).unwrap_or((left, &[]));
            if !now.is_empty() {
                ring.ram().view(segment.address, now.len() as u64, Direction::Write)?.write_bytes(0, now)?;
            }
            left = rest;
        }
        if !left.is_empty() {
            return Err(VringError::Request("a request has no room for its answer"));
        }
        Ok(u32::try_from(answer.len().saturating_add(beyond)).unwrap_or(u32::MAX))
    }
}

impl QueueHandler for FsQueue {
    fn prepare(&mut self, _epoll: &Epoll) -> io::Result<Vec<RawFd>> {
        self.idle = Some(Idle::new());
        Ok(Vec::new())
    }

    fn serve(&mut self, rings: &mut [Option<Vring>], _epoll: &Epoll) -> io::Result<Next> {
        let mut budget = BATCH;
        for ring in rings.iter_mut().flatten() {
            ring.disable_kicks();
            loop {
                while ring.next(&mut self.chain) {
                    match self.serve_one(ring) {
                        Ok(written) => ring.finish(self.chain.head(), written),
                        Err(error) => {
                            ring.fail(&error);
                            ring.finish(self.chain.head(), 0);
                        }
                    }
                    // The driver may go on with this answer while the next request is served.
                    ring.signal();
                    budget = budget.saturating_sub(1);
                    if budget == 0 {
                        return Ok(Next::Soon);
                    }
                }
                let worked = budget < BATCH;
                if worked && self.idle.as_mut().is_some_and(|idle| idle.look_for_next(|| ring.has_requests()))
                {
                    continue;
                }
                if !ring.enable_kicks() {
                    break;
                }
                ring.disable_kicks();
            }
        }
        Ok(Next::Event)
    }

    /// What is taken from a ring is in the host's hands until it is done: a slow disk or server of the host is no fault of this
    /// process.
    fn waits_for_host(&self) -> bool {
        true
    }
}
