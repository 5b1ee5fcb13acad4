//! The register protocol, both ends: a server that any client talks to, a client that any server answers.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_ipc::vfio_user::wire::{Header, IrqSet, Kind, RegionAccess, Version};
use bulkhead_ipc::vfio_user::{
    AccessError, Client, Command, Connection, Description, DeviceInfo, IrqInfo, Region, RegionInfo,
    RegisterDevice, Served,
};

use crate::script::Script;
use crate::virtqueues::{Framing, answering_peer};

/// Neither end waits longer for the other.
const DEADLINE: Duration = Duration::from_millis(4);
const REGION: u64 = 64;

struct Registers([u8; 64]);

impl RegisterDevice for Registers {
    fn description(&self) -> Description {
        Description { flags: DeviceInfo::RESET, regions: 2, irqs: 1 }
    }

    fn region(&self, index: u32) -> Option<Region<'_>> {
        (index == 0).then_some(Region {
            size: REGION,
            flags: RegionInfo::READ | RegionInfo::WRITE,
            file: None,
        })
    }

    fn irq_count(&self, index: u32) -> u32 {
        u32::from(index == 0)
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let from = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)?.get(..data.len()));
        assert_eq!(region, 0);
        data.copy_from_slice(from.expect("the connection checks accesses against the region"));
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.read(region, offset, &mut data.to_vec())
    }

    fn reset(&mut self) {
        self.0.fill(0);
    }

    fn set_irq(&mut self, index: u32, start: u32, _event: Option<OwnedFd>) -> Result<(), AccessError> {
        assert_eq!((index, start), (0, 0));
        Ok(())
    }
}

/// A client sends the bytes and hangs up.
pub fn vfio_user_server(input: &[u8]) {
    let Ok((mut client, server)) = UnixStream::pair() else { return };
    if client.write_all(input).and_then(|()| client.shutdown(Shutdown::Write)).is_err() {
        return;
    }
    let Ok(mut connection) = Connection::new(server.into(), DEADLINE) else { return };
    let mut device = Registers([0x5A; 64]);
    while let Ok(Served::Open) = connection.serve(&mut device) {}
}

fn message(command: Command, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(0) + 16;
    let header = Header { id: 0, command: command.number(), size, kind: Kind::Command };
    [&header.encode()[..], payload].concat()
}

fn version() -> Vec<u8> {
    [&Version { major: 0, minor: 1 }.encode()[..], b"{\"capabilities\":{\"max_data_xfer_size\":4096}}\0"]
        .concat()
}

pub fn server_seeds() -> Vec<Vec<u8>> {
    let start = message(Command::Version, &version());
    let access = |command, offset, count: u32, data: &[u8]| {
        message(command, &[&RegionAccess { offset, region: 0, count }.encode()[..], data].concat())
    };
    let region = RegionInfo { argsz: 32, ..RegionInfo::default() }.encode();
    let irq = IrqInfo { argsz: 16, ..IrqInfo::default() }.encode();
    let set = IrqSet { argsz: 20, flags: 0x21, index: 0, start: 0, count: 0 }.encode();
    let ask = [
        message(Command::DeviceGetInfo, &DeviceInfo { argsz: 16, ..DeviceInfo::default() }.encode()),
        message(Command::DeviceGetRegionInfo, &region),
        message(Command::DeviceGetIrqInfo, &irq),
        message(Command::DeviceSetIrqs, &set),
    ];
    vec![
        start.clone(),
        [&start[..], &ask.concat()].concat(),
        [start.clone(), access(Command::RegionRead, 60, 4, &[]), access(Command::RegionWrite, 0, 8, &[1; 8])]
            .concat(),
        [start, access(Command::RegionWrite, 63, 1, &[1]), message(Command::DeviceReset, &[])].concat(),
    ]
}

/// A server answers each request with the next record of the input.
pub fn vfio_user_client(input: &[u8]) {
    let (stream, peer) = answering_peer(input, Framing::VfioUser);
    if let Ok(mut client) = Client::connect(stream.into(), "fuzzed", DEADLINE) {
        let mut data = [0; 8];
        let _ = client.region_info(0);
        let _ = client.map_shadow(1);
        let _ = client.irq_info(0);
        let _ = client.read(0, 4, &mut data);
        let _ = client.write(0, 8, &data);
        let _ = client.set_irq(0, None);
        let _ = client.post(0, 0, &data);
        let _ = client.reset();
    }
    peer.join().expect("the peer does not panic");
}

/// A record for [`answering_peer`].
pub fn record(flags: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(0).to_le_bytes();
    [&[flags][..], &length, bytes].concat()
}

/// Takes one record.
pub fn next_record<'a>(script: &mut Script<'a>) -> Option<(u8, &'a [u8])> {
    if !script.goes_on() {
        return None;
    }
    let flags = script.u8();
    let length = script.u16();
    Some((flags, script.bytes(length.into())))
}

pub fn client_seeds() -> Vec<Vec<u8>> {
    let reply = |command: Command, payload: &[u8]| {
        let size = u32::try_from(payload.len()).unwrap_or(0) + 16;
        let header = Header { id: 0, command: command.number(), size, kind: Kind::Reply };
        record(0, &[&header.encode()[..], payload].concat())
    };
    let info = DeviceInfo { argsz: 16, flags: 1, num_regions: 2, num_irqs: 1 }.encode();
    let region = RegionInfo { argsz: 32, flags: 3, size: REGION, ..RegionInfo::default() }.encode();
    let shadow = RegionInfo { argsz: 32, flags: 5, index: 1, size: 4096, ..RegionInfo::default() }.encode();
    let irq = IrqInfo { argsz: 16, flags: 1, index: 0, count: 1 }.encode();
    let read = [&RegionAccess { offset: 4, region: 0, count: 8 }.encode()[..], &[1; 8]].concat();
    let start = [reply(Command::Version, &version()), reply(Command::DeviceGetInfo, &info)].concat();
    let rest = [
        reply(Command::DeviceGetRegionInfo, &region),
        reply(Command::DeviceGetRegionInfo, &shadow),
        reply(Command::DeviceGetIrqInfo, &irq),
        reply(Command::RegionRead, &read),
        reply(Command::RegionWrite, &RegionAccess { offset: 8, region: 0, count: 8 }.encode()),
        reply(Command::DeviceSetIrqs, &[]),
    ];
    vec![start.clone(), [start, rest.concat()].concat()]
}
