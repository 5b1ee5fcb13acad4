//! A virtio device's process that has turned hostile: it answers well for a while, and then as it likes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_ipc::vhost_user::connection::{Connection, ConnectionError, Kind, Message};
use bulkhead_ipc::vhost_user::deadline::Deadline;
use bulkhead_ipc::vhost_user::frontend::SUPPORTED_PROTOCOL_FEATURES;
use bulkhead_ipc::vhost_user::message::FrontendReq;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::nonsense::{Frame, Random};

/// Request code, flags, size.
const FIELDS: &[(usize, usize)] = &[(0, 4), (4, 4), (8, 4)];
const REPLY: u32 = 0x5;
const REQUEST: u32 = 0x1;
/// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

fn frame(request: u32, flags: u32, payload: &[u8], descriptors: Vec<OwnedFd>) -> Frame {
    let size = u32::try_from(payload.len()).unwrap_or(0);
    let mut bytes: Vec<u8> = [request, flags, size].iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(payload);
    Frame { bytes, descriptors, fields: FIELDS, size: (2, false) }
}

/// What the core gave, to be abused.
#[derive(Default)]
struct Loot {
    channel: Option<OwnedFd>,
    /// Call, kick and error eventfds.
    events: Vec<OwnedFd>,
    memory: Vec<OwnedFd>,
}

/// Plays one connection until it ends. Returns the number of messages sent, or what the core must not have allowed.
pub fn play(stream: UnixStream, random: &mut Random) -> Result<u64, String> {
    let socket = stream.try_clone().map_err(|error| error.to_string())?;
    let connection = Connection::from(stream);
    let mut loot = Loot::default();
    let mut sent = 0;
    // Of the answers, how many are good before one is not; a few connections are good up to the end of the replay.
    let most = if random.one_in(2) { 40 } else { 12 };
    let mut good = random.below(most);
    // Then it asks, signals and tells of changes, and answers each question that this brings.
    let mut tricks = random.below(60);
    let mut spoiled = false;
    loop {
        let starting = !spoiled && loot.events.len() < 3;
        let patience = if starting { Duration::from_secs(10) } else { Duration::from_millis(2) };
        match connection.receive(Deadline::after(patience)) {
            Ok(message) => {
                let Some(mut answer) = answer(&message, random) else {
                    loot.take(message);
                    continue;
                };
                loot.take(message);
                if good > 0 {
                    good -= 1;
                    sent += answer.send(socket.as_fd());
                    continue;
                }
                spoiled = true;
                answer.spoil(random);
                match answer.misbehave(socket.as_fd(), random) {
                    0 => return Ok(sent),
                    count => sent += count,
                }
            }
            Err(ConnectionError::Late(_)) if starting => {
                return Err("the core says nothing for ten seconds".to_owned());
            }
            Err(ConnectionError::Late(_)) if tricks > 0 && loot.events.len() >= 3 => {
                tricks -= 1;
                sent += loot.abuse(socket.as_fd(), random)?;
            }
            // The core may be waiting for more of a message: a few times it has to notice by itself that nothing comes.
            Err(ConnectionError::Late(_)) if random.one_in(800) => {
                std::thread::sleep(Duration::from_millis(1100))
            }
            Err(_) => return Ok(sent),
        }
    }
}

/// Serves well until the queues run and the core has nothing more to say.
pub fn serve(stream: UnixStream) -> Result<(), String> {
    let mut random = Random(1);
    let socket = stream.try_clone().map_err(|error| error.to_string())?;
    let connection = Connection::from(stream);
    let mut running = false;
    loop {
        let patience = Duration::from_millis(if running { 300 } else { 10_000 });
        match connection.receive(Deadline::after(patience)) {
            Ok(message) => {
                running |= message.request == u32::from(FrontendReq::SET_VRING_ENABLE);
                if let Some(frame) = answer(&message, &mut random) {
                    frame.send(socket.as_fd());
                }
            }
            Err(ConnectionError::Late(_)) if running => return Ok(()),
            Err(error) => return Err(format!("a good device is not served: {error}")),
        }
    }
}

