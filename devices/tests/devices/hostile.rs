//! Drivers that break their rings. The process must survive, say so, and serve the next front end.

use crate::driver::{BUFFERS, Driver, INDIRECT, NEXT, RAM, SIZE, Service, WRITE, put_descriptor};
use crate::driver::{Random, header};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

const HEADER: u64 = 0xf0_0000;
const TABLE: u64 = 0xf1_0000;

/// Waits until the queue's error descriptor was signalled.
fn broken(driver: &Driver) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        if driver.queues[0].error.read().is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

fn works(service: &Service) {
    let mut driver = Driver::new(service.connect(), 1);
    driver.put(HEADER, &header(0, 0));
    assert_eq!(driver.run(0, &[(HEADER, 16, false), (BUFFERS, 512, true), (BUFFERS + 512, 1, true)]), 513);
}

type Entry = (u64, u32, u16, u16);

fn survives(name: &str, entries: &[(u16, Entry)], table: &[Entry], head: u16) {
    let mut service = Service::disk(1 << 20, &[]);
    {
        let mut driver = Driver::new(service.connect(), 1);
        driver.put(HEADER, &header(0, 0));
        for &(index, entry) in entries {
            driver.queues[0].descriptor(&driver.ram, index, entry);
        }
        for (index, entry) in (0u64..).zip(table) {
            put_descriptor(&driver.ram, TABLE + index * 16, *entry);
        }
        driver.queues[0].offer(&driver.ram, head);
        driver.queues[0].kick();
        assert!(broken(&driver), "{name}: the ring was not found broken");
        assert!(driver.frontend.get_vring_base(0).is_ok(), "{name}: the device does not answer");
    }
    assert!(service.is_alive(), "{name}: the process died");
    works(&service);
}

#[test]
fn malformed_chains_break_the_ring_and_not_the_process() {
    let outside = RAM + 4096;
    survives("loop", &[(0, (HEADER, 16, NEXT, 1)), (1, (HEADER, 16, NEXT, 0))], &[], 0);
    survives("head outside", &[], &[], SIZE);
    survives("next outside", &[(0, (HEADER, 16, NEXT, SIZE))], &[], 0);
    survives("zero length", &[(0, (HEADER, 0, 0, 0))], &[], 0);
    survives("header outside memory", &[(0, (outside, 16, NEXT, 1)), (1, (BUFFERS, 1, WRITE, 0))], &[], 0);
    survives("address overflow", &[(0, (u64::MAX - 4, 16, NEXT, 1)), (1, (BUFFERS, 1, WRITE, 0))], &[], 0);
    survives("no status", &[(0, (HEADER, 16, 0, 0))], &[], 0);
    survives("no header", &[(0, (BUFFERS, 512, WRITE, 0))], &[], 0);
    survives("short header", &[(0, (HEADER, 15, NEXT, 1)), (1, (BUFFERS, 1, WRITE, 0))], &[], 0);
    survives("status outside memory", &[(0, (HEADER, 16, NEXT, 1)), (1, (outside, 1, WRITE, 0))], &[], 0);
    survives(
        "readable after writable",
        &[(0, (BUFFERS, 1, NEXT | WRITE, 1)), (1, (HEADER, 16, 0, 0))],
        &[],
        0,
    );
    survives("indirect in indirect", &[(0, (TABLE, 16, INDIRECT, 0))], &[(TABLE, 16, INDIRECT, 0)], 0);
    survives("indirect loop", &[(0, (TABLE, 16, INDIRECT, 0))], &[(HEADER, 16, NEXT, 0)], 0);
    survives("indirect outside memory", &[(0, (outside, 16, INDIRECT, 0))], &[], 0);
    survives("indirect with next", &[(0, (TABLE, 16, INDIRECT | NEXT, 1))], &[(HEADER, 16, 0, 0)], 0);
    survives("indirect of 17 bytes", &[(0, (TABLE, 17, INDIRECT, 0))], &[(HEADER, 16, 0, 0)], 0);
}

/// As after O_DIRECT on a buffer in persistent memory: an I/O error for who asked, and nobody else.
#[test]
fn data_outside_memory_is_an_error_and_the_disk_goes_on() {
    let service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    for (kind, writable) in [(0, true), (1, false)] {
        driver.put(HEADER, &header(kind, 0));
        for (address, status) in [(RAM + 4096, 1), (BUFFERS, 0), (u64::MAX - 511, 1), (RAM - 256, 1)] {
            driver.put(BUFFERS + 512, &[9]);
            driver.run(0, &[(HEADER, 16, false), (address, 512, writable), (BUFFERS + 512, 1, true)]);
            assert_eq!(driver.get(BUFFERS + 512, 1), [status], "{kind} at {address:#x}");
        }
    }
}

#[test]
fn an_available_index_that_runs_away_breaks_the_ring() {
    let mut service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    let at = driver.queues[0].addresses().available + 2;
    driver.ram.memory().write_obj(SIZE + 1, GuestAddress(at)).unwrap();
    driver.queues[0].kick();
    assert!(broken(&driver));
    // Setting the ring up anew makes it whole.
    driver.frontend.get_vring_base(0).unwrap();
    driver.ram.memory().write_obj(0u16, GuestAddress(at)).unwrap();
    driver.queues[0].next_available = 0;
    driver.start(None);
    driver.put(HEADER, &header(0, 0));
    driver.run(0, &[(HEADER, 16, false), (BUFFERS, 512, true), (BUFFERS + 512, 1, true)]);
    assert!(service.is_alive());
}

#[test]
fn rings_of_garbage_do_no_harm() {
    let mut random = Random(0xdead_beef_1234_5677);
    for (kind, queues) in [("blk", 1), ("rng", 1), ("console", 2)] {
        let mut service = match kind {
            "blk" => Service::disk(1 << 20, &[]),
            kind => Service::start(kind, tempfile::tempdir().unwrap(), &[]),
        };
        for _ in 0..40 {
            let mut driver = Driver::new(service.connect(), queues);
            for index in 0..usize::from(queues) {
                for descriptor in 0..SIZE {
                    let address = match random.below(4) {
                        0 => random.below(u64::MAX),
                        1 => driver.queues[index].base + random.below(0x9000),
                        _ => BUFFERS + random.below(1 << 20),
                    };
                    let len = if random.below(4) == 0 { random.below(1 << 32) } else { random.below(4096) };
                    let entry = (
                        address,
                        u32::try_from(len).unwrap(),
                        u16::try_from(random.below(8)).unwrap(),
                        u16::try_from(random.below(u64::from(SIZE) + 2)).unwrap(),
                    );
                    driver.queues[index].descriptor(&driver.ram, descriptor, entry);
                }
                for _ in 0..SIZE {
                    let head = u16::try_from(random.below(u64::from(SIZE))).unwrap();
                    driver.queues[index].offer(&driver.ram, head);
                }
                driver.queues[index].kick();
            }
            for index in 0..queues {
                driver.frontend.get_vring_base(index).unwrap();
            }
        }
        assert!(service.is_alive(), "{kind} died");
    }
}
