//! What the supervisor and its processes say to each other on the control channel.
//!
//! A message names the descriptors that travel with it by [`FdIndex`]; [`Descriptors`] hands each of them out once and
//! refuses an index that is out of range or used twice, and a descriptor that no field named.
//! Sending order: `Start` goes first and once; the process answers `Ready` after it has sealed itself (see
//! [`crate::jail::seal`]) and reads nothing from guest or peer before that.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

pub use super::device_config::{
    BackingImage, BalloonConfig, BlkConfig, BlkOptions, ConsoleConfig, Durability, ErrorAction, FlashConfig,
    FsCache, FsConfig, FsOwners, GroupConfig, ImageFormat, KeyboardConfig, NET_KEPT, NetBackend, NetConfig,
    NetLimits, PmemConfig, PortConfig, PortsConfig, Rates, RelayConfig, RngConfig, RngLimit, TYPED,
    UartConfig, VsockConfig, WatchdogConfig,
};

use crate::channel::ChannelError;
use crate::jail::{Enforcement, PolicyName};
use crate::log::LogLevel;

/// The version of these messages. A supervisor starts only device programs that speak its own version; increase it with every
/// release that changes a message.
pub const PROTOCOL: u32 = 1;

/// Index of a descriptor among those that came with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub u8);

/// From the supervisor to the core.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCore {
    /// Build the machine and run it once every device answered.
    Start(CoreStart),
    /// The device process behind `id` has ended and was replaced; `socket` is the stream to the new one, which is ready.
    DeviceReplaced {
        /// Which device, as named in [`DeviceLink::id`].
        id: String,
        /// The new vhost-user or vfio-user stream.
        socket: FdIndex,
    },
    /// No process will serve this device any more.
    DeviceGivenUp {
        /// Which device.
        id: String,
    },
    /// A device process was started while the machine runs: show its virtio function to the guest. Answered by
    /// [`FromCore::DeviceAdded`] or [`FromCore::DeviceRefused`].
    DeviceAdd(DeviceLink),
    /// Ask the guest to let go of a virtio device. [`FromCore::DeviceRemoved`] comes when it did.
    DeviceRemove {
        /// Which device.
        id: String,
        /// Pull it out without asking.
        force: bool,
    },
    /// Plug in possible CPUs, or ask the guest to let them go. [`FromCore::CpuRemoved`] comes for each when it did.
    Cpus {
        /// Their indices, from 0. All in one message: the channel has room for some hundred.
        indices: Vec<u16>,
        /// Plug in.
        insert: bool,
    },
    /// Press the ACPI power button.
    Stop,
    /// Hold all vCPUs.
    Pause,
    /// Let them go on.
    Resume,
    /// Answer [`FromCore::Alive`]: a core that hangs does not.
    Ping,
}

/// What the core needs to build the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreStart {
    /// Name of the machine.
    pub machine: String,
    /// Least severe level that is logged.
    pub log: LogLevel,
    /// What a forbidden system call does.
    pub enforcement: Enforcement,
    /// The vCPUs.
    pub processors: Processors,
    /// Guest RAM in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// Whether huge pages may back guest RAM.
    pub huge_pages: bool,
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// What the first CPU runs.
    pub boot: Boot,
    /// The generation id: no other run of a machine has it.
    pub generation: [u8; 16],
    /// There is a port by which a test in the guest ends the machine.
    pub debug_exit: bool,
    /// One link for each device process.
    pub devices: Vec<DeviceLink>,
    /// Files that the guest sees as memory.
    pub mapped: Vec<MappedRegion>,
}

/// A file that the guest sees as memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRegion {
    /// The file, locked by the supervisor.
    pub file: FdIndex,
    /// Guest-physical address, above guest RAM, a multiple of 2 MiB.
    pub address: u64,
    /// Bytes, a multiple of 2 MiB.
    pub size: u64,
    /// The guest may write.
    pub writable: bool,
}

