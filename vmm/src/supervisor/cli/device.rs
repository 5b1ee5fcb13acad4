//! `bulkhead device …` and `bulkhead events`: the devices of a machine that runs, and what happened to them.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::supervisor::config::Size;

/// List, add, remove, restart or upgrade the devices of a machine that runs
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: DeviceCommand,
}

/// What can be done to the devices of a machine that runs.
#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// List the devices of a machine: process, state, restarts, and how the last process ended
    List(DeviceListArgs),
    /// Add a disk, a network card, an entropy device, a console, named ports, a vsock, a balloon or a shared directory: its process is started, then the guest is told by ACPI
    Add(Box<DeviceAddArgs>),
    /// Ask the guest by ACPI to let go of a virtio device, then end its process and unlock its disk
    Remove(DeviceRemoveArgs),
    /// Replace the process of a device, losing nothing; one that was given up is brought back
    Restart(DeviceRestartArgs),
    /// Let a device, or all of them, go on with another bulkhead-device program while the guest runs
    #[command(after_help = UPGRADE_HELP)]
    Upgrade(DeviceUpgradeArgs),
    /// Plug the cable of a network card in, or pull it out
    Link(DeviceLinkArgs),
    /// Give a disk another size while the guest uses it
    #[command(after_help = RESIZE_HELP)]
    Resize(DeviceResizeArgs),
}

const RESIZE_HELP: &str = "\
With SIZE the disk's file, a raw image, is made that large; what is added reads as zeros. Without SIZE
the disk takes the size that its file or block device has now: after lvextend, for example. The guest
is told at once: Linux shows the new size without a rescan; partitions and file systems in it are the
guest's to grow. Before a disk is made smaller, the guest must have stopped using its end. A qcow2
image grows as far as its table has room, to 4 TiB with usual clusters, and only grows.";

const UPGRADE_HELP: &str = "\
The new program must speak the control protocol of the machine that runs. Each process of it is
started and sealed before the old one is told to stop: when it does not become ready, the old one
goes on. What a disk had in flight is finished by the old process or carried out by the new one.
Processes that die later are replaced with the new program, too.";

/// Options of `bulkhead device list`.
#[derive(Debug, Args)]
pub struct DeviceListArgs {
    /// The machine
    pub name: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `bulkhead device add`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct DeviceAddArgs {
    /// The machine
    pub name: String,
    /// A disk, as for `bulkhead run`.
    #[arg(
        long,
        value_name = "path=FILE,…",
        group = "what",
        help = "Disk image or block device: path=FILE[,readonly=on][,id=NAME][,…], as for `bulkhead run`"
    )]
    pub disk: Option<String>,
    /// Sockets between guest and host, as for `bulkhead run`
    #[arg(long, value_name = "cid=N,path=SOCKET,…", group = "what")]
    pub vsock: Option<String>,
    /// Balloon, as for `bulkhead run`
    #[arg(
        long,
        value_name = "size=SIZE,…",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "size=0",
        group = "what"
    )]
    pub balloon: Option<String>,
    /// A network card, as for `bulkhead run`.
    #[arg(
        long,
        value_name = "user|tap=NAME|…",
        group = "what",
        help = "Network card: user, tap=NAME or socket=PATH, with the options of `bulkhead run`"
    )]
    pub net: Option<String>,
    /// A device of another back end, as for `bulkhead run`.
    #[arg(
        long,
        value_name = "type=TYPE,socket=PATH,…",
        group = "what",
        help = "Device of a vhost-user back end, as for `bulkhead run`"
    )]
    pub vhost_user: Option<String>,
    /// The entropy device, as for `bulkhead run`
    #[arg(
        long,
        value_name = "max-bytes=SIZE,…",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on",
        group = "what"
    )]
    pub rng: Option<String>,
    /// The virtio console, for `bulkhead console`
    #[arg(
        long,
        value_name = "addr=SLOT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "attach",
        group = "what"
    )]
    pub console: Option<String>,
    /// Named ports, as for `bulkhead run`.
    #[arg(
        long = "port",
        value_name = "name=NAME,unix=PATH",
        group = "what",
        help = "Named port, as for `bulkhead run`; all ports are one device: repeat it for more"
    )]
    pub ports: Vec<String>,
    /// Refused: see there.
    #[arg(long, group = "what", hide = true)]
    pub pmem: Option<String>,
    /// Limits of its process, such as memory=64M,cpu=50; keys: memory, pids, cpu, read, write, read-iops, write-iops
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub limit: Option<String>,
    /// A shared directory, as for `bulkhead run`.
    #[arg(
        long,
        value_name = "tag=TAG,path=DIR,…",
        group = "what",
        help = "Shared directory: tag=TAG,path=DIR[,readonly=on]…, as for `bulkhead run`"
    )]
    pub fs: Option<String>,
}

/// Options of `bulkhead device remove`.
#[derive(Debug, Args)]
pub struct DeviceRemoveArgs {
    /// The machine
    pub name: String,
    /// The device, as `bulkhead device list` names it
    pub device: String,
    /// Take it away without asking the guest, as if it were pulled out
    #[arg(long)]
    pub force: bool,
    /// Seconds for the guest to let go of it
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub timeout: u32,
}

/// Options of `bulkhead device link`.
#[derive(Debug, Args)]
pub struct DeviceLinkArgs {
    /// The machine
    pub name: String,
    /// The network card, as `bulkhead device list` names it
    pub device: String,
    /// up or down
    #[arg(value_parser = ["up", "down"])]
    pub state: String,
}

/// Options of `bulkhead device resize`.
#[derive(Debug, Args)]
pub struct DeviceResizeArgs {
    /// The machine
    pub name: String,
    /// The disk, as `bulkhead device list` names it
    pub device: String,
    /// The new size, such as 20G [default: the size that the file or block device has]
    pub size: Option<Size>,
    /// Let the file become smaller: what is beyond its new end is lost
    #[arg(long, requires = "size")]
    pub shrink: bool,
}

/// Options of `bulkhead device restart`.
#[derive(Debug, Args)]
pub struct DeviceRestartArgs {
    /// The machine
    pub name: String,
    /// The device, as `bulkhead device list` names it
    pub device: String,
}

/// Options of `bulkhead device upgrade`.
#[derive(Debug, Args)]
pub struct DeviceUpgradeArgs {
    /// The machine
    pub name: String,
    /// The device, as `bulkhead device list` names it
    #[arg(required_unless_present = "all")]
    pub device: Option<String>,
    /// All devices, one after the other
    #[arg(long, conflicts_with = "device")]
    pub all: bool,
    /// The new program [default: bulkhead-device beside this bulkhead]
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,
}

/// Print what happened to the processes of a machine, one JSON object on each line
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The machine
    pub name: String,
    /// Go on with what happens, until the machine has ended
    #[arg(long, short)]
    pub follow: bool,
}
