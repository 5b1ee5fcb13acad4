//! What a machine that runs is given and gives back: the resources of devices that come and go.

use super::{Disk, ResourceError, Resources, Share, Stream, open_device, open_disk};
use crate::supervisor::config::{CONSOLE, DiskConfig, RNG, ShareConfig, StreamTarget};

/// A device to be added.
#[derive(Debug)]
pub enum NewDevice {
    /// A disk.
    Disk(DiskConfig),
    /// The entropy device.
    Rng,
    /// The virtio console.
    Console,
    /// A shared directory.
    Share(ShareConfig),
}

impl NewDevice {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Rng => RNG,
            Self::Console => CONSOLE,
            Self::Share(share) => &share.id,
        }
    }
}

impl Resources {
    /// Opens what a device needs and gives it a slot. On an error nothing is left.
    pub fn add(&mut self, device: &NewDevice) -> Result<(), ResourceError> {
        let id = device.id();
        if self.slots.take(id).is_none() {
            return Err(ResourceError::NoSlot(id.to_owned()));
        }
        let opened = self.open_added(device);
        if opened.is_err() {
            self.slots.release(id);
        }
        opened
    }

    fn open_added(&mut self, device: &NewDevice) -> Result<(), ResourceError> {
        match device {
            NewDevice::Disk(disk) => {
                let disk: Disk = open_disk(disk, &self.disks)?;
                self.disks.push(disk);
            }
            NewDevice::Rng => self.urandom = Some(open_device("/dev/urandom", false)?),
            NewDevice::Share(share) => self.shares.push(Share::open(share)?),
            NewDevice::Console => self.console = Stream::open(CONSOLE, &StreamTarget::Attach)?,
        }
        Ok(())
    }

    /// Closes what a device had; a disk is locked no more when the device's process is gone, too.
    pub fn remove(&mut self, id: &str) {
        self.slots.release(id);
        self.disks.retain(|disk| disk.id != id);
        self.shares.retain(|share| share.config.id != id);
        match id {
            RNG => self.urandom = None,
            CONSOLE => self.console = None,
            _ => {}
        }
    }
}
