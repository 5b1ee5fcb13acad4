//! virtio-net over a tap, or over a socket on which packets travel (virtio 1.2, 5.1).
//!
//! - `config`: features and configuration space;
//! - `control`: commands of the control queue;
//! - `filter`: which addresses packets may come from and be for;
//! - `port`: taps and sockets;
//! - `inbox`, `outbox`: packets on their way, in memory that outlives the process;
//! - `queue`: a pair of queues on its thread;
//! - `metrics`: what is counted;
//! - `service`: its options as a service.
//!
//! A packet that was taken from the guest is in the used ring when it was handed on, and buffers for packets are used in the order
//! in which they were taken: a successor needs no note of what is in flight. It may hand a packet on that its predecessor had handed
//! on already, as any network may. None is lost, and the guest gets none twice: what was taken from the host lies in memory
//! that a successor finds, as does what a stream has not taken.

mod config;
mod control;
mod filter;
mod inbox;
mod metrics;
mod outbox;
mod port;
mod queue;
mod service;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use bulkhead_ipc::channel::message::NET_KEPT;
use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::tap::{self, Tap, attach_tap_queue, set_tap_offloads};
use bulkhead_ipc::vhost_user::backend::{QueueWorker, VirtioDevice};
use thiserror::Error;
use tracing::warn;

use crate::rate_limit::{Group, Limit, RateLimits};
use config::{CONTROL_QUEUE, MULTI_QUEUE};
pub use filter::Filter;
use inbox::Inbox;
pub use metrics::Metrics;
use outbox::Outbox;
use port::Port;
use queue::Pair;
pub use service::SERVICE;

/// Most pairs of queues.
pub const MAX_PAIRS: u16 = 32;
/// Least MTU of IPv4, and the largest there is.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65_535;

const _: () = assert!((inbox::KEPT + outbox::KEPT) as u64 == NET_KEPT);

/// Why a network card cannot be served.
#[derive(Debug, Error)]
pub enum NetError {
    /// The number of pairs of queues.
    #[error("a network card has 1 to {MAX_PAIRS} pairs of queues, not {0}; over a socket it has one")]
    Pairs(u16),
    /// The hardware address.
    #[error("the hardware address {0} is one of a group: the lowest bit of its first byte must be 0")]
    Group(String),
    /// The MTU.
    #[error("an MTU of {0} is not possible: {low} to {high}", low = MTUS.start(), high = MTUS.end())]
    Mtu(u16),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] tap::TapError),
    /// The memory for a successor.
    #[error("memory for packets on their way: {0}")]
    Memory(#[from] std::io::Error),
}

/// What a network card is to be.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The address that the driver finds.
    pub mac: [u8; 6],
    /// Told to the driver, if at all.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub pairs: u16,
    /// Nobody else's packets leave, and packets for others do not enter.
    pub mac_filter: bool,
    /// Addresses and what may pass; its `mac` follows from `mac_filter`.
    pub filter: Filter,
    /// What may reach the guest.
    pub receive: RateLimits,
    /// What may leave it.
    pub transmit: RateLimits,
    /// The link is up.
    pub link: bool,
    /// The driver is to tell the network where it is: another process served it before.
    pub announce: bool,
    /// Number of the way that packets go, from 1 on: another when a stream was made anew, or the machine was.
    pub way: u64,
    /// What may pass both ways together with other devices.
    pub group: Option<Arc<Group>>,
    /// Of each queue of a tap a file that says how long the packet is that was read last, or none at all.
    pub positions: Vec<Arc<File>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            mtu: None,
            pairs: 1,
            mac_filter: false,
            filter: Filter::default(),
            receive: RateLimits::default(),
            transmit: RateLimits::default(),
            link: true,
            announce: false,
            way: 1,
            group: None,
            positions: Vec::new(),
        }
    }
}

/// Where packets go.
#[derive(Debug)]
pub enum Backend {
    /// A tap with as many queues as the settings have pairs.
    Tap(Tap),
    /// A stream: each packet after its length in 4 bytes, network order, as passt and QEMU do it.
    Stream(Option<OwnedFd>),
    /// A socket that keeps packets apart.
    Datagrams(Option<OwnedFd>),
}

