//! How fast a disk is: `TMPDIR=/dev/shm cargo bench -p bulkhead-devices`. Figures count beside a peer's from the same run alone.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss
)]

#[path = "../tests/devices/driver.rs"]
#[allow(dead_code)]
mod driver;

use std::time::{Duration, Instant};

use crate::driver::{BUFFERS, Driver, Random, Service, header};

const HEADER: u64 = 0xf0_0000;
const DISK: u64 = 1 << 30;
const TIME: Duration = Duration::from_secs(3);

fn submit(driver: &mut Driver, lane: u64, random: &mut Random, len: u32) -> u16 {
    let sector = random.below(DISK / u64::from(len)) * u64::from(len) / 512;
    driver.put(HEADER + lane * 32, &header(0, sector));
    let buffer = BUFFERS + lane * (1 << 20);
    let buffers = [(HEADER + lane * 32, 16, false), (buffer, len, true), (HEADER + lane * 32 + 16, 1, true)];
    driver.queues[0].submit(&driver.ram, &buffers)
}

fn measure(service: &Service, depth: u64, len: u32) {
    let mut driver = Driver::new(service.connect(), 1);
    let mut random = Random(0x1357_9bdf_2468_ace1);
    let ram = driver.ram.clone();
    let mut lanes = vec![0; 256];
    for lane in 0..depth {
        let head = submit(&mut driver, lane, &mut random, len);
        lanes[usize::from(head)] = lane;
    }
    driver.queues[0].kick();
    let cpu = || -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    };
    let (begin, cpu_before) = (Instant::now(), cpu());
    let mut count = 0u64;
    while begin.elapsed() < TIME {
        let mut finished = Some(driver.queues[0].wait(&ram));
        let mut any = false;
        while let Some((head, _)) = finished {
            count += 1;
            let lane = lanes[usize::from(head)];
            let head = submit(&mut driver, lane, &mut random, len);
            lanes[usize::from(head)] = lane;
            any = true;
            finished = driver.queues[0].finished(&ram);
        }
        if any {
            driver.queues[0].kick();
        }
    }
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    let each = (cpu() - cpu_before) * 1e6 / count as f64;
    println!("{len} bytes, depth {depth}: {rate:.0} a second, {each:.1} us of CPU each");
}

fn main() {
    let service = Service::disk(DISK, &[]);
    std::fs::write(service.disk_path(), vec![1; usize::try_from(DISK).unwrap()]).unwrap();
    for (depth, len) in [(1, 4096), (32, 4096), (8, 131_072)] {
        measure(&service, depth, len);
    }
}