/// What the first CPU runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Boot {
    /// A kernel.
    Kernel {
        /// Kernel image: bzImage, ELF with a PVH note, or multiboot.
        kernel: FdIndex,
        /// Initial RAM file system.
        initrd: Option<FdIndex>,
        /// Kernel command line.
        cmdline: String,
        /// SMBIOS entry point and tables, as they lie at F0000.
        smbios: Vec<u8>,
    },
    /// The reset vector in a ROM.
    Firmware {
        /// The image; its end is the end of the first 4 GiB.
        image: FdIndex,
        /// Files for the firmware.
        files: Vec<FirmwareFile>,
        /// The firmware shall offer its boot menu.
        menu: bool,
        /// What the guest reads of its variables, which lie just below the image; a device of kind [`LinkKind::Flash`] has them.
        variables: Option<FdIndex>,
        /// Option ROMs that belong to no device, as files with these names; memfds as in [`DeviceLink::rom`].
        roms: Vec<(String, FdIndex)>,
    },
}

/// A file that firmware finds in fw_cfg.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareFile {
    /// At most 55 bytes.
    pub name: String,
    /// What is in it.
    pub contents: Vec<u8>,
}

/// The first local APIC id that does not tell one processor from all in 8 bits: 255 is the broadcast address.
pub const FIRST_WIDE_APIC_ID: u32 = 255;

/// The processors that the guest sees, and may see later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processors {
    /// How many of them are there at the start.
    pub present: u16,
    /// The local APIC ids of all, in ascending order.
    pub apic_ids: Vec<u32>,
    /// The bits of an APIC id from this one on name the core.
    pub core_shift: u8,
    /// The bits of an APIC id from this one on name the package.
    pub package_shift: u8,
    /// CPUID without the numbers that each processor has for itself.
    pub cpuid: Vec<CpuidLeaf>,
}

