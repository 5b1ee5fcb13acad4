//! The device's side of one connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::error::{AccessError, Fault, ServerError};
use super::socket::{Received, Socket};
use super::wire::{
    Command, DeviceInfo, HEADER_SIZE, Header, IrqInfo, IrqSet, Kind, RegionAccess, RegionInfo, Version,
    exactly, put,
};
use super::{MAX_MESSAGE, VERSION, capabilities};

/// What a device says about itself (section VFIO_USER_DEVICE_GET_INFO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// [`DeviceInfo::RESET`], [`DeviceInfo::PCI`] and other bus types.
    pub flags: u32,
    /// Number of regions; their indices begin at 0.
    pub regions: u32,
    /// Number of interrupt types; their indices begin at 0.
    pub irqs: u32,
}

/// One region of a device (section VFIO_USER_DEVICE_GET_REGION_INFO).
#[derive(Debug, Clone, Copy)]
pub struct Region<'a> {
    /// Size in bytes.
    pub size: u64,
    /// [`RegionInfo::READ`] and [`RegionInfo::WRITE`]; whether it can be mapped follows from `file`.
    pub flags: u32,
    /// What the client may map, from offset 0.
    pub file: Option<BorrowedFd<'a>>,
}

/// A device made of registers, behind a [`Connection`].
///
/// The connection has checked every access against [`RegisterDevice::region`] before it reaches the device.
pub trait RegisterDevice {
    /// What the device is.
    fn description(&self) -> Description;

    /// The region with this index, `None` when there is none.
    fn region(&self, index: u32) -> Option<Region<'_>>;

    /// Number of interrupts of the type with this index, 0 when there is none.
    fn irq_count(&self, index: u32) -> u32;

    /// Reads `data.len()` bytes at `offset` of the region.
    ///
    /// # Errors
    /// The access is refused; the client is told so.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError>;

    /// Writes `data` at `offset` of the region.
    ///
    /// # Errors
    /// The access is refused; the client is told so, unless the write was posted.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), AccessError>;

    /// Puts the device into its reset state.
    fn reset(&mut self);

    /// Takes the eventfd that signals interrupt `start` of type `index`, or gives it up. The descriptor is the peer's: it may be anything.
    ///
    /// # Errors
    /// No such interrupt, or the descriptor cannot serve.
    fn set_irq(&mut self, index: u32, start: u32, event: Option<OwnedFd>) -> Result<(), AccessError>;

    /// `writes` REGION_WRITE messages of this connection (modulo 2^16) have taken effect: called before each reply, at the
    /// end of each batch of posted writes, and when a connection begins, for devices that publish a [`super::shadow`] page.
    fn settle(&mut self, writes: u16) {
        let _ = writes;
    }
}

/// Whether the connection is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// More may come.
    Open,
    /// The client has closed its end, between two messages.
    Closed,
}

/// One client's connection to a device.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    input: Box<[u8]>,
    /// Bytes of `input` that are there.
    filled: usize,
    output: Box<[u8]>,
    /// Descriptors that belong to the message that holds byte `descriptors_end - 1` of `input`.
    descriptors: Vec<OwnedFd>,
    descriptors_end: usize,
    negotiated: bool,
    writes: u16,
}

/// A received message: its header and where its payload lies in the input buffer.
struct Message<'a> {
    header: Header,
    payload: &'a [u8],
    descriptors: Vec<OwnedFd>,
}

/// What is sent back: so many payload bytes of the output buffer, or an errno.
type Answer = Result<usize, AccessError>;

impl Connection {
    /// Serves a connected Unix stream socket; a client that does not take a reply within `deadline` is dropped.
    ///
    /// # Errors
    /// The descriptor is not such a socket.
    pub fn new(socket: OwnedFd, deadline: Duration) -> Result<Self, ServerError> {
        let socket = Socket::new(socket, deadline).map_err(|fault| ServerError { command: None, fault })?;
        Ok(Self {
            socket,
            input: vec![0; MAX_MESSAGE.saturating_mul(2)].into(),
            filled: 0,
            output: vec![0; MAX_MESSAGE].into(),
            descriptors: Vec::new(),
            descriptors_end: 0,
            negotiated: false,
            writes: 0,
        })
    }

