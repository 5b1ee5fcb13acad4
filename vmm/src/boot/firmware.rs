//! Firmware: an image in a ROM that ends where the first 4 GiB end, so that its last bytes are the reset vector's.

use std::fs::File;
use std::sync::Arc;

use bulkhead_ipc::memory::{GuestRam, PAGE_SIZE};

use super::BootError;
use super::image::Image;
use crate::machine::MemoryChip;

/// Larger images would reach down to the APICs.
const MOST: u64 = 8 << 20;
const END: u64 = 1 << 32;

struct Rom(GuestRam);

impl MemoryChip for Rom {
    fn name(&self) -> &str {
        "firmware ROM"
    }

    fn memory(&self) -> &GuestRam {
        &self.0
    }
}

/// Reads an image into a ROM.
///
/// # Errors
/// It cannot be read, or is empty, too large or no whole number of pages.
pub fn load_firmware(file: &File) -> Result<Arc<dyn MemoryChip>, BootError> {
    let image = Image::new(file, "firmware")?;
    let size = image.size();
    if size == 0 || size > MOST || !size.is_multiple_of(PAGE_SIZE) {
        return Err(BootError::FirmwareSize(size));
    }
    let address = END.saturating_sub(size);
    let rom = GuestRam::create_at(address, size)?;
    image.load(&rom, 0, size, address)?;
    Ok(Arc::new(Rom(rom)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use bulkhead_ipc::memory::Direction;

    use super::*;

    fn load(bytes: &[u8]) -> Result<Arc<dyn MemoryChip>, BootError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        load_firmware(&file)
    }

    #[test]
    fn the_end_of_the_image_is_the_end_of_the_first_4_gib() {
        let mut image = vec![0; 8192];
        image[8191] = 0x5A;
        let rom = load(&image).unwrap();
        let mut last = [0];
        rom.memory().view(0xFFFF_FFFF, 1, Direction::Read).unwrap().read_bytes(0, &mut last).unwrap();
        assert_eq!(last, [0x5A]);
        assert!(!rom.memory().contains(0xFFFF_DFFF, 1));
    }

    #[test]
    fn empty_odd_and_huge_images_are_refused() {
        for size in [0, 1, 4095, 4097, (8 << 20) + 4096] {
            let error = load(&vec![0; size]).err().unwrap();
            assert!(matches!(error, BootError::FirmwareSize(bytes) if bytes == size as u64), "{error}");
        }
    }
}
