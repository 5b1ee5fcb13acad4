//! The command line: one place that says what a user can write.

mod device;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use device::{
    DeviceAddArgs, DeviceArgs, DeviceCommand, DeviceLinkArgs, DeviceListArgs, DeviceRemoveArgs,
    DeviceResizeArgs, DeviceRestartArgs, DeviceUpgradeArgs, EventsArgs,
};
use serde::Deserialize;

use bulkhead_ipc::jail::Layer;

use super::config::confinement::{CgroupChoice, LimitSpec, UidChoice};
use super::config::{
    BalloonSpec, BootOrder, ConsoleSpec, CpuSpec, DiskSpec, FsSpec, LimitGroupSpec, NetSpec, PmemSpec,
    PortSpec, RestartRule, RngSpec, RomSpec, Size, SmbiosSpec, StreamTarget, VhostUserSpec, VsockSpec,
    WatchdogSpec,
};
use super::exit_code;

const ABOUT: &str =
    "Bulkhead runs virtual machines on KVM whose every device is a jailed process of its own.";

const EXAMPLES: &str = "\
Examples:
  bulkhead doctor
      Does this host have what is needed?
  bulkhead run --kernel vmlinuz --initrd initrd.img --memory 1G --disk path=disk.img --rng
      A machine whose serial port is this terminal. Ctrl-A X ends it.
  bulkhead run -- make test
      A command in a guest that sees this host's files and cannot change them.
  bulkhead run --firmware seabios --disk path=disk.img
      A machine that boots from its disk, as a PC does.
  bulkhead run --name web --kernel vmlinuz --serial attach --disk path=web.img,id=root
      A machine to connect to with `bulkhead console web`; see it with `bulkhead ps web`,
      shut it down with `bulkhead stop web`.";

const RUN_HELP: &str = concat!(
    "\
Commands:
  `bulkhead run -- COMMAND …` runs a command in a guest, as root there, and ends with its exit status.
  The kernel is an installed one (or --kernel), the root is the host's (or --root DIR, any unpacked
  tree) for reading only: what the guest changes stays in its memory and is gone afterwards, but for
  the directories that --rw names. The command begins in the current directory, with this terminal;
  input that is no terminal is not passed on. It needs no configuration and no privileges. Where
  passt is installed it has a network as 10.0.2.15, on which this host is 10.0.2.2; --net none
  leaves it out, another --net takes its place. --verbose and --dry-run print the options that it
  stands for, most of which may be given as well.

Terminal:
  With --serial stdio (the default) or --console stdio on a terminal, all keys go to the guest,
  Ctrl-C included. Ctrl-A X ends the machine, Ctrl-A Ctrl-A sends one Ctrl-A, Ctrl-A H prints help.

Kernel command line:
  Where --cmdline names no console=, the console that the guest has is added: console=ttyS0 for
  the serial port, or console=hvc0 when there is only --console.

