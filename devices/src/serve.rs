//! A virtio device process under a supervisor: start message, seal, `Ready`, and then its two sockets.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_ipc::channel::message::{
    BalloonConfig, BalloonReport, BlkConfig, Descriptors, DeviceConfig, DeviceStart, FdIndex, FromDevice,
    GroupConfig, Left, NetBackend, NetConfig, NetLimits, PortsConfig, TYPED, ToDevice, UartConfig,
};
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::jail::{self, JailError, PolicyName};
use bulkhead_ipc::limit_group::GroupView;
use bulkhead_ipc::metrics::Metrics;
use bulkhead_ipc::tap::Tap;
use bulkhead_ipc::vhost_user::backend::{Daemon, DaemonError, EnterThread, VirtioDevice, WorkerError};
use bulkhead_ipc::vhost_user::connection::{Connection, ConnectionError};
use bulkhead_ipc::words::WordsError;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use tracing::{info, warn};

use crate::balloon::{self, Balloon};
use crate::blk::{self, Blk, BlkError, Files, Layer};
use crate::console::{Console, Controller, NamedPort, Ports, Sockets};
use crate::flash::{FlashDevice, FlashError};
use crate::fs::{Fs, FsError};
use crate::keyboard::KeyboardDevice;
use crate::net::{self, Net, NetError};
use crate::pmem::Pmem;
use crate::rate_limit::{Group, Rate, RateLimits};
use crate::registers::{DeviceProcess, Registers, RegistersError};
use crate::relay::{self, Relay, RelayError};
use crate::rng::Rng;
use crate::stream::{Ends, KEPT, Said, Typed};
use crate::uart::{self, UartError};
use crate::vsock::Vsock;
use crate::watchdog::WatchdogDevice;

/// How long the supervisor may take to hear of a failure.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// Milliseconds without a message after which the start is over and what only it needed is let go: not earlier, when its siblings
/// compete for the CPUs.
const REST: u16 = 1000;