/// What CPUID answers for one leaf and subleaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry.
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_…`: whether the subleaf counts.
    pub flags: u32,
    /// EAX, EBX, ECX and EDX.
    pub registers: [u32; 4],
}

/// A stream to a device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLink {
    /// Name of the device, unique in its machine.
    pub id: String,
    /// What is spoken on the stream.
    pub kind: LinkKind,
    /// The stream.
    pub socket: FdIndex,
    /// The expansion ROM of a PCI function: a memfd that cannot shrink, whose size is a power of two from 4 KiB to 16 MiB.
    pub rom: Option<FdIndex>,
}

/// What is spoken between the core and a device process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkKind {
    /// vhost-user; the core shows the guest a virtio PCI function.
    VirtioVhostUser {
        /// Device type of the virtio specification, section 5: 2 block, 3 console, 4 entropy.
        virtio_id: u16,
        /// Its place on PCI bus 0: the slot, 2–31, in bits 4:0, the function in bits 7:5.
        slot: u8,
    },
    /// vfio-user; the chip with firmware's variables.
    Flash,
    /// vfio-user; registers of a legacy device (UART at 3F8, IRQ 4).
    Registers,
    /// vfio-user; the keyboard controller at 60 and 64, IRQ 1.
    Keyboard,
    /// vfio-user; an Intel 6300ESB watchdog.
    Watchdog {
        /// Its place on PCI bus 0, as for a virtio function.
        slot: u8,
        /// Its interrupt is an NMI to all CPUs; otherwise it has none.
        nmi: bool,
    },
    /// vhost-user; a back end that is not ours, behind a process that is.
    Foreign {
        /// Device type of the virtio specification, section 5.
        virtio_id: u16,
        /// Its slot on PCI bus 0, 2–31.
        slot: u8,
        /// Queues where the back end cannot tell.
        queues: u16,
        /// Bytes of configuration space.
        config_size: u16,
    },
}

/// From the core to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCore {
    /// Sealed and serving. One violation listener came for each policy, in this order; none without a supervisor.
    Ready {
        /// Policies of the threads, in the order of the descriptors.
        policies: Vec<PolicyName>,
    },
    /// The machine ended.
    Ended(MachineEnd),
    /// A device missed a deadline or sent nonsense.
    DeviceFailed {
        /// Which device.
        id: String,
        /// What it did, for a person.
        reason: String,
    },
    /// [`ToCore::DeviceReplaced`] was received: what is said about the device from here on concerns the new process.
    DeviceReplaced {
        /// Which device.
        id: String,
    },
    /// The function of [`ToCore::DeviceAdd`] is in its slot and the guest was told.
    DeviceAdded {
        /// Which device.
        id: String,
    },
    /// A device cannot be added, or there is none to be removed.
    DeviceRefused {
        /// Which device.
        id: String,
        /// Why, for a person.
        reason: String,
    },
    /// The guest let go of a device, asked or not, or it was pulled out: nothing in the core belongs to it any more.
    DeviceRemoved {
        /// Which device.
        id: String,
    },
    /// The guest let go of a CPU, which runs no more.
    CpuRemoved {
        /// Its index.
        index: u16,
    },
    /// The answer to [`ToCore::Ping`].
    Alive,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineEnd {
    /// ACPI S5.
    PowerOff,
    /// Reset by CF9, port 92, the i8042 or a triple fault.
    Reset,
    /// The guest reported a panic.
    Panicked,
    /// The guest wrote this to the debug exit port.
    DebugExit(u8),
    /// Nothing was started: what the user gave makes no machine.
    BadInput {
        /// What of it.
        input: Input,
        /// A sentence for a person.
        reason: String,
    },
    /// The core could not go on; a sentence for a person.
    Failed(String),
}

/// What the user gives and only the core can judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// The kernel image.
    Kernel,
    /// The firmware image.
    Firmware,
    /// The initial RAM file system.
    Initrd,
    /// A number or text of the configuration, which the sentence names.
    Setting,
}

/// From the supervisor to a device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDevice {
    /// Serve this device.
    Start(DeviceStart),
    /// A new peer of a console or serial line; its stream is the only descriptor (index 0).
    Attach,
    /// A new peer of a network card, with the number of this way ([`NetConfig::way`]); its stream is the only descriptor (index 0).
    AttachWay(u64),
    /// The terminal's new size in characters.
    Resize {
        /// Width.
        columns: u16,
        /// Height.
        rows: u16,
    },
    /// Answer [`FromDevice::Alive`]: a process that hangs does not.
    Ping,
    /// What a console's predecessor had left; it comes before the first request of the guest.
    Take(Left),
    /// Finish what is in flight and exit with code 0.
    Stop,
    /// The size of the balloon, pages of 4 KiB. Answered by [`FromDevice::Balloon`], as is `None`, which only asks.
    Balloon {
        /// The size that it is to have.
        target: Option<u32>,
    },
    /// Keys are pressed and released on a keyboard, in this order. Answered by [`FromDevice::KeysTaken`]; until then they are sent again to a
    /// successor.
    Keys {
        /// Counts these messages, from 1 on.
        number: u64,
        /// Number of the newest there is: a state that knows of later ones is not one of a keyboard that kept to the rules.
        newest: u64,
        /// The keys.
        keys: Vec<Key>,
    },
    /// Plug the cable of a network card in, or pull it out.
    Link {
        /// In.
        up: bool,
    },
    /// A raw disk's file has another size; an image in a format is to have it, and the answer is [`FromDevice::DiskSize`].
    DiskSize {
        /// Bytes.
        bytes: u64,
    },
    /// A new peer of a named port, by its index from 0; its stream is the only descriptor (index 0).
    AttachPort(u16),
}

/// A key of a keyboard, going down or up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Its code in scan code set 2, E0xx with that prefix.
    pub code: u16,
    /// It goes down.
    pub pressed: bool,
}

/// What a device process needs to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStart {
    /// Name of the device, unique in its machine.
    pub id: String,
    /// Name of the machine.
    pub machine: String,
    /// Least severe level that is logged.
    pub log: LogLevel,
    /// What a forbidden system call does.
    pub enforcement: Enforcement,
    /// vhost-user or vfio-user stream to the core.
    pub socket: FdIndex,
    /// The device type and its resources.
    pub config: DeviceConfig,
    /// Where its queues are counted ([`crate::metrics`]).
    pub metrics: Option<FdIndex>,
}

/// Device type and what it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// virtio-blk.
    Blk(BlkConfig),
    /// virtio-rng.
    Rng(RngConfig),
    /// virtio-console.
    Console(ConsoleConfig),
    /// 16550A.
    Uart(UartConfig),
    /// Flash with firmware's variables.
    Flash(FlashConfig),
    /// A keyboard and its controller.
    Keyboard(KeyboardConfig),
    /// virtio-vsock.
    Vsock(VsockConfig),
    /// virtio-balloon.
    Balloon(BalloonConfig),
    /// virtio-pmem.
    Pmem(PmemConfig),
    /// virtio-net.
    Net(NetConfig),
    /// A back end that is not ours.
    Relay(RelayConfig),
    /// virtio-fs; the directory came with the jail.
    Fs(FsConfig),
    /// virtio-console with named ports.
    Ports(PortsConfig),
    /// A watchdog.
    Watchdog(WatchdogConfig),
}

/// From a device process to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDevice {
    /// Sealed and serving. One violation listener came for each policy, in this order; none without a supervisor.
    Ready {
        /// Policies of the threads, in the order of the descriptors.
        policies: Vec<PolicyName>,
    },
    /// The answer to [`ToDevice::Ping`].
    Alive(Progress),
    /// The device cannot serve; a sentence for a person. The process exits after it.
    Failed(String),
    /// The balloon: the answer to [`ToDevice::Balloon`], and what is said unasked when the guest has changed its size.
    Balloon(BalloonReport),
    /// After [`ToDevice::Stop`]: what would be lost with the process, for its successor if there is to be one.
    Left(Left),
    /// The watchdog has run out.
    Expired,
    /// The keys of [`ToDevice::Keys`] up to this number are kept: a successor knows them.
    KeysTaken(u64),
    /// The answer to [`ToDevice::DiskSize`] of a disk whose image says how large it is: its size in bytes, or why not the other.
    DiskSize(Result<u64, String>),
}

/// A balloon and what the guest says of its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonReport {
    /// Size that it is to have, pages of 4 KiB.
    pub target: u32,
    /// Size that it has.
    pub actual: u32,
    /// Tag and value (virtio 1.2, 5.5.6.4), at most 64; `None`: nobody asked.
    pub statistics: Option<Vec<(u16, u64)>>,
}

/// Bytes that the guest said to a console and nobody has read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The oldest first.
    pub output: Vec<u8>,
}

/// What the queues of a device have come to since the [`ToDevice::Ping`] before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// Nothing is to be done, or something was.
    Fine,
    /// A queue has requests, all that could be begun are under way, and none has come to its end: the host is slow.
    WaitsForHost {
        /// Which queue.
        queue: u16,
    },
    /// A queue has requests and its thread does nothing about them.
    Stalled {
        /// Which queue.
        queue: u16,
    },
}

/// The descriptors of one message, each to be taken once.
#[derive(Debug)]
pub struct Descriptors {
    slots: Vec<Option<OwnedFd>>,
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        Self { slots: descriptors.into_iter().map(Some).collect() }
    }
}

impl Descriptors {
    /// Takes the descriptor that a field names.
    ///
    /// # Errors
    /// [`ChannelError::NoSuchDescriptor`] when the index is out of range or was taken before.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, ChannelError> {
        self.slots
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(ChannelError::NoSuchDescriptor { index: index.0 })
    }

    /// Ends the message: every descriptor must have been taken.
    ///
    /// # Errors
    /// [`ChannelError::UnusedDescriptors`] with the number of those that no field named; they are closed.
    pub fn finish(self) -> Result<(), ChannelError> {
        match self.slots.iter().flatten().count() {
            0 => Ok(()),
            count => Err(ChannelError::UnusedDescriptors { count }),
        }
    }
}