/// Another peer of a socket.
#[derive(Debug)]
struct Peer {
    socket: OwnedFd,
    /// Number of this way.
    way: u64,
}

/// What the device and its threads share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    taps: Vec<Arc<File>>,
    /// Features that the driver accepted.
    features: AtomicU64,
    /// The driver's address, the first byte lowest.
    mac: AtomicU64,
    link: AtomicBool,
    announce: AtomicBool,
    /// A lock is taken only where there is a limit.
    receive: Option<Limit>,
    transmit: Option<Limit>,
    metrics: Metrics,
}

impl Shared {
    fn limit(&self, direction: Direction) -> Option<&Limit> {
        if direction.writes() { self.receive.as_ref() } else { self.transmit.as_ref() }
    }

    fn mac(&self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.mac.load(Ordering::Relaxed).to_le_bytes();
        [a, b, c, d, e, f]
    }

    fn set_mac(&self, [a, b, c, d, e, f]: [u8; 6]) {
        self.mac.store(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), Ordering::Relaxed);
    }

    fn has_control_queue(&self) -> bool {
        self.features.load(Ordering::Relaxed) & CONTROL_QUEUE != 0
    }

    /// The control queue follows the pairs that the driver knows of.
    fn is_control(&self, queue: u16) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        let pairs = if features & MULTI_QUEUE != 0 { self.settings.pairs } else { 1 };
        features & CONTROL_QUEUE != 0 && queue == pairs.saturating_mul(2)
    }

    /// Has the tap spread packets over this many queues.
    fn use_pairs(&self, pairs: u16) {
        for (number, tap) in (0..self.settings.pairs).zip(&self.taps).filter(|_| self.settings.pairs > 1) {
            if let Err(error) = attach_tap_queue(tap.as_fd(), number < pairs) {
                warn!(%error, queue = number, "a queue of the tap cannot be switched");
            }
        }
    }

    fn set_offloads(&self, features: u64) {
        let offloads = config::tap_offloads(features);
        if let Some(tap) = self.taps.first()
            && let Err(error) = set_tap_offloads(tap.as_fd(), offloads)
        {
            warn!(%error, offloads, "the tap does not take these offloads");
        }
    }
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    offloads: u32,
    ports: Vec<(Port, Inbox, Outbox)>,
    /// A socket gets other peers.
    arrivals: Option<Sender<Peer>>,
    arriving: Option<Receiver<Peer>>,
    /// A driver has begun.
    begun: bool,
    /// It has ended, and the next one begins anew. A driver that a successor takes over does not.
    ended: bool,
}

impl Net {
    /// A network card at `backend`. `kept`: memory that outlives the process, [`NET_KEPT`] bytes for each pair of queues.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(mut settings: Settings, backend: Backend, kept: Option<&File>) -> Result<Self, NetError> {
        let pairs = settings.pairs;
        let one = !matches!(backend, Backend::Tap(_));
        if pairs == 0 || pairs > MAX_PAIRS || one && pairs > 1 {
            return Err(NetError::Pairs(pairs));
        }
        if settings.mac.first().is_none_or(|first| first & 1 == 1) {
            let text = settings.mac.map(|byte| format!("{byte:02x}")).join(":");
            return Err(NetError::Group(text));
        }
        if let Some(mtu) = settings.mtu.filter(|mtu| !MTUS.contains(mtu)) {
            return Err(NetError::Mtu(mtu));
        }
        settings.filter.mac = settings.mac_filter.then_some(settings.mac);
        let (taps, offloads, ports) = match backend {
            Backend::Tap(Tap { queues, offloads, .. }) => {
                let taps: Vec<_> = queues.into_iter().map(Arc::new).collect();
                let ports = taps.iter().map(|tap| Port::Tap(tap.clone())).collect();
                (taps, offloads, ports)
            }
            Backend::Stream(peer) => (Vec::new(), 0, vec![Port::Stream(peer)]),
            Backend::Datagrams(peer) => (Vec::new(), 0, vec![Port::Datagrams(peer)]),
        };
        let mut positions = std::mem::take(&mut settings.positions).into_iter();
        let with_memory = |(number, port): (u64, Port)| {
            let at = number.saturating_mul(NET_KEPT);
            let inbox = Inbox::new(&port, inbox::memory(&port, kept, at)?, positions.next());
            let at = at.saturating_add(inbox::KEPT as u64);
            let outbox = Outbox::new(outbox::memory(&port, kept, at)?);
            Ok((port, inbox, outbox))
        };
        let ports = (0..).zip(ports).map(with_memory).collect::<std::io::Result<_>>()?;
        let shared = Shared {
            taps,
            features: AtomicU64::new(0),
            mac: AtomicU64::new(0),
            link: AtomicBool::new(settings.link),
            announce: AtomicBool::new(settings.announce),
            receive: Limit::new(settings.receive, settings.group.clone()),
            transmit: Limit::new(settings.transmit, settings.group.clone()),
            metrics: Metrics::default(),
            settings,
        };
        shared.set_mac(shared.settings.mac);
        let (arrivals, arriving) = one.then(channel).unzip();
        Ok(Self { shared: Arc::new(shared), offloads, ports, arrivals, arriving, begun: false, ended: false })
    }

    /// A handle for the control channel's messages.
    pub fn controller(&self) -> Controller {
        Controller { shared: self.shared.clone(), arrivals: self.arrivals.clone() }
    }
}

