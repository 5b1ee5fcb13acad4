//! The header of a vsock packet (virtio 1.2, 5.10.6, `struct virtio_vsock_hdr`).

/// Bytes of a header.
pub const HEADER: u32 = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only type served.
pub const STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender of the packet will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: it will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for (VIRTIO_VSOCK_OP_…).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Connect.
    Request,
    /// Connected.
    Response,
    /// There is no such connection, or not any more.
    Reset,
    /// No more is sent or received.
    Shutdown,
    /// Bytes.
    Data,
    /// How much room there is.
    CreditUpdate,
    /// Asks for it.
    CreditRequest,
    /// A number that is none of these.
    Unknown(u16),
}

impl Operation {
    const fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    const fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(number) => number,
        }
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// Stream or not.
    pub kind: u16,
    /// What for.
    pub operation: Operation,
    /// Of a shutdown.
    pub flags: u32,
    /// Bytes that the sender of the packet keeps for the connection.
    pub buf_alloc: u32,
    /// Bytes that it has taken out of them, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the fields, all of which are the guest's.
    pub fn from_bytes(bytes: &[u8; HEADER as usize]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: Operation::from_number(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// As it lies in guest memory.
    pub fn bytes(&self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.operation.number().to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((field, after)) => {
            *rest = after;
            *field
        }
        None => [0; N],
    }
}

fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    if let Some((place, after)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *place = field;
        *rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_lies_as_the_specification_has_it() {
        let header = Header {
            src_cid: 2,
            dst_cid: 0x1_0000_0003,
            src_port: 0x11,
            dst_port: 0x22,
            len: 0x33,
            kind: STREAM,
            operation: Operation::Data,
            flags: 0x44,
            buf_alloc: 0x55,
            fwd_cnt: 0x66,
        };
        let bytes = header.bytes();
        assert_eq!(bytes[..16], [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[16..28], [0x11, 0, 0, 0, 0x22, 0, 0, 0, 0x33, 0, 0, 0]);
        assert_eq!(bytes[28..], [1, 0, 5, 0, 0x44, 0, 0, 0, 0x55, 0, 0, 0, 0x66, 0, 0, 0]);
        assert_eq!(Header::from_bytes(&bytes), header);
        for number in 0..9 {
            assert_eq!(Operation::from_number(number).number(), number);
        }
    }
}
