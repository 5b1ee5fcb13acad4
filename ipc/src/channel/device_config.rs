//! What the supervisor tells a device process of its device.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::message::FdIndex;

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Where packets go.
    pub backend: NetBackend,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Told to the guest, if at all.
    pub mtu: Option<u16>,
    /// What may reach the guest.
    pub receive: NetLimits,
    /// What may leave it.
    pub transmit: NetLimits,
    /// Nobody else's packets leave, and packets for others do not enter.
    pub mac_filter: bool,
    /// The only IP addresses that packets come from; none: any.
    pub ip_filter: Vec<IpAddr>,
    /// The link is up.
    pub link: bool,
    /// The guest knows the device from a predecessor of the process.
    pub successor: bool,
    /// Memory that outlives the process, [`NET_KEPT`] bytes for each pair of queues: packets on their way.
    pub kept: Option<FdIndex>,
    /// Number of the way that packets go, from 1 on. What is kept of another way counts for nothing.
    pub way: u64,
    /// What may pass in both directions together with other devices.
    pub group: Option<Box<GroupConfig>>,
}

/// Size of the memory for a pair of queues that outlives a network card's process, in bytes.
pub const NET_KEPT: u64 = 401_408;

/// Where a network card's packets go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetBackend {
    /// A tap, opened by the supervisor: a descriptor for each pair of queues.
    Tap {
        /// The queues.
        queues: Vec<FdIndex>,
        /// Of each a file with a line `pos:` that says how long the packet is that was read last (proc(5), fdinfo).
        positions: Vec<FdIndex>,
        /// `TUN_F_…` that the kernel knows.
        offloads: u32,
    },
    /// A stream, each packet after its length; `None`: there is no peer until `Attach`.
    Stream(Option<FdIndex>),
    /// A socket that keeps packets apart.
    Datagrams(Option<FdIndex>),
}

/// Limits of one direction; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetLimits {
    /// Bytes a second.
    pub bytes: u64,
    /// Bytes that may pass at once after a pause; 0: what a tenth of a second has.
    pub bytes_burst: u64,
    /// Packets a second.
    pub packets: u64,
    /// Packets that may pass at once after a pause.
    pub packets_burst: u64,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkConfig {
    /// Image or block device, opened and locked by the supervisor.
    pub disk: FdIndex,
    /// Refuse writes.
    pub read_only: bool,
    /// Up to 20 bytes of ASCII.
    pub serial: String,
    /// Number of request queues.
    pub queues: u16,
    /// 512 or 4096.
    pub logical_block_size: u32,
    /// What can be left as it is.
    pub options: BlkOptions,
}

/// What a disk can be told beside its image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BlkOptions {
    /// Bytes, a power of two, at least the logical block; 0: 4096 or the logical block.
    pub physical_block_size: u32,
    /// What is in the image.
    pub format: ImageFormat,
    /// What backs the image, from the top down; read only.
    pub backing: Vec<BackingImage>,
    /// Files that hold data for the image, in the order in which it names them.
    pub data: Vec<FdIndex>,
    /// A raw image that `disk` opens with O_DIRECT, without that: for requests that are not aligned.
    pub cached: Option<FdIndex>,
    /// When writes are durable.
    pub durability: Durability,
    /// The guest may not give space up.
    pub no_discard: bool,
    /// What the guest may move.
    pub rates: Rates,
    /// What it may move together with others.
    pub group: Option<Box<GroupConfig>>,
    /// What follows a read that the host fails.
    pub read_error: ErrorAction,
    /// What follows anything else that the host fails.
    pub write_error: ErrorAction,
}

/// What is in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ImageFormat {
    /// The disk's bytes.
    #[default]
    Raw,
    /// qcow2.
    Qcow2,
    /// VMDK.
    Vmdk,
}

/// An image below another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingImage {
    /// Its file.
    pub file: FdIndex,
    /// What is in it.
    pub format: ImageFormat,
}

/// When writes of the guest are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Durability {
    /// When a flush after them ends; the guest may choose to have it at once.
    #[default]
    Flush,
    /// When they end.
    Write,
    /// Whenever the host likes: flushes are not passed on.
    Never,
}

/// Most bytes and requests a second, and at once after a pause; 0: no limit, or a tenth of a second's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// Bytes a second.
    pub bps: u64,
    /// Bytes at once.
    pub bps_burst: u64,
    /// Requests a second.
    pub iops: u64,
    /// Requests at once.
    pub iops_burst: u64,
}

/// A member's place in a limit group: see [`crate::limit_group`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupConfig {
    /// What all members together may move.
    pub rates: Rates,
    /// Memory that says which places are taken.
    pub roll: FdIndex,
    /// The memory of each place.
    pub places: Vec<FdIndex>,
    /// Which of them is this device's, and open for writing.
    pub own: u8,
}

/// What follows a request that the host fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ErrorAction {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// The request waits, and is tried again every second until the host can do it.
    Wait,
    /// It waits if the host's disk is full, and is an I/O error otherwise.
    WaitForSpace,
    /// The guest is told that all is well; not when the host's disk is full.
    Ignore,
}

/// A source of entropy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// `/dev/urandom`.
    pub source: FdIndex,
    /// How much the guest gets of it; `None`: as much as it likes.
    pub limit: Option<RngLimit>,
}

