//! Message layouts, encoded and decoded without side effects: pure functions on byte slices, fit for a fuzz target.
//!
//! Offsets are the specification's; all integers are in host byte order (section Protocol Specification), which on
//! x86-64 is little-endian. Decoding never panics and never allocates.

use super::MAX_MESSAGE;
use super::error::DecodeError;

/// Size of the header that precedes every message, in bytes (section Header).
pub const HEADER_SIZE: usize = 16;

const FLAGS_TYPE: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAGS_NO_REPLY: u32 = 1 << 4;
const FLAGS_ERROR: u32 = 1 << 5;
const FLAGS_KNOWN: u32 = FLAGS_TYPE | FLAGS_NO_REPLY | FLAGS_ERROR;

/// Commands of the subset (section Commands).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// VFIO_USER_VERSION.
    Version = 1,
    /// VFIO_USER_DEVICE_GET_INFO.
    DeviceGetInfo = 4,
    /// VFIO_USER_DEVICE_GET_REGION_INFO.
    DeviceGetRegionInfo = 5,
    /// VFIO_USER_DEVICE_GET_IRQ_INFO.
    DeviceGetIrqInfo = 7,
    /// VFIO_USER_DEVICE_SET_IRQS.
    DeviceSetIrqs = 8,
    /// VFIO_USER_REGION_READ.
    RegionRead = 9,
    /// VFIO_USER_REGION_WRITE.
    RegionWrite = 10,
    /// VFIO_USER_DEVICE_RESET.
    DeviceReset = 13,
}

impl Command {
    /// The command with this number, if the subset has it.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Version,
            4 => Self::DeviceGetInfo,
            5 => Self::DeviceGetRegionInfo,
            7 => Self::DeviceGetIrqInfo,
            8 => Self::DeviceSetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            13 => Self::DeviceReset,
            _ => return None,
        })
    }

    /// Its number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// What a message is (header field *Flags* and, in a reply, *Error*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A command that is to be answered.
    Command,
    /// A command with No_reply set, here called posted.
    Posted,
    /// A reply.
    Reply,
    /// A reply with the Error flag set and this errno, which may be 0.
    ErrorReply(u32),
}

/// The header of every message (section Header).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// *Message ID*, echoed in the reply.
    pub id: u16,
    /// *Command*, as a number: a server answers unknown ones too.
    pub command: u16,
    /// *Message size* in bytes, header included.
    pub size: u32,
    /// *Flags* and *Error*.
    pub kind: Kind,
}

impl Header {
    /// Decodes and checks a header.
    ///
    /// # Errors
    /// Fewer than 16 bytes, a size below 16 or above [`MAX_MESSAGE`], an unknown type, unknown flags, or flags that do
    /// not belong to the type.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let id = u16_at(bytes, 0, "message ID")?;
        let command = u16_at(bytes, 2, "command")?;
        let size = u32_at(bytes, 4, "message size")?;
        let flags = u32_at(bytes, 8, "flags")?;
        let error = u32_at(bytes, 12, "error")?;
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        if !(HEADER_SIZE..=MAX_MESSAGE).contains(&length) {
            return Err(DecodeError::Value { field: "message size", value: u64::from(size) });
        }
        let bad_flags = DecodeError::Value { field: "flags", value: u64::from(flags) };
        if flags & !FLAGS_KNOWN != 0 {
            return Err(bad_flags);
        }
        let kind = match (flags & FLAGS_TYPE, flags & FLAGS_NO_REPLY != 0, flags & FLAGS_ERROR != 0) {
            (TYPE_COMMAND, false, false) => Kind::Command,
            (TYPE_COMMAND, true, false) => Kind::Posted,
            (TYPE_REPLY, false, false) => Kind::Reply,
            (TYPE_REPLY, false, true) => Kind::ErrorReply(error),
            _ => return Err(bad_flags),
        };
        Ok(Self { id, command, size, kind })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let (flags, error) = match self.kind {
            Kind::Command => (TYPE_COMMAND, 0),
            Kind::Posted => (TYPE_COMMAND | FLAGS_NO_REPLY, 0),
            Kind::Reply => (TYPE_REPLY, 0),
            Kind::ErrorReply(errno) => (TYPE_REPLY | FLAGS_ERROR, errno),
        };
        let mut bytes = [0; HEADER_SIZE];
        put(&mut bytes, 0, &self.id.to_ne_bytes());
        put(&mut bytes, 2, &self.command.to_ne_bytes());
        put(&mut bytes, 4, &self.size.to_ne_bytes());
        put(&mut bytes, 8, &flags.to_ne_bytes());
        put(&mut bytes, 12, &error.to_ne_bytes());
        bytes
    }

    /// Bytes that follow the header.
    pub fn payload_size(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX).saturating_sub(HEADER_SIZE)
    }
}

