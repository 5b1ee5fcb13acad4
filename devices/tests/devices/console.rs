use std::io::{Read, Write};

use crate::driver::{BUFFERS, Driver, Service};

#[test]
fn bytes_go_both_ways() {
    let mut service = Service::start("console", tempfile::tempdir().unwrap(), &[]);
    let mut driver = Driver::new(service.connect(), 2);
    driver.put(BUFFERS, b"hello host");
    driver.run(1, &[(BUFFERS, 5, false), (BUFFERS + 5, 5, false)]);
    let mut seen = [0; 10];
    service.child.stdout.as_mut().unwrap().read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello host");

    // Input that comes before the guest has a buffer waits for one.
    service.child.stdin.as_mut().unwrap().write_all(b"hello guest").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(driver.run(0, &[(BUFFERS, 6, true)]), 6);
    assert_eq!(driver.run(0, &[(BUFFERS + 6, 100, true)]), 5);
    assert_eq!(driver.get(BUFFERS, 11), b"hello guest");
}

#[test]
fn a_reader_that_never_reads_does_not_stop_the_guest() {
    let service = Service::start("console", tempfile::tempdir().unwrap(), &[]);
    let mut driver = Driver::new(service.connect(), 2);
    let begin = std::time::Instant::now();
    for _ in 0..100 {
        driver.run(1, &[(BUFFERS, 8192, false)]);
    }
    assert!(begin.elapsed().as_secs() < 10);
    assert!(driver.frontend.get_vring_base(1).is_ok());
}
