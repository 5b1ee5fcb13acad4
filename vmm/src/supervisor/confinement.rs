//! The layers of the jail that a host may lack: Landlock, cgroups, a user for each process. What is missing is known before the
//! first process exists: an error where it is required, else one warning for a launch.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use bulkhead_ipc::jail::cgroup::{CgroupError, Controller, GroupLimits, IoLimits, MachineGroup, Parent};
use bulkhead_ipc::jail::uids::{UidBlock, UidError, UidRange};
use bulkhead_ipc::jail::{Exit, Identity, Layer, Limits, landlock_version};
use thiserror::Error;

use super::config::confinement::{CgroupChoice, ProcessLimits, UidChoice};
use super::config::{
    CONSOLE, CORE, FLASH, FirmwareConfig, KEYBOARD, MachineConfig, PORTS, RNG, SERIAL, Size,
};
use super::process::{Role, describe};
use super::resources::Disk;

/// Memory of its own that a process may use, in bytes: heap, stacks, rings, sockets; for a disk also the host's page cache of its
/// image, which is dropped at the limit.
const CORE_MEMORY: u64 = 320 << 20;
const DISK_MEMORY: u64 = 256 << 20;
/// What is known of the files that the guest holds, and the cache of their contents, which the kernel takes back first.
const SHARE_MEMORY: u64 = 1 << 30;
const OTHER_MEMORY: u64 = 64 << 20;
/// The kernel's tables for a mapping of guest RAM, one part in so many (8 bytes for each 4 KiB, twice in the core).
const TABLES: u64 = 128;

/// Host users that are kept for devices to come: as many as bus 0 has slots for them.
const SPARE_USERS: u32 = 30;

/// A layer that this launch goes without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub layer: Layer,
    /// Why, and how to get it.
    pub why: String,
    /// The user asked for it, so nobody need be warned.
    pub chosen: bool,
}

/// A layer that the configuration requires and the host does not have.
#[derive(Debug, Error)]
#[error(
    "cannot start {processes}: the layer {layer} of the jail is required and not to be had: {why}; `bulkhead doctor` shows what this host offers, and without {layer} in `require` the machine runs without it"
)]
pub struct Required {
    layer: Layer,
    processes: String,
    why: String,
}

/// Why a device cannot be added to a machine that runs.
#[derive(Debug, Error)]
pub enum AddError {
    /// No host user of its own.
    #[error(
        "no host user is left for it: the range of this machine's users ({range}) has none; start the machine with a larger one (--uids FIRST:COUNT), or remove another device"
    )]
    Users {
        /// The machine's users.
        range: UidRange,
    },
    /// A limit that nothing enforces.
    #[error("its limits cannot be enforced: {why}; `bulkhead doctor` shows what this host offers")]
    Limits {
        /// Why not.
        why: String,
    },
}

/// Where a process is to run.
#[derive(Debug)]
pub struct Place {
    /// Host user and group, for root.
    pub identity: Identity,
    /// Host user, for others.
    pub subordinate: Option<u32>,
    /// Its cgroup.
    pub cgroup: Option<OwnedFd>,
}

/// What the processes of one machine have for themselves, as long as this lives.
#[derive(Debug, Default)]
pub struct Confinement {
    group: Option<MachineGroup>,
    users: Option<UidBlock>,
    missing: Vec<Missing>,
    /// Devices whose images the io controller can limit.
    devices: BTreeMap<String, (u64, u64)>,
    /// Devices that were added while the machine runs: the number of each, and its limits.
    added: BTreeMap<String, (u32, ProcessLimits)>,
    /// Of each process that has ended last: its number, and the kernel's kills for want of memory before and with it.
    killed: RefCell<BTreeMap<String, Killed>>,
}

