//! virtio-console with one port (virtio 1.2, 5.3): a byte stream each way, and the terminal's size.

mod service;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::vhost_user::backend::{
    Chain, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, VringError,
    poll_worker::own_event,
};
use nix::sys::epoll::Epoll;
use vm_memory::{Bytes, GuestAddress};

use crate::stream::{End, Ends, Peer};

pub use service::SERVICE;

/// VIRTIO_CONSOLE_F_SIZE: the configuration space has the terminal's size.
const F_SIZE: u64 = 1;
/// receiveq of port 0.
const RECEIVE: usize = 0;
/// transmitq of port 0.
const TRANSMIT: usize = 1;
/// Most requests of a queue before the control thread gets its turn.
const BATCH: u32 = 64;
/// Bytes taken from the guest at once.
const PIECE: usize = 1024;
/// Bytes of the guest that are collected before they are written.
const TOGETHER: usize = 4096;
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

    fn worker_of(&self, _queue: u16) -> usize {
        0
    }

    fn serves_at_once(&self, queue: u16) -> bool {
        usize::from(queue) != RECEIVE
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        let Some((peer, arrivals)) = self.stream.take() else { return Vec::new() };
        let (receive, transmit, left) = (Chain::new(), Chain::new(), self.left.clone());
        let port = Port { peer, arrivals, left, receive, transmit, sending: None, taken: Vec::new() };
        vec![Box::new(PollWorker::new(port, 2))]
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

/// Port 0, served by the worker.
struct Port {
    peer: Peer,
    arrivals: Receiver<Arrival>,
    left: Arc<Mutex<Vec<u8>>>,
    receive: Chain,
    transmit: Chain,
    /// Of the request in `transmit`: segment, and bytes of it already taken.
    sending: Option<(usize, u32)>,
    /// Requests that are taken and may not be written yet: they are not finished before, so that a successor would write
    /// them again.
    taken: Vec<u16>,
}

impl Port {
    /// Writes what was taken, as far as the peer takes it, and finishes the requests. What it has no room for waits here.
    fn flush(&mut self, ring: &mut Vring) {
        self.peer.flush();
        self.taken.drain(..).for_each(|head| ring.finish(head, 0));
    }

    /// Guest to peer. True: there is more.
    fn transmit(&mut self, ring: &mut Vring) -> bool {
        let mut budget = BATCH;
        ring.disable_kicks();
        loop {
            while self.sending.is_some() || ring.next(&mut self.transmit) {
                match self.send(ring) {
                    Ok(true) => {
                        self.taken.push(self.transmit.head());
                        if self.peer.waiting() >= TOGETHER {
                            self.flush(ring);
                        }
                    }
                    Ok(false) => {
                        // No room: an event of the peer, or its patience, brings us back.
                        self.flush(ring);
                        ring.signal();
                        return false;
                    }
                    Err(error) => {
                        self.flush(ring);
                        ring.fail(&error);
                        ring.finish(self.transmit.head(), 0);
                    }
                }
                self.sending = None;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    self.flush(ring);
                    ring.signal();
                    return true;
                }
            }
            self.flush(ring);
            ring.signal();
            if !ring.enable_kicks() {
                return false;
            }
            ring.disable_kicks();
        }
    }

    /// Takes what is left of the request in `transmit`. False: the peer has no room for all of it.
    fn send(&mut self, ring: &Vring) -> Result<bool, VringError> {
        let mut piece = [0; PIECE];
        let (mut index, mut taken) = self.sending.unwrap_or((0, 0));
        while let Some(segment) = self.transmit.readable().get(index) {
            let left = segment.len.saturating_sub(taken);
            if left == 0 {
                (index, taken) = (index.saturating_add(1), 0);
                continue;
            }
            let len = usize::try_from(left).unwrap_or(PIECE).min(PIECE).min(self.peer.room());
            self.sending = Some((index, taken));
            if len == 0 {
                self.peer.flush();
                if self.peer.room() == 0 {
                    return Ok(false);
                }
                continue;
            }
            let Some(bytes) = piece.get_mut(..len) else { return Ok(true) };
            let address = segment.address.saturating_add(u64::from(taken));
            let outside = |_| VringError::Request("a console's output does not lie in guest memory");
            ring.ram().memory().read_slice(bytes, GuestAddress(address)).map_err(outside)?;
            self.peer.say(bytes);
            if self.peer.waiting() >= TOGETHER {
                self.peer.flush();
            }
            taken = taken.saturating_add(u32::try_from(len).unwrap_or(left));
        }
        Ok(true)
    }

    /// Peer to guest, as long as there are bytes and buffers. True: there is more.
    fn receive(&mut self, ring: &mut Vring) -> bool {
        let mut budget = BATCH;
        while let Some(input) = self.peer.ready_input() {
            if !ring.next(&mut self.receive) {
                // The guest has no buffer: it kicks when it has one.
                if ring.enable_kicks() {
                    continue;
                }
                break;
            }
            let head = self.receive.head();
            let Some(segment) = self.receive.writable().first() else {
                ring.finish(head, 0);
                continue;
            };
            let buffer = match ring.ram().lend(segment.address, u64::from(segment.len), Direction::Write) {
                Ok(buffer) => buffer,
                Err(error) => {
                    ring.fail(&error.into());
                    ring.finish(head, 0);
                    break;
                }
            };
            let result = buffer.read_from(input);
            match self.peer.settle_read(result) {
                0 => ring.put_back(head),
                count => ring.finish(head, u32::try_from(count).unwrap_or(segment.len)),
            }
            budget = budget.saturating_sub(1);
            if budget == 0 {
                ring.signal();
                return true;
            }
        }
        ring.signal();
        false
    }
}

impl QueueHandler for Port {
    fn serve(&mut self, rings: &mut [Option<Vring>], epoll: &Epoll) -> io::Result<Next> {
        while let Ok(arrival) = self.arrivals.try_recv() {
            match arrival {
                Arrival::Peer(stream) => self.peer.attach(stream),
                Arrival::Said(bytes) => self.peer.say(&bytes),
            }
        }
        self.peer.woken();
        self.peer.expire(Instant::now());
        let mut more = false;
        if let Some(Some(ring)) = rings.get_mut(TRANSMIT) {
            more |= self.transmit(ring);
        }
        if let Some(Some(ring)) = rings.get_mut(RECEIVE) {
            more |= self.receive(ring);
        }
        self.peer.watch(epoll, own_event);
        Ok(match self.peer.deadline() {
            _ if more => Next::Soon,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis();
                Next::Within(u16::try_from(left).unwrap_or(u16::MAX).saturating_add(1))
            }
            None => Next::Event,
        })
    }

    fn waits_for_host(&self) -> bool {
        self.sending.is_some()
    }

    fn release(&mut self, ring: &mut Vring) {
        if usize::from(ring.index()) == TRANSMIT && self.sending.take().is_some() {
            // What the peer has no room for now is lost; the ring must not wait for it.
            ring.finish(self.transmit.head(), 0);
            ring.signal();
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.peer.finish(LAST_OUTPUT);
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = self.peer.take_waiting();
    }
}