    /// Handles what the client has sent so far, and returns: for an event loop that has seen the socket readable.
    ///
    /// # Errors
    /// The client broke the protocol, went away in the middle of a message or did not take a reply in time.
    pub fn serve(&mut self, device: &mut dyn RegisterDevice) -> Result<Served, ServerError> {
        let space = self.input.get_mut(self.filled..).unwrap_or_default();
        match self.socket.receive_now(space).map_err(|fault| ServerError { command: None, fault })? {
            Received::Nothing => return Ok(Served::Open),
            Received::Closed if self.filled == 0 => return Ok(Served::Closed),
            Received::Closed => return Err(ServerError { command: None, fault: Fault::Closed }),
            Received::Bytes(count, descriptors) => {
                self.filled = self.filled.saturating_add(count);
                self.take_descriptors(descriptors)?;
            }
        }
        let input = std::mem::take(&mut self.input);
        let handled = self.handle_all(input.get(..self.filled).unwrap_or_default(), device);
        self.input = input;
        let consumed = handled?;
        self.input.copy_within(consumed.min(self.filled)..self.filled, 0);
        self.filled = self.filled.saturating_sub(consumed);
        self.descriptors_end = self.descriptors_end.saturating_sub(consumed);
        device.settle(self.writes);
        Ok(Served::Open)
    }

    fn take_descriptors(&mut self, descriptors: Vec<OwnedFd>) -> Result<(), ServerError> {
        if descriptors.is_empty() {
            return Ok(());
        }
        if !self.descriptors.is_empty() {
            let received = self.descriptors.len().saturating_add(descriptors.len());
            let fault = Fault::Descriptors { expected: self.descriptors.len(), received };
            return Err(ServerError { command: None, fault });
        }
        self.descriptors = descriptors;
        // A receive ends where a message with descriptors ends, so they belong to what holds the last byte.
        self.descriptors_end = self.filled;
        Ok(())
    }

    /// Handles every complete message in `input` and returns how many bytes those were.
    fn handle_all(&mut self, input: &[u8], device: &mut dyn RegisterDevice) -> Result<usize, ServerError> {
        let mut start = 0_usize;
        loop {
            let rest = input.get(start..).unwrap_or_default();
            if rest.len() < HEADER_SIZE {
                return Ok(start);
            }
            let header = Header::decode(rest)
                .map_err(|error| ServerError { command: None, fault: Fault::Message(error) })?;
            let size = HEADER_SIZE.saturating_add(header.payload_size());
            let Some(payload) = rest.get(HEADER_SIZE..size) else { return Ok(start) };
            let end = start.saturating_add(size);
            let descriptors = if (start..end).contains(&self.descriptors_end.wrapping_sub(1)) {
                std::mem::take(&mut self.descriptors)
            } else {
                Vec::new()
            };
            let command = Command::from_number(header.command);
            self.handle(Message { header, payload, descriptors }, device)
                .map_err(|fault| ServerError { command, fault })?;
            start = end;
        }
    }

    fn handle(&mut self, message: Message<'_>, device: &mut dyn RegisterDevice) -> Result<(), Fault> {
        let Message { header, payload, descriptors } = message;
        let command = Command::from_number(header.command);
        self.check_order(header, command)?;
        if command != Some(Command::DeviceSetIrqs) && command.is_some() && !descriptors.is_empty() {
            return Err(Fault::Descriptors { expected: 0, received: descriptors.len() });
        }
        let answer = match command {
            Some(Command::Version) => self.version(payload, device)?,
            Some(Command::DeviceGetInfo) => self.device_info(payload, device)?,
            Some(Command::DeviceGetRegionInfo) => {
                let answer = self.region_info(payload, device)?;
                let index = RegionInfo::decode(payload)?.index;
                let file = device.region(index).and_then(|region| region.file).filter(|_| answer.is_ok());
                return self.reply(header, answer, file);
            }
            Some(Command::DeviceGetIrqInfo) => self.irq_info(payload, device)?,
            Some(Command::DeviceSetIrqs) => set_irqs(payload, descriptors, device)?,
            Some(Command::RegionRead) => self.region_read(payload, device)?,
            Some(Command::RegionWrite) => {
                let answer = self.region_write(payload, device)?;
                self.writes = self.writes.wrapping_add(1);
                answer
            }
            Some(Command::DeviceReset) => {
                exactly(payload, 0)?;
                device.reset();
                Ok(0)
            }
            // Descriptors of a command that is not ours (DMA_MAP brings some) are closed here.
            None => Err(AccessError::NotSupported),
        };
        if header.kind == Kind::Posted {
            return Ok(());
        }
        device.settle(self.writes);
        self.reply(header, answer, None)
    }

