//! Creates the processes of a machine and tells each what it is.
//!
//! Nothing here waits: the core is started first, for creating the virtual machine takes longest; each process finds its
//! `Start` message in its control channel when it gets there. READY and failures arrive in the event loop.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_ipc::channel::message::{
    BackingImage, BalloonConfig, BlkConfig, BlkOptions, Boot, ConsoleConfig, CoreStart, DeviceConfig,
    DeviceLink, DeviceStart, FdIndex, FirmwareFile, FlashConfig, FsCache, FsConfig, FsOwners, ImageFormat,
    KeyboardConfig, LinkKind, MappedRegion, NetBackend, NetConfig, NetLimits, PmemConfig, PortConfig,
    PortsConfig, Rates, RelayConfig, RngConfig, ToCore, ToDevice, UartConfig, VsockConfig, WatchdogConfig,
};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::cgroup::CgroupError;
use bulkhead_ipc::jail::{self, Enforcement, Identity, JailError, JailSpec, Limits, SharedDirectory};
use bulkhead_ipc::vfio_user::shadow::SHADOW_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::pipe2;
use thiserror::Error;

use super::cli::LogLevel;
use super::config::fs::Cache;
use super::config::net::RateSpec;
use super::config::watchdog::WatchdogAction;
use super::config::{CONSOLE, CORE, FLASH, KEYBOARD, MachineConfig, PORTS, RNG, SERIAL, VhostUserConfig};
use super::firmware;
use super::logs::LogPipe;
use super::process::{Fds, Process, Role, State};
use super::processor::ProcessorError;
use super::programs::Programs;
use super::resources::nic::{Nic, Way};
use super::resources::{
    Balloon, Disk, Entropy, KEYBOARD_STATE, LimitGroups, MOST_FIRMWARE, PORTS_STATE, Pmem, Port, Ports,
    Resources, Share, Stream, Variables, Vsock, WATCHDOG_STATE, Watchdog,
};
use super::smbios::Tables;
use super::terminal;

/// Device types of the virtio specification, section 5.
const VIRTIO_NET: u16 = 1;
const VIRTIO_BLOCK: u16 = 2;
const VIRTIO_CONSOLE: u16 = 3;
const VIRTIO_ENTROPY: u16 = 4;
const VIRTIO_BALLOON: u16 = 5;
const VIRTIO_VSOCK: u16 = 19;
/// A descriptor for each connection of a vsock, and some.
const VSOCK_DESCRIPTORS: u64 = 1024 + 128;
const VIRTIO_FS: u16 = 26;
const VIRTIO_PMEM: u16 = 27;
/// Locked memory for the io_uring rings of all disks that run as one user, as far as the host allows it.
const IO_URING_LOCKED: u64 = 8 << 20;
/// Room for the requests in flight of any device (vhost-user, inflight I/O tracking).
const INFLIGHT_AREA: u64 = 1 << 20;
/// More queues than this bring nothing for one file.
const MAX_BLK_QUEUES: u16 = 8;
/// Bytes of a virtio-blk serial number (virtio 1.3, section 5.2.6.1).
const BLK_SERIAL: usize = 20;

/// Where kernels look for SMBIOS: the core puts it there when it starts a kernel.
const SMBIOS: u32 = 0xF_0000;

