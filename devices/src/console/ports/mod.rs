//! virtio-console with VIRTIO_CONSOLE_F_MULTIPORT (virtio 1.2, 5.3): named byte streams, as guest agents use them. Linux calls them
//! `/dev/vportNpM`, and udev `/dev/virtio-ports/NAME`.
//!
//! Queues 0 and 1 would be those of port 0, the console of a driver that knows no ports; there is none. 2 and 3 are the control
//! queues, 4 and 5 those of port 1, and so on.
//!
//! A guest sees who is there: its end of a port hangs up while nobody has the host's. A peer that does not read holds up its own
//! port alone, for as long as it takes. Bytes for a guest that has not opened the port wait with the peer.
//!
//! What a successor must know is in a file: the facts of [`control`], and bytes that were taken from the guest and not written. It is
//! read when the first queue starts, for only then the predecessor has ended.

mod control;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use bulkhead_ipc::vhost_user::backend::{
    Chain, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, VringError,
    poll_worker::own_event,
};
use nix::sys::epoll::Epoll;
use tracing::{debug, warn};
use vm_memory::{Bytes, GuestAddress};

use super::LAST_OUTPUT;
use super::port::{Port, discard};
use crate::stream::{CAPACITY, End, Ends, Peer};
use control::{Event, MESSAGE, State};

/// VIRTIO_CONSOLE_F_MULTIPORT.
const F_MULTIPORT: u64 = 1 << 1;
/// transmitq of port 0: what a driver says that knows no ports.
const NOBODY: usize = 1;
/// The control receiveq: messages to the driver.
const TO_DRIVER: usize = 2;
/// The control transmitq: messages of the driver.
const FROM_DRIVER: usize = 3;
/// The most ports of a device: with theirs the queues are 32.
pub const MOST_PORTS: usize = 15;
/// Most control messages before the control thread gets its turn.
const BATCH: u32 = 64;
/// Bytes of the file that the facts may have; what was not written follows, [`CAPACITY`] bytes for each port.
const FACTS: usize = 4096;

/// A port with what is at its host's end at the start.
#[derive(Debug)]
pub struct NamedPort {
    /// Its name in the guest.
    pub name: String,
    /// It is a console there.
    pub console: bool,
    /// Who is there.
    pub ends: Ends,
}

/// A device of named ports.
#[derive(Debug)]
pub struct Ports {
    count: usize,
    /// The driver knows ports.
    multiport: Arc<AtomicBool>,
    /// The device was reset, and the worker has not seen it.
    reset: Arc<AtomicBool>,
    arrivals: Sender<(u16, End)>,
    /// What the worker will own.
    worker: Option<Worker>,
}

/// A handle for the control channel's messages: another stream takes the place of a port's peer. Wake the workers afterwards.
#[derive(Clone, Debug)]
pub struct Sockets(Sender<(u16, End)>);

impl Sockets {
    /// A stream for the port of this index, from 0.
    pub fn attach(&self, port: u16, stream: OwnedFd) {
        let _ = self.0.send((port, End::new(stream)));
    }
}

impl Ports {
    /// A device with these ports, [`MOST_PORTS`] at most, the first of which is port 1. `file` keeps what a successor must know.
    pub fn new(ports: Vec<NamedPort>, file: Option<File>) -> Self {
        let (sender, arrivals) = channel();
        let (multiport, reset) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (mut names, mut consoles) = (Vec::new(), Vec::new());
        let mut ends = Vec::new();
        for port in ports.into_iter().take(MOST_PORTS) {
            names.push(port.name);
            consoles.push(port.console);
            ends.push(Port::new(Peer::patient(port.ends)));
        }
        let count = names.len();
        let worker = Worker {
            state: State::new(count),
            present: vec![false; count],
            names,
            consoles,
            ports: ends,
            file,
            loaded: false,
            arrivals,
            multiport: multiport.clone(),
            reset: reset.clone(),
            chain: Chain::new(),
        };
        Self { count, multiport, reset, arrivals: sender, worker: Some(worker) }
    }

