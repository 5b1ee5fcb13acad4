//! Option ROMs: read from their files once, into memory that the core maps.
//!
//! Firmware runs a ROM only if its images are for the device that brings it. Where iPXE's are for a transitional virtio network
//! card, which differs in its device ID alone, they are made ones for ours, as QEMU does with the ROMs that it brings along.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use super::{ResourceError, memory, open_error, open_regular};
use crate::supervisor::config::RomSpec;

const FIELD: &str = "option-rom";
/// What every ROM begins with (PCI Firmware Specification 3.0, section 5.1.1), and the size of a page of memory, in bytes.
const SIGNATURE: [u8; 2] = [0x55, 0xAA];
const PAGE: u64 = 4096;
/// Vendor and device ID of a transitional virtio network card, and of one that is not (virtio 1.2, section 4.1.2.1).
const TRANSITIONAL: [u8; 4] = [0xF4, 0x1A, 0x00, 0x10];
const MODERN: [u8; 4] = [0xF4, 0x1A, 0x41, 0x10];
/// The code type of an image for a BIOS.
const BIOS: u8 = 0;
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

/// Reads the file; `card`: of a virtio network card.
pub fn open(spec: &RomSpec, card: bool) -> Result<Rom, ResourceError> {
    let RomSpec { device, path } = spec;
    let failed = |error: io::Error| open_error(FIELD, path, &error);
    let mut contents = Vec::new();
    open_regular(FIELD, path)?.take(MOST + 1).read_to_end(&mut contents).map_err(failed)?;
    let size = contents.len() as u64;
    if !contents.starts_with(&SIGNATURE) || size > MOST {
        return Err(ResourceError::Rom { path: path.clone(), size });
    }
    if card {
        mend_ids(&mut contents);
    }
    let size = if device.is_some() { size.next_power_of_two() } else { size.next_multiple_of(PAGE) };
    let memory = memory(FIELD, size.max(PAGE))?;
    File::from(memory.try_clone().map_err(failed)?).write_all(&contents).map_err(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = FOLDER.chars().chain(name.chars().filter(char::is_ascii_graphic)).take(MOST_NAME).collect();
    Ok(Rom { device: device.clone(), name, memory })
}

/// Gives the images of a ROM for a transitional virtio network card the device ID of ours, and those for a BIOS their checksum.
/// What is no image ends it.
fn mend_ids(rom: &mut [u8]) {
    let mut rest = rom;
    while let Some(length) = mend_image(rest) {
        rest = rest.get_mut(length..).unwrap_or_default();
    }
}

/// The same for one image. Returns its length in bytes, unless it is the last one (PCI Firmware Specification 3.0, sections 5.1.1
/// and 5.1.2).
fn mend_image(image: &mut [u8]) -> Option<usize> {
    if !image.starts_with(&SIGNATURE) {
        return None;
    }
    let data = usize::from(u16::from_le_bytes(*image.get(0x18..)?.first_chunk()?));
    let structure: &mut [u8; 0x16] = image.get_mut(data..)?.first_chunk_mut()?;
    if !structure.starts_with(b"PCIR") {
        return None;
    }
    let length = usize::from(u16::from_le_bytes([structure[0x10], structure[0x11]])) << 9;
    let (code, last) = (structure[0x14], structure[0x15] & 1 << 7 != 0);
    let ids = structure.get_mut(4..8)?;
    if ids == TRANSITIONAL {
        ids.copy_from_slice(&MODERN);
        let sum = |bytes: [u8; 4]| bytes.into_iter().fold(0_u8, u8::wrapping_add);
        // The byte that is there for this purpose, by the convention of iPXE and others.
        if let Some(checksum) = image.get_mut(6).filter(|_| code == BIOS) {
            *checksum = checksum.wrapping_add(sum(TRANSITIONAL)).wrapping_sub(sum(MODERN));
        }
    }
    (!last && length != 0).then_some(length)
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
            let rom = open(&RomSpec { device, path: path.clone() }, false).unwrap();
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
        let refusal = || open(&RomSpec { device: None, path: path.clone() }, false).unwrap_err().to_string();
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

    /// An image with this device ID, code type and indicator, 512 bytes long, whose sum is 0.
    fn image(device: u8, code: u8, indicator: u8) -> Vec<u8> {
        let mut image = vec![0; 512];
        image[..2].copy_from_slice(&SIGNATURE);
        image[2] = 1;
        image[0x18] = 0x1C;
        image[0x1C..0x24].copy_from_slice(&[b'P', b'C', b'I', b'R', 0xF4, 0x1A, device, 0x10]);
        image[0x1C + 0x10] = 1;
        image[0x1C + 0x14..0x1C + 0x16].copy_from_slice(&[code, indicator]);
        image[6] = image.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
        image
    }

    #[test]
    fn images_for_transitional_network_cards_become_ones_for_ours() {
        let mut rom = [image(0, 0, 0), image(0, 3, 0x80), image(0, 0, 0x80)].concat();
        mend_ids(&mut rom);
        let (bios, efi) = (image(0x41, 0, 0), image(0x41, 3, 0x80));
        assert_eq!(rom[..512], bios, "with its checksum");
        assert_eq!(rom[512 + 0x1C..1024], efi[0x1C..]);
        assert_eq!(rom[512..512 + 0x1C], image(0, 3, 0x80)[..0x1C], "code for UEFI has no checksum");
        assert_eq!(rom[1024..], image(0, 0, 0x80), "nothing comes after the last one");
    }

    #[test]
    fn other_images_and_nonsense_stay_as_they_are() {
        let mut far = image(0, 0, 0x80);
        far[0x19] = 0xFF;
        let mut nameless = image(0, 0, 0x80);
        nameless[0x1C] = 0;
        let mut empty = image(1, 0, 0);
        empty[0x1C + 0x10] = 0;
        let short = image(0, 0, 0x80)[..0x30].to_vec();
        for rom in [image(1, 0, 0x80), far, nameless, empty, short, vec![0x55, 0xAA], vec![]] {
            let mut mended = rom.clone();
            mend_ids(&mut mended);
            assert_eq!(mended, rom);
        }
    }
}
