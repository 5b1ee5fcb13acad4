//! Starting, stopping, reset, failure.

use std::time::Instant;

use bulkhead_ipc::vhost_user::frontend::SUPPORTED_PROTOCOL_FEATURES;
use bulkhead_ipc::vhost_user::message::FrontendReq;

use super::driver::{CONFIG_VECTOR, QUEUE_DESC, QUEUE_ENABLE, QUEUE_SELECT, QUEUE_SIZE};
use super::*;
use crate::machine::PciFunction;

const START: [FrontendReq; 7] = [
    FrontendReq::SET_VRING_NUM,
    FrontendReq::SET_VRING_BASE,
    FrontendReq::SET_VRING_ADDR,
    FrontendReq::SET_VRING_ERR,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_KICK,
    FrontendReq::SET_VRING_ENABLE,
];

fn words(payload: &[u8]) -> Vec<u32> {
    payload.chunks(4).map(|chunk| u32::from_le_bytes(chunk.try_into().unwrap())).collect()
}

#[test]
fn driver_ok_starts_the_queues_with_guest_addresses() {
    let (scaffold, peer) = scaffold();
    peer.requests();
    scaffold.driver.start();
    assert_eq!(scaffold.driver.status(), 15);
    let features = peer.payloads(FrontendReq::SET_FEATURES);
    assert_eq!(features, [(1u64 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 0x1041).to_le_bytes()]);
    let sizes = peer.payloads(FrontendReq::SET_VRING_NUM);
    assert_eq!([words(&sizes[0]), words(&sizes[1])], [[0, 256], [1, 128]]);
    let addresses = peer.payloads(FrontendReq::SET_VRING_ADDR);
    // Index, flags, then descriptor table, used ring, available ring, log.
    assert_eq!(words(&addresses[1]), [1, 0, 0x2_0000, 0, 0x2_2000, 0, 0x2_1000, 0, 0, 0]);
    let requests = peer.requests();
    assert_eq!(
        requests[..4],
        [
            FrontendReq::SET_FEATURES,
            FrontendReq::ADD_MEM_REG,
            FrontendReq::GET_INFLIGHT_FD,
            FrontendReq::SET_INFLIGHT_FD
        ]
    );
    assert_eq!(requests[4..], [START, START].concat());
}

#[test]
fn queues_run_only_while_the_function_is_bus_master() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.start();
    driver.set_status(0);
    driver.bus_master(false);
    assert!(driver.negotiate(1 << 32));
    driver.queue(0, 256, 0x1_0000);
    peer.requests();
    driver.set_status(15);
    assert!(peer.requests().is_empty(), "not bus master yet");
    driver.bus_master(true);
    assert!(peer.requests().contains(&FrontendReq::SET_VRING_ENABLE));
    driver.bus_master(false);
    assert_eq!(peer.requests(), [FrontendReq::GET_VRING_BASE]);
    driver.bus_master(true);
    let bases = peer.payloads(FrontendReq::SET_VRING_BASE);
    assert_eq!(words(&bases[0]), [0, 7], "goes on where it stopped");
    assert_eq!(scaffold.failures.count(), 0);
}

#[test]
fn pause_stops_and_resume_goes_on() {
    let (scaffold, peer) = scaffold();
    scaffold.driver.start();
    peer.requests();
    scaffold.device.pause().unwrap();
    assert_eq!(peer.requests(), [FrontendReq::GET_VRING_BASE; 2]);
    scaffold.driver.bus_master(false);
    scaffold.driver.bus_master(true);
    assert!(peer.requests().is_empty());
    scaffold.device.resume();
    assert!(peer.requests().ends_with(&START));
}

#[test]
fn a_queue_enabled_late_is_started_too() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    driver.bus_master(true);
    assert!(driver.negotiate(1 << 32));
    driver.set_status(15);
    peer.requests();
    driver.queue(1, 64, 0x1_0000);
    assert!(peer.requests().ends_with(&START));
    driver.queue(0, 64, 0x2_0000);
    assert_eq!(peer.requests(), START);
}

