//! A serial port whose registers live in another process: the core's proxy for an [`IsaDevice`] behind vfio-user.
//!
//! Writes are posted. A read is answered from the device's shadow page where that is exact (see
//! [`bulkhead_ipc::vfio_user::shadow`]), else by a round trip with a deadline. After a failure accesses wait for
//! [`RegisterDevice::replace`] to bring a new process, and are repeated there; the guest's settings are written to it before
//! that, from a journal of the registers that only change by writing, and so are the characters that the old process had not passed
//! on. What is read from RBR and written to THR is numbered: a successor finds in the memory that it was left what its predecessor has
//! carried out, and does it no second time. When none has come within the deadline of an access,
//! the port reads all ones and drops writes, as an empty slot does, and no access waits until there is a successor.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::vfio_user::shadow::ShadowView;
use bulkhead_ipc::vfio_user::{Client, ClientError, Command, Fault};

use crate::machine::{IsaDevice, PortRange};

/// Ports of a 16550.
const PORTS: u16 = 8;
/// In an offset the number of a character, 48 bits, stands above the port.
const NUMBER_SHIFT: u32 = 3;
const REGION_SIZE: u64 = 1 << 51;

/// The region that holds the ports, and the one that is the shadow page.
const REGION_PORTS: u32 = 0;
const REGION_SHADOW: u32 = 1;

/// Characters that are kept for a successor, at the most.
const KEPT: usize = 64 << 10;

const THR: u16 = 0;
const LCR: u16 = 3;
const DLAB: u8 = 1 << 7;
const LOOP: u8 = 1 << 4;
/// FCR's self-clearing bits.
const FCR_RESETS: u8 = 0x06;

/// Which port a device answers and how patient the core is.
#[derive(Debug, Clone)]
pub struct RegisterDeviceConfig {
    /// What to call it in messages.
    pub name: String,
    /// First of its eight ports: 3F8 for the first serial port.
    pub first_port: u16,
    /// The ISA interrupt that the caller has connected the eventfd to: 4 for the first serial port.
    pub irq: u8,
    /// How long an access may take before the device counts as failed, and how long accesses then wait for a successor.
    pub deadline: Duration,
    /// How long the exchanges of a connection's start may take in all: the first process may not even be there yet.
    pub start_deadline: Duration,
}

impl RegisterDeviceConfig {
    /// The first serial port of a PC: 3F8, IRQ 4; one second for an access, ten for the start.
    pub fn com1(name: &str) -> Self {
        let (deadline, start_deadline) = (Duration::from_secs(1), Duration::from_secs(10));
        Self { name: name.to_owned(), first_port: 0x3f8, irq: 4, deadline, start_deadline }
    }
}

/// Called once for each connection that fails, from the thread that noticed.
pub type OnFailure = Box<dyn Fn(&ClientError) + Send + Sync>;

/// A serial port in another process.
pub struct RegisterDevice {
    config: RegisterDeviceConfig,
    interrupt: OwnedFd,
    on_failure: OnFailure,
    state: Mutex<State>,
    /// A successor is connected, or none will come.
    settled: Condvar,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Without a link: until then accesses wait for a successor.
    patience: Option<Instant>,
    journal: Journal,
    /// How often RBR was read.
    reads: u64,
    /// How many characters were sent, and the last of them.
    characters: u64,
    last: VecDeque<u8>,
}

/// A connection that has not failed.
struct Link {
    client: Client,
    shadow: Option<ShadowView>,
    /// Writes posted so far, modulo 2^16.
    posted: u16,
    /// How many of the last of them were to THR.
    streamed: u32,
}

/// The registers that hold what was written to them, as the guest sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Journal {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    /// Divisor latch, once it was written.
    divisor: [Option<u8>; 2],
}

impl State {
    /// Keeps a character for a successor; its number.
    fn keep(&mut self, character: u8) -> u64 {
        self.characters = self.characters.wrapping_add(1);
        if self.last.len() >= KEPT {
            self.last.pop_front();
        }
        self.last.push_back(character);
        self.characters
    }
}

impl Journal {
    fn dlab(&self) -> bool {
        self.lcr & DLAB != 0
    }

    /// Notes a write; true when it is a character to be sent, which changes no register and does not come back.
    fn note(&mut self, offset: u16, value: u8) -> bool {
        match offset {
            0 if self.dlab() => self.divisor[0] = Some(value),
            0 => return self.mcr & LOOP == 0,
            1 if self.dlab() => self.divisor[1] = Some(value),
            1 => self.ier = value,
            2 => self.fcr = value & !FCR_RESETS,
            3 => self.lcr = value,
            4 => self.mcr = value,
            7 => self.scr = value,
            _ => {}
        }
        false
    }

