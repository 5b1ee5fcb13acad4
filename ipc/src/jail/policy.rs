//! The policies of `seccomp-policies/`, compiled by `build.rs` and embedded.

use serde::{Deserialize, Serialize};

/// One instruction of a classic BPF program, as `struct sock_filter`: code, jump if true, jump if false, constant.
pub type Instruction = (u16, u8, u8, u32);

include!(concat!(env!("OUT_DIR"), "/policies.rs"));

/// The policies, one for each kind of process and thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyName {
    /// Core: all threads, while the machine is built; the others lie on top of it.
    CoreSetup,
    /// Core: event loop, control channel.
    CoreMain,
    /// Core: what waits for device processes.
    CoreDevices,
    /// Core: a vCPU.
    CoreVcpu,
    /// virtio-blk: control channel and vhost-user messages.
    BlkMain,
    /// virtio-blk: a set of queues.
    BlkQueue,
    /// virtio-rng: control channel and vhost-user messages.
    RngMain,
    /// virtio-rng: its queue.
    RngQueue,
    /// virtio-console: control channel and vhost-user messages.
    ConsoleMain,
    /// virtio-console: its queues and its peer.
    ConsoleQueue,
    /// 16550A: its only thread: control channel, registers, peer.
    UartMain,
    /// Flash with firmware's variables: its only thread.
    FlashMain,
    /// Keyboard: its only thread.
    KeyboardMain,
    /// Watchdog: its only thread.
    WatchdogMain,
    /// virtio-blk: a thread that reads and writes an image in a format.
    BlkImage,
    /// virtio-vsock: control channel and vhost-user messages.
    VsockMain,
    /// virtio-vsock: its queues, its connector and every connection.
    VsockQueue,
    /// virtio-balloon: control channel and vhost-user messages.
    BalloonMain,
    /// virtio-balloon: its queues.
    BalloonQueue,
    /// virtio-pmem: control channel and vhost-user messages.
    PmemMain,
    /// virtio-pmem: its queue.
    PmemQueue,
    /// virtio-net: control channel and vhost-user messages.
    NetMain,
    /// virtio-net: a pair of queues and its way out.
    NetQueue,
    /// What stands before a back end that is not ours: its only thread.
    RelayMain,
    /// virtio-fs: control channel and vhost-user messages.
    FsMain,
    /// virtio-fs: its queues.
    FsQueue,
}

impl PolicyName {
    /// All policies.
    pub const ALL: [Self; 26] = [
        Self::CoreSetup,
        Self::CoreMain,
        Self::CoreDevices,
        Self::CoreVcpu,
        Self::BlkMain,
        Self::BlkQueue,
        Self::RngMain,
        Self::RngQueue,
        Self::ConsoleMain,
        Self::ConsoleQueue,
        Self::UartMain,
        Self::FlashMain,
        Self::KeyboardMain,
        Self::WatchdogMain,
        Self::BlkImage,
        Self::VsockMain,
        Self::VsockQueue,
        Self::BalloonMain,
        Self::BalloonQueue,
        Self::PmemMain,
        Self::PmemQueue,
        Self::NetMain,
        Self::NetQueue,
        Self::RelayMain,
        Self::FsMain,
        Self::FsQueue,
    ];

    /// The policy's file in the source tree.
    #[must_use]
    pub fn file(self) -> &'static str {
        self.compiled().1
    }

    /// Number of system calls that it allows, those with restricted arguments included.
    #[must_use]
    pub fn allowed(self) -> usize {
        self.compiled().2
    }

    /// The filter: code, jump if true, jump if false and constant of each instruction; every refusal is
    /// `SECCOMP_RET_KILL_PROCESS`.
    #[must_use]
    pub fn program(self) -> &'static [Instruction] {
        self.compiled().0
    }

    /// Program, file, number of allowed system calls. The constants come from `build.rs`: a policy without a file does not
    /// compile, and a file without a policy leaves a constant unused.
    const fn compiled(self) -> (&'static [Instruction], &'static str, usize) {
        match self {
            Self::CoreSetup => CORE_SETUP,
            Self::CoreMain => CORE_MAIN,
            Self::CoreDevices => CORE_DEVICES,
            Self::CoreVcpu => CORE_VCPU,
            Self::BlkMain => BLK_MAIN,
            Self::BlkQueue => BLK_QUEUE,
            Self::RngMain => RNG_MAIN,
            Self::RngQueue => RNG_QUEUE,
            Self::ConsoleMain => CONSOLE_MAIN,
            Self::ConsoleQueue => CONSOLE_QUEUE,
            Self::UartMain => UART_MAIN,
            Self::FlashMain => FLASH_MAIN,
            Self::KeyboardMain => KEYBOARD_MAIN,
            Self::WatchdogMain => WATCHDOG_MAIN,
            Self::BlkImage => BLK_IMAGE,
            Self::VsockMain => VSOCK_MAIN,
            Self::VsockQueue => VSOCK_QUEUE,
            Self::BalloonMain => BALLOON_MAIN,
            Self::BalloonQueue => BALLOON_QUEUE,
            Self::PmemMain => PMEM_MAIN,
            Self::PmemQueue => PMEM_QUEUE,
            Self::NetMain => NET_MAIN,
            Self::NetQueue => NET_QUEUE,
            Self::RelayMain => RELAY_MAIN,
            Self::FsMain => FS_MAIN,
            Self::FsQueue => FS_QUEUE,
        }
    }
}

/// Size of an embedded policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicySummary {
    /// Which policy.
    pub name: PolicyName,
    /// Its file in the source tree.
    pub file: &'static str,
    /// Number of system calls that it allows, those with restricted arguments included.
    pub allowed: usize,
    /// Length of its filter in BPF instructions.
    pub instructions: usize,
}

/// All embedded policies.
#[must_use]
pub fn policies() -> &'static [PolicySummary] {
    const fn summary(name: PolicyName) -> PolicySummary {
        let (program, file, allowed) = name.compiled();
        PolicySummary { name, file, allowed, instructions: program.len() }
    }
    static SUMMARIES: [PolicySummary; PolicyName::ALL.len()] = {
        let mut summaries = [summary(PolicyName::CoreMain); PolicyName::ALL.len()];
        let mut index = 0;
        while index < summaries.len() {
            summaries[index] = summary(PolicyName::ALL[index]);
            index += 1;
        }
        summaries
    };
    &SUMMARIES
}
