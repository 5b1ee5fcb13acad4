//! The watchdog behind its register protocol, with its state in a file that outlives the process.
//!
//! Region 0 has 256 registers for each number from 0 to 255, as the keyboard's: state and number are stored before an access is
//! answered, so that none is carried out twice, whatever process it reaches. The deadline is one of the system's monotonic clock,
//! so that it holds for a successor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use bulkhead_ipc::vfio_user::{AccessError, Description, DeviceInfo, Region, RegionInfo, RegisterDevice};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::i6300esb::{I6300Esb, Outcome};

/// Size of the region, in bytes.
pub const REGION_SIZE: u64 = 1 << 16;
/// Size of the file, in bytes: a page, so that the kernel writes all of the state or nothing of it.
pub const STATE_SIZE: usize = 4096;
/// A successor acts no sooner after it has been connected, ns: a guest may have been waiting to say that it is alive.
const GRACE: u64 = 2_000_000_000;

/// What a successor needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    chip: I6300Esb,
    /// Number of the access carried out last.
    number: u8,
}

/// The watchdog as a process serves it.
#[derive(Debug)]
pub struct WatchdogDevice {
    /// None until the core has come: until then a predecessor may change what is in the file.
    state: Option<State>,
    file: File,
    /// The machine was reset by it.
    expired: bool,
    event: Option<OwnedFd>,
    failure: Option<io::Error>,
}

/// The moment, ns.
fn now() -> u64 {
    // It cannot fail with this clock.
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl WatchdogDevice {
    /// The watchdog whose state is in `file`; when that is empty, one after its reset: `expired` says whether it has done that.
    #[must_use]
    pub const fn new(file: File, expired: bool) -> Self {
        Self { state: None, file, expired, event: None, failure: None }
    }

    /// Descriptors that the device holds.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.file.as_fd())
    }

    /// The core has come: from here on no predecessor changes the state.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn begin(&mut self) -> io::Result<()> {
        if self.state.is_some() {
            return Ok(());
        }
        let mut bytes = [0; STATE_SIZE];
        let filled = self.file.read_at(&mut bytes, 0)?;
        let stored = bytes.get(..filled).unwrap_or_default();
        let fresh = State { chip: I6300Esb::new(self.expired), number: 0 };
        let mut state = if stored.is_empty() {
            fresh
        } else {
            // The predecessor may have been broken into.
            postcard::from_bytes(stored)
                .inspect_err(
                    |error| tracing::warn!(%error, "the watchdog's state makes no sense: it is reset"),
                )
                .unwrap_or(fresh)
        };
        state.chip.postpone(now().saturating_add(GRACE));
        self.state = Some(state);
        Ok(())
    }

    /// Milliseconds until [`Self::tick`] is to be called.
    #[must_use]
    pub fn timeout(&self) -> Option<i32> {
        let deadline = self.state.as_ref()?.chip.deadline()?;
        let left = deadline.saturating_sub(now()).div_ceil(1_000_000);
        Some(i32::try_from(left).unwrap_or(i32::MAX))
    }

    /// Acts upon a deadline that has come. True: it has run out, which [`Self::store`] makes known to a successor.
    pub fn tick(&mut self) -> bool {
        let Some(state) = &mut self.state else { return false };
        let before = state.chip.deadline();
        let outcome = state.chip.tick(now());
        if outcome == Outcome::Nothing && before != state.chip.deadline() {
            self.store();
        }
        outcome == Outcome::Expired
    }

    /// Raises the interrupt.
    pub fn interrupt(&self) {
        if let Some(event) = &self.event {
            // EAGAIN: 2^64 - 2 of them are waiting already. Nothing else can be done about an error here.
            let _ = nix::unistd::write(event, &1_u64.to_ne_bytes());
        }
    }

    /// Why the state can no longer be stored, once.
    pub fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }

    /// Stores the state for a successor.
    pub fn store(&mut self) {
        let Some(state) = &self.state else { return };
        let mut bytes = [0; STATE_SIZE];
        let stored = match postcard::to_slice(state, &mut bytes) {
            Ok(used) => self.file.write_all_at(used, 0),
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = stored {
            self.failure.get_or_insert(error);
        }
    }

    /// Notes the number of an access, which is in its offset; returns the register, and whether it was carried out before.
    fn number(&mut self, offset: u64) -> Result<(u8, bool, &mut I6300Esb), AccessError> {
        let number = u8::try_from(offset >> 8).map_err(|_| AccessError::OutOfRange)?;
        let state = self.state.as_mut().ok_or(AccessError::OutOfRange)?;
        let repeated = state.number == number;
        state.number = number;
        Ok((offset.to_le_bytes()[0], repeated, &mut state.chip))
    }
}