    /// What RESETDRV leaves: divisor latch and scratchpad keep their values (PC16550D, table III).
    fn reset(&mut self) {
        *self = Self { scr: self.scr, divisor: self.divisor, ..Self::default() };
    }

    /// The writes that bring a chip from its reset to this state, and those after which characters can be sent. IER comes last:
    /// enabling the transmitter interrupt raises it, so that a driver that was waiting goes on.
    fn replay(&self) -> [Vec<(u16, u8)>; 2] {
        let divisor = [(0, self.divisor[0]), (1, self.divisor[1])];
        let latch = divisor.into_iter().filter_map(|(offset, value)| value.map(|value| (offset, value)));
        let line = std::iter::once((LCR, self.lcr | DLAB)).chain(latch);
        let line = line.chain([(LCR, self.lcr & !DLAB), (2, self.fcr)]).collect();
        [line, vec![(7, self.scr), (4, self.mcr), (1, self.ier), (LCR, self.lcr)]]
    }
}

impl Link {
    /// The interrupt is left unconnected: a device takes no input before it is connected.
    fn connect(
        config: &RegisterDeviceConfig,
        socket: OwnedFd,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        // Two exchanges, and then one for each region.
        let end = end_of(patience);
        let mut client = Client::connect(socket, &config.name, patience / 2)?;
        client.set_deadline(left(end))?;
        let unexpected = |field, expected, received| ClientError {
            device: config.name.clone(),
            command: Command::DeviceGetRegionInfo,
            fault: Fault::Unexpected { field, expected, received },
        };
        let ports = client.region_info(REGION_PORTS)?;
        if ports.size != REGION_SIZE {
            return Err(unexpected("size", REGION_SIZE, ports.size));
        }
        client.set_deadline(left(end))?;
        let shadow = if client.info().num_regions > REGION_SHADOW { shadow(&mut client)? } else { None };
        client.set_deadline(config.deadline)?;
        Ok(Self { client, shadow, posted: 0, streamed: 0 })
    }

    /// Writes to a register: a character with its number, anything else without.
    fn post(&mut self, offset: u16, value: u8, number: Option<u64>) -> Result<(), ClientError> {
        let at = u64::from(offset) | number.unwrap_or(0) << NUMBER_SHIFT;
        self.client.post(REGION_PORTS, at, &[value])?;
        self.posted = self.posted.wrapping_add(1);
        self.streamed = if number.is_some() { self.streamed.saturating_add(1) } else { 0 };
        Ok(())
    }

    /// Reads a register, RBR for the time that `number` says.
    fn read(&mut self, offset: u16, number: u64) -> Result<u8, ClientError> {
        if let Some(value) = self.shadowed(offset) {
            return Ok(value);
        }
        let (mut data, at) = ([0], u64::from(offset) | number << NUMBER_SHIFT);
        self.client.read(REGION_PORTS, at, &mut data).map(|()| data[0])
    }

    /// What the device would answer, where it has promised so.
    fn shadowed(&self, offset: u16) -> Option<u8> {
        let register = match offset {
            5 => 0,
            1 => 1,
            6 => 2,
            _ => return None,
        };
        self.shadow.as_ref()?.load().answer(register, self.posted, self.streamed)
    }
}

fn end_of(patience: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(patience).unwrap_or(now)
}

fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}

/// Maps the shadow page; a device that refuses it is read without.
fn shadow(client: &mut Client) -> Result<Option<ShadowView>, ClientError> {
    match client.map_shadow(REGION_SHADOW) {
        Err(ClientError { fault: Fault::Refused(_), .. }) => Ok(None),
        result => result,
    }
}

impl RegisterDevice {
    /// Connects to the device's process over `socket`; `interrupt` is an eventfd that the caller has connected to the
    /// interrupt controller as an edge (an irqfd without resample). Waits for the device at most one start deadline, and one for the interrupt.
    ///
    /// # Errors
    /// The device does not speak the protocol, has no eight ports, or misses a deadline.
    pub fn connect(
        config: RegisterDeviceConfig,
        socket: OwnedFd,
        interrupt: OwnedFd,
        on_failure: OnFailure,
    ) -> Result<Self, ClientError> {
        let mut link = Link::connect(&config, socket, config.start_deadline)?;
        link.client.set_irq(0, Some(interrupt.as_fd()))?;
        let state = State { link: Some(link), ..State::default() };
        Ok(Self { config, interrupt, on_failure, state: Mutex::new(state), settled: Condvar::new() })
    }

    fn forget(&self, state: &mut State) {
        if let Some(link) = state.link.take() {
            // Of the last characters those stay that would be lost with the device; none where it cannot tell.
            let delivered = link.shadow.as_ref().map_or(state.characters, ShadowView::delivered);
            let count = usize::try_from(state.characters.wrapping_sub(delivered)).unwrap_or(usize::MAX);
            state.last.drain(..state.last.len().saturating_sub(count));
            state.patience = Instant::now().checked_add(self.config.deadline);
        }
    }