    /// VERSION comes first and once; only what has no answer to give may be posted.
    fn check_order(&mut self, header: Header, command: Option<Command>) -> Result<(), Fault> {
        let unexpected = |field, expected, received: u64| Fault::Unexpected { field, expected, received };
        let is_version = command == Some(Command::Version);
        if is_version == self.negotiated {
            let expected = if self.negotiated { 0 } else { u64::from(Command::Version.number()) };
            return Err(unexpected("command", expected, u64::from(header.command)));
        }
        let may_be_posted = matches!(
            command,
            None | Some(Command::RegionWrite | Command::DeviceReset | Command::DeviceSetIrqs)
        );
        match header.kind {
            Kind::Command => Ok(()),
            Kind::Posted if may_be_posted => Ok(()),
            Kind::Posted => Err(unexpected("flags", 0, 0x10)),
            Kind::Reply | Kind::ErrorReply(_) => Err(unexpected("flags", 0, 1)),
        }
    }

    /// Sends the header and as many payload bytes as the answer says.
    fn reply(&mut self, header: Header, answer: Answer, file: Option<BorrowedFd<'_>>) -> Result<(), Fault> {
        let (kind, payload) = match answer {
            Ok(payload) => (Kind::Reply, payload),
            Err(error) => (Kind::ErrorReply(error.errno()), 0),
        };
        let size = HEADER_SIZE.saturating_add(payload);
        let reply = Header { kind, size: u32::try_from(size).unwrap_or(u32::MAX), ..header };
        put(&mut self.output, 0, &reply.encode());
        let bytes = self.output.get(..size).unwrap_or_default();
        self.socket.send(bytes, file.as_slice())
    }

