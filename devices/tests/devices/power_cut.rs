//! Device and core die together, at any moment, and nobody repeats anything: what was flushed is in the image.

use std::time::Duration;

use crate::blk::{FLUSH, OK, READ, WRITE, request};
use crate::driver::{BUFFERS, Driver, Random, Service, header};
use crate::formats;

const ROUNDS: u32 = 12;
/// Blocks that are written, each of 4 KiB and far from the next, so that an image in a format has to make room for each.
const BLOCKS: u64 = 24;
const BLOCK: u64 = 4096;
const DISTANCE: u64 = 1 << 20;
const HEADERS: u64 = 0xf0_0000;
const STATUS: u64 = 0xe0_0000;

fn contents(block: u64, version: u32) -> [u8; BLOCK as usize] {
    let mut bytes = [0; BLOCK as usize];
    if version > 0 {
        let word = (block << 32 | u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
    }
    bytes
}

/// One life of a process: writes of all blocks and a flush, over and over, until it is killed somewhere in between.
fn live_and_die(service: &mut Service, random: &mut Random, written: &mut [u32], flushed: &mut [u32]) {
    let mut driver = Driver::new(service.connect(), 1);
    let ram = driver.ram.clone();
    for round in 0..1 + random.below(3) {
        let mut flying = 0;
        for block in 0..BLOCKS {
            let version = &mut written[block as usize];
            *version += 1;
            let buffer = BUFFERS + block * BLOCK;
            driver.put(buffer, &contents(block, *version));
            driver.put(HEADERS + block * 16, &header(WRITE, block * DISTANCE / 512));
            let data =
                [(HEADERS + block * 16, 16, false), (buffer, BLOCK as u32, false), (STATUS + block, 1, true)];
            driver.queues[0].submit(&ram, &data);
            flying += 1;
        }
        driver.queues[0].kick();
        for _ in 0..flying {
            driver.queues[0].wait(&ram);
        }
        driver.put(HEADERS, &header(FLUSH, 0));
        driver.put(STATUS, &[0xff]);
        driver.queues[0].submit(&ram, &[(HEADERS, 16, false), (STATUS, 1, true)]);
        driver.queues[0].kick();
        if round > 0 {
            // Between the flush and its reply, more or less.
            std::thread::sleep(Duration::from_micros(random.below(400)));
            break;
        }
        driver.queues[0].wait(&ram);
        assert_eq!(driver.get(STATUS, 1), [OK]);
        flushed.copy_from_slice(written);
    }
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    if driver.queues[0].finished(&ram).is_some() {
        flushed.copy_from_slice(written);
    }
}

fn survives(mut service: Service, arguments: &[String]) {
    let (mut written, mut flushed) = (vec![0; BLOCKS as usize], vec![0; BLOCKS as usize]);
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..ROUNDS {
        live_and_die(&mut service, &mut random, &mut written, &mut flushed);
        let _ = std::fs::remove_file(&service.socket);
        service.child = Service::spawn("blk", &service.socket, arguments);
        let mut driver = Driver::new(service.connect(), 1);
        for block in 0..BLOCKS {
            let place = block * DISTANCE / 512;
            assert_eq!(request(&mut driver, READ, place, &[(BUFFERS, BLOCK as u32, true)]), OK);
            let found = driver.get(BUFFERS, BLOCK as usize);
            let index = block as usize;
            let version =
                (flushed[index]..=written[index]).find(|version| contents(block, *version)[..] == found);
            assert!(version.is_some(), "block {block} has lost version {}", flushed[index]);
            (written[index], flushed[index]) = (version.unwrap(), version.unwrap());
        }
    }
}

#[test]
fn a_raw_image_keeps_what_was_flushed() {
    let service = Service::disk(BLOCKS * DISTANCE, &[]);
    let disk = service.disk_path().to_str().unwrap().to_owned();
    survives(service, &["--blk-file".to_owned(), disk]);
}

#[test]
fn a_qcow2_image_keeps_what_was_flushed_and_stays_sound() {
    let (folder, path) = formats::image(BLOCKS * DISTANCE, &[]);
    let file = path.to_str().unwrap().to_owned();
    let service = formats::service(folder, &path, &["--format", "qcow2"]);
    survives(service, &["--blk-file", &file, "--format", "qcow2"].map(str::to_owned));
}
