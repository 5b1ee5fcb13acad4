//! A request queue of a disk, on its thread: takes requests from the ring, runs them through io_uring, finishes them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{Durability, ErrorAction};
use bulkhead_ipc::memory::{Direction, MemoryError, single};
use bulkhead_ipc::vhost_user::backend::{Chain, HostCall, QueueWorker, Segment, Vring, VringError};
use tracing::warn;
use vm_memory::Bytes;

use super::Shared;
use super::direct::{Direct, Moved};
use super::engine::{Disk, Engine, Event, MAX_SLOTS};
use super::errors::ErrorLog;
use super::request::{self, HEADER, Header, Operation, Range, Status};
use crate::idle::Idle;
use crate::segments;

/// After this a request that waits for the host is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Most requests that are taken in one turn. After it the driver is told of those that are done.
const TURN: u32 = 32;

/// What a slot's operation under way is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Read,
    Write,
    Flush,
    /// fallocate with PUNCH_HOLE.
    Punch,
    /// fallocate with ZERO_RANGE.
    ZeroRange,
    /// Writing zeroes.
    Zeroes,
    /// A write-through disk syncs after a discard or write-zeroes.
    SyncAfter,
}

/// A request under way.
#[derive(Debug)]
struct Request {
    head: u16,
    status_address: u64,
    /// Bytes that the driver is told were written to it.
    written: u32,
    operation: Operation,
    step: Step,
    /// Next byte of the disk.
    offset: u64,
    /// Ranges of discard and write-zeroes that are left; the last is under way.
    ranges: Vec<Range>,
    /// It cannot be done with O_DIRECT: its buffers or its place are not aligned.
    cached: bool,
}

impl Request {
    fn idle() -> Self {
        Self {
            head: 0,
            status_address: 0,
            written: 0,
            operation: Operation::Flush,
            step: Step::Flush,
            offset: 0,
            ranges: Vec::new(),
            cached: false,
        }
    }
}

/// What became of a request that was begun.
enum Begun {
    /// An operation is under way.
    Started,
    /// Its ranges are listed, and to be worked off.
    Ranges,
    /// It is done.
    Finished(Status),
    /// The host refused it.
    Failed(i32),
}

/// A request queue.
pub struct BlkQueue {
    shared: Arc<Shared>,
    wake: Option<OwnedFd>,
    engine: Option<Engine>,
    ring: Option<Vring>,
    requests: Vec<Request>,
    free: Vec<usize>,
    chain: Chain,
    errors: ErrorLog,
    /// The disk's file system cannot punch holes.
    no_punch: bool,
    /// The disk's file system cannot zero ranges.
    no_zero_range: bool,
    direct: Direct,
    idle: Option<Idle>,
    call: HostCall,
    /// Nothing is taken from the ring before: the rate limit.
    limited: Option<Instant>,
    /// Requests that wait until the host can do them, and when they are tried again.
    waiting: Vec<usize>,
    retry: Option<Instant>,
}

