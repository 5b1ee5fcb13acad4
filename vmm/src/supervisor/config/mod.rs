//! What a machine is to be: options and configuration file put together, and everything checked that can be
//! checked without opening a host resource.

pub mod balloon;
pub mod confinement;
pub mod console;
pub mod cpus;
pub mod disk;
pub mod disk_options;
pub mod file;
pub mod firmware;
pub mod fs;
mod ids;
mod irq_affinity;
pub mod limit_group;
pub mod liveness;
pub mod nearest;
pub mod net;
mod others;
pub mod pairs;
pub mod pci;
pub mod pmem;
pub mod port;
pub mod restart;
pub mod rng;
pub mod rom;
pub mod size;
pub mod smbios;
pub mod stream;
pub mod table;
pub mod vhost_user;
pub mod vsock;
pub mod watchdog;

use std::mem::take;
use std::path::PathBuf;
use std::process;

pub use balloon::{BalloonConfig, BalloonSpec, balloon_pages};
pub use confinement::ConfinementConfig;
pub use console::ConsoleSpec;
pub use cpus::{CpuSpec, CpuSpecError, Topology};
pub use disk::DiskSpec;
pub use disk_options::DiskOptions;
pub use firmware::{BootOrder, FirmwareConfig};
pub use fs::FsSpec;
pub use ids::Ids;
pub use limit_group::LimitGroupSpec;
pub use liveness::Liveness;
use nearest::hint;
pub use net::{NetSpec, NetSpecError, NicConfig};
use others::Others;
pub use others::{name_balloon, name_vsock};
pub use pci::PciAddress;
pub use pmem::{PmemConfig, PmemSpec};
pub use port::PortSpec;
pub use restart::{RestartPolicy, RestartRule};
pub use rng::RngSpec;
pub use rom::RomSpec;
pub use size::Size;
pub use smbios::SmbiosSpec;
pub use stream::StreamTarget;
use thiserror::Error;
pub use vhost_user::{VhostUserConfig, VhostUserSpec};
pub use vsock::{VsockConfig, VsockSpec};
pub use watchdog::{WatchdogConfig, WatchdogSpec};

use bulkhead_ipc::channel::message::RngLimit;

use super::cli::{EndAction, LogFormat, LogLevel, RunArgs, Switch};
use super::confinement::process_names;

/// The size of a page of the guest, in bytes.
const PAGE: u64 = 4096;
/// The least memory that a PC with a kernel at 1 MiB can do with, in bytes.
const MIN_MEMORY: u64 = 2 << 20;
/// Slots of PCI bus 0 behind host bridge and PIIX (2 to 31).
const MAX_VIRTIO_DEVICES: usize = 30;
/// `sun_path` without its terminating zero, in bytes (`unix(7)`).
const MAX_SOCKET_PATH: usize = 107;
/// The longest name of a machine or device, in bytes: a virtio-blk serial number is 20, a name may be longer.
const MAX_NAME: usize = 64;

/// Name of the serial port among the devices.
pub const SERIAL: &str = "serial";
/// Name of the virtio console among the devices.
pub const CONSOLE: &str = "console";
/// Name of the device of named ports among the devices.
pub const PORTS: &str = "ports";
/// Name of the entropy device among the devices.
pub const RNG: &str = "rng";
/// Name of the chip with firmware's variables among the devices.
pub const FLASH: &str = "firmware-vars";
/// Name of the keyboard among the devices.
pub const KEYBOARD: &str = "keyboard";
/// Name of the vsock among the devices, unless it is given another.
pub const VSOCK: &str = "vsock";
/// Name of the balloon among the devices, unless it is given another.
pub const BALLOON: &str = "balloon";
/// Name of the watchdog among the devices, unless it is given another.
pub const WATCHDOG: &str = "watchdog";
/// Name of the core process among the processes.
pub const CORE: &str = "core";
/// Name of the supervisor among the processes.
pub const SUPERVISOR: &str = "supervisor";

