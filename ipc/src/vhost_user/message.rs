//! Message payloads and their bytes. The structures are the `vhost` crate's; what it keeps to itself is here.

use vm_memory::ByteValued;

pub use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, VhostUserVringAddr,
    VhostUserVringAddrFlags, VhostUserVringState,
};

/// Virtio feature bit 30, which in vhost-user says that protocol features can be negotiated.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Virtio feature bit 26, VHOST_F_LOG_ALL: the back end marks what it writes in the dirty log.
pub const VHOST_F_LOG_ALL: u64 = 1 << 26;
/// In SET_VRING_KICK, _CALL and _ERR: no descriptor comes with the message.
pub const VRING_NO_FD: u64 = 1 << 8;
/// In SET_VRING_KICK, _CALL and _ERR: the queue's index.
pub const VRING_INDEX_MASK: u64 = 0xff;

/// The bytes of a payload structure.
pub fn encode<T: ByteValued>(value: &T) -> Vec<u8> {
    value.as_slice().to_vec()
}

/// A payload structure from exactly its bytes; `None` if the payload is shorter or longer.
pub fn decode<T: ByteValued + Default>(payload: &[u8]) -> Option<T> {
    let mut value = T::default();
    let bytes = value.as_mut_slice();
    if bytes.len() != payload.len() {
        return None;
    }
    bytes.copy_from_slice(payload);
    Some(value)
}

/// A payload structure from the start of a payload, and what follows it.
pub fn decode_prefix<T: ByteValued + Default>(payload: &[u8]) -> Option<(T, &[u8])> {
    let (head, tail) = payload.split_at_checked(size_of::<T>())?;
    Some((decode(head)?, tail))
}