    /// Puts payload bytes after the header's place.
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        put(&mut self.output, HEADER_SIZE.saturating_add(offset), bytes);
    }

    fn version(&mut self, payload: &[u8], device: &mut dyn RegisterDevice) -> Result<Answer, Fault> {
        let (proposed, data) = Version::decode(payload)?;
        if proposed.major != VERSION.0 {
            let (expected, received) = (u64::from(VERSION.0), u64::from(proposed.major));
            return Err(Fault::Unexpected { field: "version major", expected, received });
        }
        capabilities::parse(data)?;
        let data = capabilities::offer();
        self.put(0, &capabilities::version(proposed.minor).encode());
        self.put(Version::SIZE, &data);
        self.negotiated = true;
        device.settle(self.writes);
        Ok(Ok(Version::SIZE.saturating_add(data.len())))
    }

    fn device_info(&mut self, payload: &[u8], device: &dyn RegisterDevice) -> Result<Answer, Fault> {
        let request = DeviceInfo::decode(payload)?;
        if too_small(request.argsz, DeviceInfo::SIZE) {
            return Ok(Err(AccessError::OutOfRange));
        }
        let Description { flags, regions, irqs } = device.description();
        let info =
            DeviceInfo { argsz: size_u32(DeviceInfo::SIZE), flags, num_regions: regions, num_irqs: irqs };
        self.put(0, &info.encode());
        Ok(Ok(DeviceInfo::SIZE))
    }

    fn region_info(&mut self, payload: &[u8], device: &dyn RegisterDevice) -> Result<Answer, Fault> {
        exactly(payload, RegionInfo::SIZE)?;
        let request = RegionInfo::decode(payload)?;
        let Some(region) = device.region(request.index) else { return Ok(Err(AccessError::OutOfRange)) };
        if too_small(request.argsz, RegionInfo::SIZE) {
            return Ok(Err(AccessError::OutOfRange));
        }
        let mappable = if region.file.is_some() { RegionInfo::MMAP } else { 0 };
        let info = RegionInfo {
            argsz: size_u32(RegionInfo::SIZE),
            flags: region.flags | mappable,
            index: request.index,
            cap_offset: 0,
            size: region.size,
            offset: 0,
        };
        self.put(0, &info.encode());
        Ok(Ok(RegionInfo::SIZE))
    }

    fn irq_info(&mut self, payload: &[u8], device: &dyn RegisterDevice) -> Result<Answer, Fault> {
        let request = IrqInfo::decode(payload)?;
        let count = device.irq_count(request.index);
        if count == 0 || too_small(request.argsz, IrqInfo::SIZE) {
            return Ok(Err(AccessError::OutOfRange));
        }
        let argsz = size_u32(IrqInfo::SIZE);
        let info = IrqInfo { argsz, flags: IrqInfo::EVENTFD, index: request.index, count };
        self.put(0, &info.encode());
        Ok(Ok(IrqInfo::SIZE))
    }

    fn region_read(&mut self, payload: &[u8], device: &mut dyn RegisterDevice) -> Result<Answer, Fault> {
        exactly(payload, RegionAccess::SIZE)?;
        let (access, _) = RegionAccess::decode(payload)?;
        if !allowed(&access, device, RegionInfo::READ) {
            return Ok(Err(AccessError::OutOfRange));
        }
        self.put(0, &access.encode());
        let start = HEADER_SIZE.saturating_add(RegionAccess::SIZE);
        let data =
            self.output.get_mut(start..).and_then(|rest| rest.get_mut(..access.len())).unwrap_or_default();
        data.fill(0);
        let length = RegionAccess::SIZE.saturating_add(data.len());
        Ok(device.read(access.region, access.offset, data).map(|()| length))
    }

    fn region_write(&mut self, payload: &[u8], device: &mut dyn RegisterDevice) -> Result<Answer, Fault> {
        let (access, data) = RegionAccess::decode(payload)?;
        if data.len() != access.len() {
            let (expected, received) = (data.len() as u64, u64::from(access.count));
            return Err(Fault::Unexpected { field: "count", expected, received });
        }
        if !allowed(&access, device, RegionInfo::WRITE) {
            return Ok(Err(AccessError::OutOfRange));
        }
        self.put(0, &access.encode());
        Ok(device.write(access.region, access.offset, data).map(|()| RegionAccess::SIZE))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether the access lies inside a region that allows it. An access of no bytes is refused.
fn allowed(access: &RegionAccess, device: &dyn RegisterDevice, direction: u32) -> bool {
    let Some(region) = device.region(access.region) else { return false };
    let end = access.offset.checked_add(u64::from(access.count));
    !access.is_empty() && region.flags & direction != 0 && end.is_some_and(|end| end <= region.size)
}

/// Sets or gives up eventfds (section VFIO_USER_DEVICE_SET_IRQS): the data flags NONE and EVENTFD with the action TRIGGER.
fn set_irqs(
    payload: &[u8],
    mut descriptors: Vec<OwnedFd>,
    device: &mut dyn RegisterDevice,
) -> Result<Answer, Fault> {
    let set = IrqSet::decode(payload)?;
    let count = device.irq_count(set.index);
    let Some(end) = set.start.checked_add(set.count).filter(|end| *end <= count) else {
        return Ok(Err(AccessError::OutOfRange));
    };
    match set.flags {
        flags if flags == IrqSet::DATA_EVENTFD | IrqSet::ACTION_TRIGGER => {
            match (descriptors.pop(), descriptors.len(), set.count) {
                (Some(event), 0, 1) => Ok(device.set_irq(set.index, set.start, Some(event)).map(|()| 0)),
                (None, ..) => Ok(clear_irqs(&set, set.start..end, device)),
                (Some(_), rest, expected) => Err(Fault::Descriptors {
                    expected: usize::try_from(expected).unwrap_or(usize::MAX),
                    received: rest.saturating_add(1),
                }),
            }
        }
        _ if !descriptors.is_empty() => Err(Fault::Descriptors { expected: 0, received: descriptors.len() }),
        // «a count (and start) of 0, with data flags of DATA_NONE disables all interrupts of the index»
        flags if flags == IrqSet::DATA_NONE | IrqSet::ACTION_TRIGGER && set.count == 0 && set.start == 0 => {
            Ok(clear_irqs(&set, 0..count, device))
        }
        _ => Ok(Err(AccessError::NotSupported)),
    }
}

fn clear_irqs(set: &IrqSet, which: std::ops::Range<u32>, device: &mut dyn RegisterDevice) -> Answer {
    for irq in which {
        device.set_irq(set.index, irq, None)?;
    }
    Ok(0)
}

fn too_small(argsz: u32, size: usize) -> bool {
    usize::try_from(argsz).unwrap_or(usize::MAX) < size
}

fn size_u32(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