#[test]
fn reset_stops_the_queues_and_clears_the_registers() {
    let (scaffold, peer) = scaffold();
    let driver = &scaffold.driver;
    for reset in [|driver: &Driver| driver.set_status(0), |driver: &Driver| driver.device.reset()] {
        driver.start();
        driver.put16(CONFIG_VECTOR, 1);
        peer.requests();
        reset(driver);
        let stop = FrontendReq::GET_VRING_BASE;
        assert_eq!(peer.requests(), [stop, stop, FrontendReq::RESET_DEVICE]);
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.get16(CONFIG_VECTOR), 0xFFFF);
        driver.put16(QUEUE_SELECT, 1);
        assert_eq!((driver.get16(QUEUE_ENABLE), driver.get16(QUEUE_SIZE)), (0, 256));
        assert_eq!(driver.get32(QUEUE_DESC), 0);
        driver.bus_master(false);
    }
    driver.start();
    let bases = peer.payloads(FrontendReq::SET_VRING_BASE);
    assert_eq!(words(&bases[0]), [0, 0], "from the start");
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_dead_back_end_means_needs_reset_and_an_interrupt() {
    let (scaffold, mut peer) = scaffold();
    let driver = &scaffold.driver;
    driver.start();
    peer.die();
    wait_until(&scaffold.device, || driver.status() & 64 != 0);
    assert_eq!(scaffold.failures.count(), 1);
    assert!(!scaffold.device.is_connected());
    assert!(scaffold.pin.asserted());
    assert_eq!(driver.get::<1>(driver.isr, 0), [2]);
    driver.set_status(15);
    assert_eq!(driver.status(), 15 | 64, "the driver cannot take it back");
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    assert!(!driver.negotiate(1 << 32), "there is no device any more");
}

#[test]
fn before_driver_ok_a_failure_interrupts_nobody() {
    let (scaffold, mut peer) = scaffold();
    peer.die();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    assert_eq!(scaffold.driver.status(), 0);
    assert!(!scaffold.pin.asserted());
}

#[test]
fn a_ring_error_is_a_failure() {
    let (scaffold, peer) = scaffold();
    scaffold.driver.start();
    peer.report_error();
    wait_until(&scaffold.device, || scaffold.failures.count() == 1);
    assert_eq!(scaffold.driver.status(), 15 | 64);
}

#[test]
fn a_back_end_that_hangs_holds_a_vcpu_only_up_to_the_deadline() {
    for request in [
        FrontendReq::SET_FEATURES,
        FrontendReq::GET_INFLIGHT_FD,
        FrontendReq::SET_VRING_KICK,
        FrontendReq::GET_VRING_BASE,
    ] {
        let (stream, peer) = Peer::start(Script { silent_on: Some(request), ..Script::default() });
        let limit = Duration::from_millis(50);
        let scaffold = scaffold_with(Settings { patience: limit, ..settings() }, stream);
        let start = Instant::now();
        scaffold.driver.start();
        if request == FrontendReq::GET_VRING_BASE {
            assert_eq!(scaffold.driver.status(), 15);
            scaffold.driver.set_status(0);
            assert_eq!(scaffold.driver.status(), 0);
        } else {
            assert_eq!(scaffold.driver.status(), 15 | 64);
        }
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(scaffold.failures.count(), 1, "{request:?}");
        let text = scaffold.failures.0.lock().unwrap()[0].clone();
        assert!(text.contains("disk0") && text.contains(&format!("{request:?}")), "{text}");
        drop(peer);
    }
}

#[test]
fn a_back_end_that_never_stops_talking_is_a_failure() {
    let (scaffold, peer) = scaffold();
    scaffold.driver.start();
    for _ in 0..4000 {
        if scaffold.failures.count() == 1 {
            break;
        }
        if peer.seen.lock().unwrap().channel.is_some() {
            peer.change_config_quietly();
        }
        serve(&scaffold.device);
    }
    assert!(scaffold.failures.0.lock().unwrap()[0].contains("more of the core's time"));
}

