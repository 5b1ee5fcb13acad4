//! How exactly rate limits hold: a measurement for `make bench`, which prints it. Nothing here asserts a time.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::driver::{BUFFERS, Driver, Service, header};

/// What was saved up for a burst is used up by then.
const WARM_UP: Duration = Duration::from_millis(400);
/// A measurement.
const TIME: Duration = Duration::from_millis(1200);
/// Requests and buffers under way: never less than a limit lets through in a moment.
const DEPTH: u64 = 64;
/// virtio's header of a packet.
const HEADER: u32 = 12;
/// `VIRTIO_BLK_T_IN`.
const READ: u32 = 0;

fn address(lane: u64) -> u64 {
    BUFFERS + lane * 0x1_0000
}

/// What ends each second of a queue that is always full of `chain`s; `count` says what has ended so far, where that is not what the
/// queue has back.
fn steady(driver: &mut Driver, queue: usize, chain: &[(u64, u32, bool)], count: Option<&AtomicU64>) -> f64 {
    let queue = &mut driver.queues[queue];
    for _ in 0..DEPTH {
        queue.submit(&driver.ram, chain);
    }
    queue.kick();
    let (start, mut ended) = (Instant::now(), 0_u64);
    let mut first = None;
    loop {
        queue.wait(&driver.ram);
        let mut again = 1;
        while queue.finished(&driver.ram).is_some() {
            again += 1;
        }
        ended += again;
        for _ in 0..again {
            queue.submit(&driver.ram, chain);
        }
        queue.kick();
        let done = count.map_or(ended, |count| count.load(Ordering::Relaxed));
        match first {
            None if start.elapsed() >= WARM_UP => first = Some((Instant::now(), done)),
            Some((begin, before)) if begin.elapsed() >= TIME => {
                return (done - before) as f64 / begin.elapsed().as_secs_f64();
            }
            _ => {}
        }
    }
}

fn card(option: &str, rate: u64) -> (Service, Driver, UnixStream) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wire");
    let listener = UnixListener::bind(&path).unwrap();
    let options = ["--stream", path.to_str().unwrap(), option, &rate.to_string()].map(str::to_owned);
    let service = Service::start("net", directory, &options);
    let driver = Driver::new(service.connect(), 3);
    (service, driver, listener.accept().unwrap().0)
}

/// Packets a second from the guest, counted where they arrive.
fn transmitted(option: &str, rate: u64, size: u32) -> f64 {
    let (_service, mut driver, wire) = card(option, rate);
    let framed = u64::from(size) + 4;
    let (bytes, packets) = (wire.try_clone().unwrap(), Arc::new(AtomicU64::new(0)));
    let counted = packets.clone();
    let reader = std::thread::spawn(move || {
        let (mut wire, mut buffer, mut came) = (bytes, vec![0; 1 << 16], 0);
        while let Ok(count @ 1..) = wire.read(&mut buffer) {
            came += count as u64;
            counted.store(came / framed, Ordering::Relaxed);
        }
    });
    let result = steady(&mut driver, 1, &[(BUFFERS, HEADER + size, false)], Some(&packets));
    let _ended = wire.shutdown(Shutdown::Both);
    reader.join().unwrap();
    result
}

/// Packets a second to the guest.
fn received(option: &str, rate: u64, size: u32) -> f64 {
    let (_service, mut driver, wire) = card(option, rate);
    let mut end = wire.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let mut packet = size.to_be_bytes().to_vec();
        packet.resize(packet.len() + size as usize, 0xff);
        while end.write_all(&packet).is_ok() {}
    });
    let result = steady(&mut driver, 0, &[(BUFFERS, 2048, true)], None);
    let _ended = wire.shutdown(Shutdown::Both);
    writer.join().unwrap();
    result
}

/// Reads a second of a disk.
fn read(option: &str, rate: u64, size: u32) -> f64 {
    let service = Service::disk(1 << 20, &[option, &rate.to_string()]);
    let mut driver = Driver::new(service.connect(), 1);
    driver.put(address(0), &header(READ, 0));
    steady(&mut driver, 0, &[(address(0), 16, false), (address(1), size, true), (address(2), 1, true)], None)
}

type Measure = fn(&str, u64, u32) -> f64;

#[test]
#[ignore = "a measurement of a quarter of a minute, which `make bench` prints"]
fn rate_limits_beside_what_passes() {
    let rows: [(&str, Measure, &str, u64, u32); 10] = [
        ("net, bytes/s from the guest", transmitted, "--tx-rate", 2_000_000, 1514),
        ("net, bytes/s from the guest", transmitted, "--tx-rate", 50_000_000, 1514),
        ("net, packets/s from the guest", transmitted, "--tx-packets", 20_000, 60),
        ("net, bytes/s to the guest", received, "--rx-rate", 2_000_000, 1514),
        ("net, bytes/s to the guest", received, "--rx-rate", 50_000_000, 1514),
        ("net, packets/s to the guest", received, "--rx-packets", 20_000, 60),
        ("blk, bytes/s", read, "--bps", 4_000_000, 4096),
        ("blk, bytes/s", read, "--bps", 100_000_000, 65536),
        ("blk, requests/s", read, "--iops", 1000, 4096),
        ("blk, requests/s", read, "--iops", 20_000, 512),
    ];
    for (what, measure, option, asked, size) in rows {
        let each = if option.ends_with("rate") || option == "--bps" { f64::from(size) } else { 1.0 };
        print(what, asked, measure(option, asked, size) * each);
    }
    for (what, asked, got) in crate::limit_group::measure() {
        print(what, asked, got);
    }
}

fn print(what: &str, asked: u64, got: f64) {
    let off = (got / asked as f64 - 1.0) * 100.0;
    let verdict = if off.abs() <= 5.0 { "holds" } else { "**missed**" };
    println!("rate: | {what} | {asked} | {got:.0} | {off:+.1} % | {verdict} (limit 5 %) |");
}