/// How much entropy a guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngLimit {
    /// Bytes in a period, and at once after a pause; at least 1.
    pub max_bytes: u64,
    /// The period, milliseconds; at least 1.
    pub period: u32,
}

/// Persistent memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// The file, open for reading: enough to flush it.
    pub file: FdIndex,
    /// Where the core has mapped it for the guest, guest-physical.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// A virtio console with one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// Bytes for the guest; `None`: nobody types until `Attach`.
    pub input: Option<FdIndex>,
    /// Bytes from the guest; `None`: the newest are kept until `Attach`.
    pub output: Option<FdIndex>,
    /// Columns and rows.
    pub size: Option<(u16, u16)>,
    /// Memory that outlives the process, [`TYPED`] bytes: what came for the guest and it has not got.
    pub typed: Option<FdIndex>,
}

/// Size of the memory of a byte stream that outlives its device's process, in bytes.
pub const TYPED: u64 = 8192;

/// A virtio console of named ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsConfig {
    /// The ports, the first of which is port 1; at most 15.
    pub ports: Vec<PortConfig>,
    /// A file without a name in which the device notes what a successor must know; empty at the start.
    pub state: Option<FdIndex>,
    /// As a console's, for each port.
    pub typed: Option<FdIndex>,
}

/// A named port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortConfig {
    /// Its name in the guest.
    pub name: String,
    /// It is a console there.
    pub console: bool,
    /// Bytes for the guest; `None`: nobody sends any until `AttachPort`.
    pub input: Option<FdIndex>,
    /// Bytes from the guest; `None`: nobody reads them until `AttachPort`.
    pub output: Option<FdIndex>,
}

/// A serial line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartConfig {
    /// Bytes for the guest; `None`: nobody types until `Attach`.
    pub input: Option<FdIndex>,
    /// Bytes from the guest; `None`: the newest are kept until `Attach`.
    pub output: Option<FdIndex>,
    /// Memory that outlives the process, twice [`TYPED`] bytes: as a console's, and how far what the guest says was passed on.
    pub typed: Option<FdIndex>,
    /// The output is a file to whose end nobody else writes.
    pub own_file: bool,
}

/// A flash chip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlashConfig {
    /// What is kept, opened and locked by the supervisor.
    pub file: FdIndex,
    /// What the guest reads: a memfd that cannot shrink. The device fills it from the file.
    pub memory: FdIndex,
    /// Size of both in bytes, a multiple of 4 KiB.
    pub size: u64,
}

/// A watchdog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogConfig {
    /// A file that keeps its registers and its deadline for a successor.
    pub state: FdIndex,
    /// When there is nothing in the file: the last run of the machine ended since the watchdog ran out.
    pub expired: bool,
    /// It raises its interrupt when it runs out.
    pub interrupt: bool,
}

/// A keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyboardConfig {
    /// A file of 4 KiB that keeps the state for a successor; zeros at the start.
    pub state: FdIndex,
}

/// A vsock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// Context id of the guest, 3 to 4294967294.
    pub guest_cid: u32,
    /// The device's end of a [`crate::connector::Connector`]'s channel.
    pub connector: FdIndex,
}

/// A balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// Size that it is to have, pages of 4 KiB.
    pub target: u32,
    /// Size that the guest has given it under a predecessor.
    pub actual: u32,
    /// The guest may take pages back when it has none left.
    pub deflate_on_oom: bool,
    /// The guest names the pages that it does not use.
    pub free_page_reporting: bool,
}

/// What stands between the core and a vhost-user back end that is not ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayConfig {
    /// The stream to the back end, connected by the supervisor.
    pub back_end: FdIndex,
    /// Where it listens, for messages.
    pub path: String,
    /// What its type is called, for messages.
    pub kind: String,
    /// Device-specific feature bits that the type has (virtio 1.2, section 5; bits 0 to 23).
    pub features: u64,
    /// Exactly so many queues; `None`: as many as the back end has.
    pub queues: Option<u16>,
    /// The least number of queues that a device of the type has.
    pub least_queues: u16,
    /// No device of the type works without a configuration space; it is the back end's unless `config` is it.
    pub has_config: bool,
    /// The configuration space, where it is the front end's: fs, net.
    pub config: Option<Vec<u8>>,
    /// Features that go with it.
    pub own_features: u64,
}

/// A shared directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsConfig {
    /// A file without a name in which the device notes what a successor must know. The supervisor keeps it.
    pub table: FdIndex,
    /// The name that the guest mounts it by: 1 to 36 bytes.
    pub tag: String,
    /// Refuse changes.
    pub read_only: bool,
    /// What the guest may keep.
    pub cache: FsCache,
    /// Whether mounts below the directory are shared too.
    pub submounts: bool,
    /// Whether extended attributes are.
    pub xattr: bool,
    /// Whose files are whose.
    pub owners: FsOwners,
}

/// What the guest may keep of a shared directory instead of asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FsCache {
    /// Nothing: the host's changes are seen at once.
    Never,
    /// Names and attributes for a second; contents until a file is opened again and has changed.
    Auto,
    /// Names and attributes; no contents.
    Metadata,
    /// Everything: for directories that nobody else changes.
    Always,
}

/// Whose files are whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FsOwners {
    /// The guest's users and groups are the host's. The process may act for all of them.
    All,
    /// All that the guest does is done by one user and group of the host, whose files are the guest's root's.
    One {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// Whom the guest sees as owner of the files of others.
        others: u32,
    },
}
