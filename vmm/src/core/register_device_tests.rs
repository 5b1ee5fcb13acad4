use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use bulkhead_ipc::vfio_user::shadow::{SHADOW_SIZE, ShadowPage, ShadowState};
use bulkhead_ipc::vfio_user::{
    AccessError, Connection, Description, DeviceInfo, Region, RegionInfo, RegisterDevice as Device, Served,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::*;

/// Eight registers that keep what is written to them; LSR is always 60. `reads` counts round trips, `numbers` are those of RBR.
struct Chip {
    registers: [u8; 8],
    log: Vec<(u64, u8)>,
    numbers: Vec<u64>,
    reads: Arc<AtomicUsize>,
    shadow: Option<ShadowPage>,
    silent: bool,
}

impl Device for Chip {
    fn description(&self) -> Description {
        Description { flags: DeviceInfo::RESET, regions: 2, irqs: 1 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        match index {
            0 => Some(Region { size: REGION_SIZE, flags: RegionInfo::READ | RegionInfo::WRITE, file: None }),
            1 => {
                let file = self.shadow.as_ref()?.as_fd();
                Some(Region { size: SHADOW_SIZE as u64, flags: 0, file: Some(file) })
            }
            _ => None,
        }
    }

    fn irq_count(&self, _: u32) -> u32 {
        1
    }

    fn read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.silent {
            std::thread::sleep(DEADLINE * 3);
        }
        let (port, number) = (offset & 7, offset >> NUMBER_SHIFT);
        assert_eq!(port == 0, number != 0, "only RBR has a number");
        self.numbers.extend((port == 0).then_some(number));
        let value = usize::try_from(port).ok().and_then(|port| self.registers.get(port));
        data.fill(*value.ok_or(AccessError::OutOfRange)?);
        Ok(())
    }

    fn write(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.log.push((offset, data[0]));
        if !matches!(offset & 7, 0 | 5) {
            self.registers[usize::try_from(offset).unwrap()] = data[0];
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.registers = [0, 0, 0, 0, 0, 0x60, 0, 0];
    }

    fn set_irq(&mut self, _: u32, _: u32, _: Option<OwnedFd>) -> Result<(), AccessError> {
        Ok(())
    }

    fn settle(&mut self, writes: u16) {
        if let Some(shadow) = &self.shadow {
            let registers = [0x60, self.registers[1], 0xb0];
            shadow.publish(ShadowState { settled: writes, credit: 4, registers, valid: 7 });
        }
    }
}

const DEADLINE: Duration = Duration::from_millis(200);

struct Rig {
    port: Arc<RegisterDevice>,
    failures: Arc<AtomicUsize>,
    reads: Arc<AtomicUsize>,
    device: JoinHandle<Chip>,
}

fn chip(reads: &Arc<AtomicUsize>, shadow: bool, silent: bool) -> (UnixStream, JoinHandle<Chip>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let shadow = shadow.then(|| ShadowPage::create().unwrap());
    let (log, numbers) = Default::default();
    let mut chip = Chip { registers: [0; 8], log, numbers, reads: reads.clone(), shadow, silent };
    chip.reset();
    let device = std::thread::spawn(move || {
        let mut connection = Connection::new(theirs.into(), DEADLINE).unwrap();
        loop {
            let mut entry = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
            poll(&mut entry, PollTimeout::NONE).unwrap();
            if !matches!(connection.serve(&mut chip), Ok(Served::Open)) {
                return chip;
            }
        }
    });
    (ours, device)
}

fn rig(shadow: bool, silent: bool) -> Rig {
    let reads = Arc::new(AtomicUsize::new(0));
    let failures = Arc::new(AtomicUsize::new(0));
    let (socket, device) = chip(&reads, shadow, silent);
    let counter = failures.clone();
    let on_failure = Box::new(move |_: &ClientError| {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let config = RegisterDeviceConfig { deadline: DEADLINE, ..RegisterDeviceConfig::com1("uart") };
    let interrupt = EventFd::from_value(0).unwrap();
    let interrupt = interrupt.as_fd().try_clone_to_owned().unwrap();
    let port = RegisterDevice::connect(config, socket.into(), interrupt, on_failure).unwrap();
    Rig { port: Arc::new(port), failures, reads, device }
}

fn read(port: &RegisterDevice, address: u16) -> u8 {
    let mut data = [0];
    port.read(address, &mut data);
    data[0]
}

#[test]
fn reads_see_earlier_posted_writes() {
    let rig = rig(false, false);
    rig.port.write(0x3ff, &[0x5a]);
    assert_eq!(read(&rig.port, 0x3ff), 0x5a);
    assert_eq!(read(&rig.port, 0x3fd), 0x60);
    assert_eq!(rig.reads.load(Ordering::Relaxed), 2);
}

#[test]
fn the_shadow_page_saves_round_trips_only_while_it_is_exact() {
    let rig = rig(true, false);
    let trips = |count| assert_eq!(rig.reads.load(Ordering::Relaxed), count);
    assert_eq!(read(&rig.port, 0x3fd), 0x60);
    trips(0);
    assert_eq!(read(&rig.port, 0x3f8), 0);
    trips(1);
    for value in 0..100 {
        rig.port.write(0x3f9, &[value]);
        assert_eq!(read(&rig.port, 0x3f9), value, "never a stale value");
    }
}

#[test]
fn addresses_outside_read_all_ones() {
    let rig = rig(false, false);
    let mut data = [0; 4];
    rig.port.read(0x3fe, &mut data);
    assert_eq!(data[2..], [0xff, 0xff]);
    rig.port.write(0x3f7, &[1]);
    assert_eq!(read(&rig.port, 0x3f7), 0xff);
}

#[test]
fn a_device_that_misses_its_deadline_becomes_an_empty_slot_and_is_reported_once() {
    let rig = rig(false, true);
    let begin = std::time::Instant::now();
    for _ in 0..50 {
        assert_eq!(read(&rig.port, 0x3fd), 0xff);
        rig.port.write(0x3f8, &[1]);
    }
    rig.port.reset();
    // One deadline for the answer, one for a successor; no access after that waits.
    assert!(begin.elapsed() >= DEADLINE * 2 && begin.elapsed() < DEADLINE * 4);
    assert_eq!(rig.failures.load(Ordering::Relaxed), 1);
    assert!(!rig.port.is_alive());
}

#[test]
fn a_process_that_is_still_starting_is_waited_for_longer() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let late = std::thread::spawn(move || {
        std::thread::sleep(DEADLINE * 3);
        let (log, numbers) = Default::default();
        let mut chip =
            Chip { registers: [0; 8], log, numbers, reads: Arc::default(), shadow: None, silent: false };
        let mut connection = Connection::new(theirs.into(), DEADLINE).unwrap();
        loop {
            let mut entry = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
            poll(&mut entry, PollTimeout::NONE).unwrap();
            if !matches!(connection.serve(&mut chip), Ok(Served::Open)) {
                return;
            }
        }
    });
    let config = RegisterDeviceConfig { deadline: DEADLINE, ..RegisterDeviceConfig::com1("uart") };
    let interrupt = EventFd::from_value(0).unwrap().as_fd().try_clone_to_owned().unwrap();
    let port = RegisterDevice::connect(config, ours.into(), interrupt, Box::new(|_| ())).unwrap();
    assert!(port.is_alive());
    drop(port);
    late.join().unwrap();
}

#[test]
fn a_new_process_gets_the_guests_settings() {
    let rig = rig(false, false);
    let settings =
        [(3, 0x83), (0, 12), (1, 0), (3, 0x03), (2, 0xc7), (4, 0x0b), (7, 0x77), (1, 0x05), (0, b'x')];
    for (offset, value) in settings {
        rig.port.write(0x3f8 + offset, &[value]);
    }
    let (socket, device) = chip(&rig.reads, true, false);
    rig.port.replace(socket.into()).unwrap();
    rig.device.join().unwrap();
    assert_eq!(read(&rig.port, 0x3ff), 0x77);
    assert!(rig.port.is_alive());
    drop(rig.port);
    let expected =
        [(3, 0x83), (0, 12), (1, 0), (3, 0x03), (2, 0xc1), (7, 0x77), (4, 0x0b), (1, 0x05), (3, 0x03)];
    assert_eq!(device.join().unwrap().log, expected);
    assert_eq!(rig.failures.load(Ordering::Relaxed), 0);
}

#[test]
fn an_access_waits_for_the_successor_and_is_repeated_there() {
    let rig = rig(false, true);
    rig.port.write(0x3ff, &[0x5a]);
    let port = rig.port.clone();
    let reader = std::thread::spawn(move || read(&port, 0x3fd));
    while rig.failures.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (socket, _device) = chip(&rig.reads, false, false);
    rig.port.replace(socket.into()).unwrap();
    assert_eq!(reader.join().unwrap(), 0x60, "the guest sees a pause");
    assert_eq!(read(&rig.port, 0x3ff), 0x5a);
    assert_eq!(rig.failures.load(Ordering::Relaxed), 1);
}

#[test]
fn characters_that_were_not_delivered_are_sent_to_the_successor() {
    // These chips say that they have delivered nothing.
    let rig = rig(true, false);
    rig.port.write(0x3fb, &[3]);
    for character in *b"abcd" {
        rig.port.write(0x3f8, &[character]);
    }
    let (socket, second) = chip(&rig.reads, true, false);
    rig.port.disconnect();
    rig.port.replace(socket.into()).unwrap();
    rig.port.write(0x3f8, b"e");
    let characters = |chip: &Chip| -> Vec<(u64, u8)> {
        let all = chip.log.iter().filter(|(offset, _)| offset & 7 == 0);
        all.map(|(offset, character)| (offset >> NUMBER_SHIFT, *character)).collect()
    };
    let expected = [(1, b'a'), (2, b'b'), (3, b'c'), (4, b'd'), (5, b'e')];
    rig.port.disconnect();
    let second = second.join().unwrap();
    assert_eq!(characters(&second), expected);
    let (socket, third) = chip(&rig.reads, false, false);
    rig.port.replace(socket.into()).unwrap();
    drop(rig.port);
    let third = third.join().unwrap();
    assert_eq!(characters(&third), expected, "nothing was delivered yet, and they are the same");
    assert_eq!(third.log.last(), Some(&(3, 3)));
}

#[test]
fn a_character_that_was_not_answered_is_asked_for_again_under_its_number() {
    let rig = rig(false, false);
    assert_eq!(read(&rig.port, 0x3f8), 0);
    // What goes round in loopback is no character that a successor could send.
    rig.port.write(0x3fc, &[LOOP]);
    rig.port.write(0x3f8, b"x");
    rig.port.disconnect();
    assert_eq!(rig.device.join().unwrap().numbers, [1]);
    let (socket, second) = chip(&rig.reads, false, true);
    rig.port.replace(socket.into()).unwrap();
    let port = rig.port.clone();
    let reader = std::thread::spawn(move || read(&port, 0x3f8));
    // The second is too slow.
    while rig.failures.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (socket, third) = chip(&rig.reads, false, false);
    rig.port.replace(socket.into()).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    drop(rig.port);
    let (second, third) = (second.join().unwrap(), third.join().unwrap());
    assert_eq!((second.numbers, third.numbers), (vec![2], vec![2]));
    assert!(third.log.iter().all(|(offset, _)| offset >> NUMBER_SHIFT == 0));
}

#[test]
fn nobody_waits_for_a_device_that_is_given_up() {
    let rig = rig(false, false);
    rig.port.disconnect();
    let port = rig.port.clone();
    let begin = std::time::Instant::now();
    let reader = std::thread::spawn(move || read(&port, 0x3fd));
    std::thread::sleep(DEADLINE / 4);
    rig.port.give_up();
    assert_eq!(reader.join().unwrap(), 0xff);
    assert_eq!(read(&rig.port, 0x3fd), 0xff);
    assert!(begin.elapsed() < DEADLINE);
    assert_eq!(rig.failures.load(Ordering::Relaxed), 0);
}

#[test]
fn a_replacement_that_does_not_answer_leaves_the_old_one() {
    let rig = rig(false, false);
    let (socket, _mute) = UnixStream::pair().unwrap();
    assert!(rig.port.replace(socket.into()).is_err());
    assert_eq!(read(&rig.port, 0x3fd), 0x60);
}

#[test]
fn reset_forgets_all_but_divisor_and_scratchpad() {
    let mut journal = Journal::default();
    for (offset, value) in [(3, 0x80), (0, 1), (1, 2), (3, 3), (7, 9), (1, 0xf), (4, 8)] {
        assert!(!journal.note(offset, value));
    }
    assert!(journal.note(0, b'x'), "a character changes no register");
    journal.reset();
    assert_eq!(journal, Journal { scr: 9, divisor: [Some(1), Some(2)], ..Journal::default() });
}