impl RegisterDevice for WatchdogDevice {
    fn description(&self) -> Description {
        Description { flags: DeviceInfo::RESET, regions: 1, irqs: 1 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        let flags = RegionInfo::READ | RegionInfo::WRITE;
        (index == 0).then_some(Region { size: REGION_SIZE, flags, file: None })
    }

    fn irq_count(&self, index: u32) -> u32 {
        u32::from(index == 0)
    }

    fn read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let (first, _, chip) = self.number(offset)?;
        data.iter_mut().zip(first..).for_each(|(byte, register)| *byte = chip.read(register));
        self.store();
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let mut word = [0; 4];
        word.get_mut(..data.len()).ok_or(AccessError::OutOfRange)?.copy_from_slice(data);
        let (register, repeated, chip) = self.number(offset)?;
        if !repeated {
            chip.write(register, u32::from_le_bytes(word), now());
            self.store();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.state.iter_mut().for_each(|state| state.chip.reset());
        self.store();
    }

    fn set_irq(&mut self, _index: u32, _start: u32, event: Option<OwnedFd>) -> Result<(), AccessError> {
        if let Some(event) = &event {
            // Whatever the peer sent, writing to it must not block.
            let flags = fcntl(event, FcntlArg::F_GETFL).map_err(|_| AccessError::OutOfRange)?;
            let flags = OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK;
            fcntl(event, FcntlArg::F_SETFL(flags)).map_err(|_| AccessError::OutOfRange)?;
        }
        self.event = event;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(file: &File) -> WatchdogDevice {
        let mut device = WatchdogDevice::new(file.try_clone().unwrap(), false);
        device.begin().unwrap();
        device
    }

    fn deadline(device: &WatchdogDevice) -> Option<u64> {
        device.state.as_ref().and_then(|state| state.chip.deadline())
    }

    #[test]
    fn a_successor_keeps_the_deadline_and_repeats_no_access() {
        let file = tempfile::tempfile().unwrap();
        let mut first = begun(&file);
        first.write(0, 0x168, &[2]).unwrap();
        let mut second = begun(&file);
        assert_eq!(deadline(&second), deadline(&first));
        assert!(deadline(&second).is_some() && second.timeout() > Some(1_000_000));
        // Turning it off was carried out, and the answer lost.
        second.write(0, 0x268, &[0]).unwrap();
        second.write(0, 0x368, &[2]).unwrap();
        let kept = deadline(&second);
        let mut third = begun(&file);
        third.write(0, 0x368, &[0]).unwrap();
        assert_eq!(deadline(&third), kept);
        let mut byte = [0];
        third.read(0, 0x468, &mut byte).unwrap();
        assert_eq!(byte, [2]);
        // 256 reads later the number comes again.
        begun(&file).write(0, 0x368, &[0]).unwrap();
        assert_eq!(deadline(&begun(&file)), None);
    }

    #[test]
    fn a_standby_takes_what_its_predecessor_did_meanwhile() {
        let file = tempfile::tempfile().unwrap();
        let mut first = begun(&file);
        let mut standby = WatchdogDevice::new(file.try_clone().unwrap(), false);
        first.write(0, 0x168, &[2]).unwrap();
        assert!(!standby.tick() && standby.timeout().is_none());
        standby.begin().unwrap();
        assert_eq!(deadline(&standby), deadline(&first));
    }

    #[test]
    fn a_guest_that_was_waiting_gets_its_chance_and_one_that_is_dead_its_end() {
        let file = tempfile::tempfile().unwrap();
        let mut first = begun(&file);
        let accesses: [(u64, &[u8]); 8] = [
            (0x0C, &[0x80]),
            (0x0C, &[0x86]),
            (0x00, &[0; 4]),
            (0x0C, &[0x80]),
            (0x0C, &[0x86]),
            (0x04, &[0; 4]),
            (0x68, &[2]),
            (0x08, &[0]),
        ];
        for (number, (register, data)) in (1..).zip(accesses) {
            first.write(0, number << 8 | register, data).unwrap();
        }
        // Its 2 ms are over while nobody is there.
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(first.timeout(), Some(0));
        let mut second = begun(&file);
        assert!(!second.tick());
        assert!(second.timeout() > Some(1500));
        second.state.as_mut().unwrap().chip.tick(u64::MAX / 2);
        let state = second.state.as_mut().unwrap();
        assert_eq!(state.chip.tick(u64::MAX), Outcome::Expired);
    }

    #[test]
    fn what_makes_no_sense_is_a_reset_and_the_supervisor_says_what_was_before() {
        let file = tempfile::tempfile().unwrap();
        let mut device = WatchdogDevice::new(file.try_clone().unwrap(), true);
        device.begin().unwrap();
        let mut word = [0; 2];
        device.read(0, 0x10C, &mut word).unwrap();
        assert_eq!(word, [0, 2]);
        file.write_all_at(&[0xFF; STATE_SIZE], 0).unwrap();
        assert_eq!(begun(&file).state.unwrap().chip, I6300Esb::new(false));
    }

    #[test]
    fn other_widths_and_places_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let mut device = begun(&file);
        assert!(device.write(0, 0x168, &[0; 5]).is_err());
        assert!(device.write(0, REGION_SIZE, &[0]).is_err());
        let mut early = WatchdogDevice::new(file, false);
        assert!(early.read(0, 0x168, &mut [0]).is_err());
    }
}