Network:
  --net user          through the host's own connections, by the program passt; needs no rights.
                      hostfwd=tcp:8080:80 leads port 8080 of the host to port 80 of the guest
                      (tcp: or udp:, before the ports an address of the host; repeat it for more).
                      address=ADDRESS/PREFIX with gateway=ADDRESS: what the guest gets by DHCP
                      instead of the host's own; dns=ADDRESS stands for the host's name server
  --net tap=NAME      a tap interface; as root one is made that goes with the machine. queues=N
                      gives it several pairs of queues
  --net socket=PATH   a cable between two machines: the first one listens, the second connects
  --net fd=N          a tap or socket that whoever starts bulkhead has opened
  --net none          no card, whatever the configuration file says
  Options of all: mac=ADDRESS, mtu=BYTES, id=NAME, restart=POLICY, addr=SLOT.FUNCTION, link=off (the
  cable is pulled out; `bulkhead device link NAME DEVICE up` plugs it in), mac-filter=on (packets leave with the
  card's own hardware address only), ip-filter=ADDRESS (and with these IP addresses only; repeat
  it for more), rx-rate=SIZE and tx-rate=SIZE (bytes a second to and from the guest, with
  rx-burst= and tx-burst=), rx-packets=N and tx-packets=N (packets a second), limit-group=NAME,
  rom=off or rom=FILE (with --firmware a card brings iPXE by default, to boot from the network, where
  Debian's package ipxe-qemu has it).

Firmware:
  With --firmware and without --kernel the machine starts as a PC does: firmware looks for a boot
  loader on the disks, then on the network. seabios and ovmf stand for the files of Debian's
  packages. With a serial port and no --console, SeaBIOS talks on the serial port.

Disks (--disk KEY=VALUE,…; the same keys in a table [[disk]]):
  path=FILE                    image or block device; the only key that must be there
  readonly=on, id=NAME, serial=TEXT, queues=N, restart=POLICY
  format=raw|qcow2|vmdk        what is in the image; never guessed. VMDK can only be read
  backing=FILE:FORMAT          what backs a qcow2 image; repeated, from the top down. An image that
                               names a file gets it only if it is named here: images may lie
  data=FILE                    a file that holds data for the image (VMDK extents); repeated
  cache=writeback              the host's page cache; durable with the guest's flush (the default)
        writethrough           durable when a write ends
        none                   O_DIRECT
",
    "        unsafe                 flushes are not passed on: for what may be lost\n",
    "  discard=off                  the guest cannot give space up
  logical-block-size=512|4096, physical-block-size=N
  bps=RATE[:BURST], iops=RATE[:BURST]      what the guest may move a second, and at once
  limit-group=NAME             what it may move together with others: see --limit-group
  read-error, write-error=report           the guest sees an I/O error (the default)
        wait                   the request waits, and is tried again each second
        wait-for-space         the same, but only while the host's disk is full
        ignore                 (writes) the guest is told that all is well; never of a full disk

Devices that die:
  A device process that dies, hangs or breaks its seccomp policy is replaced while the guest runs:
  at once the first time, then after 10 ms, 100 ms and 1 s. The guest sees a pause. A device that
  dies more often than --restart allows is given up: the guest finds it broken and runs on, and
  `bulkhead device restart NAME DEVICE` brings it back. With --restart never the machine ends
  instead (exit code 4). --restart DEVICE=POLICY and restart= of a --disk are for that device:
  --restart 5/10 --restart serial=never --restart rng=3/60/100 (first pause 100 ms).
  A process hangs when it does not answer for --hang-deadline seconds, or does nothing about the
  requests in a queue for --stall-deadline seconds; one that waits for the host's disk does not.
  0 turns a check off. A core that does not answer for 4 times as long ends the machine.

Jail:
  Landlock, cgroups and a host user for each process are used where the host offers them; what is
  missing is said once. --require makes it an error. Each process may use memory of its own up to
  a default that suits it (--limit PROCESS:memory=SIZE; guest RAM is not counted) and as many
  threads as it needs; cpu (percent of one CPU) and, for disks, read, write (bytes a second),
  read-iops and write-iops are limited when asked for. Cgroups are made below the nearest group
  that may be written and holds nobody else: as a user, try systemd-run --user --scope
  -p Delegate=yes bulkhead run …. Host users are taken from a range that is not shared with
  another machine: as a user, from the range in /etc/subuid, by newuidmap.

Vsock:
  With --vsock cid=N,path=SOCKET the guest has context id N, and streams to the host by Unix sockets:
  a guest that connects to port P of the host (context id 2) reaches the socket SOCKET_P; who connects
  to SOCKET and sends the line CONNECT P reaches port P of the guest, and reads OK and a port first.

Ports:
  With --port name=NAME,unix=PATH the guest has a character device that udev calls
  /dev/virtio-ports/NAME, as QEMU's virtserialport makes it. Who connects to the socket PATH is at its
  other end, and takes the place of whoever was there; while nobody is, the guest's end hangs up. All
  ports are one device, \"ports\". No byte is dropped while somebody is connected: the guest waits.

Signals:
  SIGTERM, SIGINT and SIGHUP end the machine at once, as if its power failed. `bulkhead stop NAME`
  presses the power button and lets the guest shut down.

Environment:
  NOTIFY_SOCKET    set by a service manager (systemd: Type=notify): it is told READY=1 when every
                   process of the machine is ready, and STOPPING=1 when the machine begins to end.

Configuration file (--config FILE, TOML): the options by the same names, for example
  kernel = \"vmlinuz\"            # relative paths start at the folder of this file
  memory = \"512M\"
  cpus = 2
  serial = \"file=boot.log\"
  on-panic = \"restart\"
  restart = { max = 5, window = 10, backoff = 10 }   # times, seconds, first pause in ms
  rng = { max-bytes = \"4K\", period = 1000, restart = \"always\" }   # a table where a device has a policy of its own
  console = { target = \"attach\", restart = \"never\" }
  require = [\"landlock\", \"cgroup\", \"distinct-uids\"]
  limits.root = { memory = \"64M\", cpu = 50 }
  [[disk]]
  path = \"root.img\"
  id = \"root\"
  [[net]]
  user = true
  hostfwd = [\"tcp:8080:80\"]
What the command line says wins; --disk takes the place of all disks of the file, --net of all cards.

Examples:
  bulkhead run --kernel vmlinuz --initrd initrd.img
  bulkhead run --kernel vmlinux --cmdline 'root=/dev/vda ro' --cpus 4 --memory 2G \\
      --disk path=root.img --disk path=data.img,readonly=on,id=data --rng --console
  bulkhead run --config web.toml --memory 4G --serial file=boot.log"
);

const SENDKEY_HELP: &str = "\
Names of keys are those of QEMU's sendkey: a-z 0-9 f1-f12 ret esc spc tab backspace shift ctrl alt
shift_r ctrl_r alt_r meta_l meta_r menu up down left right home end pgup pgdn insert delete minus
equal comma dot slash semicolon apostrophe grave_accent backslash bracket_left bracket_right less
caps_lock num_lock scroll_lock kp_0-kp_9 kp_add kp_subtract kp_multiply kp_divide kp_decimal
kp_enter print pause power

Examples:
  bulkhead sendkey web ctrl-alt-delete
  bulkhead sendkey web l s ret";

/// What `bulkhead` was asked to do.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, about = ABOUT, after_help = help_tail(EXAMPLES))]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

fn help_tail(examples: &str) -> String {
    format!("{examples}\n\n{}", exit_code::HELP)
}

/// The commands. The options of one are made when it is asked for, and what it does stands at them once more for its own help.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Start a machine and stay until it ends
    #[command(after_help = help_tail(RUN_HELP))]
    Run(Box<RunArgs>),
    /// List machines, or the processes of one machine and how each is confined
    Ps(PsArgs),
    /// Press the power button of a machine and wait until it has ended
    Stop(StopArgs),
    /// Connect this terminal to the console or serial port of a machine (leave with Ctrl-] or Ctrl-A X)
    Console(ConsoleArgs),
    /// List, add, remove, restart or upgrade the devices of a machine that runs
    Device(DeviceArgs),
    /// Change the number of CPUs of a machine that runs
    Resize(ResizeArgs),
    /// Show what the balloon of a machine holds and how the guest uses its memory, or give the balloon another size
    Balloon(BalloonArgs),
    /// Let a machine go on that its watchdog has paused
    Resume(ResumeArgs),
    /// Print what happened to the processes of a machine, one JSON object on each line
    Events(EventsArgs),
    /// Strike keys of a machine that has a --keyboard
    #[command(after_help = SENDKEY_HELP)]
    Sendkey(SendkeyArgs),
    /// Say what this host offers, and what is lost without it
    Doctor(DoctorArgs),
    /// Print what the devices of a machine have counted: requests, bytes, errors, times
    Stats(StatsArgs),
    /// Show machines, processes and what devices do, again and again (end with Ctrl-C)
    Top(TopArgs),
}

/// Start a machine and stay until it ends
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// Kernel: Linux bzImage, ELF (vmlinux) with a PVH entry, or 32-bit ELF with a multiboot header
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Firmware in place of a kernel: seabios, ovmf, or an image; it boots from the disks
    #[arg(long, value_name = "FILE|seabios|ovmf")]
    pub firmware: Option<PathBuf>,
    /// File that keeps the firmware's variables; made when it is not there and --firmware is ovmf
    #[arg(long, value_name = "FILE")]
    pub firmware_vars: Option<PathBuf>,
    /// Ids of the disks and network cards that firmware tries, in this order [default: all disks, then all cards]
    #[arg(long, value_name = "ID,…")]
    pub boot_order: Option<BootOrder>,
    /// Have firmware offer its boot menu
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub boot_menu: Option<Switch>,
    /// Option ROM for firmware to run: a file, or a name among Debian's (pxe-virtio.rom); DEVICE= puts it into that device's expansion ROM
    #[arg(long = "option-rom", value_name = "[DEVICE=]FILE")]
    pub roms: Vec<RomSpec>,
    /// What the machine says it is: uuid, serial, manufacturer, product, version, sku, family
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub smbios: Option<SmbiosSpec>,
    /// Append what the guest writes to the firmware's debug port (402) to a file
    #[arg(long, value_name = "FILE")]
    pub debug_port: Option<PathBuf>,
    /// Give the guest a port (F4) by which it ends the machine: V written there is exit code 2·V+1
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub debug_exit: Option<Switch>,
    /// Virtual CPUs: how many, how many there may be, and how they sit together; a kernel on more than 255 gets
    /// irqaffinity=, for ISA interrupts reach no others [default: 1]
    #[arg(long, value_name = "N[,max=N][,sockets=N][,cores=N][,threads=N]")]
    pub cpus: Option<CpuSpec>,
    /// What the CPUs can do: host, x86-64-v2, x86-64-v3, or a file of CPUID masks [default: host]
    #[arg(long, value_name = "MODEL|FILE")]
    pub cpu_model: Option<String>,
    /// Guest memory, such as 512M or 1G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Huge pages for guest memory: for what is loaded at the start, and wherever the host gives them to shared memory [default: on]
    #[arg(long, value_name = "on|off")]
    pub thp: Option<Switch>,
    /// Raw images and block devices.
    #[arg(
        long = "disk",
        value_name = "path=FILE,…",
        help = "Disk image or block device: path=FILE[,readonly=on][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION][,format=qcow2][,…], see below, or vhost-user=SOCKET of another back end; repeat for more disks"
    )]
    pub disks: Vec<DiskSpec>,
    /// Limits that devices share.
    #[arg(
        long = "limit-group",
        value_name = "id=NAME,…",
        help = "Limit that disks and network cards share which say limit-group=NAME: id=NAME[,bps=RATE[:BURST]][,iops=RATE[:BURST]]; any of them may use it alone, and none keeps others from their fair share; repeat for more groups"
    )]
    pub limit_groups: Vec<LimitGroupSpec>,
    /// Network cards.
    #[arg(
        long = "net",
        value_name = "user|tap=NAME|…",
        help = "Network card: user, tap=NAME, socket=PATH, fd=N or vhost-user=SOCKET of another back end, then options (see below); repeat for more cards"
    )]
    pub nets: Vec<NetSpec>,
    /// Entropy device (virtio-rng) fed by the host's /dev/urandom; max-bytes=SIZE[,period=MS] is the most that the guest gets in so many milliseconds [default period: 65536]
    #[arg(
        long,
        value_name = "on|off|max-bytes=SIZE,…|addr=SLOT.FUNCTION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on"
    )]
    pub rng: Option<RngSpec>,
    /// virtio console: attach (when nothing is said), stdio, file=PATH, pty, unix=PATH or off [default: off]; addr=SLOT.FUNCTION alone or after it is its place on the PCI bus
    #[arg(long, value_name = "TARGET[,addr=SLOT.FUNCTION]", num_args = 0..=1, require_equals = true, default_missing_value = "attach")]
    pub console: Option<ConsoleSpec>,
    /// Named ports.
    #[arg(
        long = "port",
        value_name = "name=NAME,unix=PATH",
        help = "Named port for a guest agent, /dev/virtio-ports/NAME there: name=NAME, and unix=PATH, file=PATH or pty; with console=on a console there, /dev/hvcN; repeat for more ports"
    )]
    pub ports: Vec<PortSpec>,
    /// Serial port: stdio, file=PATH, pty, unix=PATH, attach (for `bulkhead console`) or off [default: stdio]
    #[arg(long, value_name = "TARGET")]
    pub serial: Option<StreamTarget>,
    /// PS/2 keyboard, for `bulkhead sendkey` [default: off]
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub keyboard: Option<Switch>,
    /// Sockets between guest and host.
    #[arg(
        long,
        value_name = "cid=N,path=SOCKET,…",
        help = "Sockets between guest and host (virtio-vsock): cid=N,path=SOCKET[,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]"
    )]
    pub vsock: Option<VsockSpec>,
    /// A balloon.
    #[arg(
        long,
        value_name = "size=SIZE,…",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "size=0",
        help = "Balloon, by which the guest gives memory back (virtio-balloon): [size=SIZE][,deflate-on-oom=on|off][,free-page-reporting=on|off][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]"
    )]
    pub balloon: Option<BalloonSpec>,
    /// A watchdog.
    #[arg(
        long,
        value_name = "action=ACTION,…",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "action=reset",
        help = "Watchdog (Intel 6300ESB): [action=reset|shutdown|poweroff|pause|inject-nmi|debug|none][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]; reset and poweroff end with exit code 8 unless the machine starts anew"
    )]
    pub watchdog: Option<WatchdogSpec>,
    /// Read options from a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name for ps, stop and console [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// When a device process dies: always, never (the machine ends), or at most MAX times within SECONDS [default: 5/10]
    #[arg(long = "restart", value_name = "[DEVICE=]always|never|MAX/SECONDS[/MS]")]
    pub restart: Vec<RestartRule>,
    /// A process that does not answer for so long is killed and replaced; 0 does not ask [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub hang_deadline: Option<u32>,
    /// So is one that does nothing about the requests in a queue for so long; 0 does not look [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub stall_deadline: Option<u32>,
    /// When the guest reboots: start it anew, or end [default: restart]
    #[arg(long, value_name = "ACTION")]
    pub on_reboot: Option<EndAction>,
    /// When the guest panics: start it anew, or end [default: exit]
    #[arg(long, value_name = "ACTION")]
    pub on_panic: Option<EndAction>,
    /// Layers of the jail without which the machine is not started
    #[arg(
        long,
        value_name = "LAYER",
        value_delimiter = ',',
        help = "Layers of the jail that must be there: landlock, cgroup, distinct-uids (namespaces, root and seccomp always must)"
    )]
    pub require: Vec<Layer>,
    /// Limits of a process.
    #[arg(
        long = "limit",
        value_name = "PROCESS:KEY=VALUE,…",
        help = "Limits of a process, such as disk0:memory=64M,cpu=50; keys: memory, pids, cpu, read, write, read-iops, write-iops"
    )]
    pub limits: Vec<LimitSpec>,
    /// Host users of the processes: auto, off, or a range for machines of root [default: auto, that is 1879048192:1048576]
    #[arg(long, value_name = "FIRST:COUNT")]
    pub uids: Option<UidChoice>,
    /// Where the machine's cgroups are made: auto, off, or the path of a group [default: auto]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<CgroupChoice>,
    /// The least important messages that are shown [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Messages as text, or as one JSON object on each line [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Append messages to a file and not to standard error
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Devices of other back ends.
    #[arg(
        long = "vhost-user",
        value_name = "type=TYPE,socket=PATH,…",
        help = "Device of a vhost-user back end that listens at PATH: type=TYPE|device-id=N,socket=PATH[,id=NAME][,queues=N][,config-size=N][,tag=NAME][,mac=ADDRESS][,restart=POLICY]; repeat for more"
    )]
    pub vhost_user: Vec<VhostUserSpec>,
    /// Files as memory.
    #[arg(
        long = "pmem",
        value_name = "path=FILE,…",
        help = "A file as persistent memory (virtio-pmem), which the guest maps without a copy: path=FILE[,readonly=on][,id=NAME][,addr=SLOT.FUNCTION]; whole blocks of 2 MiB; repeat for more"
    )]
    pub pmems: Vec<PmemSpec>,
    /// Shared directories.
    #[arg(
        long = "fs",
        value_name = "tag=TAG,path=DIR,…",
        help = "Share a directory (virtio-fs): tag=TAG,path=DIR|vhost-user=SOCKET[,readonly=on][,cache=auto|always|metadata|never][,submounts=on][,xattr=on][,owner=all|UID:GID][,id=NAME][,restart=POLICY][,addr=SLOT.FUNCTION]; repeat for more"
    )]
    pub fs: Vec<FsSpec>,
    /// With a command: share this directory for writing; repeat for more
    #[arg(long, value_name = "DIR")]
    pub rw: Vec<PathBuf>,
    /// With a command: the root, any unpacked tree [default: the host's]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// With a command: print what it stands for, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// With a command: print what it stands for, and do it
    #[arg(long)]
    pub verbose: bool,
    /// With a command: keep the initial RAM file system that is made for it
    #[arg(long, value_name = "FILE")]
    pub save_initrd: Option<PathBuf>,
    /// A command for a guest that sees this host's files, instead of a machine: no configuration is needed
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Print what the devices of a machine have counted: requests, bytes, errors, times
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The machine
    pub name: String,
    /// Print JSON
    #[arg(long, conflicts_with = "prometheus")]
    pub json: bool,
    /// Print the text format of Prometheus
    #[arg(long)]
    pub prometheus: bool,
}