/// The processes that a machine will have, in the order of their users.
pub fn process_names(config: &MachineConfig) -> Vec<&str> {
    use super::config::StreamTarget::Off;
    let mut names = vec![CORE];
    names.extend(config.disks.iter().map(|disk| disk.id.as_str()));
    names.extend(config.rng.then_some(RNG));
    names.extend((config.console != Off).then_some(CONSOLE));
    names.extend((!config.ports.is_empty()).then_some(PORTS));
    names.extend((config.serial != Off).then_some(SERIAL));
    let flash = config.firmware.as_ref().is_some_and(FirmwareConfig::has_variables);
    names.extend(flash.then_some(FLASH));
    names.extend(config.keyboard.then_some(KEYBOARD));
    names.extend(config.vsock.as_ref().map(|vsock| vsock.id.as_str()));
    names.extend(config.balloon.as_ref().map(|balloon| balloon.id.as_str()));
    names.extend(config.watchdog.as_ref().map(|watchdog| watchdog.id.as_str()));
    names.extend(config.nics.iter().map(|nic| nic.id.as_str()));
    names.extend(config.vhost_user.iter().map(|device| device.id.as_str()));
    names.extend(config.pmems.iter().map(|pmem| pmem.id.as_str()));
    names.extend(config.shares.iter().map(|share| share.id.as_str()));
    names
}

#[derive(Debug, Clone, Copy, Default)]
struct Killed {
    pid: i32,
    before: u64,
    with: u64,
}

impl Confinement {
    /// Looks at the host and takes what it offers.
    pub fn prepare(config: &MachineConfig, disks: &[Disk]) -> Result<Self, Required> {
        let mut confinement = Self::default();
        if let Err(errno) = landlock_version() {
            confinement.lack(Layer::Landlock, landlock_reason(errno), false);
        }
        confinement.take_users(config);
        confinement.take_group(config, disks);
        let required = confinement.missing.iter().find(|it| config.confinement.require.contains(&it.layer));
        match required {
            Some(Missing { layer, why, .. }) => {
                Err(Required { layer: *layer, processes: process_names(config).join(", "), why: why.clone() })
            }
            None => Ok(confinement),
        }
    }

    fn lack(&mut self, layer: Layer, why: String, chosen: bool) {
        self.missing.push(Missing { layer, why, chosen });
    }

    fn take_users(&mut self, config: &MachineConfig) {
        let range = match config.confinement.uids {
            UidChoice::Off => {
                return self.lack(Layer::DistinctUids, "they are switched off by uids".into(), true);
            }
            UidChoice::Auto => None,
            UidChoice::Range(range) => Some(range),
        };
        let count = u32::try_from(process_names(config).len()).unwrap_or(u32::MAX);
        let claimed = match UidBlock::claim(range, count.saturating_add(SPARE_USERS)) {
            // Then nothing can be added.
            Err(UidError::UsedUp { .. }) => UidBlock::claim(range, count),
            other => other,
        };
        match claimed {
            Ok(block) => self.users = Some(block),
            Err(error) => self.lack(Layer::DistinctUids, error.to_string(), false),
        }
    }

    /// Makes room for the process of a device that is added while the machine runs; `disk` is its image, if it has one.
    ///
    /// # Errors
    /// [`AddError`]: nothing has changed.
    pub fn add(
        &mut self,
        config: &MachineConfig,
        id: &str,
        limits: ProcessLimits,
        disk: Option<&File>,
    ) -> Result<(), AddError> {
        let number = self.free_number(config, id)?;
        let device = if limits.has_io() { Some(disk.and_then(block_device)) } else { None };
        let mut wanted = Vec::new();
        wanted.extend((limits.memory.is_some()).then_some(Controller::Memory));
        wanted.extend((limits.pids.is_some()).then_some(Controller::Pids));
        wanted.extend((limits.cpu.is_some()).then_some(Controller::Cpu));
        wanted.extend(device.map(|_| Controller::Io));
        let lacks = match &mut self.group {
            Some(group) => group.need(&wanted),
            None => wanted,
        };
        let why = match device {
            _ if !lacks.is_empty() => {
                let names: Vec<&str> = lacks.iter().map(|controller| controller.name()).collect();
                Some(format!("this machine has no cgroup with the controller {}", names.join(", ")))
            }
            Some(None) => Some("its file system lies on no block device of its own".to_owned()),
            _ => None,
        };
        if let Some(why) = why {
            return Err(AddError::Limits { why });
        }
        if let Some(device) = device.flatten() {
            self.devices.insert(id.to_owned(), device);
        }
        self.added.insert(id.to_owned(), (number, limits));
        Ok(())
    }

