//! The watchdog behind its register protocol, with its state in a file that outlives the process.
//!
//! Region 0 has 256 registers for each number from 0 to 255, as the keyboard's: state and number are stored before an access is
//! answered, so that none is carried out twice, whatever process it reaches. The deadline is one of the system's monotonic clock,
//! so that it holds for a successor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_ipc::channel::message::FromDevice;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::vfio_user::{AccessError, Description, DeviceInfo, Region, RegionInfo, RegisterDevice};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::i6300esb::{I6300Esb, Outcome};
use crate::registers::{DeviceProcess, Interrupt, StateFile};

/// Size of the region, in bytes.
pub const REGION_SIZE: u64 = 1 << 16;
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
    file: StateFile,
    /// The machine was reset by it.
    expired: bool,
    /// It raises its interrupt when it runs out.
    interrupts: bool,
    interrupt: Interrupt,
}

/// The moment, ns.
fn now() -> u64 {
    // It cannot fail with this clock.
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl WatchdogDevice {
    /// The watchdog whose state is in `file`; when that is empty, one after its reset: `expired` says whether it has reset the
    /// machine. `interrupts`: it raises its interrupt when it runs out.
    #[must_use]
    pub fn new(file: File, expired: bool, interrupts: bool) -> Self {
        Self { state: None, file: file.into(), expired, interrupts, interrupt: Interrupt::default() }
    }

    /// Acts upon a deadline that has come. True: it has run out, which [`Self::store`] makes known to a successor.
    fn run_out(&mut self) -> bool {
        let Some(state) = &mut self.state else { return false };
        let before = state.chip.deadline();
        let outcome = state.chip.tick(now());
        if outcome == Outcome::Nothing && before != state.chip.deadline() {
            self.store();
        }
        outcome == Outcome::Expired
    }

    /// Stores the state for a successor.
    fn store(&mut self) {
        if let Some(state) = &self.state {
            self.file.store(state);
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

impl DeviceProcess for WatchdogDevice {
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.file.as_fd()]
    }

    /// The core has come: from here on no predecessor changes the state.
    fn begin(&mut self) -> io::Result<()> {
        if self.state.is_some() {
            return Ok(());
        }
        let fresh = State { chip: I6300Esb::new(self.expired), number: 0 };
        let mut state = self.file.load()?.unwrap_or(fresh);
        state.chip.postpone(now().saturating_add(GRACE));
        self.state = Some(state);
        Ok(())
    }

    fn timeout(&self) -> Option<i32> {
        let deadline = self.state.as_ref()?.chip.deadline()?;
        let left = deadline.saturating_sub(now()).div_ceil(1_000_000);
        Some(i32::try_from(left).unwrap_or(i32::MAX))
    }

    fn tick(&mut self, channel: &Channel) -> Result<(), ChannelError> {
        if self.run_out() {
            // Said before it is noted: should this process die in between, its successor says it again.
            channel.send(&FromDevice::Expired, &[])?;
            if self.interrupts {
                self.interrupt.signal();
            }
            self.store();
        }
        Ok(())
    }

    fn take_failure(&mut self) -> Option<io::Error> {
        self.file.take_failure()
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
        self.interrupt.connect(event)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::registers::STATE_SIZE;

    fn begun(file: &File) -> WatchdogDevice {
        let mut device = WatchdogDevice::new(file.try_clone().unwrap(), false, false);
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
        let mut standby = WatchdogDevice::new(file.try_clone().unwrap(), false, false);
        first.write(0, 0x168, &[2]).unwrap();
        assert!(!standby.run_out() && standby.timeout().is_none());
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
        assert!(!second.run_out());
        assert!(second.timeout() > Some(1500));
        second.state.as_mut().unwrap().chip.tick(u64::MAX / 2);
        let state = second.state.as_mut().unwrap();
        assert_eq!(state.chip.tick(u64::MAX), Outcome::Expired);
    }

    #[test]
    fn what_makes_no_sense_is_a_reset_and_the_supervisor_says_what_was_before() {
        let file = tempfile::tempfile().unwrap();
        let mut device = WatchdogDevice::new(file.try_clone().unwrap(), true, false);
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
        let mut early = WatchdogDevice::new(file, false, false);
        assert!(early.read(0, 0x168, &mut [0]).is_err());
    }
}
