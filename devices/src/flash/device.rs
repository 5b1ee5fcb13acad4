//! The chip behind its register protocol: region 0 is its bytes, region 1 one byte that says what it is about.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use bulkhead_ipc::memory::{Direction, GuestRam, SharedRegion};
use bulkhead_ipc::vfio_user::{AccessError, Description, DeviceInfo, Region, RegionInfo, RegisterDevice};

use super::FlashError;
use super::cfi::{BLOCK, Chip, Store};
use crate::registers::DeviceProcess;

/// Index of the region that holds the chip's bytes.
pub const REGION_BYTES: u32 = 0;
/// Index of the region that says what the chip is about.
pub const REGION_MODE: u32 = 1;
/// It shows its array: reads may be answered from the memory.
pub const MODE_ARRAY: u8 = 0;
/// It shows something else, and waits for a command.
pub const MODE_READY: u8 = 1;
/// It waits for more of a command.
pub const MODE_BUSY: u8 = 2;

/// The chip as a process serves it.
#[derive(Debug)]
pub struct FlashDevice {
    chip: Chip,
    contents: Contents,
}

/// A file, and the memory that shows what is in it.
#[derive(Debug)]
struct Contents {
    file: File,
    memory: GuestRam,
    size: u64,
    failure: Option<io::Error>,
}

impl Store for Contents {
    fn byte(&self, offset: u32) -> u8 {
        let view = self.memory.view(offset.into(), 1, Direction::Read);
        view.and_then(|view| view.read(0)).unwrap_or(0xFF)
    }

    /// The file first: the memory is made from it when the process is replaced.
    fn set(&mut self, offset: u32, bytes: &[u8]) -> bool {
        if let Err(error) = self.file.write_all_at(bytes, offset.into()) {
            tracing::error!(%error, offset, "a firmware variable is not stored");
            if error.kind() != io::ErrorKind::StorageFull {
                self.failure = Some(error);
            }
            return false;
        }
        let view = self.memory.view(offset.into(), bytes.len() as u64, Direction::Write);
        view.and_then(|view| view.write_bytes(0, bytes)).is_ok()
    }
}

impl FlashDevice {
    /// A chip after its reset with what is in the file.
    ///
    /// # Errors
    /// The file is shorter than `size` bytes or cannot be read, or the memory is smaller or not sealed.
    pub fn open(file: File, memory: OwnedFd, size: u64) -> Result<Self, FlashError> {
        let chip_size = u32::try_from(size).map_err(|_| FlashError::Size(size))?;
        if chip_size == 0 || !chip_size.is_multiple_of(BLOCK) {
            return Err(FlashError::Size(size));
        }
        let memory = GuestRam::attach(vec![SharedRegion { guest_address: 0, size, offset: 0, fd: memory }])?;
        let mut block = [0; BLOCK as usize];
        for offset in (0..size).step_by(block.len()) {
            file.read_exact_at(&mut block, offset)?;
            memory.view(offset, block.len() as u64, Direction::Write)?.write_bytes(0, &block)?;
        }
        Ok(Self { chip: Chip::new(chip_size), contents: Contents { file, memory, size, failure: None } })
    }
}

impl DeviceProcess for FlashDevice {
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let memory = self.contents.memory.regions().map(|region| region.fd);
        memory.chain([self.contents.file.as_fd()]).collect()
    }

    fn take_failure(&mut self) -> Option<io::Error> {
        self.contents.failure.take()
    }

    /// A power failure of the host shall not take what a machine that ended has stored.
    fn end(&mut self) -> io::Result<()> {
        self.contents.file.sync_data()
    }
}

impl RegisterDevice for FlashDevice {
    fn description(&self) -> Description {
        Description { flags: DeviceInfo::RESET, regions: 2, irqs: 0 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        let (size, flags) = match index {
            REGION_BYTES => (self.contents.size, RegionInfo::READ | RegionInfo::WRITE),
            REGION_MODE => (1, RegionInfo::READ),
            _ => return None,
        };
        Some(Region { size, flags, file: None })
    }

    fn irq_count(&self, _index: u32) -> u32 {
        0
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if region == REGION_MODE {
            data.fill(match (self.chip.shows_array(), self.chip.is_busy()) {
                (_, true) => MODE_BUSY,
                (true, false) => MODE_ARRAY,
                (false, false) => MODE_READY,
            });
            return Ok(());
        }
        for (byte, offset) in data.iter_mut().zip(offset..) {
            let offset = u32::try_from(offset).map_err(|_| AccessError::OutOfRange)?;
            *byte = self.chip.read(&self.contents, offset);
        }
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        for (byte, offset) in data.iter().zip(offset..) {
            let offset = u32::try_from(offset).map_err(|_| AccessError::OutOfRange)?;
            self.chip.write(&mut self.contents, offset, *byte);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.chip.reset();
    }

    fn set_irq(&mut self, _index: u32, _start: u32, _event: Option<OwnedFd>) -> Result<(), AccessError> {
        Err(AccessError::OutOfRange)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> (File, OwnedFd) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xAB; 2 * BLOCK as usize], 0).unwrap();
        let memory = GuestRam::create_at(0, 2 * u64::from(BLOCK)).unwrap();
        let fd = memory.regions().next().unwrap().fd.try_clone_to_owned().unwrap();
        (file, fd)
    }

    fn write(device: &mut FlashDevice, offset: u64, bytes: &[u8]) {
        for byte in bytes {
            device.write(REGION_BYTES, offset, &[*byte]).unwrap();
        }
    }

    fn shown(memory: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 2 * BLOCK as usize];
        File::from(memory.try_clone().unwrap()).read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn file_and_memory_change_alike_and_a_successor_shows_the_file() {
        let (file, memory) = files();
        let open =
            || FlashDevice::open(file.try_clone().unwrap(), memory.try_clone().unwrap(), 8192).unwrap();
        let mut device = open();
        write(&mut device, 5, &[0x40, 0x0F]);
        let mut mode = [9];
        device.read(REGION_MODE, 0, &mut mode).unwrap();
        assert_eq!(mode, [MODE_READY]);
        write(&mut device, 4096, &[0x20]);
        device.read(REGION_MODE, 0, &mut mode).unwrap();
        assert_eq!(mode, [MODE_BUSY]);
        write(&mut device, 4096, &[0xD0, 0xFF]);
        device.read(REGION_MODE, 0, &mut mode).unwrap();
        assert_eq!(mode, [MODE_ARRAY]);
        let mut stored = vec![0; 8192];
        file.read_exact_at(&mut stored, 0).unwrap();
        assert_eq!((stored[5], stored[4096], stored[4]), (0x0B, 0xFF, 0xAB));
        assert_eq!(shown(&memory), stored);
        // A process killed between the two leaves the file ahead of the memory.
        file.write_all_at(&[0x01], 6).unwrap();
        drop(device);
        let _successor = open();
        assert_eq!(shown(&memory)[6], 0x01);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 1, 4095, 3 * u64::from(BLOCK), u64::MAX] {
            let (file, memory) = files();
            assert!(FlashDevice::open(file, memory, size).is_err(), "{size}");
        }
    }
}
