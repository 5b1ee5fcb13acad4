//! vhost-user, both ends: a daemon that any front end talks to, a front end that any back end answers.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use bulkhead_ipc::memory::{Direction, GuestRam};
use bulkhead_ipc::vhost_user::backend::{
    Chain, Daemon, Next, PollWorker, QueueHandler, QueueWorker, VirtioDevice, Vring, no_jail,
};
use bulkhead_ipc::vhost_user::frontend::{Frontend, Limits, MemoryRegion, SUPPORTED_PROTOCOL_FEATURES};
use nix::sys::epoll::Epoll;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::registers::{next_record, record};
use crate::script::Script;

/// Records that are sent at most: their replies fit in the socket's buffer.
const RECORDS: usize = 40;
/// Bytes of guest memory.
const MEMORY: u64 = 1 << 20;

/// Sends bytes with the descriptors that the flags ask for: bit 1 an eventfd, bit 2 memory, in bits 3 and 4 once more.
fn send(stream: &UnixStream, flags: u8, bytes: &[u8]) -> io::Result<()> {
    let mut held: Vec<OwnedFd> = Vec::new();
    for bit in [1, 3] {
        if flags & 1 << bit != 0 {
            held.push(EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?.into());
        }
        if flags & 2 << bit != 0
            && let Ok(ram) = GuestRam::create(MEMORY)
            && let Some(region) = ram.regions().next()
        {
            held.push(region.fd.try_clone_to_owned()?);
        }
    }
    let descriptors: Vec<RawFd> = held.iter().map(AsRawFd::as_raw_fd).collect();
    stream.send_with_fds(&[bytes], &descriptors).map(|_| ()).map_err(io::Error::from)
}

/// How one message follows another.
#[derive(Clone, Copy)]
pub enum Framing {
    /// 16 bytes of header; the size of the whole at 4. The first two bytes are the message's id.
    VfioUser,
    /// 12 bytes of header; the size of what follows at 8. The first four bytes are the request.
    VhostUser,
}

impl Framing {
    /// Reads one message; its first bytes, which a reply repeats.
    fn receive(self, stream: &mut UnixStream) -> io::Result<Vec<u8>> {
        let (size, at, counted, repeated) = match self {
            Self::VfioUser => (16, 4, 16, 2),
            Self::VhostUser => (12, 8, 0, 4),
        };
        let mut header = vec![0; size];
        stream.read_exact(&mut header)?;
        let mut length = [0; 4];
        for (to, from) in length.iter_mut().zip(header.iter().skip(at)) {
            *to = *from;
        }
        let rest = u32::from_le_bytes(length).saturating_sub(counted).min(1 << 16);
        stream.read_exact(&mut vec![0; usize::try_from(rest).unwrap_or(0)])?;
        header.truncate(repeated);
        Ok(header)
    }
}

/// A peer that answers each message with the next record, whose beginning is that of the message unless the record's flags have
/// bit 0, and hangs up after the last.
pub fn answering_peer(input: &[u8], framing: Framing) -> (UnixStream, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    let input = input.to_vec();
    let peer = std::thread::spawn(move || {
        let mut script = Script(&input);
        while let Ok(request) = framing.receive(&mut theirs) {
            let Some((flags, bytes)) = next_record(&mut script) else { return };
            let mut bytes = bytes.to_vec();
            if flags & 1 == 0 {
                for (to, from) in bytes.iter_mut().zip(request) {
                    *to = from;
                }
            }
            if !bytes.is_empty() && send(&theirs, flags, &bytes).is_err() {
                return;
            }
        }
    });
    (ours, peer)
}

/// A device with two queues whose workers clear every buffer.
struct Cleaner;

impl VirtioDevice for Cleaner {
    fn name(&self) -> &'static str {
        "cleaner"
    }

    fn features(&self) -> u64 {
        1
    }

    fn queues(&self) -> u16 {
        2
    }

    fn tracks_inflight(&self) -> bool {
        true
    }

    fn workers(&mut self) -> Vec<Box<dyn QueueWorker>> {
        vec![Box::new(PollWorker::new(Queues(Chain::new()), 2))]
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0x5A);
    }

    fn write_config(&mut self, offset: u32, _data: &[u8]) -> bool {
        offset == 0
    }
}

struct Queues(Chain);

impl QueueHandler for Queues {
    fn serve(&mut self, rings: &mut [Option<Vring>], _epoll: &Epoll) -> io::Result<Next> {
        for ring in rings.iter_mut().flatten() {
            // A ring that never ends is the guest's own loss, but not this test's time.
            for _ in 0..1024 {
                if !ring.next(&mut self.0) {
                    break;
                }
                for segment in self.0.writable() {
                    if let Ok(view) = ring.ram().view(segment.address, segment.len.into(), Direction::Write) {
                        assert!(view.zero(0, segment.len.into()).is_ok());
                    }
                }
                ring.finish(self.0.head(), 1);
            }
            ring.signal();
        }
        Ok(Next::Event)
    }
}

