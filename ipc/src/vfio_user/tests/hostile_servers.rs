//! What a client does with a server that breaks the rules: the call fails within the deadline, and so do all later ones.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use proptest::prelude::*;

use super::super::wire::*;
use super::super::*;
use super::{DEADLINE, pair};

fn reply_to(request: Header, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + payload.len()).unwrap();
    let mut bytes = Header { size, kind: Kind::Reply, ..request }.encode().to_vec();
    bytes.extend(payload);
    bytes
}

fn receive(stream: &mut UnixStream) -> Header {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).unwrap();
    let header = Header::decode(&bytes).unwrap();
    stream.read_exact(&mut vec![0; header.payload_size()]).unwrap();
    header
}

/// A client that has connected to a server which then answers the next command by `answer`.
fn connected(answer: impl FnOnce(&mut UnixStream, Header) + Send + 'static) -> Client {
    let (ours, mut theirs) = pair();
    std::thread::spawn(move || {
        let request = receive(&mut theirs);
        theirs.write_all(&reply_to(request, &Version { major: 0, minor: 0 }.encode())).unwrap();
        let request = receive(&mut theirs);
        let info = DeviceInfo { argsz: 16, flags: 0, num_regions: 2, num_irqs: 1 };
        theirs.write_all(&reply_to(request, &info.encode())).unwrap();
        let request = receive(&mut theirs);
        answer(&mut theirs, request);
        // Stays open: silence is the client's deadline to judge.
        std::thread::sleep(DEADLINE * 4);
    });
    Client::connect(ours.into(), "bad", DEADLINE).unwrap()
}

/// The fault of a one-byte read that is answered by `bytes`, and of the call after it.
fn read_fault(bytes: impl FnOnce(Header) -> Vec<u8> + Send + 'static) -> Fault {
    let mut client = connected(move |stream, request| stream.write_all(&bytes(request)).unwrap());
    let begin = Instant::now();
    let error = client.read(0, 5, &mut [0]).unwrap_err();
    assert!(begin.elapsed() < DEADLINE * 3, "{error}");
    assert_eq!(error.device, "bad");
    assert_eq!(error.command, Command::RegionRead);
    if !matches!(error.fault, Fault::Refused(_)) {
        assert_eq!(client.post(0, 0, &[0]).unwrap_err(), error, "the failure lasts");
        assert_eq!(client.failure(), Some(&error));
    }
    error.fault
}

const GOOD: RegionAccess = RegionAccess { offset: 5, region: 0, count: 1 };

fn read_reply(access: RegionAccess, data: &[u8]) -> Vec<u8> {
    [&access.encode(), data].concat()
}

#[test]
fn silence_ends_at_the_deadline() {
    assert_eq!(read_fault(|_| Vec::new()), Fault::Deadline(DEADLINE));
}

#[test]
fn a_truncated_reply_ends_at_the_deadline() {
    assert_eq!(
        read_fault(|r| reply_to(r, &read_reply(GOOD, &[1]))[..20].to_vec()),
        Fault::Deadline(DEADLINE)
    );
}

