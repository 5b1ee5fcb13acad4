//! The host's side of a machine: every file, device and socket that it needs, opened and checked before any process
//! exists. All are close-on-exec; each process gets its own by name.

mod added;
mod balloon;
mod disk;
mod limit_groups;
mod meters;
pub mod nic;
mod pmem;
mod port;
mod roms;
mod share;
mod slots;
mod stream;
mod variables;
mod vsock;
mod watchdog;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use added::NewDevice;
pub use balloon::Balloon;
use bulkhead_ipc::channel::message::RngLimit;
use bulkhead_ipc::memory::GuestRam;
pub use disk::{Disk, ResizeError};
use disk::{lock, open_disk};
pub use limit_groups::LimitGroups;
use meters::Meters;
use nic::{Nic, NicError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
pub use pmem::Pmem;
pub use port::{PORTS_STATE, Port, Ports};
use roms::Rom;
pub use share::Share;
use slots::Slots;
pub use stream::{Keyboard, Listener, Stream};
use thiserror::Error;
pub use variables::Variables;
pub use vsock::Vsock;
pub use watchdog::{WATCHDOG_STATE, Watchdog};

use super::config::limit_group::LimitGroupError;
use super::config::{CONSOLE, KEYBOARD, MachineConfig, PciAddress, RomSpec, SERIAL, Size, VhostUserConfig};
use super::confinement::{AddError, Confinement, Required};
use super::doctor::kvm::{self, KvmError};
use super::firmware::Bootable;
use super::processor::{CpuModel, Leaves, ModelError, ProcessorError};

/// The most that the keyboard's process keeps for its successor, in bytes.
pub const KEYBOARD_STATE: u64 = 4096;
/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;
/// Firmware consists of pages, in bytes.
const FIRMWARE_UNIT: u64 = 4 << 10;
/// The largest firmware image, in bytes.
pub const MOST_FIRMWARE: u64 = 8 << 20;

/// Why the host's side is not as the configuration says.
#[derive(Debug, Error)]
pub enum ResourceError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The processors.
    #[error(transparent)]
    Processor(#[from] Arc<ProcessorError>),
    /// The model of the processors.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// More memory than there is.
    #[error("memory: {wanted} is more than this host has ({have} MiB)", wanted = Size(*wanted), have = have >> 20)]
    Memory {
        /// What was asked for, in bytes.
        wanted: u64,
        /// What the host has, in bytes.
        have: u64,
    },
    /// A file that cannot be opened.
    #[error("{field}: cannot open '{path}': {reason}", path = path.display())]
    Open {
        /// Which option or device.
        field: String,
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A file of another kind than needed.
    #[error("{field}: '{path}' is {is}; {wanted} is needed", path = path.display())]
    Kind {
        /// Which option or device.
        field: String,
        /// The file.
        path: PathBuf,
        /// What it is.
        is: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A disk that does not consist of sectors.
    #[error("disk {id}: '{path}' has {size} bytes, which is not a multiple of {SECTOR}: is it a raw image, or is format= missing? (truncate -s %{SECTOR} '{path}' rounds it up)", path = path.display())]
    DiskSize {
        /// The disk.
        id: String,
        /// Its image.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
    },
    /// Firmware that can be none.
    #[error("firmware: '{path}' has {size} bytes; an image has whole pages of 4 KiB, at least one and at most 8 MiB: is it the right file?", path = path.display())]
    FirmwareSize {
        /// The image.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
    },
    /// A file of variables that can be none.
    #[error("firmware-vars: '{path}' has {size} bytes; such a file has whole blocks of 4 KiB, at least one, and with the image at most 8 MiB: is it the right file?", path = path.display())]
    VariablesSize {
        /// The file.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
    },
    /// A file of variables that somebody else uses.
    #[error("firmware-vars: '{0}' is locked by another machine or program: stop that first")]
    VariablesLocked(PathBuf),
    /// A file that is no option ROM.
    #[error("option-rom: '{path}' has {size} bytes; an option ROM begins with 55 AA and has at most 16 MiB: is it the right file?", path = path.display())]
    Rom {
        /// The file.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
    },
    /// A disk without a sector.
    #[error("disk {id}: '{path}' is empty (truncate -s 1G '{path}' makes it 1 GiB long)", path = path.display())]
    DiskEmpty {
        /// The disk.
        id: String,
        /// Its image.
        path: PathBuf,
    },
    /// A disk that somebody else uses.
    #[error("disk {id}: '{path}' is locked by another machine or program: stop that first{hint}", path = path.display())]
    DiskLocked {
        /// The disk.
        id: String,
        /// Its image.
        path: PathBuf,
        /// What else could be done.
        hint: &'static str,
    },
    /// One image for two disks.
    #[error("disk {id}: '{path}' is already the image of disk {other}: only read-only disks may share one", path = path.display())]
    DiskTwice {
        /// The second disk.
        id: String,
        /// Its image.
        path: PathBuf,
        /// The first disk.
        other: String,
    },
    /// A file that does not consist of blocks.
    #[error("pmem {id}: '{path}' has {size} bytes; the guest maps whole blocks of 2 MiB: `truncate -s {wanted} '{path}'` makes it fit", path = path.display())]
    PmemSize {
        /// The device.
        id: String,
        /// Its file.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// The next size that fits.
        wanted: u64,
    },
    /// No place for a file in the guest's address space.
    #[error("pmem {id}: {} more are too much above the guest's memory: its processors have addresses of {bits} bits", Size(*.size))]
    PmemRoom {
        /// The device.
        id: String,
        /// Bytes.
        size: u64,
        /// Width of guest-physical addresses.
        bits: u32,
    },
    /// A disk that cannot be locked at all.
    #[error("disk {id}: cannot lock '{path}': {reason}", path = path.display())]
    Lock {
        /// The disk.
        id: String,
        /// Its image.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// A network card.
    #[error("net {0}")]
    Nic(#[from] NicError),
    /// A limit group.
    #[error(transparent)]
    LimitGroup(#[from] LimitGroupError),
    /// A layer of the jail.
    #[error(transparent)]
    Confinement(#[from] Required),
    /// The same of a device that is added.
    #[error(transparent)]
    Added(#[from] AddError),
    /// A program of Bulkhead is missing.
    #[error("cannot open '{path}': {reason}; it belongs beside the program bulkhead: is Bulkhead installed completely?", path = path.display())]
    Program {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// An ordinary user acts as nobody else.
    #[error("fs {0}: owner= is for machines of root; this user shares a directory as itself")]
    ShareOwner(String),
    /// No slot.
    #[error("device {0}: no PCI slot is free")]
    NoSlot(String),
    /// A place that is taken.
    #[error("device {id}: addr={address} is the place of {other}")]
    PlaceTaken {
        /// Who wants it.
        id: String,
        /// Where.
        address: PciAddress,
        /// Who is there.
        other: String,
    },
    /// A place that a device which is added cannot have.
    #[error(
        "device {id}: addr={address}: what is added to a machine that runs gets a slot of its own: choose function 0 of an empty one"
    )]
    WholeSlot {
        /// Who wants it.
        id: String,
        /// Where.
        address: PciAddress,
    },
    /// A socket path in use.
    #[error("{field}: the socket '{path}' is in use by another process: choose another path or stop that process", path = path.display())]
    SocketInUse {
        /// `serial`, `console` or `vsock`.
        field: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A context id that another machine has.
    #[error(
        "{field}: the context id {cid} belongs to another machine of this user: give this one another with cid=N"
    )]
    CidTaken {
        /// Which device.
        field: String,
        /// The context id.
        cid: u32,
    },
    /// No pseudo terminal, no descriptor …
    #[error("{what}: {reason}")]
    Host {
        /// What was tried.
        what: String,
        /// What the kernel said.
        reason: io::Error,
    },
}

/// What an entropy device gives.
#[derive(Debug)]
pub struct Entropy {
    /// `/dev/urandom`.
    pub source: File,
    /// How much of it.
    pub limit: Option<RngLimit>,
}

impl Entropy {
    fn open(limit: Option<RngLimit>) -> Result<Self, ResourceError> {
        Ok(Self { source: open_device("/dev/urandom", false)?, limit })
    }
}

/// All that a machine needs from its host.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: File,
    /// The kernel or firmware image.
    pub image: File,
    /// The initial RAM file system.
    pub initrd: Option<File>,
    /// Firmware's variables.
    pub variables: Option<Variables>,
    /// Option ROMs.
    pub roms: Vec<Rom>,
    /// The disks.
    pub disks: Vec<Disk>,
    /// The network cards.
    pub nics: Vec<Nic>,
    /// The devices of back ends that are not ours; a connection is made for each process.
    pub foreign: Vec<VhostUserConfig>,
    /// The PCI slots of the virtio devices.
    pub slots: Slots,
    /// How many CPUs there are at the next start.
    pub cpus: u16,
    /// What they can do.
    pub leaves: Leaves,
    /// What an entropy device has, when there is one.
    pub entropy: Option<Entropy>,
    /// What the keyboard's process leaves to its successor, when there is one.
    pub keyboard: Option<OwnedFd>,
    /// The host's side of the serial port.
    pub serial: Option<Stream>,
    /// The host's side of the virtio console.
    pub console: Option<Stream>,
    /// The named ports.
    pub ports: Option<Ports>,
    /// The host's side of the vsock.
    pub vsock: Option<Vsock>,
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// The watchdog.
    pub watchdog: Option<Watchdog>,
    /// The program of the core.
    pub core_program: OwnedFd,
    /// The program of the devices.
    pub device_program: OwnedFd,
    /// `/dev/null`.
    pub null: File,
    /// Cgroups and users.
    pub confinement: Confinement,
    /// Limits that several devices share.
    pub limit_groups: LimitGroups,
    /// Memory for what the devices count.
    pub meters: Meters,
    /// Files that the guest sees as memory.
    pub pmems: Vec<Pmem>,
    /// The shared directories.
    pub shares: Vec<Share>,
}

impl Resources {
    /// Opens and checks everything.
    pub fn open(config: &MachineConfig) -> Result<Self, ResourceError> {
        let have = host_memory();
        if config.memory > have {
            return Err(ResourceError::Memory { wanted: config.memory, have });
        }
        let leaves = Leaves::ask(config.topology, CpuModel::read(&config.cpu_model)?);
        let image = match (&config.kernel, &config.firmware) {
            (_, Some(firmware)) => open_firmware(&firmware.image)?,
            (kernel, None) => open_regular("kernel", kernel.as_deref().unwrap_or(Path::new("")))?,
        };
        let initrd = config.initrd.as_deref().map(|path| open_regular("initrd", path)).transpose()?;
        let mut disks: Vec<Disk> = Vec::with_capacity(config.disks.len());
        for disk in &config.disks {
            disks.push(open_disk(disk, &disks)?);
        }
        let variables = match &config.firmware {
            Some(firmware) => {
                variables::open(firmware, image.metadata().map_or(0, |metadata| metadata.len()))?
            }
            None => None,
        };
        let mut slots = Slots::default();
        for (id, address) in config.places() {
            take_place(&mut slots, id, address)?;
        }
        for id in config.on_bus() {
            if slots.of(id).is_none() {
                slots.take(id).ok_or_else(|| ResourceError::NoSlot(id.to_owned()))?;
            }
        }
        let kvm = kvm::open()?;
        kvm::check(&kvm, &config.topology)?;
        let confinement = Confinement::prepare(config, &disks)?;
        Ok(Self {
            kvm,
            image,
            initrd,
            variables,
            roms: config.roms.iter().map(|rom| open_rom(config, rom)).collect::<Result<_, _>>()?,
            disks,
            foreign: config.vhost_user.clone(),
            slots,
            entropy: config.rng.then(|| Entropy::open(config.rng_limit)).transpose()?,
            keyboard: config.keyboard.then(keyboard_state).transpose()?,
            balloon: config.balloon.as_ref().map(Balloon::new),
            watchdog: config.watchdog.as_ref().map(Watchdog::new).transpose()?,
            core_program: open_program("bulkhead-vmm")?,
            device_program: open_program("bulkhead-device")?,
            null: open_device("/dev/null", true)?,
            confinement,
            nics: config.nics.iter().map(Nic::open).collect::<Result<_, _>>()?,
            limit_groups: limit_groups(config)?,
            meters: Meters::default(),
            shares: config.shares.iter().map(Share::open).collect::<Result<_, _>>()?,
            pmems: pmem::open_all(&config.pmems, config.memory, &leaves)?,
            cpus: config.cpus,
            leaves,
            // Last, for these leave something in the file system or change the terminal.
            serial: Stream::open_serial(SERIAL, &config.serial)?,
            console: Stream::open_alone(CONSOLE, &config.console)?,
            ports: Ports::open(&config.ports)?,
            vsock: config.vsock.as_ref().map(Vsock::open).transpose()?,
        })
    }

    /// What firmware can boot from.
    pub fn bootable(&self) -> Vec<Bootable<'_>> {
        let disks = self.disks.iter().map(|disk| (&*disk.id, false));
        let foreign = self.foreign.iter().filter(|device| device.is_bootable());
        let foreign = foreign.map(|device| (&*device.id, device.is_card()));
        let all = disks.chain(self.nics.iter().map(|nic| (&*nic.config.id, true))).chain(foreign);
        all.filter_map(|(id, card)| Some(Bootable { id, place: self.slots.of(id)?, card })).collect()
    }

    /// Forgets what the devices of a machine that is started anew were about.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn reset(&self) -> io::Result<()> {
        self.watchdog.as_ref().map_or(Ok(()), Watchdog::reset)?;
        self.ports.as_ref().map_or(Ok(()), Ports::reset)?;
        [&self.serial, &self.console].into_iter().flatten().try_for_each(Stream::reset)?;
        self.keyboard.as_ref().map_or(Ok(()), |state| Ok(ftruncate(state, 0)?))
    }
}

/// Reads an option ROM, made fit for the device that brings it.
fn open_rom(config: &MachineConfig, rom: &RomSpec) -> Result<Rom, ResourceError> {
    let is = |id: &String| rom.device.as_ref() == Some(id);
    let foreign = || config.vhost_user.iter().any(|device| is(&device.id) && device.is_card());
    roms::open(rom, config.nics.iter().any(|nic| is(&nic.id)) || foreign())
}

/// The limit groups with those that are in them from the start.
fn limit_groups(config: &MachineConfig) -> Result<LimitGroups, ResourceError> {
    let failed = |reason| ResourceError::Host { what: "limit-group".to_owned(), reason };
    let mut groups = LimitGroups::open(&config.limit_groups).map_err(failed)?;
    let disks = config.disks.iter().map(|disk| (&disk.id, &disk.options.limit_group));
    for (id, group) in disks.chain(config.nics.iter().map(|nic| (&nic.id, &nic.limit_group))) {
        groups.join(id, group.as_deref())?;
    }
    Ok(groups)
}

fn take_place(slots: &mut Slots, id: &str, address: PciAddress) -> Result<(), ResourceError> {
    let taken = |other| ResourceError::PlaceTaken { id: id.to_owned(), address, other };
    slots.take_at(id, address).map_err(taken)
}

/// Memory for the keyboard's state.
fn keyboard_state() -> Result<OwnedFd, ResourceError> {
    let memory = memfd_create(c"keyboard", MFdFlags::MFD_CLOEXEC);
    memory.map_err(|errno| ResourceError::Host { what: KEYBOARD.to_owned(), reason: errno.into() })
}

/// Memory of the host in bytes; no limit where it cannot be read.
fn host_memory() -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    total.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

fn open_error(field: &str, path: &Path, error: &io::Error) -> ResourceError {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied for this user".to_owned(),
        _ if error.raw_os_error() == Some(libc::ENXIO) => "nobody reads that pipe or socket".to_owned(),
        _ => error.to_string(),
    };
    ResourceError::Open { field: field.to_owned(), path: path.to_owned(), reason }
}

/// Opens without ever waiting (a FIFO would) and without making a terminal the controlling one. Afterwards the file is an
/// ordinary blocking one: io_uring fails a request on a non-blocking file whenever the page cache does not hold its data.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let flags = OFlag::from_bits_retain(fcntl(file.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags.difference(OFlag::O_NONBLOCK)))?;
    Ok(file)
}

fn kind(metadata: &fs::Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "a regular file"
    }
}