    /// A handle for the control channel's messages.
    pub fn sockets(&self) -> Sockets {
        Sockets(self.arrivals.clone())
    }
}

impl VirtioDevice for Ports {
    fn name(&self) -> &'static str {
        "ports"
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queues(&self) -> u16 {
        u16::try_from(self.count).unwrap_or_default().saturating_add(2).saturating_mul(2)
    }

    fn serves_at_once(&self, queue: u16) -> bool {
        // The even ones are buffers for what may never come.
        queue % 2 == 1
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let queues = self.queues();
        match self.worker.take() {
            Some(worker) => vec![Box::new(PollWorker::new(worker, queues))],
            None => Vec::new(),
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_console_config: cols u16, rows u16, max_nr_ports u32, emerg_wr u32. Port 0 counts.
        let ports = u32::try_from(self.count).unwrap_or_default().saturating_add(1);
        let mut bytes = [0; 12];
        if let Some(field) = bytes.get_mut(4..8) {
            field.copy_from_slice(&ports.to_le_bytes());
        }
        crate::copy_config(&bytes, offset, data);
    }

    fn accept_features(&mut self, features: u64) {
        self.multiport.store(features & F_MULTIPORT != 0, Ordering::Relaxed);
    }

    fn reset(&mut self) {
        self.reset.store(true, Ordering::Relaxed);
    }
}

/// Serves all queues.
#[derive(Debug)]
struct Worker {
    names: Vec<String>,
    /// Which of them are consoles.
    consoles: Vec<bool>,
    ports: Vec<Port>,
    /// Whether somebody was at the host's end of each port when it was looked at last.
    present: Vec<bool>,
    state: State,
    file: Option<File>,
    /// The file was read.
    loaded: bool,
    arrivals: Receiver<(u16, End)>,
    multiport: Arc<AtomicBool>,
    reset: Arc<AtomicBool>,
    chain: Chain,
}

/// The queues of a port, by its index.
fn queues(index: usize) -> (usize, usize) {
    let receive = index.saturating_add(2).saturating_mul(2);
    (receive, receive.saturating_add(1))
}

/// Where a port's unwritten bytes are in the file.
fn place_of(index: usize) -> u64 {
    (FACTS as u64).saturating_add((index as u64).saturating_mul(CAPACITY as u64))
}

impl Worker {
    /// Takes over what a predecessor knew, once.
    fn load(&mut self) {
        self.loaded = true;
        let Some(file) = &self.file else { return };
        let mut bytes = [0; FACTS];
        let read = file.read_at(&mut bytes, 0).unwrap_or(0);
        if read == 0 {
            return;
        }
        // The predecessor may have been broken into.
        let Some(state) = postcard::from_bytes::<State>(bytes.get(..read).unwrap_or_default())
            .ok()
            .filter(|state| state.ports.len() == self.ports.len())
        else {
            warn!(
                "the state of the ports makes no sense: the guest's ports stand still until its driver begins anew"
            );
            return;
        };
        self.state = state;
        for (index, (port, known)) in self.ports.iter_mut().zip(&mut self.state.ports).enumerate() {
            let sent = known.sent.take();
            port.set_place(sent.and_then(|(segment, taken)| Some((usize::try_from(segment).ok()?, taken))));
            let mut left =
                vec![0; usize::try_from(std::mem::take(&mut known.left)).unwrap_or(0).min(CAPACITY)];
            if !left.is_empty() {
                match file.read_exact_at(&mut left, place_of(index)) {
                    Ok(()) => port.peer.say_first(&left),
                    Err(error) => warn!(%error, "bytes of a predecessor are lost"),
                }
            }
        }
        self.store();
    }

