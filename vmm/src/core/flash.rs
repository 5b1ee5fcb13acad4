//! The chip with firmware's variables, whose commands another process carries out: the core's proxy for a [`MemoryChip`]
//! behind vfio-user.
//!
//! While the chip shows its array the guest reads shared memory. The first write of a sequence takes that memory away, and
//! accesses go to the process until it says that the array is shown again. All writes since then are kept: a successor
//! is told them from the start, which gives the same bytes however far its predecessor came, since programming only clears
//! bits and erasing sets all of a block.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vfio_user::{Client, ClientError};

use super::reports::Reports;
use crate::machine::MemoryChip;

/// The regions: the chip's bytes, and what it is about.
const REGION_BYTES: u32 = 0;
const REGION_MODE: u32 = 1;
const MODE_ARRAY: u8 = 0;
const MODE_READY: u8 = 1;
/// The command after which the chip may show its array; and the one that shows the status instead.
const READ_ARRAY: u8 = 0xFF;
const READ_STATUS: u8 = 0x70;
/// So many writes are kept before the chip is asked whether a command is complete.
const KEPT: usize = 64 << 10;
/// How long an access may take.
const DEADLINE: Duration = Duration::from_secs(1);
/// How long accesses then wait for a successor: one that has died often starts after a pause of a second, and takes a while.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long each exchange may take while the first process starts.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// The chip.
pub(super) struct Flash {
    id: String,
    address: u64,
    memory: GuestRam,
    reports: Arc<Reports>,
    shows_bytes: AtomicBool,
    state: Mutex<State>,
    /// A successor is connected, or none will come.
    settled: Condvar,
}

#[derive(Default)]
struct State {
    client: Option<Client>,
    /// Without a connection: until then accesses wait for a successor.
    patience: Option<Instant>,
    /// Writes since the array was shown last: offset and value.
    writes: Vec<(u64, u8)>,
}

impl Flash {
    /// A chip without a process, showing `memory`, which begins at `address`.
    pub(super) fn new(id: &str, address: u64, memory: GuestRam, reports: Arc<Reports>) -> Self {
        let (id, shows_bytes) = (id.to_owned(), AtomicBool::new(true));
        let (state, settled) = (Mutex::default(), Condvar::new());
        Self { id, address, memory, reports, shows_bytes, state, settled }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Connects the first process, which may still be starting.
    pub(super) fn start(&self, socket: OwnedFd) -> Result<(), ClientError> {
        self.connect(socket, START_DEADLINE)
    }

    /// Takes a new process in place of one that has ended.
    pub(super) fn replace(&self, socket: OwnedFd) -> Result<(), ClientError> {
        // Two exchanges.
        self.connect(socket, DEADLINE / 2)
    }

    fn connect(&self, socket: OwnedFd, patience: Duration) -> Result<(), ClientError> {
        let mut client = Client::connect(socket, &self.id, patience)?;
        client.set_deadline(DEADLINE)?;
        let mut state = self.lock();
        state.writes.iter().try_for_each(|(offset, value)| client.post(REGION_BYTES, *offset, &[*value]))?;
        state.client = Some(client);
        self.settled.notify_all();
        Ok(())
    }

    /// Lets the process go; accesses wait for [`Self::replace`].
    pub(super) fn disconnect(&self) {
        Self::forget(&mut self.lock());
    }

    /// No successor will come: the bytes stay as they are, and commands are lost.
    pub(super) fn give_up(&self) {
        let mut state = self.lock();
        (state.client, state.patience) = (None, None);
        self.settled.notify_all();
    }

    /// The descriptors that the chip holds now.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.lock().client.iter().map(|client| client.as_fd().as_raw_fd()).collect()
    }

