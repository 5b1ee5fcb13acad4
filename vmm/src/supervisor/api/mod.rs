//! What machines can be asked from outside: `bulkhead ps`, `stop`, `console`, `device` and `events`.
//!
//! Each machine listens on the abstract Unix socket `@bulkhead/UID/NAME` (`SOCK_SEQPACKET`): no file that could go stale,
//! one machine of a name for each user. A packet is one JSON object. Both sides check the other's user id
//! (`SO_PEERCRED`): anybody may bind any abstract name, so the name alone proves nothing.

pub mod client;
pub mod device;
pub mod packet;
pub mod server;

pub use device::{
    AddRequest, BalloonEntry, DeviceEntry, DeviceState, DeviceStats, EventEntry, EventKind, ProgramInfo,
};
use serde::{Deserialize, Serialize};

use super::process::Role;

/// The longest packet in bytes.
pub const MAX_PACKET: usize = 64 << 10;

/// What a client asks. Unknown requests and fields are refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The processes of the machine.
    Ps,
    /// Press the power button. The connection stays open until the machine has ended.
    Stop,
    /// Kill every process of the machine. The connection stays open until that is done.
    Kill,
    /// Connect the stream socket that comes with this packet to a console or serial port.
    Attach {
        /// Which one; the virtio console if it can be attached, else the serial port.
        device: Option<String>,
        /// Size of the terminal, columns and rows.
        size: Option<(u16, u16)>,
    },
    /// The terminal of the attached console has a new size.
    Resize {
        /// Width in characters.
        columns: u16,
        /// Height in characters.
        rows: u16,
    },
    /// The devices of the machine.
    Devices,
    /// Add a device. The answer comes when the guest was told.
    DeviceAdd {
        /// Which.
        device: AddRequest,
        /// Limits of its process, as after `--limit`.
        #[serde(default)]
        limits: Option<String>,
    },
    /// Remove a virtio device. The answer comes when nothing is left of it.
    DeviceRemove {
        /// Its id.
        device: String,
        /// Do not ask the guest.
        force: bool,
        /// For the guest to let go of it, in seconds.
        timeout: u32,
    },
    /// Have another number of CPUs. The answer comes when the guest was told of all that came, and let go of all that went.
    Cpus {
        /// How many.
        count: u16,
        /// For the guest to let go of them, in seconds.
        timeout: u32,
    },
    /// Replace the process of a device in order. The answer comes when the successor serves.
    DeviceRestart {
        /// Its id.
        device: String,
    },
    /// Replace the process of a device, or of all, by one of the program that comes with this packet. The answer comes
    /// when all successors serve, or one cannot.
    DeviceUpgrade {
        /// Its id; all devices when there is none.
        device: Option<String>,
        /// What the program says of itself.
        program: ProgramInfo,
    },
    /// Let the CPUs go on that the watchdog has stopped.
    Resume,
    /// Strike keys on the machine's keyboard.
    Sendkey {
        /// One after the other; those joined by `-` are held together.
        keys: Vec<String>,
    },
    /// What the balloon holds, and how the guest uses its memory.
    Balloon {
        /// The size that the balloon is to have from now on, in bytes.
        size: Option<u64>,
    },
    /// What happened so far, and, with `follow`, what happens from here on.
    Events {
        /// Go on until the machine has ended.
        follow: bool,
    },
    /// Plug the cable of a network card in, or pull it out.
    DeviceLink {
        /// The card's id.
        device: String,
        /// In.
        up: bool,
    },
    /// What the devices have counted.
    Stats,
    /// Give a disk another size. The answer comes when its process was told.
    DeviceResize {
        /// The disk's id.
        device: String,
        /// In bytes; as large as its file is, without.
        size: Option<u64>,
        /// It may become smaller.
        #[serde(default)]
        shrink: bool,
    },
}

/// What the machine answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Response {
    /// Done.
    Done,
    /// The machine.
    Machine(MachineEntry),
    /// Attached to this device.
    Attached {
        /// Its id.
        device: String,
    },
    /// The devices.
    Devices {
        /// In the order of their places.
        devices: Vec<DeviceEntry>,
        /// The control protocol that device programs must speak.
        protocol: u32,
    },
    /// Events, oldest first. Without `follow` the answer is complete with the first packet whose `more` is false.
    Events {
        /// Some of them, as many as fit a packet.
        events: Vec<EventEntry>,
        /// Another packet follows at once.
        more: bool,
    },
    /// The balloon.
    Balloon(BalloonEntry),
    /// What the devices have counted.
    Stats {
        /// In the order of their places.
        devices: Vec<DeviceStats>,
    },
    /// Refused.
    Error {
        /// A sentence for a person.
        message: String,
    },
}

/// A machine and its processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEntry {
    /// Its name.
    pub name: String,
    /// `starting`, `running` or `ending`.
    pub state: String,
    /// Number of virtual CPUs.
    pub cpus: u16,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The supervisor, the core and the devices.
    pub processes: Vec<ProcessEntry>,
}

/// A process of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// Its name: `supervisor`, `core`, or the id of the device.
    pub id: String,
    /// What it is.
    pub role: Role,
    /// Its process id in the supervisor's pid namespace.
    pub pid: i32,
}

/// The abstract name of a machine, without the zero byte that makes it abstract.
pub fn socket_name(uid: u32, machine: &str) -> String {
    format!("bulkhead/{uid}/{machine}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_plain_json() {
        let text = serde_json::to_string(&Request::Attach { device: None, size: Some((80, 25)) }).unwrap();
        assert_eq!(text, r#"{"request":"attach","device":null,"size":[80,25]}"#);
        assert_eq!(serde_json::from_str::<Request>(r#"{"request":"kill"}"#).unwrap(), Request::Kill);
        assert!(serde_json::from_str::<Request>(r#"{"request":"dance"}"#).is_err());
    }
}