    /// The first number that no process has.
    fn free_number(&self, config: &MachineConfig, id: &str) -> Result<u32, AddError> {
        let names = process_names(config);
        let position = names.iter().position(|name| *name == id);
        let first = u32::try_from(position.unwrap_or(names.len())).unwrap_or(u32::MAX);
        let taken = |number: &u32| self.added.values().any(|(other, _)| other == number);
        let number = (first..).find(|number| position.is_some() || !taken(number)).unwrap_or(first);
        match &self.users {
            Some(users) if users.uid(number).is_none() => Err(AddError::Users { range: users.range() }),
            _ => Ok(number),
        }
    }

    /// Nothing is left of a device.
    pub fn remove(&mut self, id: &str) {
        self.added.remove(id);
        self.devices.remove(id);
        if let Some(group) = &self.group {
            group.remove_leaf(id);
        }
    }

    fn take_group(&mut self, config: &MachineConfig, disks: &[Disk]) {
        let limits = &config.confinement.limits;
        for disk in disks.iter().filter(|disk| limits.get(&disk.id).is_some_and(ProcessLimits::has_io)) {
            match block_device(&disk.file) {
                Some(device) => drop(self.devices.insert(disk.id.clone(), device)),
                None => self.lack(
                    Layer::Cgroup,
                    format!("I/O of {}: its file system lies on no block device of its own", disk.id),
                    false,
                ),
            }
        }
        let mut wanted = vec![Controller::Memory, Controller::Pids];
        wanted.extend(limits.values().any(|limits| limits.cpu.is_some()).then_some(Controller::Cpu));
        wanted.extend((!self.devices.is_empty()).then_some(Controller::Io));
        let parent = match &config.confinement.cgroup {
            CgroupChoice::Off => {
                return self.lack(Layer::Cgroup, "they are switched off by cgroup".into(), true);
            }
            CgroupChoice::Auto => Parent::find(&wanted),
            CgroupChoice::Path(path) => Parent::at(path, &wanted),
        };
        match parent.and_then(|parent| MachineGroup::create(&parent, &config.name)) {
            Ok(group) => {
                let has = |controller: &&Controller| !group.controllers().contains(controller);
                let lacks: Vec<&str> = wanted.iter().filter(has).map(|it| it.name()).collect();
                if !lacks.is_empty() {
                    let why = format!("no controller {} for {}", lacks.join(", "), group.folder().display());
                    self.lack(Layer::Cgroup, why, false);
                }
                self.group = Some(group);
            }
            Err(error) => self.lack(Layer::Cgroup, error.to_string(), false),
        }
    }

    /// One sentence about all that is missing, unless it was the user's choice.
    pub fn warning(&self) -> Option<String> {
        let missing = self.missing.iter().filter(|missing| !missing.chosen);
        let texts: Vec<String> = missing.map(|it| format!("{} ({})", it.layer, it.why)).collect();
        (!texts.is_empty())
            .then(|| format!("the jail goes without {}; see `bulkhead doctor`", texts.join(" and ")))
    }

    /// Users and cgroup of a process, whose thread limit is in `limits`.
    pub fn place(
        &self,
        config: &MachineConfig,
        id: &str,
        role: Role,
        limits: &Limits,
    ) -> Result<Place, CgroupError> {
        let number = process_names(config).iter().position(|name| *name == id);
        let number = number.and_then(|number| u32::try_from(number).ok());
        let number = number.or_else(|| self.added.get(id).map(|(number, _)| *number));
        let user = number.and_then(|number| self.users.as_ref()?.uid(number));
        let subordinate = self.users.as_ref().is_some_and(UidBlock::is_subordinate);
        let limits = self.group_limits(config, id, role, limits);
        Ok(Place {
            identity: user.map_or_else(Identity::default, |uid| Identity { uid, gid: uid }),
            subordinate: user.filter(|_| subordinate),
            cgroup: self.group.as_ref().map(|group| group.leaf(id, &limits)).transpose()?,
        })
    }

