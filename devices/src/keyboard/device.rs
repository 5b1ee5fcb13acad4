//! The controller behind its register protocol, with its state in a file that outlives the process.
//!
//! Region 0 has 256 bytes, of which the first two are the ports, for each number from 0 to 255. The client numbers its accesses and repeats one that was
//! not answered, under the same number: state, number and answer are stored together before the answer is sent, so that no
//! access is carried out twice, whatever process it reaches.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_ipc::channel::message::{FromDevice, Key, ToDevice};
use bulkhead_ipc::vfio_user::{AccessError, Description, DeviceInfo, Region, RegionInfo, RegisterDevice};
use serde::{Deserialize, Serialize};

use super::i8042::{I8042, Port};
use crate::registers::{DeviceProcess, Interrupt, StateFile};

/// Size of the region with the ports, in bytes.
pub const REGION_SIZE: u64 = 1 << 16;

/// What a successor needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    controller: I8042,
    /// Number of the access carried out last, and what it answered.
    number: u8,
    answer: u8,
    /// Number of the keys taken last.
    taken: u64,
}

/// The controller as a process serves it.
#[derive(Debug)]
pub struct KeyboardDevice {
    state: State,
    /// The state is that of the file: the predecessor, if there was one, changes it no more.
    begun: bool,
    file: StateFile,
    interrupt: Interrupt,
}

impl KeyboardDevice {
    /// A controller whose state is in `file`.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { state: State::default(), begun: false, file: file.into(), interrupt: Interrupt::default() }
    }

    /// Keys are pressed or released, unless a predecessor was told of them. Returns the number of those taken last. `newest`: number of
    /// the newest there is.
    pub fn press(&mut self, number: u64, newest: u64, keys: &[Key]) -> u64 {
        // The predecessor may have been broken into.
        if self.state.taken > newest.max(number) {
            self.state.taken = 0;
        }
        if number > self.state.taken {
            self.state.controller.press(keys);
            // Together with what they made of the controller.
            self.state.taken = number;
            self.store();
            self.signal();
        }
        self.state.taken
    }

    /// Carries out an access, unless a predecessor has.
    fn access(
        &mut self,
        offset: u64,
        access: impl FnOnce(&mut I8042, Port) -> u8,
    ) -> Result<u8, AccessError> {
        let number = u8::try_from(offset >> 8).map_err(|_| AccessError::OutOfRange)?;
        if number != self.state.number {
            let port = match offset & 0xFF {
                0 => Port::Data,
                1 => Port::Command,
                _ => return Err(AccessError::OutOfRange),
            };
            self.state.number = number;
            self.state.answer = access(&mut self.state.controller, port);
            self.store();
            self.signal();
        }
        Ok(self.state.answer)
    }

    fn store(&mut self) {
        self.file.store(&self.state);
    }

    fn signal(&mut self) {
        if self.state.controller.take_edge() {
            self.interrupt.signal();
        }
    }
}

impl DeviceProcess for KeyboardDevice {
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.file.as_fd()]
    }

    /// Not earlier, for a successor is made ready while its predecessor serves.
    fn begin(&mut self) -> io::Result<()> {
        if !self.begun {
            self.state = self.file.load()?.unwrap_or_default();
            self.begun = true;
        }
        Ok(())
    }

    fn order(&mut self, message: ToDevice) -> Option<FromDevice> {
        match message {
            ToDevice::Keys { number, newest, keys } => {
                Some(FromDevice::KeysTaken(self.press(number, newest, &keys)))
            }
            message => {
                tracing::warn!(?message, "a control message that this device does not know");
                None
            }
        }
    }

    fn take_failure(&mut self) -> Option<io::Error> {
        self.file.take_failure()
    }
}

