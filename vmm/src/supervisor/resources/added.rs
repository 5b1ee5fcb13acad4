//! What a machine that runs is given and gives back: the resources of devices that come and go.

use bulkhead_ipc::channel::message::RngLimit;

use super::nic::Nic;
use super::{
    Balloon, Disk, Entropy, Ports, ResourceError, Resources, Share, Stream, Vsock, open_disk, roms,
    take_place,
};
use crate::supervisor::config::confinement::ProcessLimits;
use crate::supervisor::config::{
    BalloonConfig, CONSOLE, DiskConfig, MachineConfig, NicConfig, PORTS, PciAddress, PortSpec, RNG,
    RestartPolicy, ShareConfig, StreamTarget, VhostUserConfig, VsockConfig, rom,
};

/// A device to be added.
#[derive(Debug)]
pub enum NewDevice {
    /// A disk.
    Disk(Box<DiskConfig>),
    /// The entropy device with its limit and place, and what follows the death of its process.
    Rng(Option<RngLimit>, Option<PciAddress>, RestartPolicy),
    /// The virtio console and its place.
    Console(Option<PciAddress>),
    /// The vsock.
    Vsock(VsockConfig),
    /// The balloon.
    Balloon(BalloonConfig),
    /// A network card, and what follows the death of its process.
    Net(Box<NicConfig>, RestartPolicy),
    /// A device of a back end that is not ours.
    VhostUser(VhostUserConfig),
    /// A shared directory.
    Share(ShareConfig),
    /// The named ports.
    Ports(Vec<PortSpec>),
}

impl NewDevice {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Rng(..) => RNG,
            Self::Console(_) => CONSOLE,
            Self::Vsock(vsock) => &vsock.id,
            Self::Balloon(balloon) => &balloon.id,
            Self::Net(nic, _) => &nic.id,
            Self::VhostUser(device) => &device.id,
            Self::Share(share) => &share.id,
            Self::Ports(_) => PORTS,
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
            NewDevice::Vsock(vsock) => vsock.addr,
            NewDevice::Balloon(balloon) => balloon.addr,
            NewDevice::Net(nic, _) => nic.addr,
            NewDevice::VhostUser(device) => device.addr,
            NewDevice::Share(share) => share.addr,
            NewDevice::Ports(_) => None,
            NewDevice::Rng(_, addr, _) | NewDevice::Console(addr) => *addr,
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
        if let Err(error) = self.open_added(config, device) {
            self.slots.release(id);
            return Err(error);
        }
        let group = match device {
            NewDevice::Disk(disk) => disk.options.limit_group.as_deref(),
            NewDevice::Net(nic, _) => nic.limit_group.as_deref(),
            _ => None,
        };
        self.limit_groups.join(id, group).inspect_err(|_| self.remove(id))?;
        let image = self.disks.iter().find(|disk| disk.id == id).map(|disk| &disk.file);
        let confined = self.confinement.add(config, id, limits, image);
        Ok(confined.inspect_err(|_| self.remove(id))?)
    }

    fn open_added(&mut self, config: &MachineConfig, device: &NewDevice) -> Result<(), ResourceError> {
        match device {
            NewDevice::Disk(disk) => {
                let disk: Disk = open_disk(disk, &self.disks)?;
                self.disks.push(disk);
            }
            NewDevice::Rng(limit, ..) => self.entropy = Some(Entropy::open(*limit)?),
            NewDevice::Share(share) => self.shares.push(Share::open(share)?),
            NewDevice::Console(_) => self.console = Stream::open_alone(CONSOLE, &StreamTarget::Attach)?,
            NewDevice::Vsock(vsock) => self.vsock = Some(Vsock::open(vsock)?),
            NewDevice::Balloon(balloon) => self.balloon = Some(Balloon::new(balloon)),
            NewDevice::Net(nic, _) => {
                // Firmware finds it when it runs next.
                let rom = rom::of_card(nic, config.firmware.is_some());
                let rom = rom.map(|rom| roms::open(&rom, true)).transpose()?;
                let mut nic = Nic::open(nic)?;
                nic.begin()?;
                self.nics.push(nic);
                self.roms.extend(rom);
            }
            NewDevice::Ports(ports) => self.ports = Ports::open(ports)?,
            NewDevice::VhostUser(device) => self.foreign.push(device.clone()),
        }
        Ok(())
    }

    /// Closes what a device had; a disk is locked no more when the device's process is gone, too.
    pub fn remove(&mut self, id: &str) {
        self.slots.release(id);
        self.confinement.remove(id);
        self.meters.remove(id);
        self.limit_groups.leave(id);
        self.disks.retain(|disk| disk.id != id);
        self.roms.retain(|rom| rom.device.as_deref() != Some(id));
        if self.vsock.as_ref().is_some_and(|vsock| vsock.id == id) {
            self.vsock = None;
        }
        if self.balloon.as_ref().is_some_and(|balloon| balloon.id == id) {
            self.balloon = None;
        }
        self.nics.retain(|nic| nic.config.id != id);
        self.foreign.retain(|device| device.id != id);
        self.shares.retain(|share| share.config.id != id);
        match id {
            RNG => self.entropy = None,
            CONSOLE => self.console = None,
            PORTS => self.ports = None,
            _ => {}
        }
    }
}