impl BlkQueue {
    /// A queue of the disk.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            wake: None,
            engine: None,
            ring: None,
            requests: Vec::new(),
            free: Vec::new(),
            chain: Chain::new(),
            errors: ErrorLog::default(),
            no_punch: false,
            no_zero_range: false,
            direct: Direct::never(),
            idle: None,
            call: HostCall::default(),
            limited: None,
            waiting: Vec::new(),
            retry: None,
        }
    }

    /// Takes requests until the ring is empty, all slots are in use, or enough were taken for one turn. True: there were some.
    fn take_requests(&mut self) -> io::Result<bool> {
        if self.limited.is_some_and(|until| Instant::now() < until) {
            return Ok(false);
        }
        self.limited = None;
        let Some(mut ring) = self.ring.take() else { return Ok(false) };
        let taken = self.take_from(&mut ring);
        self.ring = Some(ring);
        taken
    }

    fn take_from(&mut self, ring: &mut Vring) -> io::Result<bool> {
        let mut any = false;
        for _ in 0..TURN {
            let Some(slot) = self.free_slot(ring) else { break };
            if !ring.next(&mut self.chain) {
                self.free.push(slot);
                break;
            }
            self.begin(slot, ring)?;
            if self.limited.is_some() {
                break;
            }
            any = true;
        }
        Ok(any)
    }

    /// Whether another request could be begun.
    fn has_room(&self) -> bool {
        !self.free.is_empty() || self.requests.len() < MAX_SLOTS
    }

    fn free_slot(&mut self, ring: &Vring) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = self.engine.as_mut()?.add_slot(ring.ram())?;
        self.requests.push(Request::idle());
        Some(slot)
    }

    /// Begins the request in `self.chain`.
    fn begin(&mut self, slot: usize, ring: &mut Vring) -> io::Result<()> {
        let parsed = match request::header(&self.chain, ring.ram()) {
            Ok(Some(header)) => request::status_address(&self.chain).map(|address| (header, address)),
            Ok(None) => None,
            Err(error) => return self.malformed(slot, ring, &error.into()),
        };
        let Some((header, status_address)) = parsed else {
            return self.malformed(
                slot,
                ring,
                &VringError::Request("a disk request without header or status"),
            );
        };
        if let Some(limit) = &self.shared.limit {
            let bytes = request::moved_bytes(&self.chain, header.operation);
            if let Err(wait) = limit.try_take(bytes) {
                self.limited = Instant::now().checked_add(wait);
                ring.put_back(self.chain.head());
                self.free.push(slot);
                return Ok(());
            }
        }
        let (Some(request), Some(engine)) = (self.requests.get_mut(slot), self.engine.as_mut()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        request.cached = false;
        request.head = self.chain.head();
        request.status_address = status_address;
        request.written = self.chain.writable_bytes();
        request.operation = header.operation;
        let (shared, chain, direct) = (&self.shared, &self.chain, &mut self.direct);
        let mut beginning = Beginning { shared, chain, ring, engine, direct, request, slot };
        match beginning.begin(header) {
            Ok(Begun::Started) => Ok(()),
            Ok(Begun::Finished(status)) => {
                self.finish(slot, status, ring);
                Ok(())
            }
            Ok(Begun::Ranges) => self.next_range(slot, ring),
            Ok(Begun::Failed(errno)) => {
                self.failed(slot, errno, ring);
                Ok(())
            }
            Err(BeginError::Memory(error)) => self.malformed(slot, ring, &error.into()),
            Err(BeginError::Engine(error)) => Err(error),
        }
    }

    /// The driver has broken the ring. The request is never finished.
    fn malformed(&mut self, slot: usize, ring: &mut Vring, error: &VringError) -> io::Result<()> {
        ring.fail(error);
        ring.finish(self.chain.head(), 0);
        self.release(slot);
        Ok(())
    }

    fn release(&mut self, slot: usize) {
        if let Some(buffers) = self.engine.as_mut().and_then(|engine| engine.buffers(slot)) {
            buffers.complete(0);
        }
        self.free.push(slot);
    }

    fn finish(&mut self, slot: usize, status: Status, ring: &mut Vring) {
        if let Some(request) = self.requests.get(slot) {
            let place = single(ring.ram().memory(), request.status_address, 1);
            let written = place.is_some_and(|place| place.write_obj(status as u8, 0).is_ok());
            let (head, len) = (request.head, request.written);
            if !written {
                let error = MemoryError::OutOfRange { address: request.status_address, len: 1 };
                ring.fail(&error.into());
            }
            if status != Status::Ok {
                ring.count_error();
            }
            ring.finish(head, len);
        }
        self.release(slot);
    }

    /// Starts the next step of a discard or write-zeroes request.
    fn next_range(&mut self, slot: usize, ring: &mut Vring) -> io::Result<()> {
        let (Some(request), Some(engine)) = (self.requests.get_mut(slot), self.engine.as_mut()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let Some(range) = request.ranges.last().copied() else {
            if !self.shared.writes_through() {
                self.finish(slot, Status::Ok, ring);
                return Ok(());
            }
            request.step = Step::SyncAfter;
            return engine.sync(slot);
        };
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        let discard = request.operation == Operation::Discard;
        if (discard || range.unmap) && !self.no_punch {
            request.step = Step::Punch;
            return engine.allocate(slot, libc::FALLOC_FL_PUNCH_HOLE | keep, range.offset, range.len);
        }
        if discard {
            // A hint that cannot be followed.
            request.ranges.clear();
            self.finish(slot, Status::Ok, ring);
            return Ok(());
        }
        if !self.no_zero_range {
            request.step = Step::ZeroRange;
            return engine.allocate(slot, libc::FALLOC_FL_ZERO_RANGE | keep, range.offset, range.len);
        }
        request.step = Step::Zeroes;
        engine.write_zeroes(slot, range.offset, range.len)
    }

    /// An operation of `slot` ended.
    fn done(&mut self, slot: usize, result: Result<usize, i32>) -> io::Result<()> {
        let Some(mut ring) = self.ring.take() else { return Ok(()) };
        let outcome = self.done_with(slot, result, &mut ring);
        self.ring = Some(ring);
        outcome
    }

    fn done_with(&mut self, slot: usize, result: Result<usize, i32>, ring: &mut Vring) -> io::Result<()> {
        let Some(step) = self.requests.get(slot).map(|request| request.step) else { return Ok(()) };
        match (step, result) {
            (_, Err(libc::EINTR | libc::EAGAIN)) => self.again(slot, ring),
            (Step::Read | Step::Write, Ok(count)) if count > 0 => self.moved(slot, count, ring),
            (Step::Read | Step::Write, Err(libc::EINVAL)) if self.may_go_round(slot) => {
                self.again(slot, ring)
            }
            (Step::Zeroes, Ok(count)) if count > 0 => {
                if let Some(range) = self.requests.get_mut(slot).and_then(|request| request.ranges.last_mut())
                {
                    range.offset = range.offset.saturating_add(count as u64);
                    range.len = range.len.saturating_sub(count as u64);
                    if range.len > 0 {
                        return self.next_range(slot, ring);
                    }
                }
                self.range_done(slot, ring)
            }
            (Step::Punch | Step::ZeroRange, Ok(_)) => self.range_done(slot, ring),
            (Step::Punch, Err(libc::EOPNOTSUPP)) => {
                self.no_punch = true;
                self.next_range(slot, ring)
            }
            (Step::ZeroRange, Err(libc::EOPNOTSUPP)) => {
                self.no_zero_range = true;
                self.next_range(slot, ring)
            }
            (Step::Flush | Step::SyncAfter, Ok(_)) => {
                self.finish(slot, Status::Ok, ring);
                Ok(())
            }
            // The file ends before the disk does, or takes nothing more.
            (_, Ok(_)) => {
                self.failed(slot, libc::EIO, ring);
                Ok(())
            }
            (_, Err(errno)) => {
                self.failed(slot, errno, ring);
                Ok(())
            }
        }
    }

    /// Whether a request that O_DIRECT refused can be done without; from now on it is.
    fn may_go_round(&mut self, slot: usize) -> bool {
        let Some(request) = self.requests.get_mut(slot) else { return false };
        let may = self.shared.cached.is_some() && !request.cached;
        request.cached |= may;
        may
    }

    fn range_done(&mut self, slot: usize, ring: &mut Vring) -> io::Result<()> {
        if let Some(request) = self.requests.get_mut(slot) {
            request.ranges.pop();
        }
        self.next_range(slot, ring)
    }

    /// Bytes of a read or write were moved; a short one is continued.
    fn moved(&mut self, slot: usize, count: usize, ring: &mut Vring) -> io::Result<()> {
        let (Some(request), Some(engine)) = (self.requests.get_mut(slot), self.engine.as_mut()) else {
            return Ok(());
        };
        request.offset = request.offset.saturating_add(count as u64);
        let Some(buffers) = engine.buffers(slot) else { return Ok(()) };
        buffers.advance(count);
        if buffers.is_empty() {
            self.finish(slot, Status::Ok, ring);
            return Ok(());
        }
        self.again(slot, ring)
    }

    /// Starts the step of a slot (again), from where it stands.
    fn again(&mut self, slot: usize, ring: &mut Vring) -> io::Result<()> {
        let (Some(request), Some(engine)) = (self.requests.get(slot), self.engine.as_mut()) else {
            return Ok(());
        };
        match request.step {
            Step::Read => engine.read(slot, request.offset, request.cached),
            Step::Write => engine.write(slot, request.offset, self.shared.writes_through(), request.cached),
            Step::Flush | Step::SyncAfter => engine.sync(slot),
            Step::Punch | Step::ZeroRange | Step::Zeroes => self.next_range(slot, ring),
        }
    }

    fn failed(&mut self, slot: usize, errno: i32, ring: &mut Vring) {
        let step = self.requests.get(slot).map_or(Step::Flush, |request| request.step);
        let name = match step {
            Step::Read => "read",
            Step::Write => "write",
            Step::Flush | Step::SyncAfter => "flush",
            Step::Punch => "discard",
            Step::ZeroRange | Step::Zeroes => "write-zeroes",
        };
        let full = matches!(errno, libc::ENOSPC | libc::EDQUOT);
        let action = if step == Step::Read { self.shared.read_error } else { self.shared.write_error };
        match action {
            ErrorAction::Wait => return self.wait(slot, name, errno),
            ErrorAction::WaitForSpace if full => return self.wait(slot, name, errno),
            ErrorAction::Ignore if !full => {
                self.errors.failed(name, errno, "the guest is told that all is well, as configured");
                return self.fail(slot, Status::Ok, ring);
            }
            ErrorAction::Report | ErrorAction::WaitForSpace | ErrorAction::Ignore => {}
        }
        self.errors.failed(name, errno, "the guest sees an I/O error");
        self.fail(slot, Status::IoError, ring);
    }

    /// The request is tried again later; until then the guest waits.
    fn wait(&mut self, slot: usize, name: &'static str, errno: i32) {
        self.errors.failed(name, errno, "the request waits until the host can do it");
        self.waiting.push(slot);
        self.retry = self.retry.or_else(|| Instant::now().checked_add(RETRY));
    }

    fn fail(&mut self, slot: usize, status: Status, ring: &mut Vring) {
        if let Some(buffers) = self.engine.as_mut().and_then(|engine| engine.buffers(slot)) {
            buffers.fail();
        }
        self.finish(slot, status, ring);
    }

    /// Tries those again that wait for the host, when it is time.
    fn retry(&mut self) -> io::Result<()> {
        if self.retry.is_none_or(|at| Instant::now() < at) {
            return Ok(());
        }
        self.retry = None;
        let Some(mut ring) = self.ring.take() else { return Ok(()) };
        let waiting = std::mem::take(&mut self.waiting);
        let tried = waiting.into_iter().try_for_each(|slot| self.again(slot, &mut ring));
        self.ring = Some(ring);
        tried
    }

    /// Those that wait for the host wait no longer: the guest sees an I/O error.
    fn give_up(&mut self) {
        self.retry = None;
        let Some(mut ring) = self.ring.take() else { return };
        for slot in std::mem::take(&mut self.waiting) {
            self.fail(slot, Status::IoError, &mut ring);
        }
        self.ring = Some(ring);
    }

    /// Handles the events that have come. True if there were any.
    fn events(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some(event) = self.engine.as_mut().and_then(Engine::next_event) {
            any = true;
            match event {
                Event::Done { slot, result } => self.done(slot, result)?,
                // A kick, or the control thread wakes a queue whose kick may have been lost.
                Event::Woken => {}
            }
        }
        Ok(any)
    }

    fn signal(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.signal();
        }
    }

    /// Waits for something to do.
    fn rest(&mut self) -> io::Result<()> {
        let has_room = self.has_room();
        let until = [self.limited, self.retry].into_iter().flatten().min();
        let Some(engine) = self.engine.as_mut() else { return Err(io::ErrorKind::NotConnected.into()) };
        let sleep = |engine: &mut Engine| match until {
            None => engine.enter(true),
            Some(until) => engine.enter_for(until.saturating_duration_since(Instant::now())),
        };
        let looks = has_room && self.limited.is_none();
        let Some(ring) = self.ring.as_mut().filter(|_| looks) else { return sleep(engine) };
        let under_way = engine.busy() > 0;
        let ready = || ring.has_requests() || engine.has_news();
        let look = |idle: &mut Idle| match under_way {
            // A driver that sleeps has its answer as soon if this thread sleeps, too, for half the CPU time.
            true => ring.driver_looks() && idle.look_for_end(ready),
            false => idle.look_for_next(ready),
        };
        if self.idle.as_mut().is_some_and(look) {
            return Ok(());
        }
        let slept = if ring.enable_kicks() { Ok(()) } else { sleep(engine) };
        ring.disable_kicks();
        slept
    }

    /// Waits until nothing taken from the ring is under way.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            self.give_up();
            if self.engine.as_ref().is_none_or(|engine| engine.busy() == 0) {
                break;
            }
            if let Some(engine) = self.engine.as_mut() {
                engine.enter(true)?;
            }
            self.events()?;
        }
        self.signal();
        Ok(())
    }
}

