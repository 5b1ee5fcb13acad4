//! A back end that is not ours, behind the relay in its jail: one that works, and every way not to.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, FromDevice, RelayConfig};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::vhost_user::frontend::{Frontend, Limits, SUPPORTED_PROTOCOL_FEATURES};

use crate::driver::{BUFFERS, Driver, Service};
use crate::supervised::{LIMIT, Supervised};

fn config(kind: &str, features: u64, has_config: bool) -> RelayConfig {
    RelayConfig {
        back_end: FdIndex(1),
        path: "/run/peer".into(),
        kind: kind.into(),
        features,
        queues: None,
        least_queues: 1,
        has_config,
        config: None,
        own_features: 0,
    }
}

fn relay(config: RelayConfig, back_end: UnixStream) -> Supervised {
    Supervised::start(
        "relay",
        DeviceConfig::Relay(config),
        &[&OwnedFd::from(back_end)],
        Enforcement::Standalone,
    )
}

/// What the relay says to its supervisor.
fn complaint(relay: &Supervised) -> String {
    match relay.channel.recv::<FromDevice>(Some(LIMIT)).unwrap().0 {
        FromDevice::Failed(reason) => reason,
        other => panic!("{other:?}"),
    }
}

/// The core opens a session; the complaint of the relay, if there is one.
fn greet(mut relay: Supervised) -> String {
    let mut frontend = Frontend::new("test", relay.stream.take().unwrap(), Limits::default());
    let mut config = [0; 60];
    let result =
        frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).and_then(|()| frontend.get_config(0, &mut config));
    assert!(result.is_err(), "the core was let through");
    complaint(&relay)
}

#[test]
fn a_back_end_serves_through_the_relay() {
    let service = Service::start("rng", tempfile::tempdir().unwrap(), &[]);
    let mut relay = relay(config("rng", 0, false), service.connect());
    let mut driver = relay.driver(1);
    for _ in 0..100 {
        assert_eq!(driver.run(0, &[(BUFFERS, 500, true)]), 500);
    }
    relay.stop();
    drop(driver);
}

#[test]
fn a_disk_behind_the_relay_has_its_configuration_and_loses_no_queue() {
    let service = Service::disk(1 << 20, &["--num-queues=4"]);
    let mut relay =
        relay(RelayConfig { queues: Some(2), ..config("blk", 0x3_FEF7, true) }, service.connect());
    let mut driver = Driver::unstarted(relay.stream.take().unwrap(), 2);
    driver.set_up(0, u64::MAX);
    driver.start(None);
    assert_eq!(driver.frontend.max_queues(), 2, "as many as were asked for");
    let mut capacity = [0; 8];
    driver.frontend.get_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), (1 << 20) / 512);
    assert!(
        driver.frontend.get_inflight(2, 256).unwrap().is_some(),
        "memory for requests in flight passes through"
    );
    relay.stop();
    drop(driver);
}

#[test]
fn a_back_end_of_another_type_is_told_apart() {
    let disk = Service::disk(1 << 20, &[]);
    let said = greet(relay(config("rng", 0, false), disk.connect()));
    assert!(said.contains("no device of type rng has") && said.contains("another type?"), "{said}");
    let rng = Service::start("rng", tempfile::tempdir().unwrap(), &[]);
    let said = greet(relay(config("blk", 0x3_FEF7, true), rng.connect()));
    assert!(said.contains("/run/peer") && said.contains("a configuration space of zeros"), "{said}");
    let said = greet(relay(RelayConfig { queues: Some(2), ..config("blk", 0x3_FEF7, true) }, disk.connect()));
    assert!(said.contains("has 1 queues, and 2 are needed"), "{said}");
}

/// A back end that answers so many requests and then closes its connection.
fn closes_after(answers: usize) -> UnixStream {
    answers_only(answers, false)
}

/// The same, or it keeps the connection and says nothing.
fn answers_only(answers: usize, silent: bool) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut left = answers;
        loop {
            let mut header = [0; 12];
            if theirs.read_exact(&mut header).is_err() {
                return;
            }
            let [request, _, _, _, _, _, _, _, size, ..] = header;
            let mut payload = vec![0; usize::from(size)];
            theirs.read_exact(&mut payload).unwrap();
            let answer: u64 = match request {
                1 => 1 << 32 | 1 << 30,
                // MQ, CONFIG
                15 => 1 | 1 << 9,
                17 => 8,
                24 => 0,
                // SET_PROTOCOL_FEATURES, SET_OWNER
                _ => continue,
            };
            if left == 0 {
                if silent {
                    let _until_the_relay_ends = theirs.read_to_end(&mut Vec::new());
                }
                return;
            }
            left -= 1;
            let mut reply = vec![request, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0];
            reply.extend(answer.to_le_bytes());
            theirs.write_all(&reply).unwrap();
        }
    });
    ours
}

#[test]
fn a_back_end_may_close_at_any_step_of_the_handshake() {
    // It acknowledges nothing: the end of SET_OWNER is told by the answer to a question after it.
    let questions = ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_OWNER", "GET_QUEUE_NUM", "GET_CONFIG"];
    for (answers, question) in questions.into_iter().enumerate() {
        let said = greet(relay(config("blk", 0x3_FEF7, true), closes_after(answers)));
        assert!(said.contains("closed the connection") && said.contains(question), "{question}: {said}");
    }
    // A refusal.
    let said = greet(relay(config("blk", 0x3_FEF7, true), closes_after(5)));
    assert!(said.contains("refuses 60 bytes of configuration space"), "{said}");
}

#[test]
fn a_back_end_that_says_nothing_is_named() {
    // SET_OWNER is no question: it is the relay that asks one after it, and the core waits for an acknowledgement.
    thread::scope(|scope| {
        for (answers, request) in [(0, "GET_FEATURES"), (2, "SET_OWNER")] {
            scope.spawn(move || {
                let said = greet(relay(config("rng", 0, false), answers_only(answers, true)));
                assert!(said.contains(&format!("does not answer {request} within")), "{said}");
            });
        }
    });
}

#[test]
fn a_back_end_that_says_nonsense_is_let_go() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&[0xFF; 64]).unwrap();
    let relay = relay(config("rng", 0, false), ours);
    assert!(complaint(&relay).contains("header flags"));
}