/// A machine, checked.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// Its name.
    pub name: String,
    /// The kernel image, unless there is firmware.
    pub kernel: Option<PathBuf>,
    /// The firmware, unless there is a kernel.
    pub firmware: Option<FirmwareConfig>,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The complete kernel command line.
    pub cmdline: String,
    /// What was appended to the command line that the user gave.
    pub cmdline_added: Option<&'static str>,
    /// Option ROMs, each of a device that exists or of none.
    pub roms: Vec<RomSpec>,
    /// What the machine says it is.
    pub smbios: SmbiosSpec,
    /// A file for what the guest writes to the debug port.
    pub debug_port: Option<PathBuf>,
    /// There is a debug exit port.
    pub debug_exit: bool,
    /// Limits that several devices share.
    pub limit_groups: Vec<LimitGroupSpec>,
    /// Number of virtual CPUs at the start.
    pub cpus: u16,
    /// All that there may be, and how they sit together.
    pub topology: Topology,
    /// `host`, or a model that the processors are reduced to.
    pub cpu_model: String,
    /// Guest memory in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// Whether huge pages may back guest memory.
    pub thp: bool,
    /// The disks in the order of their PCI slots.
    pub disks: Vec<DiskConfig>,
    /// The network cards.
    pub nics: Vec<NicConfig>,
    /// Devices of back ends that are not ours, in the order of their PCI slots behind all others.
    pub vhost_user: Vec<VhostUserConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// How much the guest gets of it.
    pub rng_limit: Option<RngLimit>,
    /// Where it is, if the user chose.
    pub rng_addr: Option<PciAddress>,
    /// The virtio console, `Off` when there is none.
    pub console: StreamTarget,
    /// Where it is, if the user chose.
    pub console_addr: Option<PciAddress>,
    /// The named ports.
    pub ports: Vec<PortSpec>,
    /// The serial port, `Off` when there is none.
    pub serial: StreamTarget,
    /// Whether there is a keyboard.
    pub keyboard: bool,
    /// The vsock.
    pub vsock: Option<VsockConfig>,
    /// The balloon.
    pub balloon: Option<BalloonConfig>,
    /// The watchdog.
    pub watchdog: Option<WatchdogConfig>,
    /// What follows the death of a device process, unless the device says otherwise.
    pub restart: RestartPolicy,
    /// The devices, other than disks, that say otherwise.
    pub restarts: Vec<(String, RestartPolicy)>,
    /// When a process that lives counts as dead.
    pub liveness: Liveness,
    /// What follows a reboot.
    pub on_reboot: EndAction,
    /// What follows a panic.
    pub on_panic: EndAction,
    /// What is said about the jail.
    pub confinement: ConfinementConfig,
    /// Where messages go.
    pub log: LogConfig,
    /// Files that the guest sees as memory, in the order of their places.
    pub pmems: Vec<PmemConfig>,
    /// The shared directories in the order of their PCI slots.
    pub shares: Vec<ShareConfig>,
}

/// A shared directory with its id settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareConfig {
    /// The name that the guest mounts it by, unique in the machine.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// The guest cannot change anything in it.
    pub readonly: bool,
    /// What the guest may keep.
    pub cache: fs::Cache,
    /// What is mounted below it is shared, too.
    pub submounts: bool,
    /// Extended attributes are shared.
    pub xattr: bool,
    /// Whose files are whose.
    pub owner: Option<fs::Owner>,
    /// Whom the guest sees as the owner of files of others than the one user.
    pub others: u32,
    /// Unique among the processes of the machine.
    pub id: String,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
}

/// A disk with its id settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Opened for reading only.
    pub readonly: bool,
    /// Unique among the processes of the machine.
    pub id: String,
    /// What follows the death of its process.
    pub restart: RestartPolicy,
    /// Where on PCI bus 0, if the user chose.
    pub addr: Option<PciAddress>,
    /// Everything else.
    pub options: DiskOptions,
}