/// Why a process could not be created.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The jail.
    #[error("cannot start {id}: {source}{advice}", advice = advice(source))]
    Jail {
        /// Which process.
        id: String,
        /// The step that failed.
        source: JailError,
    },
    /// Its cgroup.
    #[error("cannot start {id}: {source}")]
    Cgroup {
        /// Which process.
        id: String,
        /// What failed.
        source: CgroupError,
    },
    /// The control channel.
    #[error("cannot tell {id} what to do: {source}")]
    Channel {
        /// Which process.
        id: String,
        /// What failed.
        source: ChannelError,
    },
    /// A back end that is not ours is not there.
    #[error("device {id}: cannot connect to the back end at '{path}': {reason}", path = path.display())]
    BackEnd {
        /// Which device.
        id: String,
        /// Where it should listen.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The processors.
    #[error(transparent)]
    Processor(#[from] Arc<ProcessorError>),
    /// A descriptor, most likely too many of them.
    #[error("cannot start {id}: {source}")]
    Io {
        /// Which process.
        id: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What to do about a jail that cannot be built.
pub fn advice(error: &JailError) -> &'static str {
    match error.missing_layer() {
        Some(jail::Layer::Namespaces) => {
            "; user namespaces may be forbidden here: `bulkhead doctor` says which setting does it"
        }
        Some(_) => "; `bulkhead doctor` says what this host lacks",
        None => "",
    }
}

/// A device to be.
enum Plan<'a> {
    Blk(&'a Disk),
    Rng(&'a Entropy),
    Console(&'a Stream),
    Uart(&'a Stream),
    Flash(&'a Variables),
    Keyboard(&'a OwnedFd),
    Vsock(&'a Vsock),
    Balloon(&'a Balloon),
    Net(&'a Nic),
    Foreign(&'a VhostUserConfig),
    Fs(&'a Share),
    Pmem(&'a Pmem),
    Ports(&'a Ports),
    Watchdog(&'a Watchdog),
}

impl<'a> Plan<'a> {
    /// The devices of a machine.
    fn all(resources: &'a Resources) -> Vec<Self> {
        let mut plans: Vec<Self> = resources.disks.iter().map(Self::Blk).collect();
        plans.extend(resources.entropy.as_ref().map(Self::Rng));
        plans.extend(resources.console.as_ref().map(Self::Console));
        plans.extend(resources.serial.as_ref().map(Self::Uart));
        plans.extend(resources.variables.as_ref().map(Self::Flash));
        plans.extend(resources.keyboard.as_ref().map(Self::Keyboard));
        plans.extend(resources.vsock.as_ref().map(Self::Vsock));
        plans.extend(resources.balloon.as_ref().map(Self::Balloon));
        plans.extend(resources.nics.iter().map(Self::Net));
        plans.extend(resources.foreign.iter().map(Self::Foreign));
        plans.extend(resources.shares.iter().map(Self::Fs));
        plans.extend(resources.pmems.iter().map(Self::Pmem));
        plans.extend(resources.ports.as_ref().map(Self::Ports));
        plans.extend(resources.watchdog.as_ref().map(Self::Watchdog));
        plans
    }

    fn id(&self) -> &'a str {
        match self {
            Self::Blk(disk) => &disk.id,
            Self::Rng(_) => RNG,
            Self::Console(_) => CONSOLE,
            Self::Uart(_) => SERIAL,
            Self::Flash(_) => FLASH,
            Self::Keyboard(_) => KEYBOARD,
            Self::Vsock(vsock) => &vsock.id,
            Self::Balloon(balloon) => &balloon.id,
            Self::Net(nic) => &nic.config.id,
            Self::Foreign(device) => &device.id,
            Self::Fs(share) => &share.config.id,
            Self::Pmem(pmem) => &pmem.config.id,
            Self::Ports(_) => PORTS,
            Self::Watchdog(watchdog) => &watchdog.id,
        }
    }

    const fn role(&self) -> Role {
        match self {
            Self::Blk(_) => Role::Blk,
            Self::Rng(_) => Role::Rng,
            Self::Console(_) | Self::Ports(_) => Role::Console,
            Self::Uart(_) => Role::Uart,
            Self::Flash(_) => Role::Flash,
            Self::Keyboard(_) => Role::Keyboard,
            Self::Vsock(_) => Role::Vsock,
            Self::Balloon(_) => Role::Balloon,
            Self::Net(_) => Role::Net,
            Self::Foreign(_) => Role::Relay,
            Self::Fs(_) => Role::Fs,
            Self::Pmem(_) => Role::Pmem,
            Self::Watchdog(_) => Role::Watchdog,
        }
    }

    fn link(&self, resources: &Resources) -> LinkKind {
        let slot = resources.slots.of(self.id()).unwrap_or_default();
        match self {
            Self::Blk(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_BLOCK, slot },
            Self::Rng(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_ENTROPY, slot },
            Self::Console(_) | Self::Ports(_) => {
                LinkKind::VirtioVhostUser { virtio_id: VIRTIO_CONSOLE, slot }
            }
            Self::Uart(_) => LinkKind::Registers,
            Self::Flash(_) => LinkKind::Flash,
            Self::Keyboard(_) => LinkKind::Keyboard,
            Self::Watchdog(watchdog) => {
                LinkKind::Watchdog { slot, nmi: watchdog.action == WatchdogAction::InjectNmi }
            }
            Self::Vsock(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_VSOCK, slot },
            Self::Balloon(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_BALLOON, slot },
            Self::Net(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_NET, slot },
            Self::Foreign(device) => LinkKind::Foreign {
                virtio_id: device.device_id,
                slot,
                queues: device.queues.unwrap_or(device.least_queues),
                config_size: device.config_size,
            },
            Self::Fs(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_FS, slot },
            Self::Pmem(_) => LinkKind::VirtioVhostUser { virtio_id: VIRTIO_PMEM, slot },
        }
    }

    /// A device may write no file but its own, and that no larger than it is; memory that it shares with the core counts.
    fn limits(&self) -> Limits {
        let file_size = match self {
            // An image in a format grows.
            Self::Blk(disk) if !disk.readonly && disk.options.format.0 != ImageFormat::Raw => None,
            Self::Blk(disk) if !disk.readonly => Some(disk.most_written()),
            Self::Console(stream) | Self::Uart(stream) if stream.writes_file => None,
            Self::Ports(ports) if ports.ports.iter().any(|port| port.stream.writes_file) => None,
            Self::Ports(_) => Some(PORTS_STATE),
            Self::Blk(_)
            | Self::Rng(_)
            | Self::Console(_)
            | Self::Net(_)
            | Self::Vsock(_)
            | Self::Balloon(_)
            | Self::Pmem(_) => Some(INFLIGHT_AREA),
            // The page of its readable registers.
            Self::Uart(_) => Some(SHADOW_SIZE as u64),
            Self::Flash(variables) => Some(variables.size),
            Self::Keyboard(_) => Some(KEYBOARD_STATE),
            Self::Watchdog(_) => Some(WATCHDOG_STATE),
            Self::Foreign(_) => Some(0),
            Self::Fs(_) => None,
        };
        if matches!(self, Self::Fs(_)) {
            // A descriptor for each file that the guest knows, as far as the host allows, and what is known of it.
            return Limits { file_size, descriptors: 1 << 19, data: Some(512 << 20), ..Limits::default() };
        }
        // The kernel counts io_uring's rings as locked memory, for all processes of one user together.
        let allowed = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(_, hard)| hard);
        let locked = if matches!(self, Self::Blk(_)) { IO_URING_LOCKED.min(allowed) } else { 0 };
        let usual = Limits::default().descriptors;
        let descriptors = match self {
            Self::Vsock(_) => VSOCK_DESCRIPTORS,
            // Kick, call and error of each queue, and the tap's.
            Self::Net(nic) => usual.saturating_add(u64::from(nic.config.queues) << 3),
            _ => usual,
        };
        // A disk may be given another size while the machine runs.
        let file_may_grow = matches!(self, Self::Blk(disk) if !disk.readonly);
        Limits { file_size, file_may_grow, locked, descriptors, ..Limits::default() }
    }

    /// Whether its process has queues to count.
    const fn counts(&self) -> bool {
        matches!(
            self,
            Self::Blk(_)
                | Self::Rng(_)
                | Self::Console(_)
                | Self::Ports(_)
                | Self::Net(_)
                | Self::Vsock(_)
                | Self::Balloon(_)
                | Self::Fs(_)
                | Self::Pmem(_)
        )
    }

    /// A connection to the back end, where it is not ours.
    fn connect(&self) -> Result<Option<UnixStream>, LaunchError> {
        let Self::Foreign(device) = self else { return Ok(None) };
        connect_now(&device.socket).map(Some).map_err(|errno| LaunchError::BackEnd {
            id: device.id.clone(),
            path: device.socket.clone(),
            reason: match errno {
                Errno::ENOENT => "there is no such socket: start the back end first".to_owned(),
                Errno::ECONNREFUSED => "nobody listens there: start the back end first".to_owned(),
                Errno::EAGAIN => {
                    "it does not accept connections: it serves somebody else, or hangs".to_owned()
                }
                Errno::EACCES => "permission denied for this user".to_owned(),
                Errno::ENAMETOOLONG => "the path is too long for a socket".to_owned(),
                errno => errno.desc().to_owned(),
            },
        })
    }

    /// What it is told of `config`, and of its back end or whether it is a successor.
    fn config<'b>(
        &self,
        (cpus, groups): (u16, &'b LimitGroups),
        (back_end, successor): (Option<&'b UnixStream>, bool),
        fds: &mut Fds<'b>,
    ) -> DeviceConfig
    where
        'a: 'b,
    {
        match self {
            Self::Blk(disk) => DeviceConfig::Blk(blk_config(disk, cpus, groups, fds)),
            Self::Rng(entropy) => {
                DeviceConfig::Rng(RngConfig { source: fds.add(&entropy.source), limit: entropy.limit })
            }
            Self::Console(stream) => DeviceConfig::Console(ConsoleConfig {
                input: stream.input.as_ref().map(|fd| fds.add(fd)),
                output: stream.output.as_ref().map(|fd| fds.add(fd)),
                size: stream.keyboard.as_ref().and_then(|_| terminal::size(io::stdin())),
                typed: stream.typed.as_ref().map(|fd| fds.add(fd)),
            }),
            Self::Ports(ports) => DeviceConfig::Ports(ports_config(ports, fds)),
            Self::Flash(variables) => DeviceConfig::Flash(FlashConfig {
                file: fds.add(&variables.file),
                memory: fds.add(&variables.memory),
                size: variables.size,
            }),
            Self::Keyboard(state) => DeviceConfig::Keyboard(KeyboardConfig { state: fds.add(*state) }),
            Self::Watchdog(watchdog) => DeviceConfig::Watchdog(WatchdogConfig {
                state: fds.add(&watchdog.state),
                expired: watchdog.expired,
                interrupt: watchdog.action == WatchdogAction::InjectNmi,
            }),
            Self::Balloon(balloon) => DeviceConfig::Balloon(BalloonConfig {
                target: balloon.target,
                actual: balloon.actual,
                deflate_on_oom: balloon.deflate_on_oom,
                free_page_reporting: balloon.free_page_reporting,
            }),
            Self::Vsock(vsock) => DeviceConfig::Vsock(VsockConfig {
                guest_cid: vsock.cid,
                connector: fds.add(&vsock.for_device),
            }),
            Self::Net(nic) => DeviceConfig::Net(net(nic, successor, groups, fds)),
            Self::Pmem(pmem) => DeviceConfig::Pmem(PmemConfig {
                file: fds.add(&pmem.for_device),
                address: pmem.address,
                size: pmem.size,
            }),
            Self::Fs(share) => DeviceConfig::Fs(fs_config(share, fds.add(&share.table))),
            Self::Uart(stream) => DeviceConfig::Uart(UartConfig {
                input: stream.input.as_ref().map(|fd| fds.add(fd)),
                output: stream.output.as_ref().map(|fd| fds.add(fd)),
                typed: stream.typed.as_ref().map(|fd| fds.add(fd)),
                own_file: stream.own_file,
            }),
            Self::Foreign(device) => DeviceConfig::Relay(RelayConfig {
                back_end: back_end.map_or(FdIndex(u8::MAX), |stream| fds.add(stream)),
                path: device.socket.to_string_lossy().into_owned(),
                kind: device.kind.clone(),
                features: device.features,
                queues: device.queues,
                least_queues: device.least_queues,
                has_config: device.needs_config,
                config: device.config.clone(),
                own_features: device.own_features,
            }),
        }
    }
}

fn blk_config<'a>(disk: &'a Disk, cpus: u16, groups: &'a LimitGroups, fds: &mut Fds<'a>) -> BlkConfig {
    let options = &disk.options;
    let (file, cached) = match &disk.direct {
        Some(direct) => (fds.add(direct), Some(fds.add(&disk.file))),
        None => (fds.add(&disk.file), None),
    };
    let backing =
        disk.backing.iter().map(|(file, format)| BackingImage { file: fds.add(file), format: *format });
    let backing = backing.collect();
    BlkConfig {
        disk: file,
        read_only: disk.readonly,
        serial: options.serial.as_deref().unwrap_or(&disk.id).chars().take(BLK_SERIAL).collect(),
        queues: match options.queues {
            0 => cpus.clamp(1, MAX_BLK_QUEUES),
            queues => queues,
        },
        logical_block_size: if options.logical_block_size == 0 { 512 } else { options.logical_block_size },
        options: BlkOptions {
            physical_block_size: options.physical_block_size,
            format: options.format.0,
            backing,
            data: disk.data.iter().map(|file| fds.add(file)).collect(),
            cached,
            durability: options.cache.durability,
            no_discard: options.no_discard,
            rates: Rates {
                bps: options.bps.rate,
                bps_burst: options.bps.burst,
                iops: options.iops.rate,
                iops_burst: options.iops.burst,
            },
            group: groups.config(&disk.id, fds),
            read_error: options.read_error.0,
            write_error: options.write_error.0,
        },
    }
}

fn net<'a>(nic: &'a Nic, successor: bool, groups: &'a LimitGroups, fds: &mut Fds<'a>) -> NetConfig {
    let backend = match &nic.way {
        Way::Tap(tap) => NetBackend::Tap {
            queues: tap.queues.iter().map(|queue| fds.add(queue)).collect(),
            positions: nic.positions.iter().map(|position| fds.add(position)).collect(),
            offloads: tap.offloads,
        },
        Way::Stream(stream) => NetBackend::Stream(stream.end.as_ref().map(|end| fds.add(end))),
        Way::Datagrams(socket) => NetBackend::Datagrams(Some(fds.add(socket))),
    };
    let config = &nic.config;
    let limits = |rate: RateSpec| NetLimits {
        bytes: rate.bytes,
        bytes_burst: rate.burst,
        packets: rate.packets,
        packets_burst: 0,
    };
    NetConfig {
        backend,
        mac: config.mac,
        mtu: config.mtu,
        receive: limits(config.receive),
        transmit: limits(config.transmit),
        mac_filter: config.mac_filter,
        ip_filter: config.ip_filter.clone(),
        link: config.link,
        successor,
        kept: Some(fds.add(&nic.kept)),
        way: nic.way_number,
        group: groups.config(&config.id, fds),
    }
}

fn ports_config<'a>(ports: &'a Ports, fds: &mut Fds<'a>) -> PortsConfig {
    let mut end = |fd: &'a Option<OwnedFd>| fd.as_ref().map(|fd| fds.add(fd));
    let port = |port: &'a Port| PortConfig {
        name: port.name.clone(),
        console: port.console,
        input: end(&port.stream.input),
        output: end(&port.stream.output),
    };
    let named = ports.ports.iter().map(port).collect();
    let typed = Some(fds.add(&ports.typed));
    PortsConfig { ports: named, state: Some(fds.add(&ports.state)), typed }
}

/// Connects to a Unix socket without waiting for one that does not accept.
fn connect_now(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|_| Errno::last())?;
    Ok(stream)
}

fn fs_config(share: &Share, table: FdIndex) -> FsConfig {
    let it = &share.config;
    let cache = match it.cache {
        Cache::Auto => FsCache::Auto,
        Cache::Always => FsCache::Always,
        Cache::Metadata => FsCache::Metadata,
        Cache::Never => FsCache::Never,
    };
    let one = |(uid, gid)| FsOwners::One { uid, gid, others: it.others };
    FsConfig {
        table,
        tag: it.tag.clone(),
        read_only: it.readonly,
        cache,
        submounts: it.submounts,
        xattr: it.xattr,
        owners: share.owner.map_or(FsOwners::All, one),
    }
}

const fn ipc_level(level: LogLevel) -> bulkhead_ipc::log::LogLevel {
    use bulkhead_ipc::log::LogLevel as Ipc;
    match level {
        LogLevel::Error => Ipc::Error,
        LogLevel::Warn => Ipc::Warn,
        LogLevel::Info => Ipc::Info,
        LogLevel::Debug => Ipc::Debug,
        LogLevel::Trace => Ipc::Trace,
    }
}

/// Starts every process of the machine, the core first. On an error none is left.
pub fn launch(
    config: &MachineConfig,
    resources: &Resources,
    programs: &Programs,
) -> Result<Vec<Process>, LaunchError> {
    resources.reset().map_err(|source| LaunchError::Io { id: KEYBOARD.to_owned(), source })?;
    let plans = Plan::all(resources);
    let mut processes = Vec::with_capacity(plans.len() + 1);
    let io = |id: &str, source: io::Error| LaunchError::Io { id: id.to_owned(), source };
    let mut links = Vec::with_capacity(plans.len());
    for plan in &plans {
        links.push(UnixStream::pair().map_err(|source| io(plan.id(), source))?);
    }
    let core = start_core(config, resources)?;
    for (plan, (_, socket)) in plans.iter().zip(&links) {
        let program = programs.of(plan.id(), resources);
        processes.push(start_device(config, resources, program, plan, (socket, false))?);
    }
    // Now, for what the processors can do is told late.
    tell_core(&core, config, resources, &plans, &links)?;
    processes.insert(0, core);
    processes.iter_mut().try_for_each(release)?;
    Ok(processes)
}

/// Starts another process for a device, of this program and with the resources that its predecessor has or had. Returns it and
/// the core's end of the stream between them.
pub fn relaunch(
    config: &MachineConfig,
    resources: &Resources,
    id: &str,
    program: &OwnedFd,
) -> Result<(Process, UnixStream), LaunchError> {
    let io = |source: io::Error| LaunchError::Io { id: id.to_owned(), source };
    let plans = Plan::all(resources);
    let plan = plans.iter().find(|plan| plan.id() == id).ok_or_else(|| io(io::ErrorKind::NotFound.into()))?;
    let (core, device) = UnixStream::pair().map_err(io)?;
    let mut process = start_device(config, resources, program, plan, (&device, true))?;
    release(&mut process)?;
    Ok((process, core))
}

/// Lets a process go on that waits for its user.
fn release(process: &mut Process) -> Result<(), LaunchError> {
    let id = &process.id;
    process.jailed.release().map_err(|source| LaunchError::Jail { id: id.clone(), source })
}

/// What the core and the process of this device speak, and where the guest finds it.
pub fn link_of(resources: &Resources, id: &str) -> Option<LinkKind> {
    Plan::all(resources).iter().find(|plan| plan.id() == id).map(|plan| plan.link(resources))
}

fn start_device<'a>(
    config: &MachineConfig,
    resources: &'a Resources,
    file: &OwnedFd,
    plan: &Plan<'a>,
    (socket, successor): (&'a UnixStream, bool),
) -> Result<Process, LaunchError> {
    let back_end = plan.connect()?;
    let meter = if plan.counts() { resources.meters.of(plan.id()) } else { None };
    let mut fds = Fds::default();
    let start = ToDevice::Start(DeviceStart {
        id: plan.id().to_owned(),
        machine: config.name.clone(),
        log: ipc_level(config.log.level),
        enforcement: Enforcement::Supervised,
        socket: fds.add(socket),
        config: plan.config((config.cpus, &resources.limit_groups), (back_end.as_ref(), successor), &mut fds),
        metrics: meter.as_deref().map(|meter| fds.add(meter)),
    });
    let title = format!("bulkhead-device[{}/{}]", config.name, plan.id());
    let program = Program {
        file,
        resources,
        config,
        arguments: &[title, plan.role().name().to_owned()],
        limits: plan.limits(),
    };
    program.start(plan.id(), plan.role(), |channel| channel.send(&start, &fds.0))
}

/// What the core waits for as soon as it runs.
fn tell_core(
    core: &Process,
    config: &MachineConfig,
    resources: &Resources,
    plans: &[Plan<'_>],
    links: &[(UnixStream, UnixStream)],
) -> Result<(), LaunchError> {
    let mut fds = Fds::default();
    let start = ToCore::Start(CoreStart {
        machine: config.name.clone(),
        log: ipc_level(config.log.level),
        enforcement: Enforcement::Supervised,
        processors: resources.leaves.processors(&config.topology, resources.cpus)?,
        memory_bytes: config.memory,
        huge_pages: config.thp,
        kvm: fds.add(&resources.kvm),
        boot: boot(config, resources, &mut fds),
        generation: generation().map_err(|source| LaunchError::Io { id: CORE.to_owned(), source })?,
        debug_exit: config.debug_exit,
        mapped: mapped(resources, &mut fds),
        devices: plans
            .iter()
            .zip(links)
            .map(|(plan, (socket, _))| DeviceLink {
                id: plan.id().to_owned(),
                kind: plan.link(resources),
                socket: fds.add(socket),
                rom: resources
                    .roms
                    .iter()
                    .find(|rom| rom.device.as_deref() == Some(plan.id()))
                    .map(|rom| fds.add(&rom.memory)),
            })
            .collect(),
    });
    match core.channel.send(&start, &fds.0) {
        // Why it has ended is told by what waits for it.
        Ok(()) | Err(ChannelError::PeerClosed) => Ok(()),
        Err(source) => Err(LaunchError::Channel { id: CORE.to_owned(), source }),
    }
}

fn start_core(config: &MachineConfig, resources: &Resources) -> Result<Process, LaunchError> {
    let cpus = u64::from(config.topology.count());
    let limits = Limits {
        // A stack of 2 MiB and its guard for each vCPU thread.
        data: Some((256 << 20) + (cpus << 22)),
        // Eventfds for the queues and vectors of each device; one of KVM for each vCPU.
        descriptors: 2048 + cpus,
        threads: cpus + 16,
        // The memfds of guest RAM and of firmware.
        file_size: Some(config.memory.max(MOST_FIRMWARE)),
        ..Limits::default()
    };
    let title = format!("bulkhead-vmm[{}]", config.name);
    let program = Program { file: &resources.core_program, resources, config, arguments: &[title], limits };
    program.start(CORE, Role::Core, |_| Ok(()))
}

/// The files that the guest sees as memory.
fn mapped<'a>(resources: &'a Resources, fds: &mut Fds<'a>) -> Vec<MappedRegion> {
    let region = |pmem: &'a Pmem| {
        let Pmem { address, size, .. } = *pmem;
        MappedRegion { file: fds.add(&pmem.file), address, size, writable: !pmem.config.readonly }
    };
    resources.pmems.iter().map(region).collect()
}

/// What the first CPU runs.
fn boot<'a>(config: &MachineConfig, resources: &'a Resources, fds: &mut Fds<'a>) -> Boot {
    let image = fds.add(&resources.image);
    match &config.firmware {
        Some(firmware) => {
            let variables = resources.variables.as_ref().map(|variables| fds.add(&variables.memory));
            let mut files = firmware::files(config, firmware, &resources.bootable());
            // SeaBIOS and OVMF place 64-bit BARs above it.
            let end = resources.pmems.iter().map(|pmem| pmem.address.saturating_add(pmem.size)).max();
            files.extend(end.map(|end| FirmwareFile {
                name: "etc/reserved-memory-end".to_owned(),
                contents: end.to_le_bytes().to_vec(),
            }));
            let roms = resources.roms.iter().filter(|rom| rom.device.is_none());
            let roms = roms.map(|rom| (rom.name.clone(), fds.add(&rom.memory))).collect();
            Boot::Firmware { image, files, menu: firmware.menu, variables, roms }
        }
        None => Boot::Kernel {
            kernel: image,
            initrd: resources.initrd.as_ref().map(|initrd| fds.add(initrd)),
            cmdline: config.kernel_command_line(),
            smbios: Tables::new(config, true).placed(SMBIOS),
        },
    }
}

/// 128 bits that no other machine has: a UUID of version 4.
fn generation() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    let [.., version, _, variant, _, _, _, _, _, _, _] = &mut id;
    (*version, *variant) = (*version & 0x0F | 0x40, *variant & 0x3F | 0x80);
    Ok(id)
}

/// A program to be started in a jail.
struct Program<'a> {
    file: &'a OwnedFd,
    resources: &'a Resources,
    config: &'a MachineConfig,
    arguments: &'a [String],
    limits: Limits,
}

impl Program<'_> {
    fn start(
        &self,
        id: &str,
        role: Role,
        tell: impl FnOnce(&Channel) -> Result<(), ChannelError>,
    ) -> Result<Process, LaunchError> {
        let io = |source: io::Error| LaunchError::Io { id: id.to_owned(), source };
        let channel = |source| LaunchError::Channel { id: id.to_owned(), source };
        let place = self.resources.confinement.place(self.config, id, role, &self.limits);
        let place = place.map_err(|source| LaunchError::Cgroup { id: id.to_owned(), source })?;
        let (ours, theirs) = Channel::pair().map_err(channel)?;
        // In the queue before the process exists: it never waits for it.
        tell(&ours).map_err(channel)?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|error| io(error.into()))?;
        // Only our end: what a process writes while the pipe is full makes it wait, not lose its last words.
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|error| io(error.into()))?;
        // A directory is shared by a user who may use it, and not by one of the process's own.
        let share = self.resources.shares.iter().find(|share| share.config.id == id);
        let owner = share.and_then(|share| share.owner).map(|(uid, gid)| Identity { uid, gid });
        let jailed = jail::spawn(JailSpec {
            program: self.file.as_fd(),
            arguments: self.arguments,
            channel: theirs.into_fd(),
            log: write.as_fd(),
            null: self.resources.null.as_fd(),
            limits: self.limits,
            identity: owner.unwrap_or(place.identity),
            subordinate: place.subordinate.filter(|_| share.is_none()),
            cgroup: place.cgroup.as_ref().map(AsFd::as_fd),
            shared: share.map(|share| SharedDirectory {
                directory: share.directory.as_fd(),
                read_only: share.config.readonly,
                all_owners: share.owner.is_none(),
            }),
        })
        .map_err(|source| LaunchError::Jail { id: id.to_owned(), source })?;
        Ok(Process {
            id: id.to_owned(),
            role,
            jailed,
            channel: ours,
            log: LogPipe::new(read),
            listeners: Vec::new(),
            state: State::Starting,
            explained: false,
        })
    }
}