    fn group_limits(&self, config: &MachineConfig, id: &str, role: Role, limits: &Limits) -> GroupLimits {
        let added = self.added.get(id).map(|(_, limits)| *limits);
        let asked = added.or_else(|| config.confinement.limits.get(id).copied()).unwrap_or_default();
        let own = asked.memory.map(|memory| memory.0).unwrap_or(match role {
            Role::Core => CORE_MEMORY.saturating_add(u64::from(config.topology.count()) << 22),
            Role::Blk => DISK_MEMORY,
            Role::Fs => SHARE_MEMORY,
            _ => OTHER_MEMORY,
        });
        // Every page of guest RAM is charged to the process that touches it first, and that may be any that maps it. A limit
        // without room for all of it would let the guest have a device killed. The UART, the flash
        // chip, the keyboard and the watchdog map none.
        let ram = match role {
            Role::Uart | Role::Flash | Role::Keyboard | Role::Watchdog | Role::Relay => 0,
            _ => config.memory.saturating_add(config.memory / TABLES * 2),
        };
        let rate = |size: Option<Size>| size.map(|size| size.0);
        GroupLimits {
            memory: Some(own.saturating_add(ram)),
            pids: Some(asked.pids.unwrap_or(limits.threads)),
            cpu: asked.cpu,
            io: self.devices.get(id).map(|device| IoLimits {
                device: *device,
                read_bps: rate(asked.read),
                write_bps: rate(asked.write),
                read_iops: asked.read_iops,
                write_iops: asked.write_iops,
            }),
        }
    }

    /// How a process ended, for people; the memory limit of its cgroup is named when the kernel enforced that.
    pub fn describe(&self, id: &str, pid: i32, exit: Exit) -> String {
        let mut killed = self.killed.borrow_mut();
        let last = killed.entry(id.to_owned()).or_default();
        if last.pid != pid {
            let with = self.group.as_ref().map_or(0, |group| group.killed_for_memory(id));
            *last = Killed { pid, before: last.with, with };
        }
        if exit == Exit::Signal(libc::SIGKILL) && last.with > last.before {
            return format!(
                "was killed by the kernel: it reached the memory limit of its cgroup (--limit {id}:memory=…)"
            );
        }
        describe(exit)
    }
}

/// Why there is no Landlock.
pub fn landlock_reason(errno: nix::errno::Errno) -> String {
    match errno {
        nix::errno::Errno::EOPNOTSUPP => {
            "it is switched off: the kernel parameter lsm= does not name landlock".into()
        }
        nix::errno::Errno::ENOSYS => "this kernel has none (Linux 5.13, CONFIG_SECURITY_LANDLOCK)".into(),
        errno => errno.desc().to_owned(),
    }
}