#[test]
fn a_reply_that_drips_ends_at_the_deadline() {
    let mut client = connected(|stream, request| {
        for byte in reply_to(request, &read_reply(GOOD, &[1])) {
            let _ = stream.write_all(&[byte]);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let begin = Instant::now();
    assert_eq!(client.read(0, 5, &mut [0]).unwrap_err().fault, Fault::Deadline(DEADLINE));
    assert!(begin.elapsed() < DEADLINE * 3);
}

#[test]
fn wrong_fields_are_named() {
    let unexpected = |fault| match fault {
        Fault::Unexpected { field, .. } | Fault::Message(DecodeError::Value { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let good = || read_reply(GOOD, &[1]);
    let id = read_fault(move |r| reply_to(Header { id: r.id.wrapping_sub(1), ..r }, &good()));
    assert_eq!(unexpected(id), "message ID", "a late reply to an earlier command");
    let command = read_fault(move |r| reply_to(Header { command: 10, ..r }, &good()));
    assert_eq!(unexpected(command), "command");
    let offset = RegionAccess { offset: 6, ..GOOD };
    assert_eq!(unexpected(read_fault(move |r| reply_to(r, &read_reply(offset, &[1])))), "offset");
    let region = RegionAccess { region: 1, ..GOOD };
    assert_eq!(unexpected(read_fault(move |r| reply_to(r, &read_reply(region, &[1])))), "region");
    let count = RegionAccess { count: 2, ..GOOD };
    assert_eq!(unexpected(read_fault(move |r| reply_to(r, &read_reply(count, &[1, 2])))), "count");
    assert_eq!(unexpected(read_fault(move |r| reply_to(r, &read_reply(GOOD, &[])))), "message size");
    let more = move |r| [reply_to(r, &read_reply(GOOD, &[1])), vec![0]].concat();
    assert_eq!(unexpected(read_fault(more)), "message size");
    let echo = |r: Header| Header { kind: Kind::Command, size: 16, ..r }.encode().to_vec();
    assert_eq!(unexpected(read_fault(echo)), "flags");
    let flags = |r: Header| {
        let mut bytes = reply_to(r, &[]);
        bytes[9] = 1;
        bytes
    };
    assert_eq!(unexpected(read_fault(flags)), "flags");
}

#[test]
fn an_error_reply_is_a_refusal() {
    let refusal = |r: Header| Header { kind: Kind::ErrorReply(5), size: 16, ..r }.encode().to_vec();
    assert_eq!(read_fault(refusal), Fault::Refused(5));
}

#[test]
fn a_closed_connection_is_reported_at_once() {
    let mut client = connected(|stream, _| stream.shutdown(std::net::Shutdown::Both).unwrap());
    assert_eq!(client.read(0, 5, &mut [0]).unwrap_err().fault, Fault::Closed);
}

#[test]
fn a_server_that_does_not_read_fails_posted_writes_at_the_deadline() {
    let mut client = connected(|_, _| std::thread::sleep(DEADLINE * 8));
    let begin = Instant::now();
    let error = (0..1_000_000).find_map(|_| client.post(0, 0, &[1]).err()).unwrap();
    assert_eq!(error.fault, Fault::Deadline(DEADLINE));
    assert!(begin.elapsed() < DEADLINE * 8);
}

#[test]
fn descriptors_where_none_belong_fail_the_connection() {
    let mut client = connected(|stream, request| {
        let numbers = [stream.as_raw_fd()];
        let bytes = reply_to(request, &read_reply(GOOD, &[1]));
        let rights = [ControlMessage::ScmRights(&numbers)];
        let parts = [std::io::IoSlice::new(&bytes)];
        sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
    });
    let fault = client.read(0, 5, &mut [0]).unwrap_err().fault;
    assert!(matches!(fault, Fault::Descriptors { expected: 0, .. }), "{fault:?}");
}

#[test]
fn surplus_descriptors_are_closed() {
    for count in [5, 60, 253] {
        let (mut end, sent) = std::io::pipe().unwrap();
        let mut client = connected(move |stream, request| {
            let numbers = vec![sent.as_raw_fd(); count];
            let bytes = reply_to(request, &[0; 32]);
            let rights = [ControlMessage::ScmRights(&numbers)];
            let parts = [std::io::IoSlice::new(&bytes)];
            sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        });
        let fault = client.region_info(1).unwrap_err().fault;
        assert_eq!(fault, Fault::Descriptors { expected: 1, received: count });
        assert_eq!(end.read(&mut [0]).unwrap(), 0, "nobody holds one of the {count} any more");
    }
}

#[test]
fn only_a_sealed_memfd_of_full_size_is_mapped() {
    let attempt = |length: i64, seal: bool, size: u64| {
        let mut client = connected(move |stream, request| {
            let file = memfd_create(c"page", MFdFlags::MFD_ALLOW_SEALING).unwrap();
            nix::unistd::ftruncate(&file, length).unwrap();
            if seal {
                let seals = nix::fcntl::SealFlag::F_SEAL_SHRINK;
                nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).unwrap();
            }
            let info =
                RegionInfo { argsz: 32, flags: RegionInfo::MMAP, index: 1, cap_offset: 0, size, offset: 0 };
            let bytes = reply_to(request, &info.encode());
            let numbers = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&numbers)];
            let parts = [std::io::IoSlice::new(&bytes)];
            sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        });
        client.map_shadow(1).map(|view| view.is_some())
    };
    assert_eq!(attempt(4096, true, 4096), Ok(true));
    assert!(
        matches!(attempt(4096, false, 4096).unwrap_err().fault, Fault::Descriptor(_)),
        "could shrink: SIGBUS"
    );
    assert!(matches!(attempt(4095, true, 4096).unwrap_err().fault, Fault::Descriptor(_)), "too small");
    assert!(matches!(attempt(8192, true, 8192).unwrap_err().fault, Fault::Unexpected { field: "size", .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_replies_never_panic(bytes in proptest::collection::vec(any::<u8>(), 16..64), keep_header: bool) {
        let mut client = connected(move |stream, request| {
            let answer = if keep_header { reply_to(request, &bytes) } else { bytes };
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(std::net::Shutdown::Both);
        });
        let _ = client.read(0, 5, &mut [0]);
    }
}
