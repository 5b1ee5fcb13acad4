//! A back end in a thread that answers well, notes what it was asked, and does as its script says.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bulkhead_ipc::vhost_user::connection::{Connection, Kind};
use bulkhead_ipc::vhost_user::deadline::Deadline;
use bulkhead_ipc::vhost_user::frontend::SUPPORTED_PROTOCOL_FEATURES;
use bulkhead_ipc::vhost_user::message::{BackendReq, FrontendReq, VhostUserProtocolFeatures};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

const LONG: Duration = Duration::from_secs(20);

/// How a peer is.
#[derive(Clone)]
pub struct Script {
    pub features: u64,
    pub protocol: VhostUserProtocolFeatures,
    pub queues: u64,
    /// Configuration space.
    pub config: Vec<u8>,
    /// What GET_VRING_BASE answers.
    pub base: u32,
    /// Does not answer this request.
    pub silent_on: Option<FrontendReq>,
    /// Closes the connection at this request.
    pub closes_on: Option<FrontendReq>,
    /// Answers this request with an error code.
    pub refuses: Option<FrontendReq>,
    /// Takes this long to answer this request.
    pub dawdles_on: Option<(FrontendReq, Duration)>,
    /// Has no memory for requests in flight to give: size 0.
    pub no_inflight: bool,
    /// Seals that memory, so that it cannot take it away again.
    pub seals_inflight: bool,
}

/// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC, RING_PACKED (which must not reach the guest), and three of the device.
pub const FEATURES: u64 = 1 << 34 | 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 0x1040 | 1;

impl Default for Script {
    fn default() -> Self {
        let mut protocol = SUPPORTED_PROTOCOL_FEATURES;
        protocol.remove(VhostUserProtocolFeatures::STATUS);
        Self {
            features: FEATURES,
            protocol,
            queues: 2,
            config: (0..60).collect(),
            base: 7,
            silent_on: None,
            closes_on: None,
            refuses: None,
            dawdles_on: None,
            no_inflight: false,
            seals_inflight: true,
        }
    }
}

/// What a peer was asked, and got.
#[derive(Default)]
pub struct Seen {
    pub requests: Vec<(FrontendReq, Vec<u8>)>,
    pub calls: Vec<OwnedFd>,
    pub kicks: Vec<OwnedFd>,
    pub errors: Vec<OwnedFd>,
    pub channel: Option<Connection>,
    pub inflight: Option<OwnedFd>,
}

pub struct Peer {
    pub seen: Arc<Mutex<Seen>>,
    pub script: Arc<Mutex<Script>>,
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// Starts a peer; returns the front end's socket.
    pub fn start(script: Script) -> (UnixStream, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let script = Arc::new(Mutex::new(script));
        let socket = theirs.try_clone().unwrap();
        let (noted, acts) = (Arc::clone(&seen), Arc::clone(&script));
        let thread = std::thread::spawn(move || serve(&theirs.into(), &noted, &acts));
        (ours, Self { seen, script, socket, thread: Some(thread) })
    }