/// What the control channel does to a network card. After a call wake the workers; after [`Controller::set_link`] tell the
/// front end that the configuration has changed.
#[derive(Clone, Debug)]
pub struct Controller {
    shared: Arc<Shared>,
    arrivals: Option<Sender<Peer>>,
}

impl Controller {
    /// Another peer of the socket, with the number of this way. With a tap it is closed: nobody would ever take it.
    pub fn attach(&self, socket: OwnedFd, way: u64) {
        if let Some(arrivals) = &self.arrivals {
            let _ = arrivals.send(Peer { socket, way });
        }
    }

    /// Plugs the cable in, or pulls it out.
    pub fn set_link(&self, up: bool) {
        self.shared.link.store(up, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn features(&self) -> u64 {
        config::features(&self.shared.settings, self.offloads)
    }

    fn queues(&self) -> u16 {
        self.shared.settings.pairs.saturating_mul(2).saturating_add(1)
    }

    fn worker_of(&self, queue: u16) -> usize {
        if self.shared.is_control(queue) || queue >= self.shared.settings.pairs.saturating_mul(2) {
            return 0;
        }
        usize::from(queue >> 1)
    }

    fn serves_at_once(&self, queue: u16) -> bool {
        queue & 1 == 1 || self.shared.is_control(queue)
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let ports = std::mem::take(&mut self.ports);
        let mut arriving = self.arriving.take();
        let pair = |(number, (port, inbox, outbox))| {
            let shared = self.shared.clone();
            Box::new(Pair::new(shared, number, port, (inbox, outbox), arriving.take()))
                as Box<dyn QueueWorker>
        };
        (0..).zip(ports).map(pair).collect()
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let Shared { settings, link, announce, .. } = &*self.shared;
        let (link, announce) = (link.load(Ordering::Relaxed), announce.load(Ordering::Relaxed));
        let space = config::space(self.shared.mac(), link, announce, settings.pairs, settings.mtu);
        crate::copy_config(&space, offset, data);
    }

    fn accept_features(&mut self, features: u64) {
        if features != 0 && std::mem::take(&mut self.ended) {
            self.shared.announce.store(false, Ordering::Relaxed);
            self.shared.set_mac(self.shared.settings.mac);
            self.shared.use_pairs(1);
        }
        self.begun |= features != 0;
        self.shared.features.store(features, Ordering::Relaxed);
        self.shared.set_offloads(features);
    }

    fn reset(&mut self) {
        self.ended |= std::mem::take(&mut self.begun);
        self.shared.features.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_card_at_a_tap_keeps_no_peer() {
        let tap = Tap { name: String::new(), queues: vec![tempfile::tempfile().unwrap()], offloads: 0 };
        let card = Net::new(Settings::default(), Backend::Tap(tap), None).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        card.controller().attach(ours.into(), 2);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "it is closed");
    }
}