enum BeginError {
    Memory(MemoryError),
    Engine(io::Error),
}

impl From<MemoryError> for BeginError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

impl From<io::Error> for BeginError {
    fn from(error: io::Error) -> Self {
        Self::Engine(error)
    }
}

/// A request at its beginning, and what it needs.
struct Beginning<'a> {
    shared: &'a Shared,
    chain: &'a Chain,
    ring: &'a Vring,
    engine: &'a mut Engine,
    direct: &'a mut Direct,
    request: &'a mut Request,
    slot: usize,
}

impl Beginning<'_> {
    fn begin(&mut self, header: Header) -> Result<Begun, BeginError> {
        match header.operation {
            Operation::Read => {
                let len = self.chain.writable_bytes().saturating_sub(1);
                let segments = segments::part(self.chain.writable(), 0, len);
                self.transfer(Step::Read, header.sector, len, segments)
            }
            Operation::Write | Operation::Discard | Operation::WriteZeroes if self.shared.read_only => {
                Ok(Begun::Finished(Status::IoError))
            }
            Operation::Write => {
                let len = self.chain.readable_bytes().saturating_sub(HEADER);
                let segments = segments::part(self.chain.readable(), HEADER, len);
                self.transfer(Step::Write, header.sector, len, segments)
            }
            Operation::Flush if self.shared.durability == Durability::Never => {
                Ok(Begun::Finished(Status::Ok))
            }
            Operation::Flush => {
                self.request.step = Step::Flush;
                self.engine.sync(self.slot)?;
                Ok(Begun::Started)
            }
            Operation::GetId => {
                let room = self.chain.writable_bytes().saturating_sub(1);
                let serial = &self.shared.serial;
                let serial = serial.get(..usize::try_from(room).unwrap_or(usize::MAX)).unwrap_or(serial);
                segments::scatter(self.chain.writable(), serial, self.ring.ram())?;
                Ok(Begun::Finished(Status::Ok))
            }
            Operation::Discard if !self.shared.discards => Ok(Begun::Finished(Status::Unsupported)),
            Operation::Discard | Operation::WriteZeroes => {
                let (capacity, ranges) = (self.shared.capacity(), &mut self.request.ranges);
                let read = request::ranges(self.chain, header.operation, capacity, self.ring.ram(), ranges)?;
                Ok(read.map_or_else(Begun::Finished, |()| Begun::Ranges))
            }
            Operation::Unknown(_) => Ok(Begun::Finished(Status::Unsupported)),
        }
    }

    /// Begins a read or write of `len` bytes.
    fn transfer(
        &mut self,
        step: Step,
        sector: u64,
        len: u32,
        segments: impl Iterator<Item = Segment>,
    ) -> Result<Begun, BeginError> {
        let offset = match request::check_extent(sector, len, self.shared.capacity()) {
            Ok(_) if len == 0 => return Ok(Begun::Finished(Status::Ok)),
            Ok(offset) => offset,
            Err(status) => return Ok(Begun::Finished(status)),
        };
        let direction = if step == Step::Read { Direction::Write } else { Direction::Read };
        let Some(buffers) = self.engine.buffers(self.slot) else {
            return Ok(Begun::Finished(Status::IoError));
        };
        buffers.restart(self.ring.ram(), direction);
        for segment in segments {
            // No guest RAM: a broken driver, or O_DIRECT by anybody in the guest on persistent memory, where nobody else may suffer.
            if buffers.push(segment.address, u64::from(segment.len)).is_err() {
                return Ok(Begun::Finished(Status::IoError));
            }
        }
        (self.request.step, self.request.offset) = (step, offset);
        let durable = self.shared.writes_through();
        let moved = match (step, &self.shared.raw) {
            (Step::Read, Some(disk)) => self.direct.read(disk, buffers, offset),
            (_, Some(disk)) if !durable => self.direct.write(disk, buffers, offset),
            _ => Moved::Not,
        };
        let moved = match moved {
            Moved::Bytes(0) => return Ok(Begun::Failed(libc::EIO)),
            Moved::Bytes(_) if buffers.is_empty() => return Ok(Begun::Finished(Status::Ok)),
            Moved::Bytes(count) => count,
            Moved::Failed(errno) => return Ok(Begun::Failed(errno)),
            Moved::Not => 0,
        };
        let offset = offset.saturating_add(moved as u64);
        self.request.offset = offset;
        if step == Step::Read {
            self.engine.read(self.slot, offset, false)?;
        } else {
            self.engine.write(self.slot, offset, durable, false)?;
        }
        Ok(Begun::Started)
    }
}