    /// Dies.
    pub fn die(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// The requests since the last call, without those of the negotiation.
    pub fn requests(&self) -> Vec<FrontendReq> {
        std::mem::take(&mut self.seen.lock().unwrap().requests)
            .into_iter()
            .map(|(request, _)| request)
            .collect()
    }

    /// The payloads of all requests of a kind so far.
    pub fn payloads(&self, kind: FrontendReq) -> Vec<Vec<u8>> {
        let seen = self.seen.lock().unwrap();
        seen.requests
            .iter()
            .filter(|(request, _)| *request == kind)
            .map(|(_, payload)| payload.clone())
            .collect()
    }

    /// Signals the call descriptor of the queue that was started `index`-th.
    pub fn call(&self, index: usize) {
        nix::unistd::write(&self.seen.lock().unwrap().calls[index], &1u64.to_ne_bytes()).unwrap();
    }

    /// Says that a ring is beyond repair.
    pub fn report_error(&self) {
        nix::unistd::write(&self.seen.lock().unwrap().errors[0], &1u64.to_ne_bytes()).unwrap();
    }

    /// Tells of a change that is none; does not mind when nobody listens any more.
    pub fn change_config_quietly(&self) {
        let seen = self.seen.lock().unwrap();
        let channel = seen.channel.as_ref().unwrap();
        let request = u32::from(BackendReq::CONFIG_CHANGE_MSG);
        let _ = channel.send(request, Kind::Request, &[], &[], Deadline::after(LONG));
    }

    /// Changes the configuration and tells.
    pub fn change_config(&self, config: Vec<u8>) {
        self.script.lock().unwrap().config = config;
        let seen = self.seen.lock().unwrap();
        let channel = seen.channel.as_ref().unwrap();
        let request = u32::from(BackendReq::CONFIG_CHANGE_MSG);
        channel.send(request, Kind::Request, &[], &[], Deadline::after(LONG)).unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.die();
    }
}

fn serve(connection: &Connection, seen: &Mutex<Seen>, script: &Mutex<Script>) {
    while let Ok(message) = connection.receive(Deadline::after(LONG)) {
        let request = FrontendReq::try_from(message.request).unwrap();
        let script = script.lock().unwrap().clone();
        if script.closes_on == Some(request) {
            // Not by dropping it: the handle in `Peer` is another descriptor of the same socket.
            nix::sys::socket::shutdown(connection.as_fd().as_raw_fd(), nix::sys::socket::Shutdown::Both)
                .unwrap();
            return;
        }
        let mut descriptors = message.descriptors;
        let mut file = None;
        let answer = match request {
            _ if script.refuses == Some(request) => Some(1u64.to_le_bytes().to_vec()),
            FrontendReq::GET_INFLIGHT_FD if script.no_inflight => {
                let mut payload = vec![0; 16];
                payload.extend(&message.payload[16..]);
                Some(payload)
            }
            FrontendReq::GET_FEATURES => Some(script.features.to_le_bytes().to_vec()),
            FrontendReq::GET_PROTOCOL_FEATURES => Some(script.protocol.bits().to_le_bytes().to_vec()),
            FrontendReq::GET_QUEUE_NUM => Some(script.queues.to_le_bytes().to_vec()),
            FrontendReq::GET_MAX_MEM_SLOTS => Some(8u64.to_le_bytes().to_vec()),
            FrontendReq::GET_STATUS => Some(11u64.to_le_bytes().to_vec()),
            FrontendReq::GET_CONFIG => {
                let mut payload = message.payload.clone();
                payload.truncate(12);
                payload.extend(&script.config);
                Some(payload)
            }
            FrontendReq::GET_VRING_BASE => {
                let mut payload = message.payload.clone();
                payload[4..].copy_from_slice(&script.base.to_le_bytes());
                Some(payload)
            }
            FrontendReq::GET_INFLIGHT_FD => {
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
                let memory = memfd_create(c"inflight", flags).unwrap();
                nix::unistd::ftruncate(&memory, 0x1000).unwrap();
                if script.seals_inflight {
                    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
                }
                file = Some(memory);
                let mut payload = [0x1000u64, 0].map(u64::to_le_bytes).concat();
                payload.extend(&message.payload[16..]);
                Some(payload)
            }
            _ if message.kind == Kind::RequestNeedingReply => Some(vec![0; 8]),
            _ => None,
        };
        {
            let mut seen = seen.lock().unwrap();
            let descriptor = (!descriptors.is_empty()).then(|| descriptors.remove(0));
            match (request, descriptor) {
                (FrontendReq::SET_VRING_CALL, Some(fd)) => seen.calls.push(fd),
                (FrontendReq::SET_VRING_KICK, Some(fd)) => seen.kicks.push(fd),
                (FrontendReq::SET_VRING_ERR, Some(fd)) => seen.errors.push(fd),
                (FrontendReq::SET_INFLIGHT_FD, Some(fd)) => seen.inflight = Some(fd),
                (FrontendReq::SET_BACKEND_REQ_FD, Some(fd)) => seen.channel = Some(fd.into()),
                _ => {}
            }
            seen.requests.push((request, message.payload));
        }
        if let Some((_, time)) = script.dawdles_on.filter(|(dawdles_on, _)| *dawdles_on == request) {
            std::thread::sleep(time);
        }
        if let Some(answer) = answer.filter(|_| script.silent_on != Some(request)) {
            let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            let sent = connection.send(request.into(), Kind::Reply, &answer, &fds, Deadline::after(LONG));
            if sent.is_err() {
                return;
            }
        }
    }
}