#[test]
fn a_back_end_that_dawdles_gets_two_seconds_in_ten() {
    let (scaffold, peer) = scaffold();
    scaffold.driver.start();
    wait_until(&scaffold.device, || peer.seen.lock().unwrap().channel.is_some());
    peer.script.lock().unwrap().dawdles_on = Some((FrontendReq::GET_CONFIG, Duration::from_millis(700)));
    let start = std::time::Instant::now();
    wait_until(&scaffold.device, || {
        peer.change_config_quietly();
        scaffold.failures.count() == 1
    });
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn the_event_loop_does_not_wait_for_a_vcpu_that_waits_for_the_back_end() {
    let (stream, peer) =
        Peer::start(Script { silent_on: Some(FrontendReq::GET_VRING_BASE), ..Script::default() });
    let limit = Duration::from_secs(1);
    let scaffold = scaffold_with(Settings { patience: limit, ..settings() }, stream);
    scaffold.driver.start();
    peer.requests();
    let device = Arc::clone(&scaffold.device);
    let vcpu = std::thread::spawn(move || Driver::new(device).set_status(0));
    while peer.payloads(FrontendReq::GET_VRING_BASE).is_empty() {
        std::thread::yield_now();
    }
    let readable = || {
        use std::os::fd::AsFd;
        let mut fds = [nix::poll::PollFd::new(scaffold.device.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, 0u16).unwrap() == 1
    };
    peer.call(0);
    assert!(readable());
    let start = Instant::now();
    scaffold.device.on_event();
    assert!(start.elapsed() < limit / 2, "it waited");
    assert!(!readable(), "it would spin");
    vcpu.join().unwrap();
    // The lock is free: the event loop is called again, for whatever has been left.
    assert_eq!(scaffold.failures.count(), 1);
    peer.report_error();
    let other = Peer::start(Script::default());
    scaffold.device.replace_backend(other.0).unwrap();
    scaffold.driver.start();
    other.1.call(1);
    wait_until(&scaffold.device, || scaffold.pin.asserted());
}

#[test]
fn a_back_end_that_closes_anywhere_in_the_start_is_a_failure() {
    for request in START.into_iter().chain([FrontendReq::SET_FEATURES, FrontendReq::ADD_MEM_REG]) {
        let (stream, _peer) = Peer::start(Script { closes_on: Some(request), ..Script::default() });
        let scaffold = scaffold_with(settings(), stream);
        scaffold.driver.start();
        assert_eq!(scaffold.driver.status(), 15 | 64, "{request:?}");
        assert_eq!(scaffold.failures.count(), 1);
        assert!(scaffold.failures.0.lock().unwrap()[0].contains("closed"), "and not a deadline");
    }
}

#[test]
fn a_back_end_with_status_is_told_and_asked() {
    let protocol = SUPPORTED_PROTOCOL_FEATURES;
    let (stream, peer) = Peer::start(Script { protocol, ..Script::default() });
    let scaffold = scaffold_with(settings(), stream);
    scaffold.driver.start();
    let values = |peer: &Peer| -> Vec<u8> {
        peer.payloads(FrontendReq::SET_STATUS).iter().map(|payload| payload[0]).collect()
    };
    assert_eq!(values(&peer), [11, 15]);
    peer.requests();
    scaffold.driver.set_status(0);
    assert_eq!(values(&peer), [0]);
    assert!(!peer.requests().contains(&FrontendReq::RESET_DEVICE));
}

#[test]
fn a_back_end_that_does_not_suit_is_refused_at_once() {
    let open = |script: Script, kind: DeviceType| {
        let (stream, _peer) = Peer::start(script);
        let settings = Settings { kind, ..settings() };
        let device = Backend::open(&settings, stream).and_then(|backend| {
            let ram = GuestRam::create(RAM).unwrap();
            let (messages, failures) = (Arc::new(Messages::default()), Arc::new(Failures::default()));
            VirtioPci::new(settings, backend, ram, messages, failures)
        });
        device.err().map(|error| error.to_string())
    };
    let legacy = Script { features: 1 << 30, ..Script::default() };
    assert!(open(legacy, DeviceType::BLOCK).unwrap().contains("VERSION_1"));
    let few = Script { queues: 1, config: vec![0; 12], ..Script::default() };
    assert!(open(few, DeviceType::CONSOLE).unwrap().contains("1 queues"));
    let short = Script { config: vec![0; 8], ..Script::default() };
    assert!(open(short, DeviceType::BLOCK).unwrap().contains("GET_CONFIG"));
    let many = Script { queues: 200, config: Vec::new(), ..Script::default() };
    assert_eq!(open(many, DeviceType::ENTROPY), None);
}

#[test]
fn a_back_end_that_is_still_starting_is_waited_for_longer() {
    let limit = Duration::from_millis(100);
    let script = Script { dawdles_on: Some((FrontendReq::GET_FEATURES, limit * 5)), ..Script::default() };
    let (stream, _peer) = Peer::start(script);
    let limits = Limits { exchange: limit, stop: limit };
    let scaffold = scaffold_with(Settings { limits, ..settings() }, stream);
    assert!(scaffold.device.is_connected());
}
