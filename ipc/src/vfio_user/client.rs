//! The core's side of one connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::error::{ClientError, Fault};
use super::shadow::{SHADOW_SIZE, ShadowView};
use super::socket::Socket;
use super::wire::{
    Command, DeviceInfo, HEADER_SIZE, Header, IrqInfo, IrqSet, Kind, RegionAccess, RegionInfo, Version,
    exactly, put,
};
use super::{MAX_DATA, MAX_MESSAGE, VERSION, capabilities};

/// A connection to a device. Every exchange ends within the deadline; after the first error, other than the device's own
/// refusal of one access ([`Fault::Refused`]), each call returns that error and nothing more is sent.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    device: String,
    next_id: u16,
    buffer: Box<[u8]>,
    info: DeviceInfo,
    /// Most data bytes in one access, as both sides can take it.
    max_data: usize,
    failed: Option<ClientError>,
}

/// A reply's payload in the client's buffer, and the descriptors that came with it.
struct Reply {
    length: usize,
    descriptors: Vec<OwnedFd>,
}

impl Client {
    /// Connects over a Unix stream socket: VERSION, then DEVICE_GET_INFO. `device` names the device in errors.
    ///
    /// # Errors
    /// Not such a socket, or the device does not answer as the specification says within `deadline` (for each exchange).
    pub fn connect(socket: OwnedFd, device: &str, deadline: Duration) -> Result<Self, ClientError> {
        let socket = Socket::new(socket, deadline).map_err(|fault| ClientError {
            device: device.to_owned(),
            command: Command::Version,
            fault,
        })?;
        let mut client = Self {
            socket,
            device: device.to_owned(),
            next_id: 0,
            buffer: vec![0; MAX_MESSAGE].into(),
            info: DeviceInfo::default(),
            max_data: MAX_DATA,
            failed: None,
        };
        client.guarded(Command::Version, Self::negotiate)?;
        client.info = client.guarded(Command::DeviceGetInfo, Self::get_info)?;
        Ok(client)
    }