impl QueueWorker for BlkQueue {
    fn prepare(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
        let shared = Arc::clone(&self.shared);
        let mut engine = match (&shared.raw, &shared.pool) {
            (Some(disk), _) => {
                self.direct = Direct::new(disk, self.call.clone());
                Engine::new(Disk::Raw(disk, shared.cached.as_ref()))?
            }
            (None, Some(pool)) => Engine::new(Disk::Image(Arc::clone(pool)))?,
            (None, None) => return Err(io::ErrorKind::NotFound.into()),
        };
        let wake = wake.try_clone_to_owned()?;
        engine.watch(wake.as_fd())?;
        let mut descriptors = engine.descriptors();
        descriptors.push(std::os::fd::AsRawFd::as_raw_fd(&wake));
        self.engine = Some(engine);
        self.wake = Some(wake);
        self.idle = Some(Idle::new());
        Ok(descriptors)
    }

    fn start(&mut self, ring: Vring) -> io::Result<()> {
        let Some(engine) = self.engine.as_mut() else { return Err(io::ErrorKind::NotConnected.into()) };
        engine.watch(ring.kick())?;
        self.ring = Some(ring);
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Option<Vring> {
        if self.ring.as_ref()?.index() != index {
            return None;
        }
        if let Err(error) = self.drain() {
            warn!(%error, "a disk's queue could not be drained");
        }
        let ring = self.ring.take()?;
        if let Some(engine) = self.engine.as_mut() {
            engine.unwatch(ring.kick());
            engine.forget_memory();
        }
        Some(ring)
    }

    fn waits_for_host(&self) -> bool {
        let busy = self.engine.as_ref().is_some_and(|engine| engine.busy() > 0);
        busy || self.limited.is_some() || !self.waiting.is_empty()
    }

    fn set_host_call(&mut self, call: HostCall) {
        self.call = call;
    }

    fn turn(&mut self) -> io::Result<()> {
        self.retry()?;
        let taken = self.take_requests()?;
        if let Some(engine) = self.engine.as_mut() {
            engine.advance()?;
        }
        let any = self.events()?;
        self.signal();
        if taken || any { Ok(()) } else { self.rest() }
    }
}
