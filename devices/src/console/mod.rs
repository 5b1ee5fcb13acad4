//! virtio-console (virtio 1.2, 5.3): a byte stream each way, and the terminal's size.
//!
//! | file | what |
//! | --- | --- |
//! | `mod` | a console: one port, without VIRTIO_CONSOLE_F_MULTIPORT |
//! | `port` | the queues of a port |
//! | `ports` | a device of named ports, with it |

mod port;
mod ports;
mod service;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::vhost_user::backend::{
    Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, poll_worker::own_event,
};
use nix::sys::epoll::Epoll;
use port::Port;

use crate::stream::{End, Ends, Peer};

pub use ports::{MOST_PORTS, NamedPort, Ports, Sockets};
pub use service::SERVICE;

/// VIRTIO_CONSOLE_F_SIZE: the configuration space has the terminal's size.
const F_SIZE: u64 = 1;
/// receiveq of port 0.
const RECEIVE: usize = 0;
/// transmitq of port 0.
const TRANSMIT: usize = 1;
/// How long the last output may take when the process stops.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

/// A console.
#[derive(Debug)]
pub struct Console {
    /// Columns in the low half, rows in the high half.
    size: Arc<AtomicU32>,
    arrivals: Sender<Arrival>,
    left: Arc<Mutex<Vec<u8>>>,
    /// What the worker will own.
    stream: Option<(Peer, Receiver<Arrival>)>,
}

/// What comes by the control channel.
enum Arrival {
    Peer(End),
    /// What the guest said to a predecessor.
    Said(Vec<u8>),
}

impl Console {
    /// A console with its first peer and the size of its terminal.
    pub fn new(first: Ends, size: Option<(u16, u16)>) -> Self {
        let (sender, arrivals) = channel();
        let (columns, rows) = size.unwrap_or((80, 24));
        let stream = Some((Peer::new(first), arrivals));
        let console = Self { size: Arc::default(), arrivals: sender, left: Arc::default(), stream };
        console.controller().resize(columns, rows);
        console
    }

    /// A handle for the control channel's messages.
    pub fn controller(&self) -> Controller {
        Controller { size: self.size.clone(), arrivals: self.arrivals.clone(), left: self.left.clone() }
    }
}

/// What the control channel does to a console. After a call wake the workers; after a resize tell the front end.
#[derive(Clone, Debug)]
pub struct Controller {
    size: Arc<AtomicU32>,
    arrivals: Sender<Arrival>,
    left: Arc<Mutex<Vec<u8>>>,
}

impl Controller {
    /// A stream takes the place of the present peer.
    pub fn attach(&self, stream: OwnedFd) {
        let _ = self.arrivals.send(Arrival::Peer(End::new(stream)));
    }

    /// What the guest said to a predecessor and nobody has read.
    pub fn take(&self, said: Vec<u8>) {
        let _ = self.arrivals.send(Arrival::Said(said));
    }

    /// What the guest said and nobody has read, once the worker has ended.
    pub fn left(&self) -> Vec<u8> {
        std::mem::take(&mut self.left.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The terminal has another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.size.store(u32::from(rows) << 16 | u32::from(columns), Ordering::Relaxed);
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queues(&self) -> u16 {
        2
    }

    fn serves_at_once(&self, queue: u16) -> bool {
        usize::from(queue) != RECEIVE
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let Some((peer, arrivals)) = self.stream.take() else { return Vec::new() };
        let worker = Worker { port: Port::new(peer), arrivals, left: self.left.clone() };
        vec![Box::new(PollWorker::new(worker, 2))]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_console_config: cols u16, rows u16, max_nr_ports u32, emerg_wr u32.
        let mut bytes = [0; 12];
        if let Some((size, rest)) = bytes.split_first_chunk_mut() {
            *size = self.size.load(Ordering::Relaxed).to_le_bytes();
            rest.fill(0);
        }
        crate::copy_config(&bytes, offset, data);
    }
}

/// Serves port 0.
struct Worker {
    port: Port,
    arrivals: Receiver<Arrival>,
    left: Arc<Mutex<Vec<u8>>>,
}

impl QueueHandler for Worker {
    fn serve(&mut self, rings: &mut [Option<Vring>], epoll: &Epoll) -> io::Result<Next> {
        while let Ok(arrival) = self.arrivals.try_recv() {
            match arrival {
                Arrival::Peer(stream) => self.port.peer.attach(stream),
                Arrival::Said(bytes) => self.port.peer.say(&bytes),
            }
        }
        self.port.peer.woken();
        self.port.peer.expire(Instant::now());
        let mut more = false;
        if let Some(Some(ring)) = rings.get_mut(TRANSMIT) {
            more |= self.port.transmit(ring);
        }
        if let Some(Some(ring)) = rings.get_mut(RECEIVE) {
            more |= self.port.receive(ring);
        }
        self.port.peer.watch(epoll, own_event);
        Ok(match self.port.peer.deadline() {
            _ if more => Next::Soon,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis();
                Next::Within(u16::try_from(left).unwrap_or(u16::MAX).saturating_add(1))
            }
            None => Next::Event,
        })
    }

    fn waits_for_host(&self) -> bool {
        self.port.waits()
    }

    fn release(&mut self, ring: &mut Vring) {
        if usize::from(ring.index()) == TRANSMIT {
            self.port.give_up(ring);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.port.peer.finish(LAST_OUTPUT);
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = self.port.peer.take_waiting();
    }
}
