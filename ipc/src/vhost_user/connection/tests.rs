use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::Instant;

use proptest::prelude::*;

use super::*;

const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(10);

fn raw_pair() -> (UnixStream, Connection) {
    let (a, b) = UnixStream::pair().unwrap();
    (a, b.into())
}

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn messages_arrive_as_sent_with_their_descriptors() {
    let (a, b) = Connection::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let fds = vec![null.as_fd(); MAX_DESCRIPTORS];
    let payload: Vec<u8> = (0..MAX_PAYLOAD).map(|n| n.to_le_bytes()[0]).collect();
    let deadline = Deadline::after(LONG);
    a.send(7, Kind::RequestNeedingReply, &payload, &fds, deadline).unwrap();
    a.send(8, Kind::Reply, &[], &[], deadline).unwrap();
    let first = b.receive(deadline).unwrap();
    assert_eq!((first.request, first.kind), (7, Kind::RequestNeedingReply));
    assert_eq!(first.payload, payload);
    assert_eq!(first.descriptors.len(), MAX_DESCRIPTORS);
    for fd in &first.descriptors {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, libc::FD_CLOEXEC);
    }
    let second = b.receive_next(LONG).unwrap();
    assert_eq!((second.request, second.kind), (8, Kind::Reply));
    assert!(second.descriptors.is_empty());
}

#[test]
fn end_of_stream_is_told_apart_from_a_torn_message() {
    let (a, b) = raw_pair();
    drop(a);
    assert!(matches!(b.receive(Deadline::never()), Err(ConnectionError::Closed)));
    for torn in [header(1, 1, 8)[..5].to_vec(), header(1, 1, 8)] {
        let (mut a, b) = raw_pair();
        a.write_all(&torn).unwrap();
        drop(a);
        assert!(matches!(b.receive(Deadline::never()), Err(ConnectionError::ClosedInside)));
    }
}

#[test]
fn a_silent_or_dribbling_peer_meets_the_deadline() {
    let (_a, b) = raw_pair();
    let start = Instant::now();
    assert!(matches!(b.receive(Deadline::after(SHORT)), Err(ConnectionError::Late(_))));
    assert!(start.elapsed() >= SHORT);

    let (mut a, b) = raw_pair();
    let dribble = std::thread::spawn(move || {
        for byte in header(1, 1, 4000).into_iter().chain([0; 4000]) {
            if a.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let start = Instant::now();
    assert!(matches!(b.receive(Deadline::after(SHORT)), Err(ConnectionError::Late(_))));
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(b);
    dribble.join().unwrap();
}

#[test]
fn a_peer_that_does_not_read_meets_the_deadline() {
    let (a, _b) = Connection::pair().unwrap();
    let payload = [0; MAX_PAYLOAD];
    let result =
        (0..10_000).find_map(|_| a.send(1, Kind::Request, &payload, &[], Deadline::after(SHORT)).err());
    assert!(matches!(result, Some(ConnectionError::Late(_))));
}

#[test]
fn a_gone_peer_is_an_error_and_not_a_signal() {
    let (a, b) = Connection::pair().unwrap();
    drop(b);
    let result = a.send(1, Kind::Request, &[], &[], Deadline::after(LONG));
    assert!(matches!(result, Err(ConnectionError::Closed)));
}

#[test]
fn bad_headers_are_refused() {
    let judge = |flags, size| {
        let (mut a, b) = raw_pair();
        a.write_all(&header(1, flags, size)).unwrap();
        b.receive(Deadline::after(LONG)).unwrap_err()
    };
    assert!(matches!(judge(0, 0), ConnectionError::Version(0)));
    assert!(matches!(judge(2, 0), ConnectionError::Version(2)));
    assert!(matches!(judge(0x11, 0), ConnectionError::Flags(0x11)));
    assert!(matches!(judge(0xd, 0), ConnectionError::Flags(0xd)));
    assert!(matches!(judge(1, u32::MAX), ConnectionError::TooLarge { .. }));
    assert!(matches!(judge(1, 0x1101), ConnectionError::TooLarge { .. }));
}

#[test]
fn surplus_descriptors_are_refused_and_closed() {
    let (a, b) = raw_pair();
    let null = File::open("/dev/null").unwrap();
    let fds = vec![null.as_raw_fd(); 200];
    let before = open_descriptors();
    let bytes = header(1, 1, 0);
    nix::sys::socket::sendmsg::<()>(
        a.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[nix::sys::socket::ControlMessage::ScmRights(&fds)],
        nix::sys::socket::MsgFlags::empty(),
        None,
    )
    .unwrap();
    assert!(matches!(
        b.receive(Deadline::after(LONG)),
        Err(ConnectionError::TooManyDescriptors { count: 200 })
    ));
    // Other tests open a handful of descriptors at the same time; a leak here would be of 200.
    assert!(open_descriptors() < before + 100);
}

#[test]
fn descriptors_with_the_payload_are_refused() {
    let (mut a, b) = raw_pair();
    a.write_all(&header(1, 1, 8)).unwrap();
    let null = File::open("/dev/null").unwrap();
    let fds = [null.as_raw_fd()];
    nix::sys::socket::sendmsg::<()>(
        a.as_raw_fd(),
        &[IoSlice::new(&[0; 8])],
        &[nix::sys::socket::ControlMessage::ScmRights(&fds)],
        nix::sys::socket::MsgFlags::empty(),
        None,
    )
    .unwrap();
    assert!(matches!(b.receive(Deadline::after(LONG)), Err(ConnectionError::MisplacedDescriptors)));
}

#[test]
fn oversized_messages_are_not_sent() {
    let (a, _b) = Connection::pair().unwrap();
    let deadline = Deadline::after(LONG);
    let null = File::open("/dev/null").unwrap();
    let fds = vec![null.as_fd(); MAX_DESCRIPTORS + 1];
    assert!(matches!(
        a.send(1, Kind::Request, &[0; MAX_PAYLOAD + 1], &[], deadline),
        Err(ConnectionError::TooLarge { .. })
    ));
    assert!(matches!(
        a.send(1, Kind::Request, &[], &fds, deadline),
        Err(ConnectionError::TooManyDescriptors { .. })
    ));
}

proptest! {
    #[test]
    fn random_bytes_end_in_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (mut a, b) = raw_pair();
        a.write_all(&bytes).unwrap();
        drop(a);
        while b.receive(Deadline::after(LONG)).is_ok() {}
    }
}

#[test]
fn descriptors_with_every_byte_are_refused_at_the_second() {
    for (bytes, header_only) in [(header(1, 1, 0), true), (header(1, 1, 4000), false)] {
        let (a, b) = raw_pair();
        let a = Connection::from(a);
        let null = File::open("/dev/null").unwrap();
        let fds = vec![null.as_fd(); MAX_DESCRIPTORS];
        let mut sent = 0;
        if !header_only {
            assert_eq!(a.send_part(&bytes, &fds), Ok(HEADER_SIZE));
            sent = HEADER_SIZE;
        }
        for byte in bytes.iter().copied().chain([0; 4000]).skip(sent).take(8) {
            assert_eq!(a.send_part(&[byte], &fds), Ok(1));
        }
        let error = b.receive(Deadline::after(LONG)).unwrap_err();
        assert!(matches!(error, ConnectionError::MisplacedDescriptors), "{error}");
        // What follows the second byte with descriptors was not even received.
        let rest = b.receive_part(&mut [0], &mut Vec::new()).unwrap();
        assert_eq!(rest, Ok(1), "the third is still in the socket");
    }
}
