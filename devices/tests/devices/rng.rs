use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, Progress, RngConfig, RngLimit};
use bulkhead_ipc::jail::Enforcement;

use crate::driver::{BUFFERS, Driver, Service};
use crate::supervised::{Supervised, progress};

#[test]
fn every_buffer_is_filled_with_bytes_that_differ() {
    let service = Service::start("rng", tempfile::tempdir().unwrap(), &[]);
    let mut driver = Driver::new(service.connect(), 1);
    let mut before = vec![0; 600];
    for round in 0..300 {
        let len = driver.run(0, &[(BUFFERS, 500, true), (BUFFERS + 500, 100, true)]);
        assert_eq!(len, 600);
        let now = driver.get(BUFFERS, 600);
        assert_ne!(now, before, "round {round}");
        before = now;
    }
    assert_eq!(driver.run(0, &[(BUFFERS, 1 << 20, true)]), 65536, "a request has a limit");
    assert_eq!(driver.run(0, &[(BUFFERS, 8, false)]), 0, "a request without room");
}

#[test]
fn where_a_ring_stood_is_told_after_a_reset_by_status() {
    let service = Service::start("rng", tempfile::tempdir().unwrap(), &[]);
    let mut driver = Driver::new(service.connect(), 1);
    for _ in 0..3 {
        driver.run(0, &[(BUFFERS, 8, true)]);
    }
    driver.frontend.set_status(0).unwrap();
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 0, "a reset ring begins anew");
}

#[test]
fn a_rate_is_kept_within_a_twentieth() {
    let arguments = ["--max-bytes", "4000", "--period=100"].map(str::to_owned);
    let service = Service::start("rng", tempfile::tempdir().unwrap(), &arguments);
    let mut driver = Driver::new(service.connect(), 1);
    let begin = Instant::now();
    assert_eq!(driver.run(0, &[(BUFFERS, 1 << 20, true)]), 4000, "a request gets what a period has");
    let mut bytes = 4000;
    while bytes < 20_000 {
        let len = driver.run(0, &[(BUFFERS, 1000, true)]);
        assert_eq!(len, 1000);
        bytes += len;
    }
    // 4000 are there at the start, and 40 come each millisecond.
    assert!(begin.elapsed() >= Duration::from_millis(400) * 19 / 20, "{:?}", begin.elapsed());
}

/// A jailed entropy device that gives 64 bytes a minute.
fn slow() -> Supervised {
    let source: OwnedFd = File::open("/dev/urandom").unwrap().into();
    let limit = Some(RngLimit { max_bytes: 64, period: 60_000 });
    let config = DeviceConfig::Rng(RngConfig { source: FdIndex(1), limit });
    Supervised::start("rng", config, &[&source], Enforcement::Supervised)
}

#[test]
fn a_request_that_waits_for_its_turn_is_left_to_the_successor() {
    let mut process = slow();
    let mut driver = process.driver(1);
    assert_eq!(driver.run(0, &[(BUFFERS, 64, true)]), 64);
    let head = driver.queues[0].submit(&driver.ram, &[(BUFFERS, 64, true)]);
    driver.queues[0].kick();
    let end = Instant::now() + Duration::from_secs(10);
    while progress(&process) != (Progress::WaitsForHost { queue: 0 }) {
        assert!(Instant::now() < end, "a request that waits is not told apart");
    }
    assert!(driver.queues[0].finished(&driver.ram).is_none());
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 1, "what waits was not taken");
    process.stop();

    let mut process = slow();
    let Driver { ram, queues, .. } = driver;
    let mut driver = Driver::unstarted(process.stream.take().unwrap(), 0);
    (driver.ram, driver.queues) = (ram, queues);
    driver.set_up(0, u64::MAX);
    driver.start(None);
    let ram = driver.ram.clone();
    assert_eq!(driver.queues[0].wait(&ram), (head, 64));
    assert!(driver.queues[0].finished(&ram).is_none(), "once");
    process.stop();
}
