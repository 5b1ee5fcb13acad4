//! What a disk can be told: caches, block sizes, rate limits, what follows errors.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::blk::{DISCARD, FLUSH, HEADER, IOERR, OK, READ, STATUS, UNSUPP, WRITE, range, request};
use crate::driver::{BUFFERS, Driver, PROGRAM, Service, header};

fn config(driver: &mut Driver) -> [u8; 60] {
    let mut space = [0; 60];
    driver.frontend.get_config(0, &mut space).unwrap();
    space
}

#[test]
fn without_the_page_cache_requests_need_no_alignment() {
    let service = Service::disk(1 << 20, &["--cache", "none"]);
    service.write_disk(&[9; 1 << 20]);
    let mut driver = Driver::new(service.connect(), 1);
    assert_eq!(request(&mut driver, READ, 8, &[(BUFFERS, 4096, true)]), OK);
    assert_eq!(driver.get(BUFFERS, 4096), [9; 4096]);
    // One sector, to an odd address, in two pieces.
    let pieces = [(BUFFERS + 1, 100, true), (BUFFERS + 1001, 412, true)];
    assert_eq!(request(&mut driver, READ, 1, &pieces), OK);
    assert_eq!(driver.get(BUFFERS + 1001, 412), [9; 412]);
    driver.put(BUFFERS, &[4; 512]);
    assert_eq!(request(&mut driver, WRITE, 3, &[(BUFFERS + 1, 511, false), (BUFFERS + 5, 1, false)]), OK);
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]), OK);
    let found = driver.get(BUFFERS, 4096);
    assert!(found[..1536].iter().all(|byte| *byte == 9) && found[1536..2047].iter().all(|byte| *byte == 4));
}

#[test]
fn a_cache_mode_is_what_the_guest_sees_of_it() {
    for (mode, writeback, choice) in
        [("writeback", 1, true), ("writethrough", 0, false), ("unsafe", 1, false)]
    {
        let service = Service::disk(1 << 20, &["--cache", mode]);
        let mut driver = Driver::unstarted(service.connect(), 1);
        driver.set_up(0, u64::MAX);
        driver.start(None);
        assert_eq!(driver.frontend.offered_features() >> 11 & 1 == 1, choice, "{mode}: CONFIG_WCE");
        assert_eq!(config(&mut driver)[32], writeback, "{mode}");
        assert_eq!(driver.frontend.set_config(32, &[0]).is_ok(), choice, "{mode}");
        assert_eq!(request(&mut driver, WRITE, 0, &[(BUFFERS, 4096, false)]), OK);
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
    }
}

#[test]
fn block_sizes_and_discard_are_as_configured() {
    let sizes = ["--block-size", "4096", "--physical-block-size", "16384", "--no-discard"];
    let service = Service::disk(1 << 20, &sizes);
    let mut driver = Driver::new(service.connect(), 1);
    let space = config(&mut driver);
    assert_eq!((space[20..24].to_vec(), space[24]), (4096u32.to_le_bytes().to_vec(), 2));
    assert_eq!(driver.frontend.offered_features() >> 13 & 1, 0, "DISCARD");
    driver.put(BUFFERS, &range(0, 8, 0));
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 16, false)]), UNSUPP);
}

/// Requests a second of `len` bytes at depth 8, after the burst.
fn pace(service: &Service, len: u32, time: Duration) -> f64 {
    let mut driver = Driver::new(service.connect(), 1);
    let ram = driver.ram.clone();
    driver.put(HEADER, &header(READ, 0));
    let chain = [(HEADER, 16, false), (BUFFERS, len, true), (STATUS, 1, true)];
    for _ in 0..8 {
        driver.queues[0].submit(&ram, &chain);
    }
    driver.queues[0].kick();
    let (mut begin, mut count, mut counted) = (Instant::now(), 0, 0);
    while begin.elapsed() < time || count == counted {
        driver.queues[0].wait(&ram);
        driver.queues[0].submit(&ram, &chain);
        driver.queues[0].kick();
        count += 1;
        // The burst is over after this.
        if counted == 0 && begin.elapsed() > time / 4 {
            (begin, counted) = (Instant::now(), count);
        }
    }
    f64::from(count - counted) / begin.elapsed().as_secs_f64()
}

#[test]
fn rate_limits_hold_within_five_percent() {
    for (option, limit, len, expected) in
        [("--iops", "800,200", 512, 800.0), ("--bps", "4194304,1048576", 16384, 256.0)]
    {
        let service = Service::disk(1 << 20, &[option, limit]);
        let rate = pace(&service, len, Duration::from_millis(800));
        assert!((rate / expected - 1.0).abs() < 0.05, "{option} {limit}: {rate:.1} a second");
    }
}

#[test]
fn a_request_waits_for_space_if_told_so_and_then_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, log) = (directory.path().join("socket"), directory.path().join("log"));
    let full = directory.path().join("full");
    // The shell stays, to make room when it is told.
    let script = "mount -t tmpfs -o size=2m none /mnt && truncate -s 64M /mnt/disk && head -c 1M /dev/zero >/mnt/ballast && \
         { \"$0\" blk --socket-path \"$1\" --blk-file /mnt/disk --write-error wait-for-space 2>\"$2\" & } && \
         until test -e \"$3\"; do sleep 0.05; done; rm /mnt/ballast; wait";
    let root = nix::unistd::geteuid().is_root();
    let rights: &[&str] = if root { &[] } else { &["--map-current-user", "--keep-caps"] };
    let child = Command::new("unshare")
        .args(rights)
        .args(["-m", "sh", "-c", script, PROGRAM])
        .args([&socket, &log, &full])
        .spawn()
        .unwrap();
    let service = Service { child, socket, directory };
    let mut driver = Driver::new(service.connect(), 1);
    assert_eq!(request(&mut driver, WRITE, 0, &[(BUFFERS, 512 << 10, false)]), OK);
    let maker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        std::fs::write(full, []).unwrap();
    });
    let begin = Instant::now();
    assert_eq!(request(&mut driver, WRITE, 2048, &[(BUFFERS, 1 << 20, false)]), OK);
    assert!(begin.elapsed() > Duration::from_millis(500), "it was not tried again");
    maker.join().unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("the request waits until the host can do it"), "{log}");
}

#[test]
fn a_file_that_shrinks_fails_what_is_beyond_its_end() {
    let mut service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    std::fs::File::options().write(true).open(service.disk_path()).unwrap().set_len(65536).unwrap();
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]), OK);
    assert_eq!(request(&mut driver, READ, 1024, &[(BUFFERS, 4096, true)]), IOERR);
    assert_eq!(request(&mut driver, READ, 120, &[(BUFFERS, 8192, true)]), IOERR, "half of it is there");
    assert!(service.is_alive());
}