/// Where messages go and which of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The least important that are shown.
    pub level: LogLevel,
    /// Text or JSON lines.
    pub format: LogFormat,
    /// A file, or standard error.
    pub file: Option<PathBuf>,
}

/// Why a machine is refused before any host resource was opened.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The configuration file.
    #[error(transparent)]
    File(#[from] file::FileError),
    /// No kernel.
    #[error(
        "nothing to boot: name a kernel with --kernel FILE (or the key 'kernel' of the configuration file), or firmware with --firmware"
    )]
    NoKernel,
    /// Both.
    #[error("a machine starts a kernel (--kernel) or firmware (--firmware), not both")]
    KernelAndFirmware,
    /// An option that means something to firmware alone.
    #[error("{0} is for firmware: name one with --firmware")]
    NeedsFirmware(&'static str),
    /// Options that mean something to a kernel alone.
    #[error("{0} is for a kernel: firmware's boot loader brings its own")]
    NeedsKernel(&'static str),
    /// Firmware by name, which is not there.
    #[error(
        "firmware: {name} is not installed ('{path}' of the Debian package {name}): install it or name a file"
    )]
    NoSuchFirmware {
        /// Its name.
        name: &'static str,
        /// Where it would be.
        path: &'static str,
    },
    /// A disk or network card that is not there.
    #[error("boot-order: there is no disk or network card '{id}'; there are: {known}")]
    BootOrder {
        /// What was given.
        id: String,
        /// What there is.
        known: String,
    },
    /// A device twice.
    #[error("boot-order: '{0}' is named twice")]
    BootOrderTwice(String),
    /// An option ROM for a device that there is not.
    #[error("option-rom: this machine has no PCI device '{name}': {hint}")]
    RomDevice {
        /// What was named.
        name: String,
        /// The nearest name, or all.
        hint: String,
    },
    /// A device has one expansion ROM.
    #[error("option-rom: the device '{0}' has two; a device has one")]
    RomTwice(String),
    /// A text for SMBIOS.
    #[error(transparent)]
    Smbios(#[from] smbios::SmbiosSpecError),
    /// CPUs that make no machine.
    #[error(transparent)]
    Cpus(#[from] CpuSpecError),
    /// Memory that does not consist of pages.
    #[error("memory: {0} bytes is not a multiple of a page (4 KiB){hint}", hint = unit_hint(*.0))]
    MemoryNotPages(u64),
    /// Too little memory.
    #[error("memory: {given} is too little; the least is 2M{hint}", given = Size(*.0), hint = unit_hint(*.0))]
    MemoryTooSmall(u64),
    /// A name that cannot be one.
    #[error(
        "{field}: '{name}' is not a possible name: use 1 to {MAX_NAME} of the characters a-z A-Z 0-9 . _ -, the first a letter or digit"
    )]
    BadName {
        /// `name`, or which disk.
        field: String,
        /// What was given.
        name: String,
    },
    /// A limit group.
    #[error(transparent)]
    LimitGroup(#[from] limit_group::LimitGroupError),
    /// A device of another back end.
    #[error(transparent)]
    VhostUser(#[from] vhost_user::VhostUserSpecError),
    /// More devices than slots.
    #[error("{0} virtio devices are too many: bus 0 has room for {MAX_VIRTIO_DEVICES}")]
    TooManyDevices(usize),
    /// Places on the bus that do not fit together.
    #[error(transparent)]
    Places(#[from] pci::PlacesError),
    /// Both ports on one terminal.
    #[error(
        "serial and console cannot both be stdio: connect one of them elsewhere, such as --console=attach"
    )]
    TwoOnStdio,
    /// A restart policy for a device that there is not.
    #[error("restart: this machine has no device '{name}': {hint}")]
    NoSuchDevice {
        /// What was named.
        name: String,
        /// The nearest name, or all.
        hint: String,
    },
    /// A socket path that does not fit `sockaddr_un`.
    #[error(
        "{field}: the socket path '{path}' has {length} bytes; the kernel allows at most {MAX_SOCKET_PATH}: choose a shorter one",
        path = path.display()
    )]
    SocketPathTooLong {
        /// `serial` or `console`.
        field: &'static str,
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// A limit for a process that the machine does not have.
    #[error("limit: this machine has no process '{name}'; it has {has}")]
    NoSuchProcess {
        /// What was given.
        name: String,
        /// What there is.
        has: String,
    },
    /// A limit that cannot be.
    #[error("limit of {process}: {reason}")]
    Limit {
        /// Which process.
        process: String,
        /// Why not.
        reason: &'static str,
    },
    /// A vsock that cannot be.
    #[error(transparent)]
    Vsock(#[from] vsock::VsockSpecError),
    /// A port.
    #[error(transparent)]
    Port(#[from] port::PortSpecError),
    /// A watchdog that cannot be.
    #[error(transparent)]
    Watchdog(#[from] watchdog::WatchdogSpecError),
    /// A balloon that cannot be.
    #[error(transparent)]
    Balloon(#[from] balloon::BalloonSpecError),
    /// An id that another device has.
    #[error(
        "{device}: the id '{id}' already belongs to another device or process of this machine; give it another with id=NAME"
    )]
    IdTaken {
        /// Which device, as messages call it.
        device: String,
        /// The id.
        id: String,
    },
    /// A network card that cannot be.
    #[error("net {id}: {source}")]
    Net {
        /// Which.
        id: String,
        /// Why not.
        source: NetSpecError,
    },
    /// A tag that cannot be one.
    #[error("fs '{path}': {fault}", path = path.display())]
    Tag {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// A command line that C cannot hold.
    #[error("cmdline: contains a zero byte")]
    CmdlineZero,
}

/// A bare number was most likely meant to have a unit.
fn unit_hint(bytes: u64) -> String {
    if (16..65536).contains(&bytes) { format!("; for megabytes write {bytes}M") } else { String::new() }
}

impl MachineConfig {
    /// What follows the death of this device's process.
    pub fn restart_of(&self, id: &str) -> RestartPolicy {
        let disk = self.disks.iter().find(|disk| disk.id == id).map(|disk| disk.restart);
        let disk =
            disk.or_else(|| self.vsock.as_ref().filter(|vsock| vsock.id == id).map(|vsock| vsock.restart));
        let disk = disk.or_else(|| self.balloon.as_ref().filter(|it| it.id == id).map(|it| it.restart));
        let disk = disk.or_else(|| self.watchdog.as_ref().filter(|it| it.id == id).map(|it| it.restart));
        let other = || self.restarts.iter().find(|(device, _)| device == id).map(|(_, policy)| *policy);
        let foreign = || self.vhost_user.iter().find(|device| device.id == id).map(|device| device.restart);
        disk.or_else(other).or_else(foreign).unwrap_or(self.restart)
    }
}

impl MachineConfig {
    /// Where the devices are that chose their places on the PCI bus.
    pub fn places(&self) -> impl Iterator<Item = (&str, PciAddress)> {
        let disks = self.disks.iter().map(|disk| (&*disk.id, disk.addr));
        disks
            .chain([(RNG, self.rng_addr), (CONSOLE, self.console_addr)])
            .chain(self.vsock.iter().map(|vsock| (&*vsock.id, vsock.addr)))
            .chain(self.balloon.iter().map(|balloon| (&*balloon.id, balloon.addr)))
            .chain(self.watchdog.iter().map(|watchdog| (&*watchdog.id, watchdog.addr)))
            .chain(self.nics.iter().map(|nic| (&*nic.id, nic.addr)))
            .chain(self.vhost_user.iter().map(|device| (&*device.id, device.addr)))
            .chain(self.shares.iter().map(|share| (&*share.id, share.addr)))
            .chain(self.pmems.iter().map(|pmem| (&*pmem.id, pmem.addr)))
            .filter_map(|(id, address)| Some((id, address?)))
    }

    /// The ids of all devices on the PCI bus, in the order of the slots that they get unless they chose one.
    pub fn on_bus(&self) -> Vec<&str> {
        let disks = self.disks.iter().map(|disk| &*disk.id);
        let console = (self.console != StreamTarget::Off).then_some(CONSOLE);
        disks
            .chain(self.rng.then_some(RNG))
            .chain(console)
            .chain(self.vsock.iter().map(|vsock| &*vsock.id))
            .chain(self.balloon.iter().map(|balloon| &*balloon.id))
            .chain(self.nics.iter().map(|nic| &*nic.id))
            .chain(self.vhost_user.iter().map(|device| &*device.id))
            .chain(self.shares.iter().map(|share| &*share.id))
            .chain(self.pmems.iter().map(|pmem| &*pmem.id))
            .chain((!self.ports.is_empty()).then_some(PORTS))
            .chain(self.watchdog.iter().map(|watchdog| &*watchdog.id))
            .collect()
    }
}

/// Puts options and file together (options win) and checks the result.
pub fn resolve(mut args: RunArgs) -> Result<MachineConfig, ConfigError> {
    let mut file = match args.config.take() {
        Some(path) => file::read(&path)?,
        None => RunArgs::default(),
    };
    let (serial, ConsoleSpec { target: console, addr: console_addr }) = streams(&mut args, &mut file)?;
    let confinement = confine(&mut args, &mut file);
    let (disks, foreign) = disks(&mut args, &mut file)?;
    let name = name(&mut args, &mut file)?;
    let memory = check_memory(args.memory.or(file.memory).unwrap_or(Size(512 << 20)).0)?;
    let (mut rules, given) = (take(&mut file.restart), take(&mut args.restart));
    let (rng, rng_limit, rng_addr) = entropy(&args, &file, &mut rules);
    let restart = rules.iter().chain(&given).rfind(|rule| rule.device.is_none());
    let restart = restart.map_or_else(RestartPolicy::default, |rule| rule.policy);
    let mut ids = Ids::new([]);
    let mut disks = name_disks(disks, restart, &mut ids)?;
    let mut named =
        Others::resolve(&mut args, &mut file, (&name, ids, foreign), memory, (restart, &mut rules))?;
    check_count(disks.len() + usize::from(rng) + named.ids().count(), &console)?;
    let firmware = firmware::resolve(&mut args, &mut file, &named.bootable(&disks))?;
    let flash = firmware.as_ref().is_some_and(FirmwareConfig::has_variables);
    let keyboard = args.keyboard.or(file.keyboard) == Some(Switch::On);
    let off = StreamTarget::Off;
    let fixed = [
        (SERIAL, serial != off),
        (CONSOLE, console != off),
        (RNG, rng),
        (FLASH, flash),
        (KEYBOARD, keyboard),
    ];
    // Not those that stand in the file beside a device which the command line has turned off.
    rules.retain(|rule| !fixed.iter().any(|(id, on)| !on && rule.device.as_deref() == Some(id)));
    rules.extend(given);
    let others = fixed.iter().filter(|(_, on)| *on).map(|(id, _)| *id);
    let restarts = apply(&rules, &mut disks, others.chain(named.ids()).collect())?;
    named.apply(&restarts);
    let (kernel, initrd, (cmdline, cmdline_added)) =
        direct_boot(&mut args, &mut file, firmware.is_some(), (&serial, &console))?;
    let (cpus, topology) = args.cpus.or(file.cpus).unwrap_or(CpuSpec::from(1)).resolve()?;
    let config = MachineConfig {
        name,
        kernel,
        firmware,
        initrd,
        cmdline,
        cmdline_added,
        roms: take(if args.roms.is_empty() { &mut file.roms } else { &mut args.roms }),
        smbios: smbios(&mut args, &mut file)?,
        debug_port: args.debug_port.take().or(file.debug_port.take()),
        debug_exit: args.debug_exit.or(file.debug_exit) == Some(Switch::On),
        cpus,
        topology,
        cpu_model: args.cpu_model.take().or(file.cpu_model.take()).unwrap_or_else(|| "host".to_owned()),
        memory,
        thp: args.thp.or(file.thp) != Some(Switch::Off),
        disks,
        nics: named.nics,
        vhost_user: named.vhost_user,
        rng,
        rng_limit,
        rng_addr,
        console_addr,
        console,
        ports: named.ports,
        serial,
        keyboard,
        vsock: named.vsock,
        balloon: named.balloon,
        watchdog: named.watchdog,
        restart,
        restarts,
        liveness: liveness(&args, &file),
        on_reboot: args.on_reboot.or(file.on_reboot).unwrap_or(EndAction::Restart),
        on_panic: args.on_panic.or(file.on_panic).unwrap_or(EndAction::Exit),
        confinement,
        log: log(&mut args, &mut file),
        limit_groups: named.limit_groups,
        pmems: named.pmems,
        shares: named.shares,
    };
    check(&config)?;
    find_roms(config)
}

/// Whether there is an entropy device, its limit and its place. What was said of its restarts becomes a rule.
fn entropy(
    args: &RunArgs,
    file: &RunArgs,
    rules: &mut Vec<RestartRule>,
) -> (bool, Option<RngLimit>, Option<PciAddress>) {
    let Some(rng) = args.rng.or(file.rng).filter(|rng| rng.on) else { return (false, None, None) };
    let restart = rng.restart.or(file.rng.and_then(|rng| rng.restart));
    rules.extend(restart.map(|policy| RestartRule { device: Some(RNG.to_owned()), policy }));
    (true, rng.limit, rng.addr)
}

fn name(args: &mut RunArgs, file: &mut RunArgs) -> Result<String, ConfigError> {
    let name = args.name.take().or(file.name.take());
    check_name("name", name.unwrap_or_else(|| format!("vm-{}", process::id())))
}

fn smbios(args: &mut RunArgs, file: &mut RunArgs) -> Result<SmbiosSpec, ConfigError> {
    let mut smbios = args.smbios.take().or(file.smbios.take()).unwrap_or_default();
    smbios.check()?;
    Ok(smbios)
}

fn liveness(args: &RunArgs, file: &RunArgs) -> Liveness {
    Liveness::new(args.hang_deadline.or(file.hang_deadline), args.stall_deadline.or(file.stall_deadline))
}

fn log(args: &mut RunArgs, file: &mut RunArgs) -> LogConfig {
    LogConfig {
        level: args.log_level.or(file.log_level).unwrap_or(LogLevel::Info),
        format: args.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
        file: args.log_file.take().or(file.log_file.take()),
    }
}

/// Checks that the option ROMs' devices are on the PCI bus, and finds the files that are named without a folder.
fn find_roms(mut config: MachineConfig) -> Result<MachineConfig, ConfigError> {
    let roms = take(&mut config.roms);
    let roms = rom::resolve(roms, &config.on_bus(), &config.nics, config.firmware.is_some())?;
    Ok(MachineConfig { roms, ..config })
}

fn check_count(others: usize, console: &StreamTarget) -> Result<(), ConfigError> {
    let virtio = others + usize::from(*console != StreamTarget::Off);
    if virtio > MAX_VIRTIO_DEVICES { Err(ConfigError::TooManyDevices(virtio)) } else { Ok(()) }
}

/// The disks, and the devices of other back ends: disks, network cards and shared directories among them.
fn disks(args: &mut RunArgs, file: &mut RunArgs) -> Result<(Vec<DiskSpec>, Vec<VhostUserSpec>), ConfigError> {
    let mut disks = take(if args.disks.is_empty() { &mut file.disks } else { &mut args.disks });
    let foreign = if args.vhost_user.is_empty() { &mut file.vhost_user } else { &mut args.vhost_user };
    let mut foreign = take(foreign);
    for disk in disks.extract_if(.., |disk| disk.vhost_user) {
        let addr = disk.addr;
        foreign.push(VhostUserSpec { addr, ..VhostUserSpec::disk(disk.path, disk.id, disk.restart) });
    }
    // What is left stands for both places.
    let in_file = take(&mut file.nets);
    let nets = &mut args.nets;
    if nets.is_empty() {
        *nets = in_file;
    }
    for net in nets.extract_if(.., |net| net.vhost_user.is_some()) {
        let id = net.id.clone().unwrap_or_else(|| "net".to_owned());
        foreign.extend(net.foreign().map_err(|source| ConfigError::Net { id, source })?);
    }
    let in_file = take(&mut file.fs);
    let fs = &mut args.fs;
    if fs.is_empty() {
        *fs = in_file;
    }
    foreign.extend(fs.extract_if(.., |fs| fs.vhost_user).filter_map(|fs| fs.foreign()));
    Ok((disks, foreign))
}

/// The options about the jail. What either place requires is required; of two limits for one process the command line's counts.
fn confine(args: &mut RunArgs, file: &mut RunArgs) -> ConfinementConfig {
    let limits = take(&mut file.limits).into_iter().chain(take(&mut args.limits));
    ConfinementConfig {
        require: take(&mut args.require).into_iter().chain(take(&mut file.require)).collect(),
        limits: limits.map(|spec| (spec.process, spec.limits)).collect(),
        uids: args.uids.take().or(file.uids.take()).unwrap_or_default(),
        cgroup: args.cgroup.take().or(file.cgroup.take()).unwrap_or_default(),
    }
}

/// Checks what concerns several devices.
fn check(config: &MachineConfig) -> Result<(), ConfigError> {
    pci::check(config.places())?;
    limit_group::check(&config.limit_groups, &config.disks, &config.nics)?;
    let names = process_names(config);
    for (process, limits) in &config.confinement.limits {
        if !names.contains(&process.as_str()) {
            return Err(ConfigError::NoSuchProcess {
                name: process.escape_debug().to_string(),
                has: names.join(", "),
            });
        }
        let disk = config.disks.iter().any(|disk| disk.id == *process);
        let misplaced = (limits.has_io() && !disk).then_some("read and write are for disks");
        if let Some(reason) = limits.impossible().or(misplaced) {
            return Err(ConfigError::Limit { process: process.clone(), reason });
        }
    }
    Ok(())
}

/// What a direct boot starts and how: kernel, initial RAM file system and command line, with what was added to it.
type DirectBoot = (Option<PathBuf>, Option<PathBuf>, (String, Option<&'static str>));

/// Takes what concerns the kernel out of the options, those of the command line first; firmware has none of it.
fn direct_boot(
    args: &mut RunArgs,
    file: &mut RunArgs,
    firmware: bool,
    (serial, console): (&StreamTarget, &StreamTarget),
) -> Result<DirectBoot, ConfigError> {
    let initrd = args.initrd.take().or(file.initrd.take());
    let cmdline = args.cmdline.take().or(file.cmdline.take());
    let kernel = args.kernel.take().or(file.kernel.take());
    match firmware {
        true if initrd.is_some() => Err(ConfigError::NeedsKernel("initrd")),
        true if cmdline.is_some() => Err(ConfigError::NeedsKernel("cmdline")),
        true => Ok((None, None, (String::new(), None))),
        false => {
            let kernel = kernel.ok_or(ConfigError::NoKernel)?;
            Ok((Some(kernel), initrd, complete(cmdline, serial, console)?))
        }
    }
}

/// Adds the console that the guest has, where the user named none.
fn complete(
    given: Option<String>,
    serial: &StreamTarget,
    console: &StreamTarget,
) -> Result<(String, Option<&'static str>), ConfigError> {
    let mut cmdline = given.unwrap_or_default();
    if cmdline.contains('\0') {
        return Err(ConfigError::CmdlineZero);
    }
    let has_console = cmdline.split_whitespace().any(|word| word.starts_with("console="));
    let added = match (has_console, serial, console) {
        (true, ..) | (false, StreamTarget::Off, StreamTarget::Off) => None,
        (false, StreamTarget::Off, _) => Some("console=hvc0"),
        (false, ..) => Some("console=ttyS0"),
    };
    if let Some(added) = added {
        // Before the user's words: what follows `--` there belongs to init.
        cmdline = if cmdline.is_empty() { added.to_owned() } else { format!("{added} {cmdline}") };
    }
    Ok((cmdline, added))
}

/// The serial port, and the console with its place where there is one.
fn streams(args: &mut RunArgs, file: &mut RunArgs) -> Result<(StreamTarget, ConsoleSpec), ConfigError> {
    let serial = args.serial.take().or(file.serial.take()).unwrap_or(StreamTarget::Stdio);
    let off = ConsoleSpec::from(StreamTarget::Off);
    let given = args.console.take().or(file.console.take());
    let console = given.filter(|console| console.target != off.target).unwrap_or(off);
    check_streams(&serial, &console.target)?;
    Ok((serial, console))
}

fn check_streams(serial: &StreamTarget, console: &StreamTarget) -> Result<(), ConfigError> {
    if (serial, console) == (&StreamTarget::Stdio, &StreamTarget::Stdio) {
        return Err(ConfigError::TwoOnStdio);
    }
    for (field, target) in [(SERIAL, serial), (CONSOLE, console)] {
        if let StreamTarget::Unix(path) = target {
            let length = path.as_os_str().len();
            if length > MAX_SOCKET_PATH {
                return Err(ConfigError::SocketPathTooLong { field, path: path.clone(), length });
            }
        }
    }
    Ok(())
}

fn check_memory(bytes: u64) -> Result<u64, ConfigError> {
    if !bytes.is_multiple_of(PAGE) {
        Err(ConfigError::MemoryNotPages(bytes))
    } else if bytes < MIN_MEMORY {
        Err(ConfigError::MemoryTooSmall(bytes))
    } else {
        Ok(bytes)
    }
}

/// Checks a name of a machine or device: it becomes part of a socket name, of process titles and of messages.
pub fn check_name(field: &str, name: String) -> Result<String, ConfigError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first && name.len() <= MAX_NAME && name.bytes().all(good) {
        Ok(name)
    } else {
        Err(ConfigError::BadName { field: field.to_owned(), name: name.escape_debug().to_string() })
    }
}

/// Gives the devices the policies that were said of them by name, the last one of each. Those of others than disks are
/// returned.
fn apply(
    rules: &[RestartRule],
    disks: &mut [DiskConfig],
    others: Vec<&str>,
) -> Result<Vec<(String, RestartPolicy)>, ConfigError> {
    let mut restarts: Vec<(String, RestartPolicy)> = Vec::new();
    for RestartRule { device, policy } in rules {
        let Some(device) = device else { continue };
        if let Some(disk) = disks.iter_mut().find(|disk| disk.id == *device) {
            disk.restart = *policy;
        } else if others.contains(&device.as_str()) {
            restarts.retain(|(id, _)| id != device);
            restarts.push((device.clone(), *policy));
        } else {
            let devices = disks.iter().map(|disk| disk.id.as_str()).chain(others).collect::<Vec<_>>();
            let name = device.escape_debug().to_string();
            return Err(ConfigError::NoSuchDevice { hint: hint(&name, &devices), name });
        }
    }
    Ok(restarts)
}

fn name_disks(
    disks: Vec<DiskSpec>,
    restart: RestartPolicy,
    ids: &mut Ids,
) -> Result<Vec<DiskConfig>, ConfigError> {
    let mut named = Vec::with_capacity(disks.len());
    for (index, disk) in disks.into_iter().enumerate() {
        let id = disk.id.unwrap_or_else(|| format!("disk{index}"));
        let id = ids.take(&format!("disk '{}'", disk.path.display()), id)?;
        let restart = disk.restart.unwrap_or(restart);
        let DiskSpec { path, readonly, addr, options, .. } = disk;
        named.push(DiskConfig { path, readonly, id, restart, addr, options });
    }
    Ok(named)
}

#[cfg(test)]
mod tests;