/// Show machines, processes and what devices do, again and again (end with Ctrl-C)
#[derive(Debug, Args)]
pub struct TopArgs {
    /// The machine; without it all machines of this user (of all users for root)
    pub name: Option<String>,
    /// Milliseconds between two looks
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(100..=3_600_000))]
    pub interval: u32,
    /// End after so many looks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
}

/// List machines, or the processes of one machine and how each is confined
#[derive(Debug, Args)]
pub struct PsArgs {
    /// The machine; without it all machines of this user (of all users for root) are listed
    pub name: Option<String>,
    /// Show each layer of the jail for each process and thread of the machine, as the kernel tells it
    #[arg(long, requires = "name")]
    pub security: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Press the power button of a machine and wait until it has ended
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The machine
    pub name: String,
    /// Kill it at once, as if its power failed
    #[arg(long)]
    pub force: bool,
    /// Seconds to wait for the guest; 0 does not wait
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u32,
}

/// Connect this terminal to the console or serial port of a machine (leave with Ctrl-] or Ctrl-A X)
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The machine
    pub name: String,
    /// Which one, when the machine has both [default: console, if it can be attached]
    pub device: Option<String>,
}

/// Change the number of CPUs of a machine that runs
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The machine
    pub name: String,
    /// How many CPUs it is to have, from 1 to the max= of its --cpus
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub cpus: u16,
    /// Seconds for the guest to let go of CPUs
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub timeout: u32,
}

