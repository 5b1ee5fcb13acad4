//! Our client against another implementation's server, and its client against our server.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::super::*;
use super::{DEADLINE, Memory, Told, serve, wait_readable};

#[derive(Default)]
struct Foreign {
    bytes: Vec<u8>,
    event: Option<File>,
}

impl vfio_user::ServerBackend for Foreign {
    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.bytes[start..start + data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.bytes[start..start + data.len()].copy_from_slice(data);
        if let Some(event) = &self.event {
            nix::unistd::write(event, &1_u64.to_ne_bytes()).unwrap();
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: vfio_user::DmaMapFlags,
        _: u64,
        _: u64,
        _: u64,
        _: Option<File>,
    ) -> std::io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: vfio_user::DmaUnmapFlags, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> std::io::Result<()> {
        self.bytes.fill(0);
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, mut fds: Vec<File>) -> std::io::Result<()> {
        self.event = fds.pop();
        Ok(())
    }
}

#[test]
fn our_client_drives_another_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let irq = vfio_user::IrqInfo { index: 0, flags: IrqInfo::EVENTFD, count: 1 };
    let mut region =
        vfio_user::ServerRegion { region_info: Default::default(), sparse_areas: Vec::new(), mmap_fd: None };
    region.region_info.argsz = 32;
    region.region_info.flags = RegionInfo::READ | RegionInfo::WRITE;
    region.region_info.size = 64;
    let server = vfio_user::Server::new(&path, true, vec![irq], vec![region]).unwrap();
    let server = std::thread::spawn(move || {
        let mut backend = Foreign { bytes: vec![0; 64], event: None };
        server.run(&mut backend)
    });
    let stream = UnixStream::connect(&path).unwrap();
    let mut client = Client::connect(stream.into(), "foreign", DEADLINE).unwrap();
    assert_eq!(client.info().flags, DeviceInfo::PCI | DeviceInfo::RESET);
    assert_eq!(client.region_info(0).unwrap().size, 64);
    assert_eq!(client.irq_info(0).unwrap().count, 1);
    assert_eq!(client.region_info(9).unwrap_err().fault, Fault::Refused(22));

    client.post(0, 3, &[1, 2]).unwrap();
    client.write(0, 5, &[3]).unwrap();
    let mut data = [0; 3];
    client.read(0, 3, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3]);
    let event = nix::sys::eventfd::EventFd::from_value(0).unwrap();
    client.set_irq(0, Some(event.as_fd())).unwrap();
    client.write(0, 0, &[1]).unwrap();
    assert!(wait_readable(event.as_fd()));
    client.reset().unwrap();
    client.read(0, 3, &mut data).unwrap();
    assert_eq!(data, [0; 3]);
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn another_client_drives_our_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (mut device, told) = Memory::new(DeviceInfo::PCI | DeviceInfo::RESET);
    device.shadow = None;
    let server =
        std::thread::spawn(move || serve(listener.accept().unwrap().0.into(), device).join().unwrap());

    let mut client = vfio_user::Client::new(&path).unwrap();
    let region = client.region(0).unwrap();
    assert_eq!((region.size, region.flags), (4096, RegionInfo::READ | RegionInfo::WRITE));
    client.region_write(0, 16, &[1, 2, 3, 4]).unwrap();
    assert_eq!(told.recv().unwrap(), Told::Wrote(16, vec![1, 2, 3, 4]));
    let mut data = [0; 2];
    client.region_read(0, 17, &mut data).unwrap();
    assert_eq!(data, [2, 3]);
    let info = client.get_irq_info(0).unwrap();
    assert_eq!((info.flags, info.count), (IrqInfo::EVENTFD, 1));
    let event = nix::sys::eventfd::EventFd::from_value(0).unwrap();
    let flags = wire::IrqSet::DATA_EVENTFD | wire::IrqSet::ACTION_TRIGGER;
    client.set_irqs(0, flags, 0, 1, &[event.as_fd().as_raw_fd()]).unwrap();
    assert_eq!(told.recv().unwrap(), Told::Irq(true));
    client.region_write(0, 0, &[0xff]).unwrap();
    assert!(wait_readable(event.as_fd()));
    client.reset().unwrap();
    client.region_read(0, 17, &mut data).unwrap();
    assert_eq!(data, [0, 0]);
    client.shutdown().unwrap();
    assert_eq!(server.join().unwrap(), Ok(()));
}
