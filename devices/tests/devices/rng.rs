use crate::driver::{BUFFERS, Driver, Service};

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
