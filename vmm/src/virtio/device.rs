//! The PCI function.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Duration;

use bulkhead_ipc::memory::{Direction, GuestRam};
use bulkhead_ipc::vhost_user::frontend::{Frontend, InflightMemory, Limits};
use bulkhead_ipc::vhost_user::message::VhostUserProtocolFeatures;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::backend::{Backend, FromBackend, InflightSource, Link};
use super::capabilities::{
    COMMON, DEVICE, ISR, Layout, MAX_QUEUES, MSIX_BAR, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR, build,
};
use super::device_config::DeviceConfig;
use super::device_type::DeviceType;
use super::event::Event;
use super::events::{Events, Locked, Token};
use super::failure::{Observer, VirtioError};
use super::features::Features;
use super::interrupts::{Interrupts, IntxPin, MsiHost};
use super::queues::Queue;
use crate::machine::PciFunction;
use crate::machine::pci::{Command, ConfigSpace, Doorbell, DoorbellId, ROM_BAR};

/// A page of a BAR.
const BLOCK: u64 = 0x1000;

/// How a device is to be.
pub struct Settings {
    /// Its id, for messages.
    pub id: String,
    /// What it is.
    pub kind: DeviceType,
    /// Largest size of a queue, entries: a power of two. SeaBIOS wants 256 at most.
    pub queue_size: u16,
    /// Largest number of queues, whatever the back end offers.
    pub max_queues: u16,
    /// How long to wait for the back end.
    pub limits: Limits,
    /// How long one access of a vCPU, or the start of a successor, may wait for the back end in all.
    pub patience: Duration,
    /// How long to wait for its first answers all together: its process may not even be there yet.
    pub start_limit: Duration,
    /// When the back end fails, keep it from the guest until [`VirtioPci::replace_backend`] or [`VirtioPci::give_up`].
    pub hold_on_failure: bool,
    /// Who owns the memory for requests in flight.
    pub inflight: Box<dyn InflightSource>,
    /// What the expansion ROM holds, from address 0 on, if there is one; its size is a power of two.
    pub rom: Option<GuestRam>,
}

impl Settings {
    /// The usual settings.
    #[must_use]
    pub fn new(id: &str, kind: DeviceType) -> Self {
        Self {
            id: id.to_owned(),
            kind,
            queue_size: 256,
            max_queues: 64,
            limits: Limits::default(),
            patience: Duration::from_secs(1),
            start_limit: Duration::from_secs(15),
            hold_on_failure: false,
            inflight: Box::new(FromBackend),
            rom: None,
        }
    }
}

/// Everything that changes, under the device's one lock.
pub(super) struct State {
    pub features: Features,
    pub status: u8,
    pub config: DeviceConfig,
    pub queue_select: u16,
    pub queues: Vec<Queue>,
    pub interrupts: Interrupts,
    /// `None` after the back end failed.
    pub link: Option<Link>,
    pub inflight: Option<InflightMemory>,
    pub bus_master: bool,
    pub paused: bool,
    pub complaints: u64,
}

/// A virtio device on the PCI bus.
///
/// vCPU threads enter through [`PciFunction`], the core's event loop through [`VirtioPci::on_event`]. Both take the
/// device's lock and no other device's; the doorbells take none.
pub struct VirtioPci {
    pub(super) device: Arc<str>,
    pub(super) settings: Settings,
    pub(super) layout: Layout,
    pub(super) ram: GuestRam,
    pub(super) kicks: Vec<Event>,
    pub(super) ring_error: Event,
    pub(super) events: Events,
    pub(super) observer: Arc<dyn Observer>,
    state: Mutex<State>,
}

/// How many queues a device has.
fn queue_count(settings: &Settings, frontend: &Frontend) -> Result<u16, VirtioError> {
    let needed = settings.kind.queues;
    if !frontend.has(VhostUserProtocolFeatures::MQ) {
        return Ok(needed);
    }
    let got = frontend.max_queues();
    if got < needed {
        return Err(VirtioError::Queues { got, needed });
    }
    let most = if settings.kind.multi_queue { settings.max_queues.min(MAX_QUEUES) } else { needed };
    Ok(got.min(most).max(needed))
}

