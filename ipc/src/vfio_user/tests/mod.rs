//! Codec, hostile peers and another implementation.

mod codec;
mod hostile_clients;
mod hostile_servers;
mod interoperability;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::shadow::{SHADOW_SIZE, ShadowPage, ShadowState};
use super::*;

pub(super) const DEADLINE: Duration = Duration::from_millis(300);

/// What a test device was told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    Wrote(u64, Vec<u8>),
    Reset,
    Irq(bool),
}

/// A device of 4 KiB of memory that reports what it is told; interrupt 0 fires when FF is written to offset 0.
pub(super) struct Memory {
    pub bytes: Vec<u8>,
    pub told: Sender<Told>,
    pub event: Option<OwnedFd>,
    pub shadow: Option<ShadowPage>,
    pub flags: u32,
}

impl Memory {
    pub fn new(flags: u32) -> (Self, Receiver<Told>) {
        let (told, receiver) = channel();
        let shadow = ShadowPage::create().ok();
        (Self { bytes: vec![0; 4096], told, event: None, shadow, flags }, receiver)
    }
}

impl RegisterDevice for Memory {
    fn description(&self) -> Description {
        Description { flags: self.flags, regions: 2, irqs: 1 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        match index {
            0 => Some(Region { size: 4096, flags: RegionInfo::READ | RegionInfo::WRITE, file: None }),
            1 => {
                let file = self.shadow.as_ref().map(AsFd::as_fd);
                Some(Region { size: SHADOW_SIZE as u64, flags: 0, file })
            }
            _ => None,
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        u32::from(index == 0)
    }

    fn read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.bytes[start..start + data.len()]);
        Ok(())
    }

    fn write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let start = usize::try_from(offset).unwrap();
        self.bytes[start..start + data.len()].copy_from_slice(data);
        let _ = self.told.send(Told::Wrote(offset, data.to_vec()));
        if let (0, [0xff], Some(event)) = (offset, data, &self.event) {
            nix::unistd::write(event, &1_u64.to_ne_bytes()).unwrap();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.bytes.fill(0);
        let _ = self.told.send(Told::Reset);
    }

    fn set_irq(&mut self, _index: u32, _start: u32, event: Option<OwnedFd>) -> Result<(), AccessError> {
        let _ = self.told.send(Told::Irq(event.is_some()));
        self.event = event;
        Ok(())
    }

    fn settle(&mut self, writes: u16) {
        if let Some(shadow) = &self.shadow {
            shadow.publish(ShadowState { settled: writes, credit: 8, registers: [1, 2, 3], valid: 0b101 });
        }
    }
}

/// Serves until the client closes or the connection fails.
pub(super) fn serve(
    socket: OwnedFd,
    mut device: impl RegisterDevice + Send + 'static,
) -> JoinHandle<Result<(), ServerError>> {
    std::thread::spawn(move || {
        let mut connection = Connection::new(socket, DEADLINE)?;
        loop {
            wait_readable(connection.as_fd());
            if connection.serve(&mut device)? == Served::Closed {
                return Ok(());
            }
        }
    })
}

pub(super) fn wait_readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(10_000_u16)).unwrap() > 0
}

pub(super) fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

#[test]
fn every_command_works_between_our_client_and_our_server() {
    let (ours, theirs) = pair();
    let (device, told) = Memory::new(DeviceInfo::RESET);
    let server = serve(theirs.into(), device);
    let mut client = Client::connect(ours.into(), "memory", DEADLINE).unwrap();
    assert_eq!(client.info().flags, DeviceInfo::RESET);
    assert_eq!((client.info().num_regions, client.info().num_irqs), (2, 1));

    let region = client.region_info(0).unwrap();
    assert_eq!((region.size, region.flags), (4096, RegionInfo::READ | RegionInfo::WRITE));
    assert_eq!(client.irq_info(0).unwrap().count, 1);

    client.post(0, 5, &[1, 2, 3]).unwrap();
    client.write(0, 8, &[4]).unwrap();
    let mut data = [0; 4];
    client.read(0, 5, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    assert_eq!(told.recv().unwrap(), Told::Wrote(5, vec![1, 2, 3]));

    let event = nix::sys::eventfd::EventFd::from_value(0).unwrap();
    client.set_irq(0, Some(event.as_fd())).unwrap();
    client.post(0, 0, &[0xff]).unwrap();
    assert!(wait_readable(event.as_fd()), "the device signals the client's eventfd");
    assert_eq!(event.read().unwrap(), 1);
    client.set_irq(0, None).unwrap();

    client.reset().unwrap();
    client.read(0, 5, &mut data).unwrap();
    assert_eq!(data, [0; 4]);

    drop(client);
    assert_eq!(server.join().unwrap(), Ok(()));
}

#[test]
fn a_refused_access_leaves_the_connection_usable() {
    let (ours, theirs) = pair();
    let (device, _told) = Memory::new(0);
    let _server = serve(theirs.into(), device);
    let mut client = Client::connect(ours.into(), "memory", DEADLINE).unwrap();
    let mut data = [0; 2];
    for (region, offset) in [(0, 4095), (0, u64::MAX), (1, 0), (2, 0), (u32::MAX, 0)] {
        let error = client.read(region, offset, &mut data).unwrap_err();
        assert_eq!(error.fault, Fault::Refused(22), "region {region} offset {offset}");
        assert_eq!(client.write(region, offset, &data).unwrap_err().fault, Fault::Refused(22));
    }
    assert_eq!(client.read(0, 0, &mut []).unwrap_err().fault, Fault::Refused(22), "no bytes");
    assert_eq!(client.irq_info(1).unwrap_err().fault, Fault::Refused(22));
    assert_eq!(client.region_info(7).unwrap_err().fault, Fault::Refused(22));
    assert_eq!(client.read(0, 0, &mut vec![0; 5000]).unwrap_err().fault, Fault::TooLong(5000));
    client.read(0, 4094, &mut data).unwrap();
    client.read(0, 0, &mut vec![0; 4096]).unwrap();
}

#[test]
fn the_shadow_page_answers_only_what_it_promises() {
    let (ours, theirs) = pair();
    let (device, _told) = Memory::new(0);
    let _server = serve(theirs.into(), device);
    let mut client = Client::connect(ours.into(), "memory", DEADLINE).unwrap();
    let view = client.map_shadow(1).unwrap().unwrap();
    assert_eq!(client.map_shadow(0).unwrap().map(|_| ()), None, "region 0 cannot be mapped");
    assert_eq!(view.load().answer(0, 0, 0), Some(1));
    assert_eq!(view.load().answer(1, 0, 0), None, "not valid");
    assert_eq!(view.load().answer(3, 0, 0), None, "no such register");
    client.write(0, 1, &[1]).unwrap();
    assert_eq!(view.load().settled, 1, "published before the reply");
}

#[test]
fn a_shadow_answer_needs_every_outstanding_write_to_be_a_promised_stream_write() {
    let state = ShadowState { settled: 65_530, credit: 10, registers: [7; 3], valid: 7 };
    assert_eq!(state.answer(0, 65_530, 0), Some(7), "nothing outstanding");
    assert_eq!(state.answer(0, 4, 10), Some(7), "ten outstanding, across the wrap");
    assert_eq!(state.answer(0, 5, 11), None, "one more than the credit");
    assert_eq!(state.answer(0, 4, 9), None, "the oldest outstanding one is not a stream write");
    assert_eq!(state.answer(0, 65_529, 100), None, "the device claims more than was sent");
}