fn open_regular(field: &str, path: &Path) -> Result<File, ResourceError> {
    let failed = |error: io::Error| open_error(field, path, &error);
    let file = open(OpenOptions::new().read(true), path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_file() {
        Ok(file)
    } else {
        let wanted = "a regular file";
        Err(ResourceError::Kind {
            field: field.to_owned(),
            path: path.to_owned(),
            is: kind(&metadata),
            wanted,
        })
    }
}

/// Opens a firmware image: whole pages, small enough to lie below 4 GiB and above the APICs.
fn open_firmware(path: &Path) -> Result<File, ResourceError> {
    let file = open_regular("firmware", path)?;
    let size = file.metadata().map_err(|error| open_error("firmware", path, &error))?.len();
    if size == 0 || size > MOST_FIRMWARE || !size.is_multiple_of(FIRMWARE_UNIT) {
        return Err(ResourceError::FirmwareSize { path: path.to_owned(), size });
    }
    Ok(file)
}

/// Memory of this size that can neither grow nor shrink.
fn memory(what: &str, size: u64) -> Result<OwnedFd, ResourceError> {
    let host = |reason| ResourceError::Host { what: what.to_owned(), reason };
    let memory = GuestRam::create_at(0, size).map_err(|error| host(io::Error::other(error)))?;
    let region = memory.regions().next().ok_or_else(|| host(io::ErrorKind::InvalidInput.into()))?;
    region.fd.try_clone_to_owned().map_err(host)
}

fn open_device(path: &str, write: bool) -> Result<File, ResourceError> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(|error| open_error("host", Path::new(path), &error))
}

/// A program of Bulkhead, beside the one that runs.
fn open_program(name: &str) -> Result<OwnedFd, ResourceError> {
    let mut path = std::env::current_exe()
        .map_err(|reason| ResourceError::Program { path: PathBuf::from("/proc/self/exe"), reason })?;
    path.set_file_name(name);
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(&path);
    opened.map(OwnedFd::from).map_err(|reason| ResourceError::Program { path, reason })
}

/// Opens the log file for appending.
pub fn open_log(path: &Path) -> Result<File, ResourceError> {
    append("log-file", path)
}

/// Opens the file for the debug port's output, for appending.
pub fn open_debug_port(path: &Path) -> Result<File, ResourceError> {
    append("debug-port", path)
}

fn append(field: &str, path: &Path) -> Result<File, ResourceError> {
    let file = open(OpenOptions::new().append(true).create(true).mode(0o644), path);
    file.map_err(|error| open_error(field, path, &error))
}

#[cfg(test)]
mod tests;