/// Payload of VFIO_USER_VERSION; the version data follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// *version major*.
    pub major: u16,
    /// *version minor*.
    pub minor: u16,
}

impl Version {
    /// Size in bytes.
    pub const SIZE: usize = 4;

    /// Decodes the fixed part and returns it with the version data, its terminating NUL taken off.
    ///
    /// # Errors
    /// Cut off, or version data that does not end with its only NUL.
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let version =
            Self { major: u16_at(payload, 0, "version major")?, minor: u16_at(payload, 2, "version minor")? };
        let data = match payload.get(Self::SIZE..).unwrap_or_default() {
            [] => &[][..],
            [json @ .., 0] if !json.contains(&0) => json,
            [.., last] => {
                return Err(DecodeError::Value { field: "version data terminator", value: u64::from(*last) });
            }
        };
        Ok((version, data))
    }

    /// The fixed part's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &self.major.to_ne_bytes());
        put(&mut bytes, 2, &self.minor.to_ne_bytes());
        bytes
    }
}

/// Payload of VFIO_USER_DEVICE_GET_INFO, request and reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceInfo {
    /// *argsz*.
    pub argsz: u32,
    /// *flags*: [`DeviceInfo::RESET`], [`DeviceInfo::PCI`] and other bus types.
    pub flags: u32,
    /// *num_regions*.
    pub num_regions: u32,
    /// *num_irqs*: number of interrupt types, not of interrupts.
    pub num_irqs: u32,
}

impl DeviceInfo {
    /// Size in bytes.
    pub const SIZE: usize = 16;
    /// VFIO_DEVICE_FLAGS_RESET.
    pub const RESET: u32 = 1 << 0;
    /// VFIO_DEVICE_FLAGS_PCI.
    pub const PCI: u32 = 1 << 1;

    /// Decodes.
    ///
    /// # Errors
    /// Not exactly [`Self::SIZE`] bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        exact_words(payload).map(|[argsz, flags, num_regions, num_irqs]| Self {
            argsz,
            flags,
            num_regions,
            num_irqs,
        })
    }

    /// The payload's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        words([self.argsz, self.flags, self.num_regions, self.num_irqs])
    }
}

/// Payload of VFIO_USER_DEVICE_GET_REGION_INFO, request and reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegionInfo {
    /// *argsz*.
    pub argsz: u32,
    /// *flags*: [`RegionInfo::READ`], [`RegionInfo::WRITE`], [`RegionInfo::MMAP`], [`RegionInfo::CAPS`].
    pub flags: u32,
    /// *index*.
    pub index: u32,
    /// *cap_offset*: where capabilities begin, counted from the start of this structure; 0 without any.
    pub cap_offset: u32,
    /// *size* of the region in bytes.
    pub size: u64,
    /// *offset* for `mmap` of the descriptor that comes with a mappable region.
    pub offset: u64,
}

impl RegionInfo {
    /// Size in bytes.
    pub const SIZE: usize = 32;
    /// VFIO_REGION_INFO_FLAG_READ.
    pub const READ: u32 = 1 << 0;
    /// VFIO_REGION_INFO_FLAG_WRITE.
    pub const WRITE: u32 = 1 << 1;
    /// VFIO_REGION_INFO_FLAG_MMAP.
    pub const MMAP: u32 = 1 << 2;
    /// VFIO_REGION_INFO_FLAG_CAPS.
    pub const CAPS: u32 = 1 << 3;

    /// Decodes the structure; capabilities may follow it, this subset does not read them.
    ///
    /// # Errors
    /// Fewer than [`Self::SIZE`] bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self {
            argsz: u32_at(payload, 0, "argsz")?,
            flags: u32_at(payload, 4, "flags")?,
            index: u32_at(payload, 8, "index")?,
            cap_offset: u32_at(payload, 12, "cap_offset")?,
            size: u64_at(payload, 16, "size")?,
            offset: u64_at(payload, 24, "offset")?,
        })
    }

    /// The payload's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &words::<16>([self.argsz, self.flags, self.index, self.cap_offset]));
        put(&mut bytes, 16, &self.size.to_ne_bytes());
        put(&mut bytes, 24, &self.offset.to_ne_bytes());
        bytes
    }
}

/// Payload of VFIO_USER_DEVICE_GET_IRQ_INFO, request and reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IrqInfo {
    /// *argsz*.
    pub argsz: u32,
    /// *flags*: [`IrqInfo::EVENTFD`] and others.
    pub flags: u32,
    /// *index* of the interrupt type.
    pub index: u32,
    /// *count* of interrupts of this type.
    pub count: u32,
}

