//! The chip with firmware's variables, whose commands another process carries out: the core's proxy for a [`MemoryChip`]
//! behind vfio-user.
//!
//! While the chip shows its array the guest reads shared memory. The first write of a sequence takes that memory away, and
//! accesses go to the process until it says that the array is shown again. All writes since then are kept: a successor
//! is told them from the start, which gives the same bytes however far its predecessor came, since programming only clears
//! bits and erasing sets all of a block.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vfio_user::Client;

use super::remote::{Remote, Replay};
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

/// Writes since the array was shown last: offset and value.
type Writes = Vec<(u64, u8)>;

/// The chip.
pub(super) struct Flash {
    address: u64,
    memory: GuestRam,
    shows_bytes: AtomicBool,
    pub remote: Arc<Remote<Writes>>,
}

impl Flash {
    /// A chip without a process, showing `memory`, which begins at `address`.
    pub(super) fn new(id: &str, address: u64, memory: GuestRam, reports: Arc<Reports>) -> Self {
        let replay: Replay<Writes> = |writes, client| {
            writes.iter().try_for_each(|(offset, value)| client.post(REGION_BYTES, *offset, &[*value]))
        };
        let remote = Arc::new(Remote::new(id, None, reports, replay));
        Self { address, memory, shows_bytes: AtomicBool::new(true), remote }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        let mut state = self.remote.lock();
        state.kept.push((offset, value));
        self.shows_bytes.store(false, Ordering::Release);
        // A failure here is noticed again below; a successor is told the write with all others.
        self.remote.attempt(&mut state, |client| client.post(REGION_BYTES, offset, &[value]));
        if value != READ_ARRAY && state.kept.len() < KEPT {
            return;
        }
        let full = state.kept.len() >= KEPT;
        let mut mode = [0];
        let asked = self.remote.exchange(state, |client| client.read(REGION_MODE, 0, &mut mode));
        let mut state = self.remote.lock();
        if asked.is_none() || mode == [MODE_ARRAY] {
            state.kept.clear();
            self.shows_bytes.store(true, Ordering::Release);
        } else if mode == [MODE_READY] && full {
            state.kept = vec![(offset, READ_STATUS)];
        } else if state.kept.len() >= KEPT.saturating_mul(2) {
            // No firmware's doing: such a command never ends.
            state.kept.clear();
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
        let asked =
            self.remote.exchange(self.remote.lock(), |client| client.read(REGION_BYTES, offset, data));
        if asked.is_none() {
            data.fill(0xFF);
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        for (offset, value) in (address.saturating_sub(self.address)..).zip(data) {
            self.write_byte(offset, *value);
        }
    }

    fn reset(&self) {
        let mut state = self.remote.lock();
        state.kept.clear();
        self.shows_bytes.store(true, Ordering::Release);
        self.remote.exchange(state, Client::reset);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use bulkhead_ipc::vfio_user::{
        AccessError, Connection, Description, DeviceInfo, Region, RegionInfo, RegisterDevice, Served,
    };
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::super::register_device::RemoteDevice;
    use super::super::remote::DEADLINE;
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
        flash.remote.start(socket).unwrap();
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
        flash.remote.start(socket).unwrap();
        flash.write(ADDRESS, &[0x40, 1]);
        flash.write(ADDRESS, &[0xFF]);
        flash.write(ADDRESS + 7, &[0x40]);
        flash.remote.disconnect();
        first.join().unwrap();
        let (socket, second) = process();
        thread::scope(|scope| {
            // It waits for the successor.
            scope.spawn(|| flash.write(ADDRESS + 7, &[0xFF]));
            thread::sleep(Duration::from_millis(20));
            flash.remote.replace(socket).unwrap();
        });
        assert!(!flash.shows_bytes());
        drop(flash);
        assert_eq!(second.join().unwrap(), [(7, 0x40), (7, 0xFF)]);
    }

    #[test]
    fn without_a_process_the_memory_is_shown_and_nobody_waits() {
        let flash = flash();
        flash.remote.give_up();
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
        flash.remote.start(socket).unwrap();
        for _ in 0..3 * KEPT {
            flash.write(ADDRESS, &[0x70]);
        }
        assert!(flash.remote.lock().kept.len() <= KEPT);
        drop(flash);
        assert_eq!(process.join().unwrap().len(), 3 * KEPT);
    }
}
