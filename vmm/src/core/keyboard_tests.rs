use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use bulkhead_ipc::channel::message::FromCore;
use bulkhead_ipc::vfio_user::{
    AccessError, Connection, Description, DeviceInfo, Region, RegionInfo, RegisterDevice, Served,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::super::remote::DEADLINE;
use super::*;

/// A controller that notes the accesses; after so many it is gone without an answer.
struct Model {
    accesses: VecDeque<(u64, Option<u8>)>,
    left: usize,
}

impl RegisterDevice for Model {
    fn description(&self) -> Description {
        Description { flags: DeviceInfo::RESET, regions: 1, irqs: 1 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        let flags = RegionInfo::READ | RegionInfo::WRITE;
        (index == 0).then_some(Region { size: 1 << 16, flags, file: None })
    }

    fn irq_count(&self, _index: u32) -> u32 {
        1
    }

    fn read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.accesses.push_back((offset, None));
        data.fill(0x1D);
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.accesses.push_back((offset, data.first().copied()));
        Ok(())
    }

    fn reset(&mut self) {}

    fn set_irq(&mut self, _: u32, _: u32, _: Option<OwnedFd>) -> Result<(), AccessError> {
        Ok(())
    }
}

type Process = JoinHandle<VecDeque<(u64, Option<u8>)>>;

/// A process with this model, which ends before access number `left`; it says what it saw.
fn process(left: usize) -> (OwnedFd, Process) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let serve = move || {
        let mut connection = Connection::new(theirs.into(), DEADLINE).unwrap();
        let mut model = Model { accesses: VecDeque::new(), left };
        loop {
            let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            if model.accesses.len() >= model.left {
                return model.accesses;
            }
            match connection.serve(&mut model) {
                Ok(Served::Open) => {}
                _ => return model.accesses,
            }
        }
    };
    (ours.into(), thread::spawn(serve))
}

fn keyboard(left: usize) -> (Arc<Keyboard>, Arc<Reports>, Process) {
    let (socket, process) = process(left);
    let reports = Arc::new(Reports::new().unwrap());
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let remote = Remote::new("keyboard", Some(event.into()), reports.clone(), |_, _| Ok(()));
    remote.start(socket).unwrap();
    (Arc::new(Keyboard::new(Arc::new(remote), reports.clone())), reports, process)
}

fn ended(reports: &Reports) -> bool {
    std::iter::from_fn(|| reports.next()).any(|report| report == FromCore::Ended(MachineEnd::Reset))
}

#[test]
fn accesses_are_numbered_and_what_resets_the_machine_stays_here() {
    let (keyboard, reports, process) = keyboard(usize::MAX);
    let mut byte = [0];
    keyboard.read(COMMAND, &mut byte);
    assert_eq!(byte, [0x1D]);
    // Not the output port's bit 0: the second byte is the keyboard's, and odd pulses do not concern the processor.
    for (port, value) in [(COMMAND, 0xD1), (DATA, 0x03), (DATA, 0xF2), (COMMAND, 0xFF)] {
        keyboard.write(port, &[value]);
    }
    assert!(!ended(&reports));
    keyboard.write(COMMAND, &[0xFE]);
    assert!(ended(&reports));
    drop(keyboard);
    let written = [(0x201, Some(0xD1)), (0x300, Some(0x03)), (0x400, Some(0xF2)), (0x501, Some(0xFF))];
    assert!(process.join().unwrap().into_iter().eq([(0x101, None)].into_iter().chain(written)));
}

#[test]
fn the_output_port_resets_too() {
    let (keyboard, reports, _process) = keyboard(usize::MAX);
    keyboard.write(COMMAND, &[0xD1]);
    // Another command comes between.
    keyboard.write(COMMAND, &[0xAE]);
    keyboard.write(DATA, &[0xFE]);
    assert!(!ended(&reports));
    keyboard.write(COMMAND, &[0xD1]);
    keyboard.write(DATA, &[0xFE]);
    assert!(ended(&reports));
}

#[test]
fn an_access_that_was_not_answered_is_repeated_under_its_number() {
    let (keyboard, _reports, first) = keyboard(1);
    keyboard.write(DATA, &[0xF4]);
    let (socket, second) = process(usize::MAX);
    let guest = thread::spawn({
        let keyboard = keyboard.clone();
        move || {
            let mut byte = [0];
            keyboard.read(DATA, &mut byte);
            byte
        }
    });
    first.join().unwrap();
    keyboard.remote.replace(socket).unwrap();
    assert_eq!(guest.join().unwrap(), [0x1D]);
    drop(keyboard);
    assert_eq!(second.join().unwrap(), [(0x200, None)]);
}

#[test]
fn without_a_process_the_ports_are_empty_and_the_reset_still_works() {
    let (keyboard, reports, _process) = keyboard(usize::MAX);
    keyboard.remote.disconnect();
    keyboard.remote.give_up();
    let start = Instant::now();
    let mut byte = [0];
    keyboard.read(COMMAND, &mut byte);
    assert_eq!(byte, [0xFF]);
    keyboard.write(COMMAND, &[0xFE]);
    assert!(ended(&reports) && start.elapsed() < DEADLINE);
}
