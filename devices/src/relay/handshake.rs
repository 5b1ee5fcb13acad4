//! What a back end says of itself, judged and completed on its way to the core.

use bulkhead_ipc::channel::message::RelayConfig;
use bulkhead_ipc::vhost_user::connection::{Kind, Message};
use bulkhead_ipc::vhost_user::message::{
    FrontendReq, VHOST_USER_F_PROTOCOL_FEATURES, VhostUserConfig, VhostUserProtocolFeatures, decode_prefix,
    encode,
};
use thiserror::Error;

use super::reply;

/// Bits that each type of device gives a meaning of its own (virtio 1.2, section 6); those from 50 on are given to none here.
const DEVICE_SPECIFIC: u64 = 0x00FF_FFFF;
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

/// Features of virtio-net that need a control queue (virtio 1.2, 5.1.3). A vhost-user back end has none: it is its front end's
/// business, DPDK and passt offer them all the same, and a driver that waits for an answer there waits for ever.
const NET_CONTROL: u64 = 0xFE_0004;

/// In what way a back end is not what it should be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unfit {
    /// It has features of something else.
    #[error(
        "offers features that no device of type {kind} has ({bits:#x}): is it a back end of another type?"
    )]
    OtherType {
        /// The type that was asked for.
        kind: String,
        /// The bits that it does not have.
        bits: u64,
    },
    /// It has no configuration space.
    #[error(
        "has no configuration space, which a device of type {0} needs: is it a back end of another type?"
    )]
    NoConfig(String),
    /// Its configuration space is too short.
    #[error(
        "refuses {wanted} bytes of configuration space, which a device of type {kind} has: is it a back end of another type, or too old?"
    )]
    Config {
        /// The type that was asked for.
        kind: String,
        /// How many bytes.
        wanted: u32,
    },
    /// Nothing tells that it is what it should be.
    #[error(
        "has no feature of a device of type {0} and a configuration space of zeros: is it a back end of another type?"
    )]
    Empty(String),
    /// It lacks a feature that every front end of today needs.
    #[error("lacks {0}, which is needed")]
    Lacks(&'static str),
    /// It has too few queues.
    #[error("has {got} queues, and {needed} are needed")]
    Queues {
        /// What it has.
        got: u64,
        /// What was asked for, or the type has at least.
        needed: u16,
    },
    /// A reply that has not the length of a number.
    #[error("answers {0} with a message of the wrong length")]
    Length(&'static str),
    /// It said something unasked.
    #[error("sent a message (request {0}) that nobody asked for")]
    Unasked(u32),
}

/// What becomes of a request of the core.
#[derive(Debug)]
pub enum Next {
    /// It goes to the back end.
    PassOn(Message),
    /// The first goes to the back end, and the second after it: the answer to that one says that the first is done.
    PassOnBoth(Message, Message),
    /// This is the answer.
    Answer(Message),
    /// It ends here, and none is due.
    Nothing,
}

/// The handshake so far.
#[derive(Debug)]
pub struct Handshake {
    config: RelayConfig,
    /// The question about itself that the back end has not answered yet.
    asked: Option<FrontendReq>,
    /// How many bytes of configuration space were asked for.
    wanted: u32,
    /// The features that it offers.
    offered: u64,
    /// The back end acknowledges nothing, so that this process does it.
    acknowledges_for_it: bool,
    /// The request that is acknowledged when the back end has answered the question that was sent after it.
    unacknowledged: Option<u32>,
}

/// Questions that a back end answers at once, whatever its state.
fn is_question(request: FrontendReq) -> bool {
    use FrontendReq::{GET_CONFIG, GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM};
    matches!(request, GET_FEATURES | GET_PROTOCOL_FEATURES | GET_QUEUE_NUM | GET_CONFIG)
}

/// The number in a payload.
fn number(payload: &[u8], what: &'static str) -> Result<u64, Unfit> {
    payload.try_into().map(u64::from_le_bytes).map_err(|_| Unfit::Length(what))
}

/// Rewrites the number of a payload that has the length of one.
fn rewrite(message: &mut Message, change: impl FnOnce(u64) -> u64) {
    if let Ok(bytes) = <[u8; 8]>::try_from(message.payload.as_slice()) {
        message.payload = change(u64::from_le_bytes(bytes)).to_le_bytes().to_vec();
    }
}

impl Handshake {
    /// Nothing was said yet.
    #[must_use]
    pub fn new(config: RelayConfig) -> Self {
        Self { config, asked: None, wanted: 0, offered: 0, acknowledges_for_it: false, unacknowledged: None }
    }

    /// The question that the back end has not answered.
    #[must_use]
    pub fn asked(&self) -> Option<String> {
        self.asked.map(|request| format!("{request:?}"))
    }

    /// Protocol features that stay between the core and this process. Without a configuration space of its own a back end has
    /// nothing to say about changes of it, and what else it might send over its own channel the core does not serve.
    /// A back end that acknowledges nothing would hear the guest's first notification before it has enabled the ring, and some
    /// forget it then (vhost-device-rng): this process acknowledges for it.
    fn own_protocol(&self) -> u64 {
        let mut own = VhostUserProtocolFeatures::empty();
        if self.config.config.is_some() {
            own |= VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::BACKEND_REQ;
        }
        if self.acknowledges_for_it {
            own |= VhostUserProtocolFeatures::REPLY_ACK;
        }
        own.bits()
    }

    /// Looks at a request of the core.
    #[must_use]
    pub fn request(&mut self, mut message: Message) -> Next {
        let Ok(request) = FrontendReq::try_from(message.request) else { return Next::PassOn(message) };
        match request {
            FrontendReq::SET_FEATURES => rewrite(&mut message, |bits| bits & !self.config.own_features),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let own = self.own_protocol();
                rewrite(&mut message, |bits| bits & !own);
            }
            FrontendReq::GET_CONFIG => {
                if let Some(answer) = self.own_config(&message) {
                    return Next::Answer(answer);
                }
                self.wanted =
                    decode_prefix::<VhostUserConfig>(&message.payload).map_or(0, |(head, _)| head.size);
            }
            FrontendReq::SET_CONFIG if self.config.config.is_some() => {
                // Nothing in these spaces can be written.
                return match message.kind {
                    Kind::RequestNeedingReply => {
                        Next::Answer(reply(message.request, 1u64.to_le_bytes().to_vec()))
                    }
                    _ => Next::Nothing,
                };
            }
            _ => {}
        }
        self.asked = is_question(request).then_some(request);
        if message.kind != Kind::RequestNeedingReply || !self.acknowledges_for_it {
            return Next::PassOn(message);
        }
        message.kind = Kind::Request;
        self.unacknowledged = Some(message.request);
        // Any question would do: requests are worked on in order.
        let question = Message {
            request: FrontendReq::GET_FEATURES.into(),
            kind: Kind::Request,
            payload: Vec::new(),
            descriptors: Vec::new(),
        };
        Next::PassOnBoth(message, question)
    }

    /// The answer to GET_CONFIG out of the configuration space that is the front end's.
    fn own_config(&self, message: &Message) -> Option<Message> {
        let space = self.config.config.as_ref()?;
        let (head, _) = decode_prefix::<VhostUserConfig>(&message.payload)?;
        let mut payload = encode(&head);
        let bytes = space.iter().copied().chain(std::iter::repeat(0));
        let (offset, size) = (usize::try_from(head.offset).ok()?, usize::try_from(head.size).ok()?);
        payload.extend(bytes.skip(offset).take(size.min(message.payload.len())));
        Some(reply(message.request, payload))
    }

    /// Looks at a message of the back end: the core gets what this returns.
    ///
    /// # Errors
    /// [`Unfit`]: the back end is not what it should be.
    pub fn reply(&mut self, mut message: Message) -> Result<Message, Unfit> {
        if message.kind != Kind::Reply {
            return Err(Unfit::Unasked(message.request));
        }
        if message.request == u32::from(FrontendReq::GET_FEATURES)
            && let Some(request) = self.unacknowledged.take()
        {
            return Ok(reply(request, 0u64.to_le_bytes().to_vec()));
        }
        let asked = self.asked.filter(|asked| u32::from(*asked) == message.request);
        match asked {
            Some(FrontendReq::GET_FEATURES) => self.features(&mut message)?,
            Some(FrontendReq::GET_PROTOCOL_FEATURES) => self.protocol(&mut message)?,
            Some(FrontendReq::GET_QUEUE_NUM) => self.queues(&mut message)?,
            Some(FrontendReq::GET_CONFIG) => self.space(&message)?,
            _ => {}
        }
        self.asked = None;
        Ok(message)
    }

    fn features(&mut self, message: &mut Message) -> Result<(), Unfit> {
        let offered = number(&message.payload, "GET_FEATURES")?;
        self.offered = offered;
        let foreign = offered & DEVICE_SPECIFIC & !self.config.features;
        if foreign != 0 {
            return Err(Unfit::OtherType { kind: self.config.kind.clone(), bits: foreign });
        }
        if offered & VERSION_1 == 0 {
            return Err(Unfit::Lacks("VIRTIO_F_VERSION_1"));
        }
        if offered & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            return Err(Unfit::Lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let hidden = if self.config.kind == "net" { NET_CONTROL } else { 0 };
        rewrite(message, |bits| (bits | self.config.own_features) & !hidden);
        Ok(())
    }

    fn protocol(&mut self, message: &mut Message) -> Result<(), Unfit> {
        let offered = number(&message.payload, "GET_PROTOCOL_FEATURES")?;
        let has = |feature: VhostUserProtocolFeatures| offered & feature.bits() != 0;
        self.acknowledges_for_it = !has(VhostUserProtocolFeatures::REPLY_ACK);
        if self.config.config.is_none() && self.config.has_config && !has(VhostUserProtocolFeatures::CONFIG) {
            return Err(Unfit::NoConfig(self.config.kind.clone()));
        }
        let own = self.own_protocol();
        let shown = own & !VhostUserProtocolFeatures::BACKEND_REQ.bits();
        rewrite(message, |bits| bits & !own | shown);
        match self.config.queues {
            // A back end that cannot tell has what its type has at least.
            Some(needed) if needed > self.config.least_queues && !has(VhostUserProtocolFeatures::MQ) => {
                Err(Unfit::Queues { got: self.config.least_queues.into(), needed })
            }
            _ => Ok(()),
        }
    }

    fn queues(&self, message: &mut Message) -> Result<(), Unfit> {
        let got = number(&message.payload, "GET_QUEUE_NUM")?;
        let needed = self.config.queues.unwrap_or(self.config.least_queues);
        if got < needed.into() {
            return Err(Unfit::Queues { got, needed });
        }
        if self.config.queues.is_some() {
            rewrite(message, |_| needed.into());
        }
        Ok(())
    }

    /// The back end answers with less where it has less, or with nothing ("GET_CONFIG", reply).
    fn space(&self, message: &Message) -> Result<(), Unfit> {
        let wanted = self.wanted;
        match decode_prefix::<VhostUserConfig>(&message.payload) {
            Some((_, bytes))
                if self.config.has_config
                    && self.offered & DEVICE_SPECIFIC == 0
                    && bytes.iter().all(|byte| *byte == 0) =>
            {
                Err(Unfit::Empty(self.config.kind.clone()))
            }
            Some((head, bytes)) if head.size == wanted && bytes.len() as u64 == u64::from(wanted) => Ok(()),
            _ => Err(Unfit::Config { kind: self.config.kind.clone(), wanted }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: u64 = VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES;

    fn config() -> RelayConfig {
        RelayConfig {
            back_end: bulkhead_ipc::channel::message::FdIndex(1),
            path: "/run/x".into(),
            kind: "fs".into(),
            features: 1,
            queues: Some(2),
            least_queues: 2,
            has_config: true,
            config: None,
            own_features: 0,
        }
    }

    fn ask(handshake: &mut Handshake, request: FrontendReq, answer: u64) -> Result<u64, Unfit> {
        let payload = Vec::new();
        let message =
            Message { request: request.into(), kind: Kind::Request, payload, descriptors: Vec::new() };
        assert!(matches!(handshake.request(message), Next::PassOn(_)));
        let answer = handshake.reply(reply(request.into(), answer.to_le_bytes().to_vec()))?;
        Ok(u64::from_le_bytes(answer.payload.try_into().unwrap()))
    }

    #[test]
    fn features_tell_types_apart() {
        let mut handshake = Handshake::new(config());
        let request = FrontendReq::GET_FEATURES;
        assert_eq!(ask(&mut handshake, request, GOOD | 1), Ok(GOOD | 1));
        let other = Unfit::OtherType { kind: "fs".into(), bits: 0x40 };
        assert_eq!(ask(&mut handshake, request, GOOD | 0x41), Err(other));
        assert_eq!(ask(&mut handshake, request, GOOD & !VERSION_1), Err(Unfit::Lacks("VIRTIO_F_VERSION_1")));
        assert!(ask(&mut handshake, request, VERSION_1).is_err());
    }

    #[test]
    fn queues_are_as_many_as_asked_for() {
        let mut handshake = Handshake::new(RelayConfig { queues: Some(3), ..config() });
        assert_eq!(ask(&mut handshake, FrontendReq::GET_QUEUE_NUM, 8), Ok(3));
        let few = Unfit::Queues { got: 2, needed: 3 };
        assert_eq!(ask(&mut handshake, FrontendReq::GET_QUEUE_NUM, 2), Err(few));
        let config_only = VhostUserProtocolFeatures::CONFIG.bits();
        let none = Unfit::Queues { got: 2, needed: 3 };
        assert_eq!(ask(&mut handshake, FrontendReq::GET_PROTOCOL_FEATURES, config_only), Err(none));
        let mut handshake = Handshake::new(RelayConfig { queues: None, ..config() });
        assert_eq!(ask(&mut handshake, FrontendReq::GET_QUEUE_NUM, 8), Ok(8));
    }

    #[test]
    fn a_network_card_is_offered_without_the_control_queue_that_nobody_serves() {
        let card = RelayConfig {
            kind: "net".into(),
            features: NET_CONTROL | 1,
            config: Some(vec![0; 12]),
            own_features: 0x20,
            ..config()
        };
        let checksum = 1;
        let offered = GOOD | NET_CONTROL | checksum;
        assert_eq!(
            ask(&mut Handshake::new(card), FrontendReq::GET_FEATURES, offered),
            Ok(GOOD | checksum | 0x20)
        );
    }

    #[test]
    fn a_space_of_the_front_end_hides_that_the_back_end_has_none() {
        let mq = VhostUserProtocolFeatures::MQ.bits();
        assert_eq!(
            ask(&mut Handshake::new(config()), FrontendReq::GET_PROTOCOL_FEATURES, mq),
            Err(Unfit::NoConfig("fs".into()))
        );
        let space = Some(vec![1, 2, 3, 4]);
        let mut handshake = Handshake::new(RelayConfig { config: space, own_features: 0x20, ..config() });
        let with = mq | VhostUserProtocolFeatures::CONFIG.bits();
        assert_eq!(ask(&mut handshake, FrontendReq::GET_PROTOCOL_FEATURES, mq), Ok(with));
        assert_eq!(ask(&mut handshake, FrontendReq::GET_FEATURES, GOOD), Ok(GOOD | 0x20));
        let mut set = |request: FrontendReq, value: u64| {
            let mut message = reply(request.into(), value.to_le_bytes().to_vec());
            message.kind = Kind::Request;
            match handshake.request(message) {
                Next::PassOn(message) => u64::from_le_bytes(message.payload.try_into().unwrap()),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(set(FrontendReq::SET_PROTOCOL_FEATURES, with), mq);
        assert_eq!(set(FrontendReq::SET_FEATURES, GOOD | 0x20), GOOD);
        let mut payload = encode(&VhostUserConfig { offset: 2, size: 4, flags: Default::default() });
        payload.extend([9; 4]);
        let message = Message {
            request: FrontendReq::GET_CONFIG.into(),
            kind: Kind::Request,
            payload,
            descriptors: Vec::new(),
        };
        let Next::Answer(answer) = handshake.request(message) else { panic!("passed on") };
        assert_eq!(answer.payload[12..], [3, 4, 0, 0]);
    }

    #[test]
    fn a_back_end_that_acknowledges_nothing_is_asked_a_question_instead() {
        let mq = VhostUserProtocolFeatures::MQ.bits();
        let acknowledged = mq | VhostUserProtocolFeatures::REPLY_ACK.bits();
        let ring = || Message {
            request: FrontendReq::SET_VRING_ENABLE.into(),
            kind: Kind::RequestNeedingReply,
            payload: vec![0, 0, 0, 0, 1, 0, 0, 0],
            descriptors: Vec::new(),
        };
        let mut handshake = Handshake::new(RelayConfig { has_config: false, ..config() });
        let question = FrontendReq::GET_PROTOCOL_FEATURES;
        assert_eq!(ask(&mut handshake, question, mq), Ok(acknowledged));
        let Next::PassOnBoth(first, second) = handshake.request(ring()) else { panic!("one") };
        assert_eq!((first.request, first.kind), (ring().request, Kind::Request));
        assert_eq!((second.request, second.kind), (FrontendReq::GET_FEATURES.into(), Kind::Request));
        let answer = handshake.reply(reply(second.request, GOOD.to_le_bytes().to_vec())).unwrap();
        assert_eq!((answer.request, answer.payload), (ring().request, vec![0; 8]));
        // The next question is one of the core's own.
        assert_eq!(ask(&mut handshake, FrontendReq::GET_FEATURES, GOOD | 1), Ok(GOOD | 1));
        // One that acknowledges does so itself.
        assert_eq!(ask(&mut handshake, question, acknowledged), Ok(acknowledged));
        assert!(matches!(handshake.request(ring()), Next::PassOn(_)));
    }

    #[test]
    fn nobody_speaks_unasked() {
        let mut handshake = Handshake::new(config());
        let message =
            Message { request: 9, kind: Kind::Request, payload: Vec::new(), descriptors: Vec::new() };
        assert_eq!(handshake.reply(message).unwrap_err(), Unfit::Unasked(9));
    }
}