impl VirtioPci {
    /// Builds the function that `backend` is to the guest. `settings` are those with which it was opened.
    ///
    /// # Errors
    /// The back end does not answer as it should, or descriptors ran out.
    pub fn new(
        settings: Settings,
        backend: Backend,
        ram: GuestRam,
        msi: Arc<dyn MsiHost>,
        observer: Arc<dyn Observer>,
    ) -> Result<Arc<Self>, VirtioError> {
        let Backend { link } = backend;
        let queues = queue_count(&settings, &link.frontend)?;
        let events = Events::new().map_err(io::Error::from)?;
        let device: Arc<str> = settings.id.as_str().into();
        let interrupts = Interrupts::new(&device, queues, msi, Arc::clone(events.inner()))?;
        let state = State {
            features: Features::new(link.frontend.offered_features()),
            status: 0,
            config: DeviceConfig::new(settings.kind.config_size),
            queue_select: 0,
            queues: (0..queues).map(|_| Queue::new(settings.queue_size)).collect(),
            interrupts,
            link: None,
            inflight: None,
            bus_master: false,
            paused: false,
            complaints: 0,
        };
        let this = Self {
            device,
            layout: build(
                &settings.kind,
                queues,
                queues.saturating_add(1),
                settings.rom.as_ref().map(GuestRam::size),
            )?,
            settings,
            ram,
            kicks: (0..queues).map(|_| Event::new()).collect::<io::Result<_>>()?,
            ring_error: Event::new()?,
            events,
            observer,
            state: Mutex::new(state),
        };
        let input = EpollEvent::new(EpollFlags::EPOLLIN, Token::RingError.into());
        this.epoll().add(this.ring_error.as_fd(), input).map_err(io::Error::from)?;
        {
            let mut state = this.state();
            this.adopt(&mut state, link)?;
            this.refresh_config(&mut state, false)?;
        }
        Ok(Arc::new(this))
    }

    /// The device's id.
    pub fn id(&self) -> &str {
        &self.device
    }

    /// How many queues, and so doorbells, it has.
    pub fn queues(&self) -> usize {
        self.kicks.len()
    }

    /// Connects the INTx# pin that the bus gave out when the function was attached.
    pub fn connect_pin(&self, pin: Arc<dyn IntxPin>) {
        self.state().interrupts.isr.connect(pin);
    }

    /// The eventfd to register as ioeventfd for a doorbell of [`PciFunction::doorbells`]. The same for the device's whole life.
    pub fn doorbell_event(&self, id: DoorbellId) -> Option<&Event> {
        usize::try_from(id.0).ok().and_then(|index| self.kicks.get(index))
    }

