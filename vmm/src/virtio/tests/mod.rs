//! Tests of the transport: a driver made of register accesses on one side, a back end in a thread on the other.

pub mod driver;
mod interrupts;
mod lifecycle;
mod on_the_bus;
mod own_daemon;
pub mod peer;
mod random;
mod registers;
mod replacement;
mod storage_daemon;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_ipc::memory::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use driver::Driver;
use peer::{Peer, Script};

/// RAM of the tests' guests, bytes.
const RAM: u64 = 1 << 20;

/// Records which sources are connected, and what would be sent.
#[derive(Default)]
struct Messages {
    connected: Mutex<BTreeMap<u16, (MsiMessage, EventFd)>>,
}

impl Messages {
    /// What a source is connected to.
    fn of(&self, source: u16) -> Option<MsiMessage> {
        self.connected.lock().unwrap().get(&source).map(|(message, _)| *message)
    }

    /// As irqfd does: takes an event of a connected source.
    fn delivered(&self, source: u16) -> bool {
        self.connected.lock().unwrap().get(&source).is_some_and(|(_, event)| event.read().is_ok())
    }
}

impl MsiHost for Messages {
    fn connect(&self, source: u16, event: &EventFd, message: MsiMessage) -> io::Result<()> {
        let before = self.connected.lock().unwrap().insert(source, (message, event.try_clone()?));
        assert!(before.is_none(), "source {source} was connected already");
        Ok(())
    }

    fn disconnect(&self, source: u16, _event: &EventFd) {
        assert!(
            self.connected.lock().unwrap().remove(&source).is_some(),
            "source {source} was not connected"
        );
    }
}

#[derive(Default)]
struct Pin(AtomicBool);

impl Pin {
    fn asserted(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl IntxPin for Pin {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

#[derive(Default)]
pub struct Failures(Mutex<Vec<String>>);

impl Failures {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl Observer for Failures {
    fn backend_failed(&self, device: &str, error: &VirtioError) {
        assert_eq!(device, "disk0");
        self.0.lock().unwrap().push(error.to_string());
    }
}

/// A device with everything around it.
struct Scaffold {
    device: Arc<VirtioPci>,
    driver: Driver,
    messages: Arc<Messages>,
    pin: Arc<Pin>,
    failures: Arc<Failures>,
    ram: GuestRam,
}

pub fn settings() -> Settings {
    let exchange = Duration::from_secs(10);
    let limits = Limits { exchange, stop: exchange };
    Settings { limits, patience: exchange, ..Settings::new("disk0", DeviceType::BLOCK) }
}

fn scaffold_with(settings: Settings, stream: UnixStream) -> Scaffold {
    let messages = Arc::new(Messages::default());
    let failures = Arc::new(Failures::default());
    let pin = Arc::new(Pin::default());
    let ram = GuestRam::create(RAM).unwrap();
    let backend = Backend::open(&settings, stream).unwrap();
    let device = VirtioPci::new(
        settings,
        backend,
        ram.clone(),
        Arc::clone(&messages) as Arc<dyn MsiHost>,
        Arc::clone(&failures) as Arc<dyn Observer>,
    )
    .unwrap();
    device.connect_pin(Arc::clone(&pin) as Arc<dyn IntxPin>);
    let driver = Driver::new(Arc::clone(&device));
    Scaffold { device, driver, messages, pin, failures, ram }
}

/// A device with a well-behaved peer.
fn scaffold() -> (Scaffold, Peer) {
    let (stream, peer) = Peer::start(Script::default());
    (scaffold_with(settings(), stream), peer)
}

/// What the core's two threads do.
fn serve(device: &VirtioPci) {
    if device.on_event() {
        device.serve_request();
    }
}

/// Waits until `condition` holds, letting the device handle its events.
fn wait_until(device: &VirtioPci, mut condition: impl FnMut() -> bool) {
    use std::os::fd::AsFd;
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "nothing happened");
        let mut fds = [nix::poll::PollFd::new(device.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, 20u16).unwrap();
        serve(device);
    }
}
