//! A back end dies and another takes its place.

use bulkhead_ipc::memory::Direction;
use bulkhead_ipc::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use super::peer::FEATURES;
use super::*;

fn held() -> (Scaffold, Peer) {
    let (stream, peer) = Peer::start(Script::default());
    (scaffold_with(Settings { hold_on_failure: true, ..settings() }, stream), peer)
}

fn inode(peer: &Peer) -> u64 {
    let seen = peer.seen.lock().unwrap();
    nix::sys::stat::fstat(seen.inflight.as_ref().unwrap()).unwrap().st_ino
}

#[test]
fn the_successor_gets_features_memory_rings_and_requests_in_flight() {
    let (scaffold, mut peer) = held();
    scaffold.driver.start();
    let memory = inode(&peer);
    // The predecessor returned five requests of queue 0.
    let used = scaffold.ram.view(0x1_2002, 2, Direction::Write).unwrap();
    used.write(0, 5u16).unwrap();
    peer.die();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    assert_eq!(scaffold.driver.status(), 15, "the guest notices nothing");

    let (stream, successor) = Peer::start(Script::default());
    scaffold.device.replace_backend(stream).unwrap();
    assert!(scaffold.device.is_connected());
    assert_eq!(inode(&successor), memory, "the same memory");
    let bases = successor.payloads(FrontendReq::SET_VRING_BASE);
    assert_eq!(bases[0], [0, 0, 0, 0, 5, 0, 0, 0]);
    let features = [successor.payloads(FrontendReq::SET_FEATURES), peer.payloads(FrontendReq::SET_FEATURES)];
    assert_eq!(features[0], features[1]);
    let addresses =
        [successor.payloads(FrontendReq::SET_VRING_ADDR), peer.payloads(FrontendReq::SET_VRING_ADDR)];
    assert_eq!(addresses[0], addresses[1]);
    let requests = successor.requests();
    assert!(!requests.contains(&FrontendReq::GET_INFLIGHT_FD));
    assert_eq!(requests.iter().filter(|request| **request == FrontendReq::SET_VRING_ENABLE).count(), 2);
    assert!(requests.contains(&FrontendReq::ADD_MEM_REG));
    // An interrupt that the predecessor owed.
    wait_until(&scaffold.device, || scaffold.pin.asserted());
    assert_eq!(scaffold.driver.get::<1>(scaffold.driver.isr, 0), [1]);
    assert_eq!(scaffold.driver.status(), 15);
    // And it works like the first.
    successor.call(0);
    wait_until(&scaffold.device, || scaffold.pin.asserted());
}

#[test]
fn a_successor_without_the_features_in_use_is_refused() {
    let (scaffold, mut peer) = held();
    scaffold.driver.start();
    peer.die();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    let (stream, _successor) = Peer::start(Script { features: FEATURES & !(1 << 29), ..Script::default() });
    let error = scaffold.device.replace_backend(stream).unwrap_err();
    assert!(matches!(error, VirtioError::FeaturesLost(bits) if bits == 1 << 29));
    let (stream, _successor) = Peer::start(Script { queues: 1, ..Script::default() });
    assert!(matches!(
        scaffold.device.replace_backend(stream).unwrap_err(),
        VirtioError::Queues { got: 1, needed: 2 }
    ));
    // The next one may be better.
    let (stream, _successor) = Peer::start(Script::default());
    scaffold.device.replace_backend(stream).unwrap();
    assert_eq!(scaffold.driver.status(), 15);
}

#[test]
fn giving_up_tells_the_guest() {
    let (scaffold, mut peer) = held();
    scaffold.driver.start();
    scaffold.device.give_up();
    assert_eq!(scaffold.driver.status(), 15, "it is connected");
    peer.die();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    scaffold.device.give_up();
    assert_eq!(scaffold.driver.status(), 15 | 64);
    assert!(scaffold.pin.asserted());
}

#[test]
fn what_was_given_up_is_brought_back_with_its_requests_or_after_a_reset() {
    for resets in [false, true] {
        let (scaffold, mut peer) = held();
        scaffold.driver.start();
        let memory = inode(&peer);
        peer.die();
        wait_until(&scaffold.device, || scaffold.failures.count() == 1);
        scaffold.device.give_up();
        if resets {
            scaffold.driver.set_status(0);
        }
        let (stream, successor) = Peer::start(Script::default());
        scaffold.device.replace_backend(stream).unwrap();
        if resets {
            scaffold.driver.start();
        }
        assert_eq!(scaffold.driver.status(), 15);
        assert_eq!(inode(&successor) == memory, !resets, "a reset forgets what was in flight");
        if !resets {
            // What the predecessor may have owed; after a reset it owes nothing.
            wait_until(&scaffold.device, || scaffold.pin.asserted());
            scaffold.driver.get::<1>(scaffold.driver.isr, 0);
        }
        assert!(!scaffold.pin.asserted());
        successor.call(0);
        wait_until(&scaffold.device, || scaffold.pin.asserted());
    }
}

#[test]
fn a_working_back_end_is_stopped_before_it_is_replaced() {
    let (scaffold, peer) = held();
    scaffold.driver.start();
    peer.requests();
    let mut script = Script::default();
    script.protocol.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    script.config = vec![1; 60];
    let (stream, successor) = Peer::start(script);
    scaffold.device.replace_backend(stream).unwrap();
    assert_eq!(peer.requests(), [FrontendReq::GET_VRING_BASE; 2]);
    assert_eq!(scaffold.failures.count(), 0);
    assert_eq!(scaffold.driver.get::<2>(scaffold.driver.config, 0), [1, 1]);
    assert_eq!(scaffold.driver.get::<1>(scaffold.driver.isr, 0)[0] & 2, 2, "the configuration differs");
    assert!(!successor.requests().contains(&FrontendReq::SET_INFLIGHT_FD));
}

#[test]
fn a_back_end_that_cannot_track_requests_in_flight_is_served_without() {
    let scripts = [
        Script { no_inflight: true, ..Script::default() },
        Script { refuses: Some(FrontendReq::GET_INFLIGHT_FD), ..Script::default() },
        Script { refuses: Some(FrontendReq::SET_INFLIGHT_FD), ..Script::default() },
    ];
    for script in scripts {
        let (stream, peer) = Peer::start(script);
        let scaffold = scaffold_with(settings(), stream);
        scaffold.driver.start();
        assert_eq!((scaffold.failures.count(), scaffold.driver.status()), (0, 15));
        peer.call(0);
        wait_until(&scaffold.device, || scaffold.pin.asserted());
    }
}

#[test]
fn a_successor_that_refuses_the_requests_in_flight_is_given_up() {
    let (scaffold, mut peer) = held();
    scaffold.driver.start();
    peer.die();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    let refuses = Some(FrontendReq::SET_INFLIGHT_FD);
    let (stream, _successor) = Peer::start(Script { refuses, ..Script::default() });
    assert!(scaffold.device.replace_backend(stream).is_err());
    assert_eq!(scaffold.failures.count(), 2);
    let (stream, successor) = Peer::start(Script::default());
    scaffold.device.replace_backend(stream).unwrap();
    assert!(
        successor.requests().contains(&FrontendReq::SET_INFLIGHT_FD),
        "what is in flight is not forgotten"
    );
}
