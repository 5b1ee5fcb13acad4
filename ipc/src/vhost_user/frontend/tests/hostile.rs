//! Peers that answer wrongly, too much, too little, late or not at all: always an error, never a panic, never a hang.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Instant;

use proptest::prelude::*;

use super::*;

type Call = fn(&mut Frontend) -> Result<(), FrontendError>;

/// Every call that waits for a reply.
const CALLS: [(&str, Call); 12] = [
    ("negotiate", |frontend| frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES)),
    ("set_features", |frontend| frontend.set_features(1 << 32)),
    ("set_memory", |frontend| {
        let file = File::open("/dev/null").unwrap();
        frontend.set_memory(&[MemoryRegion { guest_address: 0, size: 1, offset: 0, file: file.as_fd() }])
    }),
    ("get_config", |frontend| frontend.get_config(0, &mut [0; 8])),
    ("set_config", |frontend| frontend.set_config(0, &[0; 8])),
    ("set_vring_num", |frontend| frontend.set_vring_num(0, 1)),
    ("get_vring_base", |frontend| frontend.get_vring_base(0).map(drop)),
    ("get_status", |frontend| frontend.get_status().map(drop)),
    ("get_inflight", |frontend| frontend.get_inflight(1, 256).map(drop)),
    ("set_log_base", |frontend| {
        let file = File::open("/dev/null").unwrap();
        frontend.set_log_base(1, 0, file.as_fd())
    }),
    ("open_backend_requests", |frontend| frontend.open_backend_requests().map(drop)),
    ("reset_device", |frontend| frontend.reset_device()),
];

