//! What a machine that runs is given and gives back: the resources of devices that come and go.

use super::{Disk, ResourceError, Resources, Share, Stream, open_device, open_disk, take_place};
use crate::supervisor::config::confinement::ProcessLimits;
use crate::supervisor::config::{CONSOLE, DiskConfig, MachineConfig, RNG, ShareConfig, StreamTarget};

/// A device to be added.
#[derive(Debug)]
pub enum NewDevice {
    /// A disk.
    Disk(Box<DiskConfig>),
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
    /// Opens what a device needs and gives it a slot and a place in the jail. On an error nothing is left.
    pub fn add(
        &mut self,
        config: &MachineConfig,
        device: &NewDevice,
        limits: ProcessLimits,
    ) -> Result<(), ResourceError> {
        let id = device.id();
        let chosen = match device {
            NewDevice::Disk(disk) => disk.addr,
            _ => None,
        };
        match chosen {
            Some(address) => {
                // The guest would not look for another function of a slot that it knows.
                if address.function != 0 || !self.slots.others(address.slot, id).is_empty() {
                    return Err(ResourceError::WholeSlot { id: id.to_owned(), address });
                }
                take_place(&mut self.slots, id, address)?;
            }
            None => {
                self.slots.take(id).ok_or_else(|| ResourceError::NoSlot(id.to_owned()))?;
            }
        }
        if let Err(error) = self.open_added(device) {
            self.slots.release(id);
            return Err(error);
        }
        let image = self.disks.iter().find(|disk| disk.id == id).map(|disk| &disk.file);
        let confined = self.confinement.add(config, id, limits, image);
        Ok(confined.inspect_err(|_| self.remove(id))?)
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
        self.confinement.remove(id);
        self.disks.retain(|disk| disk.id != id);
        self.shares.retain(|share| share.config.id != id);
        match id {
            RNG => self.urandom = None,
            CONSOLE => self.console = None,
            _ => {}
        }
    }
}