/// A front end sends each record as a message, with descriptors, and hangs up.
pub fn vhost_user_backend(input: &[u8]) {
    let Ok((ours, theirs)) = UnixStream::pair() else { return };
    let mut script = Script(input);
    for _ in 0..RECORDS {
        let Some((flags, bytes)) = next_record(&mut script) else { break };
        if !bytes.is_empty() && send(&ours, flags, bytes).is_err() {
            return;
        }
    }
    if ours.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let Ok(mut daemon) = Daemon::new(Box::new(Cleaner), &no_jail()) else { return };
    assert!(daemon.run(theirs.into()).is_err(), "it runs until the connection ends");
}

fn message(flags: u8, request: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(0);
    let header = [request, 1, size].map(u32::to_le_bytes).concat();
    record(flags, &[&header[..], payload].concat())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn backend_seeds() -> Vec<Vec<u8>> {
    let state = |request, index: u32, value: u32| {
        message(0, request, &[index.to_le_bytes(), value.to_le_bytes()].concat())
    };
    let open = [
        message(0, 1, &[]),
        message(0, 15, &[]),
        message(0, 16, &words(&[0x3_FFFF])),
        message(0, 3, &[]),
        message(0, 17, &[]),
        message(0, 36, &[]),
        message(0, 2, &words(&[1 << 32 | 1 << 30 | 1])),
    ]
    .concat();
    let table = message(4, 5, &words(&[1, 0, MEMORY, 0, 0]));
    let ring = [
        state(8, 0, 256),
        state(10, 0, 0),
        message(0, 9, &words(&[0, 0x1_0000, 0x1_2000, 0x1_1000, 0])),
        message(2, 13, &words(&[0])),
        message(2, 12, &words(&[0])),
        state(18, 0, 1),
    ]
    .concat();
    let end = [state(18, 0, 0), state(11, 0, 0)].concat();
    vec![
        open.clone(),
        [&open[..], &table, &ring, &end].concat(),
        [
            &open[..],
            &message(4, 37, &words(&[0, 0, MEMORY, 0, 0])),
            &message(0, 38, &words(&[0, 0, MEMORY, 0, 0])),
        ]
        .concat(),
        [
            &open[..],
            &message(0, 31, &words(&[0, 0, 0x100_0002])),
            &message(4, 32, &words(&[4096, 0, 0x10_0002])),
            &ring,
        ]
        .concat(),
        [
            &open[..],
            &table,
            &message(4, 6, &words(&[4096, 0])),
            &ring,
            &message(0, 2, &words(&[0x1_4400_0001])),
        ]
        .concat(),
        [
            &open[..],
            &message(0, 24, &[[0_u8; 4], [8, 0, 0, 0], [0; 4], [0; 4], [0; 4]].concat()),
            &message(0, 34, &[]),
        ]
        .concat(),
        [&open[..], &message(2, 21, &[]), &message(0, 39, &words(&[0xF])), &message(0, 40, &[])].concat(),
    ]
}

/// A back end answers each request with the next record.
pub fn vhost_user_frontend(input: &[u8]) {
    let (stream, peer) = answering_peer(input, Framing::VhostUser);
    let limit = Duration::from_millis(4);
    let mut frontend = Frontend::new("fuzzed", stream, Limits { exchange: limit, stop: limit });
    if frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).is_ok() {
        drive(&mut frontend);
    }
    drop(frontend);
    peer.join().expect("the peer does not panic");
}

fn drive(frontend: &mut Frontend) {
    let offered = frontend.offered_features();
    let _ = frontend.set_features(offered);
    let _ = frontend.get_config(0, &mut [0; 16]);
    let _ = frontend.get_inflight(2, 256);
    if let Ok(ram) = GuestRam::create(MEMORY) {
        let regions: Vec<_> = ram.regions().map(MemoryRegion::from).collect();
        let _ = frontend.set_memory(&regions);
    }
    let _ = frontend.set_vring_num(0, 256);
    let _ = frontend.set_vring_base(0, 0);
    if let Ok(event) = EventFd::from_flags(EfdFlags::EFD_NONBLOCK) {
        let _ = frontend.set_vring_kick(0, event.as_fd());
        let _ = frontend.set_vring_call(0, Some(event.as_fd()));
    }
    let _ = frontend.set_vring_enable(0, true);
    let _ = frontend.get_status();
    if let Ok(mut requests) = frontend.open_backend_requests() {
        let _ = requests.receive();
    }
    let _ = frontend.get_vring_base(0);
}

pub fn frontend_seeds() -> Vec<Vec<u8>> {
    let reply = |flags: u8, payload: &[u8]| {
        let size = u32::try_from(payload.len()).unwrap_or(0);
        record(flags, &[&[0, 5, size].map(u32::to_le_bytes).concat()[..], payload].concat())
    };
    let u64s = |value: u64| reply(0, &words(&[value]));
    let open = [u64s(1 << 32 | 1 << 30), u64s(0x3_FFFF), record(0, &[]), u64s(0), u64s(2), u64s(32)].concat();
    let config = reply(0, &[[0_u8; 4], [16, 0, 0, 0], [0; 4], [7; 4], [7; 4], [7; 4], [7; 4]].concat());
    let inflight = reply(4, &words(&[4096, 0, 0x100_0002]));
    let acknowledged = u64s(0);
    vec![
        open.clone(),
        [&open[..], &acknowledged, &config, &inflight, &acknowledged.repeat(9)].concat(),
        u64s(u64::MAX).repeat(12),
    ]
}