impl Loot {
    fn take(&mut self, message: Message) {
        let list = match FrontendReq::try_from(message.request) {
            Ok(FrontendReq::SET_BACKEND_REQ_FD) => {
                self.channel = message.descriptors.into_iter().next();
                return;
            }
            Ok(FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_ERR) => {
                &mut self.events
            }
            _ => &mut self.memory,
        };
        list.extend(message.descriptors);
    }

    /// One thing that no device of ours does.
    fn abuse(&self, socket: BorrowedFd<'_>, random: &mut Random) -> Result<u64, String> {
        let mut sent = 0;
        let event =
            usize::try_from(random.below(self.events.len() as u64)).ok().and_then(|at| self.events.get(at));
        match (random.below(8), event) {
            // A storm of signals, as fast as it goes.
            (0..2, Some(event)) => {
                for _ in 0..2000 {
                    let _ = nix::unistd::write(event, &1u64.to_ne_bytes());
                }
            }
            // A full counter. To make the eventfd blocking too is what no policy of a device allows.
            (2, Some(event)) => {
                let _ = nix::unistd::read(event, &mut [0; 8]);
                let _ = nix::unistd::write(event, &(u64::MAX - 1).to_ne_bytes());
            }
            (3, _) => {
                for memory in &self.memory {
                    let sealed = nix::unistd::ftruncate(memory, 0).is_err();
                    if !sealed {
                        return Err("guest RAM was truncated".to_owned());
                    }
                }
            }
            // An answer to nothing.
            (4, _) => {
                let mut answer =
                    frame(u32::try_from(random.below(50)).unwrap_or(0), REPLY, &[0; 8], Vec::new());
                if random.one_in(2) {
                    answer.spoil(random);
                }
                sent += answer.send(socket);
            }
            _ => {
                let Some(channel) = &self.channel else { return Ok(0) };
                for _ in 0..1 + random.below(60) {
                    // Mostly the one request that is known: a change of the configuration.
                    let request = if random.one_in(4) { random.below(16) } else { 2 };
                    let flags = REQUEST | if random.one_in(3) { 8 } else { 0 };
                    let payload = if request == 2 { Vec::new() } else { random.bytes(24) };
                    let mut request = frame(u32::try_from(request).unwrap_or(0), flags, &payload, Vec::new());
                    if random.one_in(100) {
                        request.spoil(random);
                    }
                    sent += request.send(channel.as_fd());
                }
                // Answers to these are not read: the core must not wait for that.
            }
        }
        Ok(sent)
    }
}

/// The right answer, if one is due.
fn answer(message: &Message, random: &mut Random) -> Option<Frame> {
    let number = |value: u64| Some((value.to_le_bytes().to_vec(), Vec::new()));
    let reply = match FrontendReq::try_from(message.request).ok()? {
        FrontendReq::GET_FEATURES => number(FEATURES),
        FrontendReq::GET_PROTOCOL_FEATURES => number(SUPPORTED_PROTOCOL_FEATURES.bits()),
        FrontendReq::GET_QUEUE_NUM => number(2),
        FrontendReq::GET_MAX_MEM_SLOTS => number(8),
        FrontendReq::GET_STATUS => number(11),
        FrontendReq::GET_CONFIG => {
            // Another one each time.
            let mut payload = message.payload.get(..12)?.to_vec();
            payload.extend(random.bytes(message.payload.len() - 12));
            Some((payload, Vec::new()))
        }
        FrontendReq::GET_VRING_BASE => {
            let mut payload = message.payload.get(..4)?.to_vec();
            payload.extend([0; 4]);
            Some((payload, Vec::new()))
        }
        FrontendReq::GET_INFLIGHT_FD => {
            let memory =
                memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).ok()?;
            nix::unistd::ftruncate(&memory, 0x4000).ok()?;
            if random.one_in(2) {
                fcntl(&memory, FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK)).ok()?;
            }
            let mut payload = [0x4000u64, 0].map(u64::to_le_bytes).concat();
            payload.extend(message.payload.get(16..)?);
            Some((payload, vec![memory]))
        }
        _ if message.kind == Kind::RequestNeedingReply => number(0),
        _ => None,
    };
    reply.map(|(payload, descriptors)| frame(message.request, REPLY, &payload, descriptors))
}
