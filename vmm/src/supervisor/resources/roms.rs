//! Option ROMs: read from their files once, into memory that the core maps.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use super::{ResourceError, memory, open_error, open_regular};
use crate::supervisor::config::RomSpec;

const FIELD: &str = "option-rom";
/// What every ROM begins with (PCI Firmware Specification 3.0, section 5.1.1), and the size of a page of memory, in bytes.
const SIGNATURE: [u8; 2] = [0x55, 0xAA];
const PAGE: u64 = 4096;
/// The largest, in bytes (PCI Local Bus Specification 3.0, section 6.2.5.2).
const MOST: u64 = 16 << 20;
/// The longest name of a file of fw_cfg, and the folder that firmware looks in.
const MOST_NAME: usize = 55;
const FOLDER: &str = "genroms/";

/// An option ROM.
#[derive(Debug)]
pub struct Rom {
    /// The PCI device that brings it.
    pub device: Option<String>,
    /// What firmware knows it by if it belongs to no device.
    pub name: String,
    /// What is in it, filled up with zeros: to a page, or for a device to a size that a base address register can have.
    pub memory: OwnedFd,
}

/// Reads the file.
pub fn open(spec: &RomSpec) -> Result<Rom, ResourceError> {
    let RomSpec { device, path } = spec;
    let failed = |error: io::Error| open_error(FIELD, path, &error);
    let mut contents = Vec::new();
    open_regular(FIELD, path)?.take(MOST + 1).read_to_end(&mut contents).map_err(failed)?;
    let size = contents.len() as u64;
    if !contents.starts_with(&SIGNATURE) || size > MOST {
        return Err(ResourceError::Rom { path: path.clone(), size });
    }
    let size = if device.is_some() { size.next_power_of_two() } else { size.next_multiple_of(PAGE) };
    let memory = memory(FIELD, size.max(PAGE))?;
    File::from(memory.try_clone().map_err(failed)?).write_all(&contents).map_err(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = FOLDER.chars().chain(name.chars().filter(char::is_ascii_graphic)).take(MOST_NAME).collect();
    Ok(Rom { device: device.clone(), name, memory })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_devices_rom_fills_its_base_address_register() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nic.rom");
        let mut image = vec![1; 9 << 10];
        image[..2].copy_from_slice(&SIGNATURE);
        fs::write(&path, &image).unwrap();
        for (device, size) in [(Some("net0".to_owned()), 16 << 10), (None, 12 << 10)] {
            let rom = open(&RomSpec { device, path: path.clone() }).unwrap();
            assert_eq!(rom.name, "genroms/nic.rom");
            let memory = File::from(rom.memory);
            let mut contents = vec![0; image.len()];
            memory.read_exact_at(&mut contents, 0).unwrap();
            assert_eq!((memory.metadata().unwrap().len(), contents), (size, image.clone()));
        }
    }

    #[test]
    fn files_that_are_no_rom_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.rom");
        let refusal = || open(&RomSpec { device: None, path: path.clone() }).unwrap_err().to_string();
        assert!(refusal().contains("no such file"));
        for contents in [vec![], vec![0x55], vec![0xAA; 512]] {
            fs::write(&path, contents).unwrap();
            assert!(refusal().contains("is it the right file?"), "{}", refusal());
        }
        let file = File::create(&path).unwrap();
        file.write_all_at(&SIGNATURE, 0).unwrap();
        file.set_len(MOST + 1).unwrap();
        assert!(refusal().contains("is it the right file?"), "{}", refusal());
    }
}