    /// Changes the deadline of later exchanges: a process that is still starting may take longer than one that runs.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn set_deadline(&mut self, deadline: Duration) -> Result<(), ClientError> {
        self.socket.set_deadline(deadline).map_err(|fault| ClientError {
            device: self.device.clone(),
            command: Command::Version,
            fault,
        })
    }

    /// What the device said about itself.
    pub fn info(&self) -> DeviceInfo {
        self.info
    }

    /// Why the connection has failed, if it has.
    pub fn failure(&self) -> Option<&ClientError> {
        self.failed.as_ref()
    }

    /// DEVICE_GET_REGION_INFO.
    ///
    /// # Errors
    /// As for every exchange; [`Fault::Refused`] when there is no such region.
    pub fn region_info(&mut self, index: u32) -> Result<RegionInfo, ClientError> {
        self.guarded(Command::DeviceGetRegionInfo, |client| client.get_region(index).map(|(info, _)| info))
    }

    /// Maps a region that is a [shadow](super::shadow) page.
    ///
    /// # Errors
    /// As for every exchange, and when the region is not such a page; `Ok(None)` when it cannot be mapped.
    pub fn map_shadow(&mut self, index: u32) -> Result<Option<ShadowView>, ClientError> {
        self.guarded(Command::DeviceGetRegionInfo, |client| {
            let (info, file) = client.get_region(index)?;
            let Some(file) = file else { return Ok(None) };
            expect("offset", 0, info.offset)?;
            expect("size", SHADOW_SIZE as u64, info.size)?;
            ShadowView::map(file).map(Some)
        })
    }

    /// DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// As for every exchange; [`Fault::Refused`] when there is no such interrupt type.
    pub fn irq_info(&mut self, index: u32) -> Result<IrqInfo, ClientError> {
        self.guarded(Command::DeviceGetIrqInfo, |client| {
            let argsz = size_u32(IrqInfo::SIZE);
            let request = IrqInfo { argsz, index, ..IrqInfo::default() };
            let reply = client.exchange(Command::DeviceGetIrqInfo, &[&request.encode()], &[])?;
            let info = IrqInfo::decode(client.payload(&reply))?;
            expect("index", u64::from(index), u64::from(info.index))?;
            Ok(info)
        })
    }

    /// DEVICE_SET_IRQS: `event` is signalled when interrupt 0 of type `index` is triggered; `None` gives it up.
    ///
    /// # Errors
    /// As for every exchange; [`Fault::Refused`] when there is no such interrupt.
    pub fn set_irq(&mut self, index: u32, event: Option<BorrowedFd<'_>>) -> Result<(), ClientError> {
        self.guarded(Command::DeviceSetIrqs, |client| {
            let flags = IrqSet::ACTION_TRIGGER | IrqSet::DATA_EVENTFD;
            let request = IrqSet { argsz: size_u32(IrqSet::SIZE), flags, index, start: 0, count: 1 };
            let reply = client.exchange(Command::DeviceSetIrqs, &[&request.encode()], event.as_slice())?;
            Ok(exactly(client.payload(&reply), 0)?)
        })
    }

    /// REGION_READ: fills `data` from `offset` of the region. One send, one receive.
    ///
    /// # Errors
    /// As for every exchange; `data` is then unchanged.
    pub fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ClientError> {
        self.guarded(Command::RegionRead, |client| {
            let request = client.access(region, offset, data.len())?;
            let reply = client.exchange(Command::RegionRead, &[&request.encode()], &[])?;
            let (answer, received) = RegionAccess::decode(client.payload(&reply))?;
            check_access(&request, &answer)?;
            expect("message size", data.len() as u64, received.len() as u64)?;
            data.copy_from_slice(received);
            Ok(())
        })
    }

    /// REGION_WRITE, answered: returns when the device has carried it out. One send, one receive.
    ///
    /// # Errors
    /// As for every exchange.
    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.guarded(Command::RegionWrite, |client| {
            let request = client.access(region, offset, data.len())?;
            let reply = client.exchange(Command::RegionWrite, &[&request.encode(), data], &[])?;
            let (answer, rest) = RegionAccess::decode(client.payload(&reply))?;
            check_access(&request, &answer)?;
            Ok(exactly(rest, 0)?)
        })
    }

    /// REGION_WRITE with No_reply: returns when the socket has taken it. One send. Later accesses see its effect, because
    /// the device handles messages in their order (section Command Concurrency).
    ///
    /// # Errors
    /// The device is gone or does not read within the deadline.
    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.guarded(Command::RegionWrite, |client| {
            let request = client.access(region, offset, data.len())?;
            client.send(Command::RegionWrite, Kind::Posted, &[&request.encode(), data], &[]).map(|_| ())
        })
    }

    /// DEVICE_RESET.
    ///
    /// # Errors
    /// As for every exchange.
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.guarded(Command::DeviceReset, |client| {
            let reply = client.exchange(Command::DeviceReset, &[], &[])?;
            Ok(exactly(client.payload(&reply), 0)?)
        })
    }

    /// Runs one exchange unless the connection has failed, and remembers its failure.
    fn guarded<T>(
        &mut self,
        command: Command,
        exchange: impl FnOnce(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, ClientError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        exchange(self).map_err(|fault| {
            let lasting = !matches!(fault, Fault::Refused(_) | Fault::TooLong(_));
            let error = ClientError { device: self.device.clone(), command, fault };
            if lasting {
                self.failed = Some(error.clone());
            }
            error
        })
    }

    fn negotiate(&mut self) -> Result<(), Fault> {
        let proposal = Version { major: VERSION.0, minor: VERSION.1 }.encode();
        let reply = self.exchange(Command::Version, &[&proposal, &capabilities::offer()], &[])?;
        let (version, data) = Version::decode(self.payload(&reply))?;
        expect("version major", u64::from(VERSION.0), u64::from(version.major))?;
        if version.minor > VERSION.1 {
            let (expected, received) = (u64::from(VERSION.1), u64::from(version.minor));
            return Err(Fault::Unexpected { field: "version minor", expected, received });
        }
        let limit = capabilities::parse(data)?.max_data_xfer_size;
        self.max_data = usize::try_from(limit).unwrap_or(usize::MAX).min(MAX_DATA);
        Ok(())
    }

    fn get_info(&mut self) -> Result<DeviceInfo, Fault> {
        let request = DeviceInfo { argsz: size_u32(DeviceInfo::SIZE), ..DeviceInfo::default() };
        let reply = self.exchange(Command::DeviceGetInfo, &[&request.encode()], &[])?;
        let info = DeviceInfo::decode(self.payload(&reply))?;
        if info.argsz < request.argsz {
            let (expected, received) = (u64::from(request.argsz), u64::from(info.argsz));
            return Err(Fault::Unexpected { field: "argsz", expected, received });
        }
        Ok(info)
    }

    fn get_region(&mut self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>), Fault> {
        let argsz = size_u32(RegionInfo::SIZE);
        let request = RegionInfo { argsz, index, ..RegionInfo::default() };
        let mut reply = self.exchange(Command::DeviceGetRegionInfo, &[&request.encode()], &[])?;
        exactly(self.payload(&reply), RegionInfo::SIZE)?;
        let info = RegionInfo::decode(self.payload(&reply))?;
        expect("index", u64::from(index), u64::from(info.index))?;
        let expected = usize::from(info.flags & RegionInfo::MMAP != 0);
        if reply.descriptors.len() > expected {
            return Err(Fault::Descriptors { expected, received: reply.descriptors.len() });
        }
        Ok((info, reply.descriptors.pop()))
    }

    fn access(&self, region: u32, offset: u64, length: usize) -> Result<RegionAccess, Fault> {
        if length > self.max_data {
            return Err(Fault::TooLong(length));
        }
        Ok(RegionAccess { offset, region, count: size_u32(length) })
    }

    /// Sends one message and returns its ID.
    fn send(
        &mut self,
        command: Command,
        kind: Kind,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<u16, Fault> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let mut end = HEADER_SIZE;
        for part in parts {
            put(&mut self.buffer, end, part);
            end = end.saturating_add(part.len());
        }
        let header = Header { id, command: command.number(), size: size_u32(end), kind };
        put(&mut self.buffer, 0, &header.encode());
        let message = self.buffer.get(..end).ok_or(Fault::TooLong(end))?;
        self.socket.send(message, descriptors)?;
        Ok(id)
    }

    /// Sends a command and receives its reply.
    fn exchange(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Reply, Fault> {
        let id = self.send(command, Kind::Command, parts, descriptors)?;
        let with_descriptors = command == Command::DeviceGetRegionInfo;
        let mut received = Vec::new();
        let mut filled = 0_usize;
        let mut wanted = HEADER_SIZE;
        let mut header = None;
        let mut end = None;
        while filled < wanted {
            if filled > 0 {
                // The reply comes in pieces: from here on the whole of it has one deadline.
                let end = *end.get_or_insert_with(|| self.socket.end());
                self.socket.check(end)?;
            }
            let space = self.buffer.get_mut(filled..).unwrap_or_default();
            let count = if with_descriptors {
                let (count, mut more) = self.socket.receive_with_descriptors(space)?;
                // No reply has more than one; a peer that adds some to every byte must not exhaust ours.
                if more.len().saturating_add(received.len()) > 1 {
                    let count = more.len().saturating_add(received.len());
                    return Err(Fault::Descriptors { expected: 1, received: count });
                }
                received.append(&mut more);
                count
            } else {
                self.socket.receive(space)?
            };
            filled = filled.saturating_add(count);
            if header.is_none() && filled >= HEADER_SIZE {
                let decoded = Header::decode(&self.buffer)?;
                wanted = HEADER_SIZE.saturating_add(decoded.payload_size());
                header = Some(decoded);
            }
        }
        expect("message size", wanted as u64, filled as u64)?;
        let header = header.ok_or(Fault::Closed)?;
        expect("message ID", u64::from(id), u64::from(header.id))?;
        expect("command", u64::from(command.number()), u64::from(header.command))?;
        match header.kind {
            Kind::Reply => Ok(Reply { length: header.payload_size(), descriptors: received }),
            Kind::ErrorReply(errno) => {
                expect("message size", HEADER_SIZE as u64, u64::from(header.size))?;
                Err(Fault::Refused(errno))
            }
            Kind::Command => Err(Fault::Unexpected { field: "flags", expected: 1, received: 0 }),
            Kind::Posted => Err(Fault::Unexpected { field: "flags", expected: 1, received: 0x10 }),
        }
    }

    fn payload(&self, reply: &Reply) -> &[u8] {
        self.buffer.get(HEADER_SIZE..).and_then(|rest| rest.get(..reply.length)).unwrap_or_default()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn check_access(request: &RegionAccess, answer: &RegionAccess) -> Result<(), Fault> {
    expect("offset", request.offset, answer.offset)?;
    expect("region", u64::from(request.region), u64::from(answer.region))?;
    expect("count", u64::from(request.count), u64::from(answer.count))
}

fn expect(field: &'static str, expected: u64, received: u64) -> Result<(), Fault> {
    if expected == received { Ok(()) } else { Err(Fault::Unexpected { field, expected, received }) }
}

fn size_u32(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