    /// Numbers of the descriptors that the device holds now, for the check before the process is sealed.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let state = self.state();
        let link = state.link.as_ref().map(|link| link.frontend.as_fd());
        let requests = state.link.as_ref().and_then(|link| link.requests.as_ref()).map(AsFd::as_fd);
        let kicks = self.kicks.iter().map(AsFd::as_fd);
        let rom = self.settings.rom.iter().flat_map(|rom| rom.regions().map(|region| region.fd.as_raw_fd()));
        kicks
            .chain([self.ring_error.as_fd()])
            .chain(link)
            .chain(requests)
            .chain(state.interrupts.events().map(AsFd::as_fd))
            .map(|fd| fd.as_raw_fd())
            .chain(self.events.descriptors())
            .chain(rom)
            .collect()
    }

    /// Whether a back end is connected.
    pub fn is_connected(&self) -> bool {
        self.state().link.is_some()
    }

    pub(super) fn state(&self) -> Locked<'_> {
        // A panic ends the process; a poisoned lock is never met.
        Locked::new(self.state.lock().unwrap_or_else(PoisonError::into_inner), &self.events)
    }

    /// The state, unless somebody else uses it.
    pub(super) fn try_state(&self) -> Option<Locked<'_>> {
        let guard = match self.state.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Locked::new(guard, &self.events))
    }

    /// Acts with all that is asked of the back end under one deadline: a vCPU may wait for it, and others for this vCPU.
    pub(super) fn bounded<R>(&self, state: &mut State, act: impl FnOnce(&mut State) -> R) -> R {
        let bound =
            |state: &mut State, limit| state.link.iter_mut().for_each(|link| link.frontend.bound(limit));
        bound(state, Some(self.settings.patience));
        let result = act(state);
        bound(state, None);
        result
    }

    /// Where the device's descriptors are registered.
    pub(super) fn epoll(&self) -> &Epoll {
        self.events.inner()
    }

    fn read_rom(&self, offset: u64, data: &mut [u8]) {
        let view = self.settings.rom.as_ref().map(|rom| rom.view(offset, data.len() as u64, Direction::Read));
        // A BAR is as large as its ROM, so that there is nothing to tell of.
        let _ = view.and_then(Result::ok).map(|view| view.read_bytes(0, data));
    }

    /// A write to the doorbells that no ioeventfd caught.
    fn notify(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index) {
            kick.signal();
        }
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.layout.config
    }

    fn config_will_read(&self, offset: u16, len: usize) {
        if self.touches_window(offset, len) {
            self.read_window();
        }
    }

    fn config_written(&self, offset: u16, len: usize) {
        let control = self.layout.msix.saturating_add(2);
        let end = usize::from(offset).saturating_add(len);
        if offset < control.saturating_add(2) && end > usize::from(control) {
            let value = self.layout.config.get_u16(control);
            self.state().interrupts.set_msix_control(value);
        }
        if self.touches_window(offset, len) {
            self.write_window();
        }
    }

    fn command_changed(&self, command: Command) {
        let mut state = self.state();
        state.bus_master = command.bus_master();
        state.interrupts.set_bus_master(command.bus_master());
        self.bounded(&mut state, |state| self.reconcile(state));
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inside = offset % BLOCK;
        match (bar, offset - inside) {
            (ROM_BAR, _) => self.read_rom(offset, data),
            (VIRTIO_BAR, COMMON) => self.state().read_common(inside, data),
            (VIRTIO_BAR, ISR) if inside == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.state().interrupts.isr.read();
                }
            }
            (VIRTIO_BAR, DEVICE) => self.state().config.read(inside, data),
            (MSIX_BAR, _) => {
                let state = self.state();
                match offset.checked_sub(self.layout.pba) {
                    Some(offset) => state.interrupts.read_pending(offset, data),
                    None => state.interrupts.msix.read(offset, data),
                }
            }
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let inside = offset % BLOCK;
        match (bar, offset - inside) {
            (VIRTIO_BAR, COMMON) => {
                self.bounded(&mut self.state(), |state| self.write_common(state, inside, data));
            }
            (VIRTIO_BAR, DEVICE) => {
                self.bounded(&mut self.state(), |state| self.write_config(state, inside, data));
            }
            (VIRTIO_BAR, NOTIFY) => self.notify(inside),
            (MSIX_BAR, _) if offset < self.layout.pba => {
                self.state().interrupts.write_table(offset, data);
            }
            _ => {}
        }
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        (0u64..)
            .zip(&self.kicks)
            .map(|(index, _)| Doorbell {
                id: DoorbellId(index),
                bar: VIRTIO_BAR,
                offset: NOTIFY + index * u64::from(NOTIFY_MULTIPLIER),
                // A driver writes the queue's index, 16 bits; each queue has its own address, so that it need not be compared.
                length: 2,
                datamatch: None,
            })
            .collect()
    }

    fn reset(&self) {
        let mut state = self.state();
        self.bounded(&mut state, |state| self.reset_device(state));
        state.interrupts.reset_function();
        state.bus_master = false;
    }
}
