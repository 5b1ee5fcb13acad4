//! Features, owner, number of queues and of memory slots.

use super::{Frontend, FrontendError, Problem};
use crate::vhost_user::message::{FrontendReq, VHOST_USER_F_PROTOCOL_FEATURES, VhostUserProtocolFeatures};

/// The protocol features that this front end knows how to use.
pub const SUPPORTED_PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// Largest number of queues: SET_VRING_KICK and its kin have eight bits for the index.
const MAX_QUEUES: u16 = 256;
/// Largest number that VHOST_USER_MAX_VRINGS-like limits of any implementation reach; more is nonsense.
const ABSURD_QUEUES: u64 = 0x8000;

impl Frontend {
    /// Opens the session: GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES with what both sides know out
    /// of `wanted`, SET_OWNER, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS. Once for each connection.
    ///
    /// # Errors
    /// A back end without protocol features (bit 30) is [`Problem::Missing`]: it has neither a way to disable a
    /// ring nor a configuration space.
    pub fn negotiate(&mut self, wanted: VhostUserProtocolFeatures) -> Result<(), FrontendError> {
        self.offered = self.query_u64(FrontendReq::GET_FEATURES)?;
        if self.offered & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            return Err(self.broken(FrontendReq::GET_FEATURES, Problem::Missing("protocol features")));
        }
        // Bits that this front end does not know are the peer's business as long as they are not negotiated.
        let offered = self.query_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
        let mut protocol =
            VhostUserProtocolFeatures::from_bits_truncate(offered) & wanted & SUPPORTED_PROTOCOL_FEATURES;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            // Nothing but changes of the configuration space would come over it.
            protocol.remove(VhostUserProtocolFeatures::BACKEND_REQ);
        }
        // REPLY_ACK counts from the next message on.
        let payload = protocol.bits().to_le_bytes();
        self.command(FrontendReq::SET_PROTOCOL_FEATURES, &payload, &[])?;
        self.protocol = protocol;
        self.command(FrontendReq::SET_OWNER, &[], &[])?;
        if self.has(VhostUserProtocolFeatures::MQ) {
            self.queues = self.queue_num()?;
        }
        if self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = self.query_u64(FrontendReq::GET_MAX_MEM_SLOTS)?;
            if slots == 0 {
                return Err(self.bad_reply(
                    FrontendReq::GET_MAX_MEM_SLOTS,
                    "number of slots",
                    slots,
                    "at least 1",
                ));
            }
            self.memory_slots = slots;
        }
        Ok(())
    }

    fn queue_num(&mut self) -> Result<u16, FrontendError> {
        let number = self.query_u64(FrontendReq::GET_QUEUE_NUM)?;
        if number == 0 || number > ABSURD_QUEUES {
            return Err(self.bad_reply(
                FrontendReq::GET_QUEUE_NUM,
                "number of queues",
                number,
                format!("1 to {ABSURD_QUEUES:#x}"),
            ));
        }
        Ok(u16::try_from(number).map_or(MAX_QUEUES, |number| number.min(MAX_QUEUES)))
    }

    /// SET_FEATURES: virtio features, with vhost-user's own bits as the caller wants them
    /// ([`VHOST_USER_F_PROTOCOL_FEATURES`] so that rings start disabled,
    /// [`VHOST_F_LOG_ALL`](crate::vhost_user::message::VHOST_F_LOG_ALL) while the dirty log runs).
    ///
    /// # Errors
    /// [`Problem::Parameter`] for features that the back end did not offer.
    pub fn set_features(&mut self, features: u64) -> Result<(), FrontendError> {
        let unknown = features & !self.offered;
        if unknown != 0 {
            return Err(self.error(
                FrontendReq::SET_FEATURES,
                Problem::Parameter { field: "feature bits that were not offered", value: unknown },
            ));
        }
        self.command(FrontendReq::SET_FEATURES, &features.to_le_bytes(), &[])?;
        self.features = Some(features);
        Ok(())
    }

    /// The virtio features set last, `None` before the first SET_FEATURES.
    pub fn features(&self) -> Option<u64> {
        self.features
    }
}