/// Let a machine go on that its watchdog has paused
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The machine
    pub name: String,
}

/// Strike keys of a machine that has a --keyboard
#[derive(Debug, Args)]
pub struct SendkeyArgs {
    /// The machine
    pub name: String,
    /// Keys to strike one after the other; those joined by - are held together: ctrl-alt-delete
    #[arg(required = true)]
    pub keys: Vec<String>,
}

/// Show what the balloon of a machine holds and how the guest uses its memory, or give the balloon another size
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// The machine
    pub name: String,
    /// Memory that the guest is to do without, such as 256M; 0 gives all back to it
    pub size: Option<Size>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Say what this host offers, and what is lost without it
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// There, or used.
    On,
    /// Neither.
    Off,
}

impl From<bool> for Switch {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

/// What follows a reboot or a panic of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndAction {
    /// Fresh processes, same resources.
    Restart,
    /// `bulkhead run` ends.
    Exit,
}

/// Importance of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something will fail, or was dropped.
    Warn,
    /// What a user wants to know.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn run(arguments: &[&str]) -> Result<RunArgs, String> {
        let all = ["bulkhead", "run"].iter().chain(arguments);
        match Cli::try_parse_from(all).map_err(|error| error.to_string())?.command {
            Command::Run(run) => Ok(*run),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What the list of commands says of one, its own help says.
    #[test]
    fn a_command_is_told_the_same_twice() {
        let mut built = Cli::command();
        let mut compared = 0;
        for listed in Cli::command().get_subcommands() {
            let name = listed.get_name();
            let Err(help) = built.try_get_matches_from_mut(["bulkhead", name, "--help"]) else { panic!() };
            let about = listed.get_about().unwrap().to_string();
            assert!(help.to_string().starts_with(&about), "{name}: {about} / {help}");
            compared += 1;
        }
        assert!(compared > 12);
    }

    #[test]
    fn reads_all_options() {
        let run = run(&[
            "--kernel=k",
            "--initrd=i",
            "--cmdline",
            "-x root=/dev/vda",
            "--cpus=4",
            "--memory=1G",
            "--disk",
            "path=a",
            "--disk",
            "path=b,id=b",
            "--rng",
            "--console",
            "--serial",
            "file=s",
            "--name=n",
            "--restart=3/60",
            "--restart=b=never",
            "--hang-deadline=1",
            "--require=landlock,cgroup",
            "--limit=b:memory=64M",
            "--uids=off",
            "--cgroup=/sys/fs/cgroup/x",
            "--on-reboot=exit",
            "--on-panic=restart",
            "--log-level=debug",
            "--log-format=json",
            "--log-file=l",
        ])
        .unwrap();
        assert_eq!(run.memory, Some(Size(1 << 30)));
        assert_eq!(run.disks.len(), 2);
        assert_eq!(run.rng, Some(RngSpec::from(true)));
        assert_eq!(run.console, Some(StreamTarget::Attach.into()));
        assert_eq!(run.serial, Some(StreamTarget::File("s".into())));
        assert_eq!(run.restart, ["3/60".parse().unwrap(), "b=never".parse().unwrap()]);
        assert_eq!(run.hang_deadline, Some(1));
        assert_eq!(run.require, [Layer::Landlock, Layer::Cgroup]);
        assert_eq!(run.limits, ["b:memory=64M".parse().unwrap()]);
        assert_eq!(run.uids, Some(UidChoice::Off));
        assert!(matches!(run.cgroup, Some(CgroupChoice::Path(_))));
        assert_eq!(run.on_reboot, Some(EndAction::Exit));
        assert_eq!(run.cmdline.as_deref(), Some("-x root=/dev/vda"));
    }

    #[test]
    fn an_unknown_option_names_the_nearest() {
        let error = run(&["--kernal", "k"]).unwrap_err();
        assert!(error.contains("--kernel"), "{error}");
        let error = run(&["--log-level=inof"]).unwrap_err();
        assert!(error.contains("info"), "{error}");
    }

    #[test]
    fn a_bad_value_names_the_option() {
        let error = run(&["--memory=lots"]).unwrap_err();
        assert!(error.contains("--memory") && error.contains("512M"), "{error}");
        let error = run(&["--restart=sometimes"]).unwrap_err();
        assert!(error.contains("--restart") && error.contains("5/10"), "{error}");
        let error = run(&["--cpus=-1"]).unwrap_err();
        assert!(error.contains("--cpus"), "{error}");
    }
}
