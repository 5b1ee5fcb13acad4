//! The way to a process that holds registers, and to its successors: what the proxies of the keyboard controller, the flash chip and
//! the watchdog have in common. The serial port's is its own (`register_device`).
//!
//! Accesses may be numbered: one that was not answered is repeated at the successor, which finds in the state that it was left whether
//! it has been carried out.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::vfio_user::{Client, ClientError};

use super::register_device::RemoteDevice;
use super::reports::Reports;

/// How long an access may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(1);
/// How long accesses then wait for a successor: one that has died often starts after a pause of a second, and takes a while.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long each exchange may take while the first process starts.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// The number stands above the register in the offset of an access.
const NUMBER_SHIFT: u32 = 8;

/// Tells a new process what it must know before the guest reaches it.
pub(super) type Replay<K> = fn(&K, &mut Client) -> Result<(), ClientError>;

/// The connection to such a process, with what is kept for its successors.
pub(super) struct Remote<K> {
    id: String,
    reports: Arc<Reports>,
    /// The eventfd that it signals, if there is one.
    interrupt: Option<OwnedFd>,
    replay: Replay<K>,
    state: Mutex<State<K>>,
    /// A successor is connected, or none will come.
    settled: Condvar,
}

/// Where the connection stands.
#[derive(Default)]
pub(super) struct State<K> {
    client: Option<Client>,
    /// Without a connection: until then accesses wait for a successor.
    until: Option<Instant>,
    pub kept: K,
}

impl<K: Default> Remote<K> {
    /// Without a process.
    pub(super) fn new(
        id: &str,
        interrupt: Option<OwnedFd>,
        reports: Arc<Reports>,
        replay: Replay<K>,
    ) -> Self {
        let (id, state, settled) = (id.to_owned(), Mutex::default(), Condvar::new());
        Self { id, reports, interrupt, replay, state, settled }
    }

    /// Connects the first process, which may still be starting.
    pub(super) fn start(&self, socket: OwnedFd) -> Result<(), ClientError> {
        self.connect(socket, START_DEADLINE)
    }

    fn connect(&self, socket: OwnedFd, patience: Duration) -> Result<(), ClientError> {
        let mut client = Client::connect(socket, &self.id, patience)?;
        if let Some(interrupt) = &self.interrupt {
            client.set_irq(0, Some(interrupt.as_fd()))?;
        }
        client.set_deadline(DEADLINE)?;
        let mut state = self.lock();
        (self.replay)(&state.kept, &mut client)?;
        state.client = Some(client);
        self.settled.notify_all();
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(state: &mut State<K>) {
        if state.client.take().is_some() {
            state.until = Instant::now().checked_add(PATIENCE);
        }
    }

    /// Runs an exchange, if there is a process. None: there is none now.
    pub(super) fn attempt<T>(
        &self,
        state: &mut State<K>,
        exchange: impl FnOnce(&mut Client) -> Result<T, ClientError>,
    ) -> Option<T> {
        let result = exchange(state.client.as_mut()?);
        result
            .inspect_err(|error| {
                Self::forget(state);
                self.reports.device_failed(&self.id, error.to_string());
            })
            .ok()
    }

    /// Runs an exchange, with a successor if it must be. None: nobody has come.
    pub(super) fn exchange<T>(
        &self,
        mut state: MutexGuard<'_, State<K>>,
        mut exchange: impl FnMut(&mut Client) -> Result<T, ClientError>,
    ) -> Option<T> {
        loop {
            if let Some(value) = self.attempt(&mut state, &mut exchange) {
                return Some(value);
            }
            let left = state.until?.checked_duration_since(Instant::now())?;
            let waited = self
                .settled
                .wait_timeout_while(state, left, |state| state.client.is_none() && state.until.is_some());
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Remote<u8> {
    /// Begins an access to a register, 0–255: where it goes in the process's region.
    fn next(&self, register: u64) -> (MutexGuard<'_, State<u8>>, u64) {
        let mut state = self.lock();
        state.kept = state.kept.wrapping_add(1);
        let offset = u64::from(state.kept) << NUMBER_SHIFT | register;
        (state, offset)
    }

    /// Reads from a register; all ones when no process answers.
    pub(super) fn read(&self, register: u64, data: &mut [u8]) {
        let (state, offset) = self.next(register);
        if self.exchange(state, |client| client.read(0, offset, data)).is_none() {
            data.fill(0xFF);
        }
    }

    /// Writes to a register.
    pub(super) fn write(&self, register: u64, data: &[u8]) {
        let (state, offset) = self.next(register);
        self.exchange(state, |client| client.write(0, offset, data));
    }
}

impl<K: Default + Send> RemoteDevice for Remote<K> {
    fn id(&self) -> &str {
        &self.id
    }

    fn replace(&self, socket: OwnedFd) -> Result<(), ClientError> {
        // Two exchanges.
        self.connect(socket, DEADLINE / 2)
    }

    fn disconnect(&self) {
        Self::forget(&mut self.lock());
    }

    fn give_up(&self) {
        let mut state = self.lock();
        (state.client, state.until) = (None, None);
        self.settled.notify_all();
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let state = self.lock();
        let socket = state.client.iter().map(|client| client.as_fd().as_raw_fd());
        socket.chain(self.interrupt.iter().map(AsRawFd::as_raw_fd)).collect()
    }
}