/// Makes each call against a peer that reads the request and then does `answer` with the socket and the request's code.
fn each_call(
    exchange: Duration,
    answer: impl Fn(UnixStream, u32) + Send + Clone + 'static,
    judge: impl Fn(&str, FrontendError),
) {
    for (name, call) in CALLS {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = answer.clone();
        let peer = std::thread::spawn(move || {
            let mut header = [0; 12];
            theirs.read_exact(&mut header).unwrap();
            let request = u32::from_le_bytes(header[..4].try_into().unwrap());
            answer(theirs, request);
        });
        let mut frontend = negotiated(Frontend::new("disk0", ours, limits(exchange)), ALL);
        let start = Instant::now();
        let error = call(&mut frontend).expect_err(name);
        assert!(start.elapsed() < LONG, "{name} took too long");
        assert!(frontend.is_broken(), "{name}: {error}");
        assert!(error.to_string().contains("disk0"), "{error}");
        judge(name, error);
        // Later calls fail at once.
        let start = Instant::now();
        let error = call(&mut frontend).expect_err(name);
        assert!(matches!(error.problem, Problem::Broken));
        assert!(start.elapsed() < Duration::from_secs(1));
        drop(frontend);
        peer.join().unwrap();
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes: Vec<u8> = [request, flags, size].iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(payload);
    bytes
}

fn answers(
    bytes: impl Fn(u32) -> Vec<u8> + Send + Clone + 'static,
) -> impl Fn(UnixStream, u32) + Send + Clone {
    move |mut stream, request| {
        stream.write_all(&bytes(request)).unwrap();
        // Stays connected until the front end has judged.
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

fn bad_field(field: &'static str) -> impl Fn(&str, FrontendError) {
    move |name, error| match error.problem {
        Problem::Reply { field: named, .. } => assert_eq!(named, field, "{name}"),
        problem => panic!("{name}: {problem}"),
    }
}

#[test]
fn wrong_request_code() {
    each_call(LONG, answers(|request| message(request ^ 0x40, 5, &[0; 8])), bad_field("request code"));
}

#[test]
fn no_reply_flag() {
    each_call(LONG, answers(|request| message(request, 1, &[0; 8])), bad_field("REPLY flag"));
}

#[test]
fn wrong_size() {
    each_call(LONG, answers(|request| message(request, 5, &[0; 21])), |name, error| match error.problem {
        Problem::Reply { field, .. } => {
            assert!(["size", "configuration size", "offset"].contains(&field), "{name}: {field}");
        }
        problem => panic!("{name}: {problem}"),
    });
}

#[test]
fn oversized() {
    let bytes = |request: u32| {
        let mut bytes = message(request, 5, &[]);
        bytes[8..].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes
    };
    each_call(LONG, answers(bytes), |name, error| {
        assert!(
            matches!(error.problem, Problem::Connection(ConnectionError::TooLarge { .. })),
            "{name}: {error}"
        );
    });
}

#[test]
fn wrong_version() {
    each_call(LONG, answers(|request| message(request, 6, &[0; 8])), |name, error| {
        assert!(matches!(error.problem, Problem::Connection(ConnectionError::Version(6))), "{name}: {error}");
    });
}

#[test]
fn descriptors_where_none_belong() {
    let answer = |stream: UnixStream, request| {
        let connection = Connection::from(stream);
        let null = File::open("/dev/null").unwrap();
        let fds = [null.as_fd(); 2];
        connection.send(request, Kind::Reply, &[0; 8], &fds, Deadline::after(LONG)).unwrap();
        // The rest of the request, then until the end.
        let _ = UnixStream::from(OwnedFd::from(connection)).read_to_end(&mut Vec::new());
    };
    each_call(LONG, answer, bad_field("number of descriptors"));
}

#[test]
fn silence_meets_the_deadline() {
    each_call(SHORT, answers(|_| Vec::new()), |name, error| {
        assert!(matches!(error.problem, Problem::Connection(ConnectionError::Late(_))), "{name}: {error}");
    });
}

#[test]
fn closed_before_and_inside_the_reply() {
    each_call(
        LONG,
        |stream, _| drop(stream),
        |name, error| assert!(matches!(error.problem, Problem::Connection(_)), "{name}: {error}"),
    );
    let torn = |mut stream: UnixStream, request| {
        // The rest of the request first: closing with unread data resets the connection.
        stream.set_read_timeout(Some(SHORT)).unwrap();
        let _ = stream.read(&mut [0; 8192]);
        stream.write_all(&message(request, 5, &[0; 8])[..15]).unwrap();
    };
    each_call(LONG, torn, |name, error| {
        assert!(
            matches!(error.problem, Problem::Connection(ConnectionError::ClosedInside)),
            "{name}: {error}"
        );
    });
}

/// One exchange, answered with `payload`.
fn answered(
    payload: Vec<u8>,
    call: impl FnOnce(&mut Frontend) -> Result<(), FrontendError>,
) -> FrontendError {
    let (frontend, peer) = with_peer(LONG, move |connection| {
        let message = connection.receive(Deadline::after(LONG)).unwrap();
        reply(&connection, message.request.try_into().unwrap(), &payload);
    });
    let error = call(&mut negotiated(frontend, ALL)).unwrap_err();
    peer.join().unwrap();
    error
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn values_out_of_range() {
    let field = |error: FrontendError| match error.problem {
        Problem::Reply { field, .. } => field,
        problem => panic!("{problem}"),
    };
    let base = |frontend: &mut Frontend| frontend.get_vring_base(1).map(drop);
    assert_eq!(field(answered(words(&[2, 0]), base)), "queue index");
    assert_eq!(field(answered(words(&[1, 0x1_0000]), base)), "base");
    let status = |frontend: &mut Frontend| frontend.get_status().map(drop);
    assert_eq!(field(answered(words(&[0x100, 0]), status)), "status");
    let config = |frontend: &mut Frontend| frontend.get_config(4, &mut [0; 4]);
    assert_eq!(field(answered(words(&[0, 4, 0, 0]), config)), "offset");
    assert_eq!(field(answered(words(&[4, 8, 0, 0]), config)), "configuration size");
    assert_eq!(field(answered(words(&[4, 4, 0, 0, 0]), config)), "size");
}

#[test]
fn a_refusal_leaves_the_connection_usable() {
    let config = |frontend: &mut Frontend| frontend.get_config(4, &mut [0; 4]);
    assert!(matches!(answered(Vec::new(), config).problem, Problem::Refused(0)));
    assert!(matches!(answered(words(&[4, 0, 0]), config).problem, Problem::Refused(0)));
    let enable = |frontend: &mut Frontend| {
        let result = frontend.set_vring_enable(0, true);
        assert!(!frontend.is_broken());
        result
    };
    let error = answered(words(&[7, 0]), enable);
    assert!(matches!(error.problem, Problem::Refused(7)));
    assert_eq!(
        error.to_string(),
        "device disk0: SET_VRING_ENABLE: refused by the device process with code 0x7"
    );
}

#[test]
fn a_legacy_peer_is_named() {
    let mut features = FEATURES & !(1 << 30);
    let error =
        answered(features.to_le_bytes().to_vec(), |frontend| frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES));
    assert!(matches!(error.problem, Problem::Missing(_)));
    features |= 1 << 30;
    for (number, field) in [(0u64, "number of queues"), (u64::MAX, "number of queues")] {
        let (mut frontend, peer) = with_peer(LONG, move |connection| {
            while let Ok(message) = connection.receive(Deadline::after(LONG)) {
                let request = message.request.try_into().unwrap();
                match request {
                    FrontendReq::GET_FEATURES => reply(&connection, request, &features.to_le_bytes()),
                    FrontendReq::GET_PROTOCOL_FEATURES => reply(&connection, request, &1u64.to_le_bytes()),
                    FrontendReq::GET_QUEUE_NUM => reply(&connection, request, &number.to_le_bytes()),
                    _ => {}
                }
            }
        });
        match frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).unwrap_err().problem {
            Problem::Reply { field: named, value, .. } => assert_eq!((named, value), (field, number)),
            problem => panic!("{problem}"),
        }
        drop(frontend);
        peer.join().unwrap();
    }
}

#[test]
fn an_operation_has_one_deadline_for_all_its_exchanges() {
    let (frontend, peer) = with_peer(LONG, |connection| {
        // Each answer comes in time by itself.
        while let Ok(message) = connection.receive(Deadline::after(LONG)) {
            std::thread::sleep(Duration::from_millis(30));
            let deadline = Deadline::after(LONG);
            if connection.send(message.request, Kind::Reply, &[0; 8], &[], deadline).is_err() {
                break;
            }
        }
    });
    let mut frontend = negotiated(frontend, ALL);
    let start = Instant::now();
    let result = frontend.within(Duration::from_millis(100), |frontend| {
        (0..1000).try_for_each(|_| frontend.set_vring_num(0, 1))
    });
    assert!(matches!(result.unwrap_err().problem, Problem::Connection(ConnectionError::Late(_))));
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(frontend);
    peer.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_bytes_as_replies(
        noise in proptest::collection::vec(any::<u8>(), 0..64),
        flags in prop_oneof![Just(5u32), any::<u32>()],
        size in prop_oneof![0u32..40, any::<u32>()],
        keep_code in any::<bool>(),
    ) {
        for (_, call) in CALLS {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let noise = noise.clone();
            let peer = std::thread::spawn(move || {
                let mut header = [0; 12];
                theirs.read_exact(&mut header).unwrap();
                let code = u32::from_le_bytes(header[..4].try_into().unwrap());
                let code = if keep_code { code } else { !code };
                let mut bytes = words(&[code, flags, size]);
                bytes.extend(&noise);
                let _ = theirs.write_all(&bytes);
                let _ = theirs.shutdown(std::net::Shutdown::Write);
                let _ = theirs.read_to_end(&mut Vec::new());
            });
            let mut frontend = negotiated(Frontend::new("disk0", ours, limits(LONG)), ALL);
            let start = Instant::now();
            let _ = call(&mut frontend);
            prop_assert!(start.elapsed() < LONG);
            drop(frontend);
            peer.join().unwrap();
        }
    }
}
