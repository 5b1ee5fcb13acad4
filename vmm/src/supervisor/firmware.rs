//! The files that firmware reads from fw_cfg, but for those that describe the machine as the core has it (e820, ACPI). Their
//! names and contents are those of QEMU's, which SeaBIOS and OVMF know.

use bulkhead_ipc::channel::message::FirmwareFile;

use super::config::firmware::FirmwareConfig;
use super::config::{MachineConfig, PciAddress, StreamTarget};
use super::smbios::Tables;

/// The first serial port.
const SERIAL_PORT: u16 = 0x3F8;
/// How long the boot menu is offered, in milliseconds.
const MENU_WAIT: u16 = 2500;
/// Sleep states S0–S5: bit 7 says whether there is one. S3 and S4 are not.
const SLEEP_STATES: [u8; 6] = [0x80, 0, 0, 1, 2, 0x80];
/// Waits for ever when nothing can be booted, and tries no more.
const NEVER: u32 = u32::MAX;

/// A device that firmware can boot from.
#[derive(Debug, Clone, Copy)]
pub struct Bootable<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its place on PCI bus 0, see [`PciAddress::place`].
    pub place: u8,
    /// A network card, not a disk.
    pub card: bool,
}

/// The files for this machine with these devices to boot from.
pub fn files(
    config: &MachineConfig,
    firmware: &FirmwareConfig,
    bootable: &[Bootable<'_>],
) -> Vec<FirmwareFile> {
    let tables = Tables::new(config, false);
    let mut files = vec![
        ("bootorder", boot_order(&firmware.order, bootable)),
        ("etc/boot-fail-wait", NEVER.to_le_bytes().to_vec()),
        ("etc/boot-menu-wait", MENU_WAIT.to_le_bytes().to_vec()),
        ("etc/smbios/smbios-anchor", tables.anchor(0)),
        ("etc/smbios/smbios-tables", tables.structures()),
        ("etc/system-states", SLEEP_STATES.to_vec()),
    ];
    if config.serial != StreamTarget::Off {
        files.push(("etc/sercon-port", SERIAL_PORT.to_le_bytes().to_vec()));
    }
    files.into_iter().map(|(name, contents)| FirmwareFile { name: name.to_owned(), contents }).collect()
}

/// Device paths as Open Firmware writes them, one a line, ended by a zero. SeaBIOS compares function and all of a PCI device's
/// part, OVMF knows the names of the parts.
fn boot_order(order: &[String], bootable: &[Bootable<'_>]) -> Vec<u8> {
    let chosen: Vec<&Bootable<'_>> = if order.is_empty() {
        let (cards, disks): (Vec<_>, Vec<_>) = bootable.iter().partition(|device| device.card);
        disks.into_iter().chain(cards).collect()
    } else {
        // One that was removed meanwhile is not tried.
        order.iter().filter_map(|id| bootable.iter().find(|device| device.id == id)).collect()
    };
    let paths = chosen.into_iter().map(|device| {
        let function = match PciAddress::from_place(device.place) {
            PciAddress { slot, function: 0 } => format!("{slot:x}"),
            PciAddress { slot, function } => format!("{slot:x},{function:x}"),
        };
        let (name, unit) = if device.card { ("ethernet", "ethernet-phy@0") } else { ("scsi", "disk@0,0") };
        format!("/pci@i0cf8/{name}@{function}/{unit}")
    });
    let mut text = paths.collect::<Vec<_>>().join("\n").into_bytes();
    text.push(0);
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::supervisor::cli::{Cli, Command};
    use crate::supervisor::config::resolve;

    fn file(options: &str, name: &str) -> Option<Vec<u8>> {
        let arguments = ["bulkhead", "run", "--firmware", "/f"].into_iter().chain(options.split_whitespace());
        let Command::Run(args) = Cli::try_parse_from(arguments).unwrap().command else { panic!() };
        let config = resolve(*args).unwrap();
        let cards = config.nics.iter().map(|nic| (&*nic.id, true)).zip([5, 0x25]);
        let disks = config.disks.iter().map(|disk| (&*disk.id, false)).zip([2, 14]);
        let bootable = cards.chain(disks).map(|((id, card), place)| Bootable { id, place, card });
        let bootable: Vec<Bootable<'_>> = bootable.collect();
        let all = files(&config, config.firmware.as_ref().unwrap(), &bootable);
        all.into_iter().find(|file| file.name == name).map(|file| file.contents)
    }

    #[test]
    fn disks_are_tried_in_their_order_or_in_the_users() {
        let disks = "--disk path=a --disk path=b,id=b";
        let both = "/pci@i0cf8/scsi@2/disk@0,0\n/pci@i0cf8/scsi@e/disk@0,0\0";
        assert_eq!(file(disks, "bootorder").unwrap(), both.as_bytes());
        let only_b = file(&format!("{disks} --boot-order b"), "bootorder").unwrap();
        assert_eq!(only_b, b"/pci@i0cf8/scsi@e/disk@0,0\0");
        assert_eq!(file("", "bootorder").unwrap(), b"\0");
        let device = Bootable { id: "a", place: 0x25, card: false };
        assert_eq!(boot_order(&[], &[device]), b"/pci@i0cf8/scsi@5,1/disk@0,0\0");
    }

    #[test]
    fn cards_are_tried_after_disks_or_in_the_users_order() {
        let options = "--disk path=a --net user --net user,id=b";
        let cards = "/pci@i0cf8/ethernet@5/ethernet-phy@0\n/pci@i0cf8/ethernet@5,1/ethernet-phy@0";
        let all = format!("/pci@i0cf8/scsi@2/disk@0,0\n{cards}\0");
        assert_eq!(file(options, "bootorder").unwrap(), all.as_bytes());
        let chosen = file(&format!("{options} --boot-order b,disk0"), "bootorder").unwrap();
        assert_eq!(chosen, b"/pci@i0cf8/ethernet@5,1/ethernet-phy@0\n/pci@i0cf8/scsi@2/disk@0,0\0");
    }

    #[test]
    fn firmware_talks_on_the_serial_port_where_there_is_one() {
        assert_eq!(file("", "etc/sercon-port").unwrap(), [0xF8, 3]);
        assert_eq!(file("--serial off", "etc/sercon-port"), None);
    }
}