    fn store(&self) {
        let Some(file) = &self.file else { return };
        let mut bytes = [0; FACTS];
        let stored = match postcard::to_slice(&self.state, &mut bytes) {
            Ok(used) => file.write_all_at(used, 0),
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = stored {
            // A process that dies now leaves what it knew before.
            warn!(%error, "the state of the ports cannot be stored");
        }
    }

    /// Streams that have come, and peers that have come or gone.
    fn look_at_peers(&mut self) {
        while let Ok((index, stream)) = self.arrivals.try_recv() {
            let Some(port) = self.ports.get_mut(usize::from(index)) else { continue };
            if port.peer.is_present() {
                // Half of what was said to another is of no use.
                port.peer.take_waiting();
            }
            port.peer.attach(stream);
        }
        for (port, present) in self.ports.iter_mut().zip(&mut self.present) {
            port.peer.woken();
            let now = port.peer.is_present();
            if *present && !now {
                debug!("nobody is at the other end of a port any more");
                port.peer.take_waiting();
            }
            *present = now;
        }
    }

    /// Messages of the driver. True: there is more.
    fn hear(&mut self, ring: &mut Vring) -> bool {
        let mut changed = false;
        let mut more = true;
        for _ in 0..BATCH {
            if !ring.next(&mut self.chain) {
                more = false;
                break;
            }
            let mut message = [0; MESSAGE];
            match message_of(&self.chain, ring, &mut message) {
                Ok(true) => {
                    self.state.hear(message);
                    changed = true;
                }
                Ok(false) => {}
                Err(error) => ring.fail(&error),
            }
            ring.finish(self.chain.head(), 0);
        }
        if changed {
            // Before the driver knows: a message that is heard twice does no harm, one that is forgotten does.
            self.store();
        }
        ring.signal();
        more || ring.enable_kicks()
    }

    /// Messages to the driver, as long as it has buffers. True: there is more.
    fn tell(&mut self, ring: &mut Vring) -> bool {
        let mut changed = false;
        let mut more = false;
        for _ in 0..BATCH {
            let is = |list: &[bool], index: usize| list.get(index).copied().unwrap_or(false);
            let next = self.state.next(|index| is(&self.present, index), |index| is(&self.consoles, index));
            let Some(event) = next else {
                more = false;
                break;
            };
            if !ring.next(&mut self.chain) {
                more = ring.enable_kicks();
                if more {
                    continue;
                }
                break;
            }
            more = true;
            let name = match event {
                Event::Name(index) => self.names.get(index).map_or("", String::as_str),
                _ => "",
            };
            let written = put_message(&self.chain, ring, &event.encode(), name.as_bytes());
            match written {
                Ok(written) => {
                    // One that a driver has no room for is no less said: it would not have it the next time either.
                    self.state.said(event);
                    ring.finish(self.chain.head(), written);
                    changed = true;
                }
                Err(error) => {
                    ring.fail(&error);
                    ring.finish(self.chain.head(), 0);
                    more = false;
                    break;
                }
            }
        }
        ring.signal();
        if changed {
            // After the driver can know: as in `hear`.
            self.store();
        }
        more
    }

    /// Bytes of all ports. True: there is more.
    fn move_bytes(&mut self, rings: &mut [Option<Vring>]) -> bool {
        let mut more = false;
        for (index, port) in self.ports.iter_mut().enumerate() {
            let (receive, transmit) = queues(index);
            if let Some(Some(ring)) = rings.get_mut(transmit) {
                more |= if port.peer.is_present() { port.transmit(ring) } else { port.discard(ring) };
            }
            let open = self.state.ports.get(index).is_some_and(|port| port.guest_open);
            if let Some(Some(ring)) = rings.get_mut(receive).filter(|_| open) {
                more |= port.receive(ring);
            }
        }
        more
    }
}

/// Reads a message of the driver. False: it is shorter than one.
fn message_of(chain: &Chain, ring: &Vring, message: &mut [u8; MESSAGE]) -> Result<bool, VringError> {
    let mut filled = 0;
    for segment in chain.readable() {
        let Some(space) = message.get_mut(filled..).filter(|space| !space.is_empty()) else { break };
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(space.len());
        let Some(space) = space.get_mut(..len) else { break };
        let outside = |_| VringError::Request("a console's control message does not lie in guest memory");
        ring.ram().memory().read_slice(space, GuestAddress(segment.address)).map_err(outside)?;
        filled = filled.saturating_add(len);
    }
    Ok(filled == MESSAGE)
}

/// Writes a message to the driver, as much of it as there is room for; returns the number of bytes.
fn put_message(chain: &Chain, ring: &Vring, message: &[u8], name: &[u8]) -> Result<u32, VringError> {
    let bytes = [message, name].concat();
    let mut rest = bytes.as_slice();
    for segment in chain.writable() {
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(rest.len());
        let Some((part, after)) = rest.split_at_checked(len) else { break };
        let outside = |_| VringError::Request("a console's control buffer does not lie in guest memory");
        ring.ram().memory().write_slice(part, GuestAddress(segment.address)).map_err(outside)?;
        rest = after;
    }
    Ok(u32::try_from(bytes.len().saturating_sub(rest.len())).unwrap_or(0))
}

impl QueueHandler for Worker {
    fn prepare(&mut self, _epoll: &Epoll) -> io::Result<Vec<RawFd>> {
        Ok(self.file.iter().map(AsRawFd::as_raw_fd).collect())
    }

