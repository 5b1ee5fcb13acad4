//! Devices and events as the API shows them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bulkhead_ipc::metrics::Counters;
use serde::{Deserialize, Serialize};

use crate::supervisor::process::Role;

fn attach() -> String {
    "attach".to_owned()
}

fn on() -> String {
    "on".to_owned()
}

/// A device to be added to a machine that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AddRequest {
    /// A disk.
    Disk {
        /// As after `--disk`.
        spec: String,
        /// Where a relative path starts.
        folder: PathBuf,
    },
    /// The entropy device.
    Rng {
        /// As after `--rng=`.
        #[serde(default = "on")]
        spec: String,
    },
    /// The virtio console, for `bulkhead console`.
    Console {
        /// As after `--console=`: `attach`, `addr=SLOT`.
        #[serde(default = "attach")]
        spec: String,
    },
    /// The vsock.
    Vsock {
        /// As after `--vsock`.
        spec: String,
        /// Where a relative path starts.
        folder: PathBuf,
    },
    /// A network card.
    Net {
        /// As after `--net`.
        spec: String,
        /// Where a relative path starts.
        folder: PathBuf,
    },
    /// The balloon.
    Balloon {
        /// As after `--balloon`.
        spec: String,
    },
    /// A device of a back end that is not ours.
    VhostUser {
        /// As after `--vhost-user`.
        spec: String,
        /// Where a relative path starts.
        folder: PathBuf,
    },
    /// The named ports, which are one device.
    Ports {
        /// Each as after `--port`.
        specs: Vec<String>,
        /// Where a relative path starts.
        folder: PathBuf,
    },
    /// A shared directory.
    Fs {
        /// As after `--fs`.
        spec: String,
        /// Where a relative path starts.
        folder: PathBuf,
    },
}

/// A balloon, and how the guest uses its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonEntry {
    /// The size that it is to have, bytes.
    pub target: u64,
    /// The size that it has, bytes.
    pub actual: u64,
    /// What the guest says, by the names of the specification (5.5.6.4); bytes or counts.
    pub statistics: BTreeMap<String, u64>,
}

/// A device program, as it describes itself (`bulkhead-device --version`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramInfo {
    /// Its version.
    pub version: String,
    /// The control protocol that it speaks ([`bulkhead_ipc::channel::message::PROTOCOL`]).
    pub protocol: u32,
}

/// A device of a machine that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceEntry {
    /// Its id.
    pub id: String,
    /// Its type.
    pub role: Role,
    /// What it does now.
    pub state: DeviceState,
    /// The process that serves it, if one does.
    pub pid: Option<i32>,
    /// What follows the death of its process, as `--restart` says it.
    pub policy: String,
    /// How often its process was replaced.
    pub restarts: u64,
    /// How its last process ended.
    pub last_end: Option<String>,
    /// The version of its program.
    pub version: String,
}

/// What a device has counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Its id.
    pub id: String,
    /// Its type.
    pub role: Role,
    /// How often its process was replaced.
    pub restarts: u64,
    /// The counts, all processes of the device together; none for a device that does not count.
    pub counters: Option<Counters>,
}

/// What a device does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Its first process is not ready yet.
    Starting,
    /// Its process serves.
    Serving,
    /// Its process has ended or is about to, and a successor is on the way.
    Restarting,
    /// It was given up: the guest finds a device that needs a reset.
    Failed,
}

impl DeviceState {
    /// The word for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Restarting => "restarting",
            Self::Failed => "failed",
        }
    }
}

/// What happened to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A process was started.
    Start,
    /// It is sealed and serves.
    Ready,
    /// It did not answer in time, and was killed.
    Hang,
    /// It made a system call that its policy forbids, and was killed.
    Violation,
    /// It said that it cannot go on, sent nonsense, or the core gave its connection up.
    Failure,
    /// A queue has made no progress for long because the host is slow. Nothing is done about it.
    Waits,
    /// It ended.
    Death,
    /// A successor is to be started, after `pause_ms`.
    Restart,
    /// The successor serves the guest; `took_us` since the predecessor stopped.
    Replaced,
    /// A user asked for a restart or upgrade of the device.
    Asked,
    /// What a user asked for was not possible; the device goes on as before.
    Refused,
    /// No process will serve the device unless a user asks for it.
    GivenUp,
    /// Every process of the machine is ready.
    Running,
    /// A device was added and the guest was told.
    Added,
    /// A device was removed.
    Removed,
    /// The guest's watchdog ran out; `reason` is the action.
    Watchdog,
    /// The machine ends.
    End,
}

/// Something that happened: one line of `bulkhead events`. Fields that say nothing are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventEntry {
    /// Counts from 1; a gap says that older events were dropped.
    pub sequence: u64,
    /// UTC, RFC 3339, with milliseconds.
    pub time: String,
    /// What it was.
    pub event: EventKind,
    /// The process: `core` or the id of a device; none for the machine as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Its process id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// A sentence for a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The exit code of a process that ended by itself, or of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Milliseconds before the restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<u64>,
    /// Microseconds without a process that serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_us: Option<u64>,
}