    fn forget(state: &mut State) {
        if state.client.take().is_some() {
            state.patience = Instant::now().checked_add(PATIENCE);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an exchange, with a successor if it must be.
    fn exchange<T>(
        &self,
        mut state: MutexGuard<'_, State>,
        mut exchange: impl FnMut(&mut Client) -> Result<T, ClientError>,
    ) -> Option<T> {
        loop {
            match state.client.as_mut().map(&mut exchange) {
                Some(Ok(value)) => return Some(value),
                Some(Err(error)) => {
                    Self::forget(&mut state);
                    self.reports.device_failed(&self.id, error.to_string());
                }
                None => {
                    let left = state.patience?.checked_duration_since(Instant::now())?;
                    let waited = self.settled.wait_timeout(state, left);
                    (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        let mut state = self.lock();
        state.writes.push((offset, value));
        self.shows_bytes.store(false, Ordering::Release);
        // A failure here is noticed again below; a successor is told the write with all others.
        if let Some(Err(error)) =
            state.client.as_mut().map(|client| client.post(REGION_BYTES, offset, &[value]))
        {
            Self::forget(&mut state);
            self.reports.device_failed(&self.id, error.to_string());
        }
        if value != READ_ARRAY && state.writes.len() < KEPT {
            return;
        }
        let full = state.writes.len() >= KEPT;
        let mut mode = [0];
        let asked = self.exchange(state, |client| client.read(REGION_MODE, 0, &mut mode));
        let mut state = self.lock();
        if asked.is_none() || mode == [MODE_ARRAY] {
            state.writes.clear();
            self.shows_bytes.store(true, Ordering::Release);
        } else if mode == [MODE_READY] && full {
            state.writes = vec![(offset, READ_STATUS)];
        } else if state.writes.len() >= KEPT.saturating_mul(2) {
            // No firmware's doing: such a command never ends.
            state.writes.clear();
        }
    }
}

impl MemoryChip for Flash {
    fn name(&self) -> &str {
        "firmware variables"
    }

    fn memory(&self) -> &GuestRam {
        &self.memory
    }

    fn shows_bytes(&self) -> bool {
        self.shows_bytes.load(Ordering::Acquire)
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        let offset = address.saturating_sub(self.address);
        if self.exchange(self.lock(), |client| client.read(REGION_BYTES, offset, data)).is_none() {
            data.fill(0xFF);
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        for (offset, value) in (address.saturating_sub(self.address)..).zip(data) {
            self.write_byte(offset, *value);
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.writes.clear();
        self.shows_bytes.store(true, Ordering::Release);
        self.exchange(state, Client::reset);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread::{self, JoinHandle};

    use bulkhead_ipc::vfio_user::{
        AccessError, Connection, Description, DeviceInfo, Region, RegionInfo, RegisterDevice, Served,
    };
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    const ADDRESS: u64 = 0xFFC0_0000;

    /// A chip that notes what it is told: command 40 takes one byte more, FF shows the array.
    #[derive(Default)]
    struct Model {
        told: Vec<(u64, u8)>,
        programming: bool,
        array: bool,
    }

    impl RegisterDevice for Model {
        fn description(&self) -> Description {
            Description { flags: DeviceInfo::RESET, regions: 2, irqs: 0 }
        }

        fn region(&self, index: u32) -> Option<Region<'_>> {
            let size = if index == REGION_BYTES { 8192 } else { 1 };
            (index < 2).then_some(Region { size, flags: RegionInfo::READ | RegionInfo::WRITE, file: None })
        }

        fn irq_count(&self, _index: u32) -> u32 {
            0
        }

        fn read(&mut self, region: u32, _offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
            let mode = if self.array { MODE_ARRAY } else { MODE_READY };
            data.fill(if region == REGION_MODE { mode } else { 0x80 });
            Ok(())
        }

        fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
            for value in data {
                self.told.push((offset, *value));
                self.array = !self.programming && *value == READ_ARRAY;
                self.programming = !self.programming && *value == 0x40;
            }
            Ok(())
        }

        fn reset(&mut self) {}

        fn set_irq(&mut self, _: u32, _: u32, _: Option<OwnedFd>) -> Result<(), AccessError> {
            Err(AccessError::OutOfRange)
        }
    }

    /// A process with this model; it ends when its connection does, and says what it was told.
    fn process() -> (OwnedFd, JoinHandle<Vec<(u64, u8)>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serve = move || {
            let mut connection = Connection::new(theirs.into(), DEADLINE).unwrap();
            let mut model = Model::default();
            loop {
                let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                match connection.serve(&mut model) {
                    Ok(Served::Open) => {}
                    _ => return model.told,
                }
            }
        };
        (ours.into(), thread::spawn(serve))
    }

    fn flash() -> Flash {
        let memory = GuestRam::create_at(ADDRESS, 8192).unwrap();
        Flash::new("firmware-vars", ADDRESS, memory, Arc::new(Reports::new().unwrap()))
    }

    #[test]
    fn memory_is_shown_until_a_command_and_again_when_the_chip_says_so() {
        let (flash, (socket, process)) = (flash(), process());
        flash.start(socket).unwrap();
        assert!(flash.shows_bytes());
        flash.write(ADDRESS + 5, &[0x40]);
        assert!(!flash.shows_bytes());
        // Data that looks like the command.
        flash.write(ADDRESS + 5, &[0xFF]);
        assert!(!flash.shows_bytes());
        let mut status = [0; 2];
        flash.read(ADDRESS + 5, &mut status);
        assert_eq!(status, [0x80; 2]);
        flash.write(ADDRESS + 5, &[0xFF]);
        assert!(flash.shows_bytes());
        drop(flash);
        assert_eq!(process.join().unwrap(), [(5, 0x40), (5, 0xFF), (5, 0xFF)]);
    }

    #[test]
    fn a_successor_is_told_everything_since_the_array_was_shown() {
        let (flash, (socket, first)) = (flash(), process());
        flash.start(socket).unwrap();
        flash.write(ADDRESS, &[0x40, 1]);
        flash.write(ADDRESS, &[0xFF]);
        flash.write(ADDRESS + 7, &[0x40]);
        flash.disconnect();
        first.join().unwrap();
        let (socket, second) = process();
        thread::scope(|scope| {
            // It waits for the successor.
            scope.spawn(|| flash.write(ADDRESS + 7, &[0xFF]));
            thread::sleep(Duration::from_millis(20));
            flash.replace(socket).unwrap();
        });
        assert!(!flash.shows_bytes());
        drop(flash);
        assert_eq!(second.join().unwrap(), [(7, 0x40), (7, 0xFF)]);
    }

    #[test]
    fn without_a_process_the_memory_is_shown_and_nobody_waits() {
        let flash = flash();
        flash.give_up();
        let start = Instant::now();
        flash.write(ADDRESS, &[0x70]);
        let mut bytes = [0];
        flash.read(ADDRESS, &mut bytes);
        assert_eq!(bytes, [0xFF]);
        flash.write(ADDRESS, &[0xFF]);
        assert!(flash.shows_bytes() && start.elapsed() < DEADLINE);
    }

    #[test]
    fn a_guest_that_never_ends_a_command_fills_no_memory() {
        let (flash, (socket, process)) = (flash(), process());
        flash.start(socket).unwrap();
        for _ in 0..3 * KEPT {
            flash.write(ADDRESS, &[0x70]);
        }
        assert!(flash.lock().writes.len() <= KEPT);
        drop(flash);
        assert_eq!(process.join().unwrap().len(), 3 * KEPT);
    }
}