impl RegisterDevice for KeyboardDevice {
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
        let [byte] = data else { return Err(AccessError::OutOfRange) };
        *byte = self.access(offset, |controller, port| controller.read(port))?;
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let [value] = data else { return Err(AccessError::OutOfRange) };
        self.access(offset, |controller, port| {
            controller.write(port, *value);
            0
        })?;
        Ok(())
    }

    fn reset(&mut self) {
        self.state.controller = I8042::default();
        self.store();
    }

    fn set_irq(&mut self, _index: u32, _start: u32, event: Option<OwnedFd>) -> Result<(), AccessError> {
        self.interrupt.connect(event)?;
        // The predecessor may have died between storing a byte and saying so. A driver does not mind once too often.
        self.state.controller.raise();
        self.signal();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;
    use crate::registers::STATE_SIZE;

    const A: Key = Key { code: 0x1C, pressed: true };
    const B: Key = Key { code: 0x32, pressed: true };

    struct Guest {
        device: KeyboardDevice,
        number: u8,
        keys: u64,
    }

    fn begun(file: &File) -> KeyboardDevice {
        let mut device = KeyboardDevice::new(file.try_clone().unwrap());
        device.begin().unwrap();
        device
    }

    impl Guest {
        fn new(file: &File) -> Self {
            Self { device: begun(file), number: 0, keys: 0 }
        }

        fn press(&mut self, keys: &[Key]) {
            self.keys += 1;
            assert_eq!(self.device.press(self.keys, self.keys, keys), self.keys);
        }

        fn offset(&self, port: u64) -> u64 {
            u64::from(self.number) * 256 + (port & 4) / 4
        }

        fn read(&mut self, port: u64) -> u8 {
            self.number = self.number.wrapping_add(1);
            self.again(port)
        }

        fn again(&mut self, port: u64) -> u8 {
            let mut byte = [0];
            let offset = self.offset(port);
            self.device.read(0, offset, &mut byte).unwrap();
            byte[0]
        }

        fn write(&mut self, port: u64, value: u8) {
            self.number = self.number.wrapping_add(1);
            let offset = self.offset(port);
            self.device.write(0, offset, &[value]).unwrap();
        }

        fn succeed(&mut self, file: &File) {
            self.device = begun(file);
        }
    }

    #[test]
    fn keys_that_a_predecessor_has_taken_are_not_struck_again() {
        let file = tempfile::tempfile().unwrap();
        let mut guest = Guest::new(&file);
        guest.write(0x64, 0x60);
        guest.write(0x60, 0x41);
        // Made ready while its predecessor serves.
        let mut successor = KeyboardDevice::new(file.try_clone().unwrap());
        guest.press(&[A]);
        successor.begin().unwrap();
        guest.device = successor;
        assert_eq!(guest.device.press(1, 1, &[A]), 1);
        guest.press(&[B]);
        assert_eq!([guest.read(0x60), guest.read(0x60)], [0x1E, 0x30]);
        assert_eq!(guest.read(0x64) & 1, 0);
    }

    #[test]
    fn a_state_that_knows_of_keys_that_nobody_struck_keeps_none_back() {
        let file = tempfile::tempfile().unwrap();
        let mut guest = Guest::new(&file);
        guest.write(0x64, 0x60);
        guest.write(0x60, 0x41);
        guest.device.state.taken = u64::MAX;
        guest.device.store();
        guest.succeed(&file);
        guest.press(&[A]);
        guest.press(&[B]);
        assert_eq!([guest.read(0x60), guest.read(0x60)], [0x1E, 0x30]);
        // One that a predecessor took, of more that are not known to be taken, is not struck again.
        guest.succeed(&file);
        assert_eq!(guest.device.press(1, 2, &[A]), 2);
        assert_eq!(guest.read(0x64) & 1, 0);
    }

    #[test]
    fn a_successor_goes_on_where_its_predecessor_was_and_repeats_no_access() {
        let file = tempfile::tempfile().unwrap();
        let mut guest = Guest::new(&file);
        guest.write(0x64, 0x60);
        guest.succeed(&file);
        guest.write(0x60, 0x41);
        guest.press(&[A, B]);
        guest.succeed(&file);
        assert_eq!(guest.read(0x60), 0x1E);
        // The answer was lost with the process.
        guest.succeed(&file);
        assert_eq!(guest.again(0x60), 0x1E);
        assert_eq!(guest.read(0x60), 0x30);
        assert_eq!(guest.read(0x64) & 1, 0);
    }

    #[test]
    fn a_successor_raises_the_interrupt_that_may_be_owed() {
        let file = tempfile::tempfile().unwrap();
        let mut guest = Guest::new(&file);
        guest.write(0x64, 0x60);
        guest.write(0x60, 0x41);
        guest.press(&[A]);
        guest.succeed(&file);
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        guest.device.set_irq(0, 0, Some(event.as_fd().try_clone_to_owned().unwrap())).unwrap();
        assert_eq!(event.read(), Ok(1));
        guest.read(0x60);
        assert!(event.read().is_err());
        guest.press(&[B]);
        assert_eq!(event.read(), Ok(1));
    }

    #[test]
    fn a_state_that_makes_no_sense_is_a_reset() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xFF; STATE_SIZE], 0).unwrap();
        assert_eq!(Guest::new(&file).device.state, State::default());
    }

    #[test]
    fn the_largest_state_fits_the_file() {
        let file = tempfile::tempfile().unwrap();
        let mut guest = Guest::new(&file);
        for _ in 0..100 {
            guest.press(&[Key { code: u16::MAX, pressed: true }; 100]);
        }
        assert!(guest.device.take_failure().is_none());
        let state = guest.device.state.clone();
        guest.succeed(&file);
        assert_eq!(guest.device.state, state);
    }

    #[test]
    fn other_widths_are_refused() {
        let mut guest = Guest::new(&tempfile::tempfile().unwrap());
        assert!(guest.device.read(0, 2, &mut [0; 2]).is_err());
        assert!(guest.device.write(0, 2, &[0; 4]).is_err());
        assert!(guest.device.write(0, REGION_SIZE, &[0]).is_err());
    }
}
