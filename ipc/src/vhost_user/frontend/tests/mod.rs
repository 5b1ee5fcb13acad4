//! Tests of the front end: against scripted peers, good and hostile, and against QEMU's storage daemon.

mod backend_requests;
mod hostile;
mod requests;
mod storage_daemon;

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use super::*;

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(50);
const ALL: u64 = SUPPORTED_PROTOCOL_FEATURES.bits();
/// VERSION_1, PROTOCOL_FEATURES, LOG_ALL.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 26;

fn limits(exchange: Duration) -> Limits {
    Limits { exchange, stop: exchange }
}

/// Runs `peer` in a thread on the other end of a front end's connection.
fn with_peer<R: Send + 'static>(
    exchange: Duration,
    peer: impl FnOnce(Connection) -> R + Send + 'static,
) -> (Frontend, JoinHandle<R>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || peer(theirs.into()));
    (Frontend::new("disk0", ours, limits(exchange)), thread)
}

/// A front end that has negotiated `protocol` already.
fn negotiated(mut frontend: Frontend, protocol: u64) -> Frontend {
    frontend.offered = FEATURES;
    frontend.protocol = VhostUserProtocolFeatures::from_bits_truncate(protocol);
    frontend.memory_slots = 8;
    frontend
}

fn reply(connection: &Connection, request: FrontendReq, payload: &[u8]) {
    connection.send(request.into(), Kind::Reply, payload, &[], Deadline::after(LONG)).unwrap();
}

/// Answers as a well-behaved back end with everything, until the front end hangs up. Returns what it was asked.
fn good_peer(connection: Connection) -> Vec<Message> {
    let mut seen = Vec::new();
    let mut acknowledge = false;
    while let Ok(message) = connection.receive(Deadline::after(LONG)) {
        let request = FrontendReq::try_from(message.request).unwrap();
        let answer = match request {
            FrontendReq::GET_FEATURES => Some(FEATURES.to_le_bytes().to_vec()),
            // And bits that nobody knows.
            FrontendReq::GET_PROTOCOL_FEATURES => Some((ALL | 1 << 63).to_le_bytes().to_vec()),
            FrontendReq::GET_QUEUE_NUM => Some(4u64.to_le_bytes().to_vec()),
            FrontendReq::GET_MAX_MEM_SLOTS => Some(8u64.to_le_bytes().to_vec()),
            FrontendReq::GET_STATUS => Some(15u64.to_le_bytes().to_vec()),
            FrontendReq::GET_CONFIG => {
                let mut payload = message.payload.clone();
                payload.iter_mut().skip(12).for_each(|byte| *byte = 0xAB);
                Some(payload)
            }
            FrontendReq::GET_VRING_BASE => {
                let mut payload = message.payload.clone();
                payload[4..].copy_from_slice(&77u32.to_le_bytes());
                Some(payload)
            }
            _ if message.kind == Kind::RequestNeedingReply => Some(vec![0; 8]),
            _ => None,
        };
        if let Some(answer) = answer {
            reply(&connection, request, &answer);
        }
        if request == FrontendReq::SET_PROTOCOL_FEATURES {
            assert_eq!(message.payload, ALL.to_le_bytes());
            acknowledge = true;
        } else if acknowledge && message.kind == Kind::Request {
            assert!(format!("{request:?}").starts_with("GET_"), "{request:?} without NEED_REPLY");
        }
        seen.push(message);
    }
    seen
}

fn requests(messages: &[Message]) -> Vec<FrontendReq> {
    messages.iter().map(|message| message.request.try_into().unwrap()).collect()
}
