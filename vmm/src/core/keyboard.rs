//! The keyboard controller, ports 60 and 64, whose registers another process holds.
//!
//! What resets the machine is acted upon here: no device process has a say in that. Accesses are numbered, and one that was not
//! answered is repeated at the successor, which finds in the state that it was left whether it has been carried out.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::MachineEnd;
use bulkhead_ipc::vfio_user::{Client, ClientError};

use super::register_device::RemoteDevice;
use super::reports::Reports;
use crate::machine::{IsaDevice, PortRange};

/// IRQ 1.
pub(super) const IRQ: u8 = 1;
const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
/// Command: write the output port, whose bit 0 low holds the processor in reset.
const WRITE_OUTPUT_PORT: u8 = 0xD1;
/// Commands from here on pulse the low bits of the output port that are zero in them.
const PULSE: u8 = 0xF0;
const NOT_RESET: u8 = 1 << 0;
/// How long an access may take, and how long accesses then wait for a successor.
const DEADLINE: Duration = Duration::from_secs(1);
/// How long each exchange may take while the first process starts.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// The controller.
pub(super) struct Keyboard {
    id: String,
    interrupt: OwnedFd,
    reports: Arc<Reports>,
    state: Mutex<State>,
    /// A successor is connected, or none will come.
    settled: Condvar,
}

#[derive(Default)]
struct State {
    client: Option<Client>,
    /// Without a connection: until then accesses wait for a successor.
    patience: Option<Instant>,
    /// Of the access that was begun last.
    number: u8,
    /// The next byte at port 60 is for the output port.
    output_port: bool,
}

impl Keyboard {
    /// Connects the first process, which may still be starting; `interrupt` is an eventfd that the caller connects to IRQ 1.
    pub(super) fn connect(
        id: &str,
        socket: OwnedFd,
        interrupt: OwnedFd,
        reports: Arc<Reports>,
    ) -> Result<Self, ClientError> {
        let (id, state, settled) = (id.to_owned(), Mutex::default(), Condvar::new());
        let this = Self { id, interrupt, reports, state, settled };
        this.link(socket, START_DEADLINE)?;
        Ok(this)
    }

    fn link(&self, socket: OwnedFd, patience: Duration) -> Result<(), ClientError> {
        let mut client = Client::connect(socket, &self.id, patience)?;
        client.set_irq(0, Some(self.interrupt.as_fd()))?;
        client.set_deadline(DEADLINE)?;
        self.lock().client = Some(client);
        self.settled.notify_all();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(state: &mut State) {
        if state.client.take().is_some() {
            state.patience = Instant::now().checked_add(DEADLINE);
        }
    }

    /// Runs an exchange, with a successor if it must be.
    fn exchange(
        &self,
        mut state: MutexGuard<'_, State>,
        mut exchange: impl FnMut(&mut Client) -> Result<(), ClientError>,
    ) -> Option<()> {
        loop {
            match state.client.as_mut().map(&mut exchange) {
                Some(Ok(())) => return Some(()),
                Some(Err(error)) => {
                    Self::forget(&mut state);
                    self.reports.device_failed(&self.id, error.to_string());
                }
                None => {
                    let left = state.patience?.checked_duration_since(Instant::now())?;
                    let waited = self.settled.wait_timeout(state, left);
                    (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Begins an access: where it goes in the device's region.
    fn next(state: &mut State, port: u16) -> u64 {
        state.number = state.number.wrapping_add(1);
        u64::from(state.number) << 1 | u64::from(port == COMMAND)
    }
}

impl IsaDevice for Keyboard {
    fn name(&self) -> &str {
        &self.id
    }

    fn ports(&self) -> Vec<PortRange> {
        [DATA, COMMAND].map(|first| PortRange { first, count: 1 }).into()
    }

    fn irq(&self) -> Option<u8> {
        Some(IRQ)
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        let mut state = self.lock();
        let offset = Self::next(&mut state, port);
        if self.exchange(state, |client| client.read(0, offset, data)).is_none() {
            data.fill(0xFF);
        }
    }

    fn write(&self, port: u16, data: &[u8]) {
        let [value] = *data else { return };
        let mut state = self.lock();
        let for_output_port =
            std::mem::replace(&mut state.output_port, port == COMMAND && value == WRITE_OUTPUT_PORT);
        let takes_reset = if port == COMMAND { value >= PULSE } else { for_output_port };
        if takes_reset && value & NOT_RESET == 0 {
            tracing::debug!("the guest resets the machine by the keyboard controller");
            return self.reports.end(MachineEnd::Reset);
        }
        let offset = Self::next(&mut state, port);
        self.exchange(state, |client| client.write(0, offset, data));
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.output_port = false;
        self.exchange(state, Client::reset);
    }
}

impl RemoteDevice for Keyboard {
    fn replace(&self, socket: OwnedFd) -> Result<(), ClientError> {
        self.link(socket, DEADLINE)
    }

    fn disconnect(&self) {
        Self::forget(&mut self.lock());
    }

    fn give_up(&self) {
        let mut state = self.lock();
        (state.client, state.patience) = (None, None);
        self.settled.notify_all();
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let state = self.lock();
        let socket = state.client.as_ref().map(|client| client.as_fd().as_raw_fd());
        socket.into_iter().chain([self.interrupt.as_raw_fd()]).collect()
    }
}

#[cfg(test)]
#[path = "keyboard_tests.rs"]
mod tests;