impl IrqInfo {
    /// Size in bytes.
    pub const SIZE: usize = 16;
    /// VFIO_IRQ_INFO_EVENTFD.
    pub const EVENTFD: u32 = 1 << 0;

    /// Decodes.
    ///
    /// # Errors
    /// Not exactly [`Self::SIZE`] bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        exact_words(payload).map(|[argsz, flags, index, count]| Self { argsz, flags, index, count })
    }

    /// The payload's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        words([self.argsz, self.flags, self.index, self.count])
    }
}

/// Payload of VFIO_USER_DEVICE_SET_IRQS; descriptors come beside it, boolean data is not in the subset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IrqSet {
    /// *argsz*.
    pub argsz: u32,
    /// *flags*: one data flag and one action flag.
    pub flags: u32,
    /// *index* of the interrupt type.
    pub index: u32,
    /// *start*: first interrupt of that type.
    pub start: u32,
    /// *count* of interrupts.
    pub count: u32,
}

impl IrqSet {
    /// Size in bytes.
    pub const SIZE: usize = 20;
    /// VFIO_IRQ_SET_DATA_NONE.
    pub const DATA_NONE: u32 = 1 << 0;
    /// VFIO_IRQ_SET_DATA_EVENTFD.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// VFIO_IRQ_SET_ACTION_TRIGGER.
    pub const ACTION_TRIGGER: u32 = 1 << 5;

    /// Decodes.
    ///
    /// # Errors
    /// Not exactly [`Self::SIZE`] bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        exact_words(payload).map(|[argsz, flags, index, start, count]| Self {
            argsz,
            flags,
            index,
            start,
            count,
        })
    }

    /// The payload's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        words([self.argsz, self.flags, self.index, self.start, self.count])
    }
}

/// Payload of VFIO_USER_REGION_READ and VFIO_USER_REGION_WRITE; data follows it in a write and in a read's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegionAccess {
    /// *offset* into the region.
    pub offset: u64,
    /// *region* index.
    pub region: u32,
    /// *count* of data bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Size in bytes.
    pub const SIZE: usize = 16;

    /// Decodes the structure and returns it with the bytes that follow.
    ///
    /// # Errors
    /// Cut off, or a count above [`super::MAX_DATA`].
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let access = Self {
            offset: u64_at(payload, 0, "offset")?,
            region: u32_at(payload, 8, "region")?,
            count: u32_at(payload, 12, "count")?,
        };
        if access.len() > super::MAX_DATA {
            return Err(DecodeError::Value { field: "count", value: u64::from(access.count) });
        }
        Ok((access, payload.get(Self::SIZE..).unwrap_or_default()))
    }

    /// The structure's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        put(&mut bytes, 0, &self.offset.to_ne_bytes());
        put(&mut bytes, 8, &words::<8>([self.region, self.count]));
        bytes
    }

    /// *count* as a length in memory.
    pub fn len(&self) -> usize {
        usize::try_from(self.count).unwrap_or(usize::MAX)
    }

    /// Whether no byte is accessed.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// Fails unless the payload has exactly this size.
pub(super) fn exactly(payload: &[u8], size: usize) -> Result<(), DecodeError> {
    if payload.len() == size {
        Ok(())
    } else {
        Err(DecodeError::Value {
            field: "message size",
            value: HEADER_SIZE.saturating_add(payload.len()) as u64,
        })
    }
}

/// The words of a payload that consists of so many and of nothing else.
fn exact_words<const WORDS: usize>(payload: &[u8]) -> Result<[u32; WORDS], DecodeError> {
    exactly(payload, size_of::<[u32; WORDS]>())?;
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(payload.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    Ok(words)
}

/// Copies `field` to `offset`; what would not fit is left out, which no caller does.
pub(super) fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(offset..).and_then(|rest| rest.get_mut(..field.len())) {
        place.copy_from_slice(field);
    }
}

fn words<const BYTES: usize>(fields: impl IntoIterator<Item = u32>) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
        place.copy_from_slice(&field.to_ne_bytes());
    }
    bytes
}

fn array_at<const N: usize>(
    bytes: &[u8],
    offset: usize,
    field: &'static str,
) -> Result<[u8; N], DecodeError> {
    bytes.get(offset..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or(DecodeError::Short {
        field,
        needed: offset.saturating_add(N),
        got: bytes.len(),
    })
}

fn u16_at(bytes: &[u8], offset: usize, field: &'static str) -> Result<u16, DecodeError> {
    array_at(bytes, offset, field).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], offset: usize, field: &'static str) -> Result<u32, DecodeError> {
    array_at(bytes, offset, field).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], offset: usize, field: &'static str) -> Result<u64, DecodeError> {
    array_at(bytes, offset, field).map(u64::from_ne_bytes)
}