/// Numbers of the whole block device behind a disk's image.
fn block_device(file: &File) -> Option<(u64, u64)> {
    let metadata = file.metadata().ok()?;
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let folder = format!("/sys/dev/block/{major}:{minor}");
    // Of a partition, the folder above is the disk's.
    let whole = if fs::exists(format!("{folder}/partition")).ok()? { "/../dev" } else { "/dev" };
    let text = fs::read_to_string(format!("{folder}{whole}")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::supervisor::cli::{Cli, Command};
    use crate::supervisor::config::confinement::LimitSpec;
    use crate::supervisor::config::resolve;

    fn config(options: &str) -> MachineConfig {
        let arguments = ["bulkhead", "run", "--kernel", "k"].into_iter().chain(options.split_whitespace());
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Run(args) => resolve(*args).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_process_has_a_place_in_the_list() {
        let config = config("--disk path=a --disk path=b,id=b --rng --console");
        assert_eq!(process_names(&config), ["core", "disk0", "b", "rng", "console", "serial"]);
    }

    #[test]
    fn a_limit_has_room_for_the_guest_ram_that_may_be_charged_to_the_process() {
        let config =
            config("--disk path=a --memory 1G --limit disk0:memory=64M,pids=5 --limit serial:cpu=50");
        let confinement = Confinement::default();
        let limits = |id, role| confinement.group_limits(&config, id, role, &Limits::default());
        let (disk, serial) = (limits("disk0", Role::Blk), limits("serial", Role::Uart));
        assert_eq!(disk.memory, Some((64 << 20) + (1 << 30) + (16 << 20)));
        assert_eq!((disk.pids, disk.cpu), (Some(5), None));
        assert_eq!(serial.memory, Some(OTHER_MEMORY));
        assert_eq!((serial.pids, serial.cpu), (Some(Limits::default().threads), Some(50)));
        assert!(limits("core", Role::Core).memory.unwrap() > 1 << 30);
    }

    #[test]
    fn a_device_that_is_added_has_a_user_and_limits_of_its_own_until_it_is_removed() {
        let config = config("--disk path=a,id=a");
        let mut confinement = Confinement::default();
        let limits = |text: &str| format!("x:{text}").parse::<LimitSpec>().unwrap().limits;
        let pids = |confinement: &Confinement, id| {
            confinement.group_limits(&config, id, Role::Blk, &Limits::default()).pids
        };
        for (id, number) in [("b", 3), ("c", 4), ("a", 1)] {
            confinement.add(&config, id, ProcessLimits::default(), None).unwrap();
            assert_eq!(confinement.added[id].0, number, "{id}");
        }
        confinement.remove("b");
        // There is no cgroup here that could enforce it.
        let error = confinement.add(&config, "b", limits("memory=64M,cpu=5"), None).unwrap_err().to_string();
        assert!(error.contains("controller memory, cpu"), "{error}");
        assert!(!confinement.added.contains_key("b"));
        confinement.added.insert("b".to_owned(), (3, limits("pids=7")));
        assert_eq!(pids(&confinement, "b"), Some(7));
        confinement.remove("b");
        assert_eq!(pids(&confinement, "b"), Some(Limits::default().threads));
    }

    #[test]
    fn no_device_is_added_without_a_user_where_all_others_have_one() {
        let range = UidRange { first: 0x7F00_0000, count: 4 };
        // The host may not allow it at all.
        let Ok(users) = UidBlock::claim(Some(range), 4) else { return };
        let config = config("--disk path=a,id=a");
        let mut confinement = Confinement { users: Some(users), ..Confinement::default() };
        confinement.add(&config, "b", ProcessLimits::default(), None).unwrap();
        let error = confinement.add(&config, "c", ProcessLimits::default(), None).unwrap_err().to_string();
        assert!(error.contains("2130706432:4") && error.contains("--uids"), "{error}");
        confinement.remove("b");
        confinement.add(&config, "c", ProcessLimits::default(), None).unwrap();
        let place = confinement.place(&config, "c", Role::Blk, &Limits::default()).unwrap();
        assert_eq!(place.identity.uid, range.first + 3);
    }

    #[test]
    fn what_is_required_and_missing_is_refused_by_name() {
        let error = Confinement::prepare(&config("--cgroup off --require cgroup --rng"), &[]).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("cannot start core, rng, serial: the layer cgroup"), "{text}");
        assert!(text.contains("doctor") && text.contains("`require`"), "{text}");
        let error = Confinement::prepare(&config("--uids off --require landlock,distinct-uids"), &[]);
        assert!(error.unwrap_err().to_string().contains("distinct-uids"));
        // What was switched off is no news.
        let quiet = Confinement::prepare(&config("--uids off --cgroup off"), &[]).unwrap();
        assert_eq!(quiet.warning().is_some(), landlock_version().is_err(), "{:?}", quiet.warning());
    }
}