/// Why a device process ends.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Channel(#[from] ChannelError),
    /// The process could not be sealed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The disk cannot be served.
    #[error(transparent)]
    Blk(#[from] BlkError),
    /// The UART ended.
    #[error(transparent)]
    Uart(#[from] UartError),
    /// The flash chip cannot be made.
    #[error(transparent)]
    Flash(#[from] FlashError),
    /// A flash chip, a keyboard or a watchdog ended.
    #[error(transparent)]
    Registers(#[from] RegistersError),
    /// The network card cannot be served.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The relay ended.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// The counters or a limit group cannot be mapped.
    #[error(transparent)]
    Words(#[from] WordsError),
    /// The directory cannot be shared.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The jail has no directory.
    #[error("this process was given no directory to share")]
    NoDirectory,
    /// A queue's thread could not be set up.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The front end's connection cannot be used any longer.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The program was started as another type than the start message says.
    #[error("this process was started as {started}, and told to serve {told}")]
    Type {
        /// The first argument.
        started: String,
        /// The start message.
        told: &'static str,
    },
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, Errno),
    /// What the device was given is not what it should be.
    #[error("{0}")]
    Open(String),
    /// The memory for a successor.
    #[error("memory for what came for the guest: {0}")]
    Memory(#[from] io::Error),
}

/// A sealed process, ready to serve.
enum Prepared<'a> {
    Virtio(Daemon, Control),
    Uart(Box<uart::EventLoop<'a>>),
    Registers(Box<Registers<'a>>),
    Relay(Box<Relay<'a>>),
}

/// What the control channel's messages act on.
enum Control {
    None,
    Blk(blk::Controller),
    Console(Controller),
    Ports(Sockets),
    Balloon(balloon::Controller),
    Net(net::Controller),
}

impl Control {
    /// Can be read when a device has something to say of itself.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        if let Self::Blk(disk) = self { disk.event() } else { None }
    }
}

/// A virtio device with what the process around it needs to know.
struct Parts {
    device: Box<dyn VirtioDevice>,
    main: PolicyName,
    queue: PolicyName,
    control: Control,
}

/// The descriptors of the start message, and the numbers of those that were taken, for the seal.
struct Resources {
    descriptors: Descriptors,
    taken: Vec<RawFd>,
}

impl Resources {
    fn take(&mut self, index: FdIndex) -> Result<OwnedFd, ChannelError> {
        let fd = self.descriptors.take(index)?;
        self.taken.push(fd.as_raw_fd());
        Ok(fd)
    }

    fn ends(&mut self, input: Option<FdIndex>, output: Option<FdIndex>) -> Result<Ends, ChannelError> {
        let mut take = |index: Option<_>| index.map(|index| self.take(index)).transpose();
        Ok(Ends::new(take(input)?, take(output)?))
    }

    /// These ends, with memory for what comes for the guest.
    fn keeping(&mut self, ends: Ends, typed: Option<FdIndex>) -> Result<Ends, ServeError> {
        let Some(index) = typed else { return Ok(ends) };
        let file = File::from(self.descriptors.take(index)?);
        Ok(ends.keeping(Typed::new(Some(&file), 0)?))
    }

    /// These ends, with what a successor of a serial port needs.
    fn serial(&mut self, ends: Ends, config: &UartConfig) -> Result<Ends, ServeError> {
        let Some(index) = config.typed else { return Ok(ends) };
        let file = File::from(self.descriptors.take(index)?);
        let said = Said::new(&file, TYPED, config.own_file)?;
        Ok(ends.keeping(Typed::new(Some(&file), 0)?).passing(said))
    }

    /// A network card with its descriptors.
    fn net(&mut self, config: &NetConfig) -> Result<Net, ServeError> {
        let peer = |this: &mut Self, index: &Option<FdIndex>| index.map(|index| this.take(index)).transpose();
        let mut positions = Vec::new();
        let (backend, pairs) = match &config.backend {
            NetBackend::Tap { queues, positions: indices, offloads } => {
                let taken: Result<_, _> =
                    indices.iter().map(|index| self.take(*index).map(|fd| Arc::new(fd.into()))).collect();
                positions = taken?;
                let files: Result<Vec<File>, _> =
                    queues.iter().map(|index| self.take(*index).map(File::from)).collect();
                let tap = Tap { name: String::new(), queues: files?, offloads: *offloads };
                (net::Backend::Tap(tap), u16::try_from(queues.len()).unwrap_or(u16::MAX))
            }
            NetBackend::Stream(index) => (net::Backend::Stream(peer(self, index)?), 1),
            NetBackend::Datagrams(index) => (net::Backend::Datagrams(peer(self, index)?), 1),
        };
        let settings = net::Settings {
            mac: config.mac,
            mtu: config.mtu,
            pairs,
            mac_filter: config.mac_filter,
            filter: net::Filter { mac: None, addresses: config.ip_filter.clone() },
            receive: limits(config.receive),
            transmit: limits(config.transmit),
            link: config.link,
            announce: config.successor,
            way: config.way,
            group: self.group(config.group.as_deref())?,
            positions,
        };
        let kept = config.kept.map(|index| self.descriptors.take(index)).transpose()?.map(File::from);
        Ok(Net::new(settings, backend, kept.as_ref())?)
    }

    /// A limit group. Only the mappings are kept.
    fn group(&mut self, config: Option<&GroupConfig>) -> Result<Option<Arc<Group>>, ServeError> {
        let Some(GroupConfig { rates, roll, places, own }) = config else { return Ok(None) };
        let roll = self.descriptors.take(*roll)?;
        let places: Result<Vec<_>, _> = places.iter().map(|place| self.descriptors.take(*place)).collect();
        let view = GroupView::map(&roll, &places?, usize::from(*own))?;
        Ok(Some(Arc::new(Group::new((*rates).into(), view))))
    }

    /// Ends the message; the descriptors that the process holds on its account, and the control channel's.
    fn finish(self, channel: &Channel) -> Result<Vec<RawFd>, ChannelError> {
        self.descriptors.finish()?;
        Ok([self.taken, vec![channel.as_fd().as_raw_fd()]].concat())
    }
}

fn limits(limits: NetLimits) -> RateLimits {
    RateLimits {
        bandwidth: Rate { rate: limits.bytes, burst: limits.bytes_burst },
        operations: Rate { rate: limits.packets, burst: limits.packets_burst },
    }
}

/// The name by which `bulkhead-device` knows a device type.
fn type_name(config: &DeviceConfig) -> &'static str {
    match config {
        DeviceConfig::Blk(_) => "blk",
        DeviceConfig::Rng(_) => "rng",
        DeviceConfig::Console(_) | DeviceConfig::Ports(_) => "console",
        DeviceConfig::Uart(_) => "uart",
        DeviceConfig::Flash(_) => "flash",
        DeviceConfig::Keyboard(_) => "keyboard",
        DeviceConfig::Vsock(_) => "vsock",
        DeviceConfig::Balloon(_) => "balloon",
        DeviceConfig::Pmem(_) => "pmem",
        DeviceConfig::Net(_) => "net",
        DeviceConfig::Relay(_) => "relay",
        DeviceConfig::Fs(_) => "fs",
        DeviceConfig::Watchdog(_) => "watchdog",
    }
}

/// Serves the device that the start message describes, until the supervisor says stop, or either end is closed.
///
/// # Errors
/// [`ServeError`]; one from before `Ready` was told to the supervisor.
pub fn run(
    started: &str,
    start: &DeviceStart,
    descriptors: Descriptors,
    channel: &Channel,
) -> Result<(), ServeError> {
    match prepare(started, start, descriptors, channel) {
        Ok(Prepared::Virtio(mut daemon, control)) => {
            serve(&mut daemon, channel, &control)?;
            // The workers say their last.
            drop(daemon);
            match control {
                Control::Console(console) => leave(channel, &console.left()),
                _ => Ok(()),
            }
        }
        Ok(Prepared::Uart(events)) => Ok(events.run()?),
        Ok(Prepared::Registers(registers)) => Ok(registers.run()?),
        Ok(Prepared::Relay(relay)) => Ok(relay.run()?),
        Err(error) => {
            refuse(channel, error.to_string())?;
            Err(error)
        }
    }
}

/// Tells the supervisor why nothing will be served.
///
/// # Errors
/// The supervisor does not listen.
pub fn refuse(channel: &Channel, reason: String) -> Result<(), ChannelError> {
    channel.send_within(&FromDevice::Failed(reason), &[], FAREWELL_LIMIT)
}

/// The most bytes in one message.
const LEFT_AT_ONCE: usize = 24 << 10;

/// Leaves to a successor what would be lost with this process. Without a supervisor that listens there is none.
fn leave(channel: &Channel, output: &[u8]) -> Result<(), ServeError> {
    for output in output.chunks(LEFT_AT_ONCE) {
        let left = Left { output: output.to_vec() };
        match channel.send_within(&FromDevice::Left(left), &[], FAREWELL_LIMIT) {
            Ok(()) => {}
            Err(ChannelError::PeerClosed) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Builds the device, seals the process and answers `Ready`.
fn prepare<'a>(
    started: &str,
    start: &DeviceStart,
    descriptors: Descriptors,
    channel: &'a Channel,
) -> Result<Prepared<'a>, ServeError> {
    let told = type_name(&start.config);
    if started != told {
        return Err(ServeError::Type { started: started.into(), told });
    }
    let mut resources = Resources { descriptors, taken: Vec::new() };
    let socket = resources.take(start.socket)?;
    // Only the mapping is kept.
    let metrics = match start.metrics {
        Some(index) => Metrics::map(&resources.descriptors.take(index)?)?,
        None => Metrics::none(),
    };
    let Some(parts) = virtio(&start.config, &mut resources)? else {
        return without_queues(&start.config, socket, resources, channel);
    };
    let mut held = resources.finish(channel)?;

    let mut daemon = Daemon::new(parts.device, &enter_by(parts.queue))?;
    daemon.set_metrics(metrics);
    held.extend(daemon.worker_descriptors());
    held.extend(parts.control.event().map(|event| event.as_raw_fd()));
    let sealed = jail::seal(parts.main, &held)?;
    daemon.device_mut().open().map_err(ServeError::Open)?;
    channel.send(&FromDevice::Ready { policies: sealed.policies() }, &sealed.descriptors())?;
    drop(sealed);
    daemon.connect(Connection::from(socket))?;
    Ok(Prepared::Virtio(daemon, parts.control))
}

/// A virtio device; `None`: this is none.
fn virtio(config: &DeviceConfig, resources: &mut Resources) -> Result<Option<Parts>, ServeError> {
    Ok(match config {
        DeviceConfig::Blk(blk) => {
            let device = disk(blk, resources)?;
            let (main, queue) = (PolicyName::BlkMain, PolicyName::BlkQueue);
            let control = Control::Blk(device.controller());
            Some(Parts { device: Box::new(device), main, queue, control })
        }
        DeviceConfig::Rng(rng) => {
            let device = Box::new(Rng::new(File::from(resources.take(rng.source)?), rng.limit));
            Some(Parts {
                device,
                main: PolicyName::RngMain,
                queue: PolicyName::RngQueue,
                control: Control::None,
            })
        }
        DeviceConfig::Console(config) => {
            let ends = resources.ends(config.input, config.output)?;
            let device = Console::new(resources.keeping(ends, config.typed)?, config.size);
            let control = Control::Console(device.controller());
            let (main, queue) = (PolicyName::ConsoleMain, PolicyName::ConsoleQueue);
            Some(Parts { device: Box::new(device), main, queue, control })
        }
        DeviceConfig::Ports(config) => {
            let device = ports(config, resources)?;
            let control = Control::Ports(device.sockets());
            let (main, queue) = (PolicyName::ConsoleMain, PolicyName::ConsoleQueue);
            Some(Parts { device: Box::new(device), main, queue, control })
        }
        DeviceConfig::Vsock(config) => {
            let device = Box::new(Vsock::new(config.guest_cid, resources.take(config.connector)?));
            let (main, queue) = (PolicyName::VsockMain, PolicyName::VsockQueue);
            Some(Parts { device, main, queue, control: Control::None })
        }
        DeviceConfig::Balloon(config) => {
            let BalloonConfig { target, actual, deflate_on_oom, free_page_reporting } = *config;
            let settings = balloon::Settings { target, actual, deflate_on_oom, free_page_reporting };
            let device = Box::new(Balloon::new(settings));
            let control = Control::Balloon(device.controller());
            Some(Parts { device, main: PolicyName::BalloonMain, queue: PolicyName::BalloonQueue, control })
        }
        DeviceConfig::Pmem(config) => {
            let file = File::from(resources.take(config.file)?);
            let device = Box::new(Pmem::new(file, config.address, config.size));
            let (main, queue) = (PolicyName::PmemMain, PolicyName::PmemQueue);
            Some(Parts { device, main, queue, control: Control::None })
        }
        DeviceConfig::Net(config) => {
            let device = resources.net(config)?;
            let control = Control::Net(device.controller());
            let (main, queue) = (PolicyName::NetMain, PolicyName::NetQueue);
            Some(Parts { device: Box::new(device), main, queue, control })
        }
        DeviceConfig::Fs(config) => {
            let (directory, descriptors) = jail::shared_directory().ok_or(ServeError::NoDirectory)?;
            let table = resources.take(config.table)?.into();
            resources.taken.extend([directory.as_raw_fd(), descriptors.as_raw_fd()]);
            let device = Box::new(Fs::new(directory, descriptors, Some(table), config.into())?);
            Some(Parts {
                device,
                main: PolicyName::FsMain,
                queue: PolicyName::FsQueue,
                control: Control::None,
            })
        }
        DeviceConfig::Uart(_)
        | DeviceConfig::Flash(_)
        | DeviceConfig::Keyboard(_)
        | DeviceConfig::Watchdog(_)
        | DeviceConfig::Relay(_) => None,
    })
}

/// A device that serves no queues itself.
fn without_queues<'a>(
    config: &DeviceConfig,
    socket: OwnedFd,
    mut resources: Resources,
    channel: &'a Channel,
) -> Result<Prepared<'a>, ServeError> {
    match config {
        DeviceConfig::Uart(config) => {
            let ends = resources.ends(config.input, config.output)?;
            let ends = resources.serial(ends, config)?;
            resources.finish(channel)?;
            let events = uart::open(socket, ends, channel)?;
            seal(PolicyName::UartMain, &events.descriptors(), channel)?;
            Ok(Prepared::Uart(Box::new(events)))
        }
        DeviceConfig::Flash(config) => {
            let (file, memory) = (resources.take(config.file)?.into(), resources.take(config.memory)?);
            let chip = Box::new(FlashDevice::open(file, memory, config.size)?);
            registers(PolicyName::FlashMain, chip, socket, resources, channel)
        }
        DeviceConfig::Keyboard(config) => {
            let state = resources.take(config.state)?.into();
            let chip = Box::new(KeyboardDevice::new(state));
            registers(PolicyName::KeyboardMain, chip, socket, resources, channel)
        }
        DeviceConfig::Watchdog(config) => {
            let state = resources.take(config.state)?.into();
            let chip = Box::new(WatchdogDevice::new(state, config.expired, config.interrupt));
            registers(PolicyName::WatchdogMain, chip, socket, resources, channel)
        }
        DeviceConfig::Relay(config) => {
            let back_end = resources.take(config.back_end)?;
            resources.finish(channel)?;
            let relay = relay::open(socket, back_end, config, channel);
            seal(PolicyName::RelayMain, &relay.descriptors(), channel)?;
            Ok(Prepared::Relay(Box::new(relay)))
        }
        other => Err(ServeError::Type { started: "a device without queues".into(), told: type_name(other) }),
    }
}

/// A device that is registers, sealed.
fn registers<'a>(
    policy: PolicyName,
    chip: Box<dyn DeviceProcess>,
    socket: OwnedFd,
    resources: Resources,
    channel: &'a Channel,
) -> Result<Prepared<'a>, ServeError> {
    resources.finish(channel)?;
    let registers = Registers::new(socket, chip, channel)?;
    seal(policy, &registers.descriptors(), channel)?;
    Ok(Prepared::Registers(Box::new(registers)))
}

/// Named ports and who is at them.
fn ports(config: &PortsConfig, resources: &mut Resources) -> Result<Ports, ServeError> {
    let mut named = Vec::with_capacity(config.ports.len());
    let typed = config.typed.map(|index| resources.descriptors.take(index)).transpose()?.map(File::from);
    for (number, port) in (0_u64..).zip(&config.ports) {
        let mut ends = resources.ends(port.input, port.output)?;
        if let Some(file) = &typed {
            ends = ends.keeping(Typed::new(Some(file), number.saturating_mul(KEPT as u64))?);
        }
        named.push(NamedPort { name: port.name.clone(), console: port.console, ends });
    }
    let state = config.state.map(|index| resources.take(index)).transpose()?;
    Ok(Ports::new(named, state.map(File::from)))
}

/// A disk and its files.
fn disk(config: &BlkConfig, resources: &mut Resources) -> Result<Blk, ServeError> {
    let options = &config.options;
    let mut chain = vec![Layer { file: resources.take(config.disk)?.into(), format: options.format }];
    for backing in &options.backing {
        chain.push(Layer { file: resources.take(backing.file)?.into(), format: backing.format });
    }
    let data = options.data.iter().map(|index| Ok(resources.take(*index)?.into()));
    let data = data.collect::<Result<_, ChannelError>>()?;
    let cached = options.cached.map(|index| resources.take(index)).transpose()?.map(File::from);
    let group = resources.group(options.group.as_deref())?;
    Ok(Blk::new(config, Files { chain, data }, cached, group, &enter_by(PolicyName::BlkImage))?)
}

/// What puts a thread under this policy.
fn enter_by(policy: PolicyName) -> EnterThread {
    Arc::new(move || jail::enter_thread(policy).map_err(io::Error::other))
}

/// Seals the process with exactly these descriptors and answers `Ready`.
fn seal(policy: PolicyName, held: &[impl AsRawFd], channel: &Channel) -> Result<(), ServeError> {
    let sealed = jail::seal(policy, held)?;
    channel.send(&FromDevice::Ready { policies: sealed.policies() }, &sealed.descriptors())?;
    drop(sealed);
    Ok(())
}

/// Serves the control channel and the front end until either ends.
fn serve(daemon: &mut Daemon, channel: &Channel, acted_on: &Control) -> Result<(), ServeError> {
    let mut until_rest = PollTimeout::from(REST);
    loop {
        let Some(socket) = daemon.socket() else { return Ok(()) };
        let watched = [channel.as_fd(), socket].into_iter().chain(acted_on.event());
        let mut fds: Vec<_> = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, until_rest) {
            Ok(0) => {
                crate::footprint::release_program();
                until_rest = PollTimeout::NONE;
                continue;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(ServeError::System("poll", errno)),
        }
        let [control, front_end, event] =
            [0, 1, 2].map(|at| fds.get(at).is_some_and(|fd| fd.any().unwrap_or(true)));
        if event {
            tell_grown(daemon, channel, acted_on)?;
        }
        if control && !control_message(daemon, channel, acted_on)? {
            daemon.disconnect()?;
            return Ok(());
        }
        if front_end {
            let before = size(acted_on);
            match daemon.serve_message() {
                Ok(()) => {
                    if let Control::Balloon(balloon) = acted_on
                        && before != size(acted_on)
                    {
                        report(channel, balloon, None)?;
                    }
                }
                Err(DaemonError::Connection(ConnectionError::Closed)) => {
                    info!("the front end has closed its connection");
                    daemon.disconnect()?;
                    return Ok(());
                }
                Err(error) => {
                    daemon.disconnect()?;
                    return Err(error.into());
                }
            }
        }
    }
}

/// Acts on one message of the supervisor. False: stop.
fn control_message(daemon: &mut Daemon, channel: &Channel, control: &Control) -> Result<bool, ServeError> {
    let (message, descriptors) = match channel.recv::<ToDevice>(None) {
        Ok(received) => received,
        Err(ChannelError::PeerClosed) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    match (message, control) {
        (ToDevice::Stop, _) => return Ok(false),
        (ToDevice::Ping, _) => channel.send(&FromDevice::Alive(daemon.progress()), &[])?,
        (message @ (ToDevice::Attach | ToDevice::AttachWay(_)), Control::Console(_) | Control::Net(_)) => {
            match (<[OwnedFd; 1]>::try_from(descriptors), message, control) {
                (Ok([stream]), ToDevice::Attach, Control::Console(console)) => console.attach(stream),
                (Ok([stream]), ToDevice::AttachWay(way), Control::Net(net)) => net.attach(stream, way),
                (Ok(_), message, _) => warn!(?message, "a control message that this device does not know"),
                (Err(descriptors), ..) => {
                    warn!(descriptors = descriptors.len(), "an attach message needs one descriptor");
                }
            }
            daemon.wake_workers();
        }
        (ToDevice::AttachPort(port), Control::Ports(sockets)) => {
            if let Ok([stream]) = <[OwnedFd; 1]>::try_from(descriptors) {
                sockets.attach(port, stream);
            }
            daemon.wake_workers();
        }
        (ToDevice::Take(left), Control::Console(console)) => {
            console.take(left.output);
            daemon.wake_workers();
        }
        (ToDevice::Resize { columns, rows }, Control::Console(console)) => {
            console.resize(columns, rows);
            daemon.config_changed();
        }
        (ToDevice::DiskSize { bytes }, Control::Blk(disk)) => {
            if disk.resize(bytes) {
                daemon.config_changed();
            }
        }
        (ToDevice::Balloon { target }, Control::Balloon(balloon)) => {
            if let Some(target) = target {
                balloon.set_target(target);
                daemon.config_changed();
            }
            let statistics = Some(balloon.statistics(|| daemon.wake_workers()));
            report(channel, balloon, statistics)?;
        }
        (ToDevice::Link { up }, Control::Net(net)) => {
            net.set_link(up);
            daemon.wake_workers();
            daemon.config_changed();
        }
        (message, _) => warn!(?message, "a control message that this device does not know"),
    }
    Ok(true)
}

/// Tells the supervisor and the front end of a disk that has become longer, or the supervisor why it has not.
fn tell_grown(daemon: &mut Daemon, channel: &Channel, control: &Control) -> Result<(), ServeError> {
    let Control::Blk(disk) = control else { return Ok(()) };
    for grown in disk.grown() {
        let changed = grown.is_ok();
        channel.send_within(&FromDevice::DiskSize(grown), &[], FAREWELL_LIMIT)?;
        if changed {
            daemon.config_changed();
        }
    }
    Ok(())
}

/// The size of a balloon.
fn size(control: &Control) -> Option<(u32, u32)> {
    if let Control::Balloon(balloon) = control { Some(balloon.size()) } else { None }
}

/// Tells the supervisor how large the balloon is. What it has no room for now it hears the next time.
fn report(
    channel: &Channel,
    balloon: &balloon::Controller,
    statistics: Option<Vec<(u16, u64)>>,
) -> Result<(), ServeError> {
    let (target, actual) = balloon.size();
    match channel.send(&FromDevice::Balloon(BalloonReport { target, actual, statistics }), &[]) {
        Ok(()) | Err(ChannelError::Deadline) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