    /// Whether the device answers.
    pub fn is_alive(&self) -> bool {
        self.lock().link.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an access; a failure ends the connection and is reported, once, and the access waits for a successor.
    fn access<T>(
        &self,
        mut state: MutexGuard<'_, State>,
        mut access: impl FnMut(&mut Link) -> Result<T, ClientError>,
    ) -> Option<T> {
        loop {
            match state.link.as_mut().map(&mut access) {
                Some(Ok(value)) => return Some(value),
                Some(Err(error)) => {
                    self.forget(&mut state);
                    (self.on_failure)(&error);
                }
                None => {
                    let left = state.patience?.checked_duration_since(Instant::now())?;
                    let waited = self.settled.wait_timeout(state, left);
                    (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn offset(&self, port: u16) -> Option<u16> {
        port.checked_sub(self.config.first_port).filter(|offset| *offset < PORTS)
    }
}

/// The way to a device's process, which may be replaced.
pub trait RemoteDevice: Send + Sync {
    /// The device's name.
    fn id(&self) -> &str;

    /// Takes a new process in place of one that failed.
    ///
    /// # Errors
    /// It does not answer as it must; accesses go on waiting.
    fn replace(&self, socket: OwnedFd) -> Result<(), ClientError>;

    /// Lets the process go; accesses wait for [`Self::replace`].
    fn disconnect(&self);

    /// No successor will come.
    fn give_up(&self);

    /// Numbers of the descriptors that the device holds now.
    fn descriptors(&self) -> Vec<RawFd>;
}

impl RemoteDevice for RegisterDevice {
    fn id(&self) -> &str {
        &self.config.name
    }

    /// Accesses wait until it has carried out what the guest's settings are, not while the connection is made.
    fn replace(&self, socket: OwnedFd) -> Result<(), ClientError> {
        let mut link = Link::connect(&self.config, socket, self.config.deadline)?;
        let mut state = self.lock();
        self.forget(&mut state);
        let [line, settings] = state.journal.replay();
        line.into_iter().try_for_each(|(offset, value)| link.post(offset, value, None))?;
        // A process that takes them one by one, each just in time, does not get them all; and others wait meanwhile.
        let end = end_of(self.config.deadline);
        let first = state.characters.saturating_sub(state.last.len() as u64).saturating_add(1);
        let mut characters = (first..).zip(&state.last).take_while(|_| !left(end).is_zero());
        characters.try_for_each(|(number, character)| link.post(THR, *character, Some(number)))?;
        link.client.set_deadline(left(end))?;
        settings.into_iter().try_for_each(|(offset, value)| link.post(offset, value, None))?;
        link.client.set_irq(0, Some(self.interrupt.as_fd()))?;
        link.client.set_deadline(self.config.deadline)?;
        state.link = Some(link);
        self.settled.notify_all();
        Ok(())
    }

    fn disconnect(&self) {
        self.forget(&mut self.lock());
    }

    fn give_up(&self) {
        let mut state = self.lock();
        (state.link, state.patience) = (None, None);
        self.settled.notify_all();
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let state = self.lock();
        let socket = state.link.as_ref().map(|link| link.client.as_fd().as_raw_fd());
        socket.into_iter().chain([self.interrupt.as_raw_fd()]).collect()
    }
}

impl IsaDevice for RegisterDevice {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn ports(&self) -> Vec<PortRange> {
        vec![PortRange { first: self.config.first_port, count: PORTS }]
    }

    fn irq(&self) -> Option<u8> {
        Some(self.config.irq)
    }

    fn read(&self, port: u16, data: &mut [u8]) {
        for (byte, port) in data.iter_mut().zip(port..) {
            *byte = 0xff;
            let Some(offset) = self.offset(port) else { continue };
            let mut state = self.lock();
            state.reads = state.reads.wrapping_add(u64::from(offset == 0));
            let number = if offset == 0 { state.reads } else { 0 };
            *byte = self.access(state, |link| link.read(offset, number)).unwrap_or(0xff);
        }
    }

    fn write(&self, port: u16, data: &[u8]) {
        for (value, port) in data.iter().zip(port..) {
            let Some(offset) = self.offset(port) else { continue };
            let mut state = self.lock();
            let number = state.journal.note(offset, *value).then(|| state.keep(*value));
            self.access(state, |link| link.post(offset, *value, number));
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.journal.reset();
        self.access(state, |link| link.client.reset());
    }
}

#[cfg(test)]
#[path = "register_device_tests.rs"]
mod tests;