    fn serve(&mut self, rings: &mut [Option<Vring>], epoll: &Epoll) -> io::Result<Next> {
        if rings.iter().any(Option::is_some) {
            // A reset before the first queue ran is none: that is how a connection begins.
            let reset = self.reset.swap(false, Ordering::Relaxed);
            if !self.loaded {
                self.load();
            } else if reset {
                self.state = State::new(self.ports.len());
                self.ports.iter_mut().for_each(|port| port.set_place(None));
                self.store();
            }
        }
        self.look_at_peers();
        let mut more = false;
        if let Some(Some(ring)) = rings.get_mut(NOBODY) {
            more |= discard(&mut self.chain, ring);
        }
        if self.multiport.load(Ordering::Relaxed) {
            if let Some(Some(ring)) = rings.get_mut(FROM_DRIVER) {
                more |= self.hear(ring);
            }
            more |= self.move_bytes(rings);
            if let Some(Some(ring)) = rings.get_mut(TO_DRIVER) {
                more |= self.tell(ring);
            }
        }
        for port in &mut self.ports {
            port.peer.watch(epoll, own_event);
        }
        Ok(if more { Next::Soon } else { Next::Event })
    }

    fn waits_for_host(&self) -> bool {
        self.ports.iter().any(Port::waits)
    }

    fn release(&mut self, ring: &mut Vring) {
        let number = usize::from(ring.index());
        let port = self.ports.iter_mut().enumerate().find(|(index, _)| queues(*index).1 == number);
        if let Some((_, port)) = port {
            port.put_back(ring);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.loaded {
            // It has served nobody.
            return;
        }
        let Some(file) = &self.file else {
            self.ports.iter_mut().for_each(|port| port.peer.finish(LAST_OUTPUT));
            return;
        };
        for (index, (port, known)) in self.ports.iter_mut().zip(&mut self.state.ports).enumerate() {
            port.peer.flush();
            let place = port.place();
            known.sent = place.and_then(|(segment, taken)| Some((u32::try_from(segment).ok()?, taken)));
            let left = port.peer.take_waiting();
            match file.write_all_at(&left, place_of(index)) {
                Ok(()) => known.left = u32::try_from(left.len()).unwrap_or(0),
                Err(error) => warn!(%error, "bytes of the guest are lost"),
            }
        }
        self.store();
    }
}
