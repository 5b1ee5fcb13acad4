use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use crate::driver::{
    BUFFERS, Driver, EVENT_IDX, INDIRECT, INDIRECT_DESC, PROGRAM, Random, SIZE, Service, header,
    put_descriptor,
};

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
pub const STATUS: u64 = 0xe0_0000;
pub const HEADER: u64 = 0xf0_0000;

/// Runs a request with its data in one buffer; returns the status.
pub fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u8 {
    driver.put(HEADER, &header(kind, sector));
    driver.put(STATUS, &[0xff]);
    let mut buffers = vec![(HEADER, 16, false)];
    buffers.extend_from_slice(data);
    buffers.push((STATUS, 1, true));
    driver.run(0, &buffers);
    driver.get(STATUS, 1)[0]
}

pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// One request of each lane at a time, on its own part of the disk.
struct Lane {
    model: Vec<u8>,
    buffer: u64,
    extent: (usize, usize),
    writes: bool,
}

const LANES: usize = 32;
const LANE_BYTES: usize = 2 << 20;
const LONGEST: usize = 1 << 20;

fn submit(driver: &mut Driver, queue: usize, lane: usize, state: &mut Lane, random: &mut Random) {
    let longest = if random.below(8) == 0 { LONGEST } else { 65536 };
    let len = (1 + usize::try_from(random.below(longest as u64 / 512)).unwrap()) * 512;
    let at = usize::try_from(random.below(((LANE_BYTES - len) / 512) as u64 + 1)).unwrap() * 512;
    state.extent = (at, len);
    state.writes = random.below(2) == 0;
    state.buffer = BUFFERS + (lane * 2 * LONGEST) as u64 + random.below(512);
    let kind = if state.writes { WRITE } else { READ };
    if state.writes {
        let seed = random.below(256);
        for (index, byte) in state.model[at..at + len].iter_mut().enumerate() {
            *byte = ((index as u64 * 31 + seed) >> 2).to_le_bytes()[0];
        }
        driver.put(state.buffer, &state.model[at..at + len]);
    }
    let header_at = HEADER + lane as u64 * 16;
    driver.put(header_at, &header(kind, ((lane * LANE_BYTES + at) / 512) as u64));
    let status = STATUS + lane as u64;
    driver.put(status, &[0xff]);
    // Any layout: the header in two parts, the data in up to three, the status with the last of the data.
    let mut buffers = vec![(header_at, 5, false), (header_at + 5, 11, false)];
    let first = random.below(len as u64 - 1) as u32 + 1;
    buffers.push((state.buffer, first, !state.writes));
    buffers.push((state.buffer + u64::from(first), len as u32 - first, !state.writes));
    buffers.retain(|buffer| buffer.1 > 0);
    buffers.push((status, 1, true));
    driver.queues[queue].submit(&driver.ram, &buffers);
}

/// Bytes of a disk for [`move_randomly`].
pub const RANDOM_DISK: u64 = (LANES * LANE_BYTES) as u64;

fn random_io(queues: u16, features: u64, rounds: usize) {
    let service = Service::disk(RANDOM_DISK, &["--num-queues", &queues.to_string()]);
    let expected = move_randomly(&service, queues, features, rounds, 0);
    assert!(std::fs::read(service.disk_path()).unwrap() == expected, "wrong bytes were written");
}

/// Random reads and writes on a disk that is full of `filling`; returns what must be on it then.
pub fn move_randomly(service: &Service, queues: u16, features: u64, rounds: usize, filling: u8) -> Vec<u8> {
    let mut driver = Driver::with(service.connect(), queues, features);
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut lanes: Vec<Lane> = (0..LANES)
        .map(|_| Lane { model: vec![filling; LANE_BYTES], buffer: 0, extent: (0, 0), writes: false })
        .collect();
    for _ in 0..rounds {
        for (index, lane) in lanes.iter_mut().enumerate() {
            submit(&mut driver, index % usize::from(queues), index, lane, &mut random);
        }
        driver.queues.iter().for_each(|queue| queue.kick());
        for index in 0..LANES {
            let queue = index % usize::from(queues);
            let ram = driver.ram.clone();
            driver.queues[queue].wait(&ram);
        }
        for (index, lane) in lanes.iter().enumerate() {
            assert_eq!(driver.get(STATUS + index as u64, 1), [OK]);
            let (at, len) = lane.extent;
            if !lane.writes {
                assert!(
                    driver.get(lane.buffer, len) == lane.model[at..at + len],
                    "lane {index} read wrong bytes"
                );
            }
        }
    }
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
    lanes.into_iter().flat_map(|lane| lane.model).collect()
}

#[test]
fn random_requests_of_all_sizes_at_depth_32_move_the_right_bytes() {
    random_io(1, EVENT_IDX | INDIRECT_DESC, 24);
}

#[test]
fn four_queues_serve_one_disk() {
    random_io(4, EVENT_IDX | INDIRECT_DESC, 8);
}

#[test]
fn drivers_without_event_idx_are_interrupted_too() {
    random_io(2, 0, 8);
}

#[test]
fn indirect_descriptors_are_followed() {
    let service = Service::disk(1 << 20, &[]);
    service.write_disk(&[7; 1 << 20]);
    let mut driver = Driver::new(service.connect(), 1);
    driver.put(HEADER, &header(READ, 1));
    let table = HEADER + 4096;
    put_descriptor(&driver.ram, table, (HEADER, 16, 1, 1));
    put_descriptor(&driver.ram, table + 16, (BUFFERS, 4096, 3, 2));
    put_descriptor(&driver.ram, table + 32, (STATUS, 1, 2, 0));
    driver.queues[0].descriptor(&driver.ram, 9, (table, 48, INDIRECT, 0));
    driver.queues[0].offer(&driver.ram, 9);
    driver.queues[0].kick();
    let ram = driver.ram.clone();
    assert_eq!(driver.queues[0].wait(&ram), (9, 4097));
    assert_eq!(driver.get(BUFFERS, 4096), vec![7; 4096]);
    assert_eq!(driver.get(STATUS, 1), [OK]);
}

#[test]
fn requests_that_make_no_sense_fail_and_the_next_works() {
    let service = Service::disk(1 << 20, &["--serial", "serial-1"]);
    let mut driver = Driver::new(service.connect(), 1);
    let write = [(BUFFERS, 512, false)];
    let read = [(BUFFERS, 1024, true)];
    assert_eq!(request(&mut driver, READ, 2047, &read), IOERR, "beyond the end");
    assert_eq!(request(&mut driver, WRITE, 2048, &write), IOERR, "at the end");
    assert_eq!(request(&mut driver, READ, u64::MAX, &read), IOERR, "far beyond");
    assert_eq!(request(&mut driver, WRITE, 1 << 54, &write), IOERR, "so far that bytes overflow");
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 511, true)]), IOERR, "not whole sectors");
    assert_eq!(request(&mut driver, READ, 2048, &[]), OK, "nothing, at the end");
    assert_eq!(request(&mut driver, 99, 0, &write), UNSUPP);
    assert_eq!(request(&mut driver, 99, 0, &read), UNSUPP);
    assert_eq!(request(&mut driver, GET_ID, 0, &[(BUFFERS, 20, true)]), OK);
    assert_eq!(&driver.get(BUFFERS, 20)[..9], b"serial-1\0");
    assert_eq!(request(&mut driver, READ, 2046, &read), OK);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let service = Service::disk(1 << 20, &["--read-only"]);
    let mut driver = Driver::new(service.connect(), 1);
    assert_ne!(driver.frontend.offered_features() & (1 << 5), 0);
    assert_eq!(driver.frontend.offered_features() & (1 << 13 | 1 << 14), 0);
    assert_eq!(request(&mut driver, WRITE, 0, &[(BUFFERS, 512, false)]), IOERR);
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 16, false)]), IOERR);
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 512, true)]), OK);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
}

#[test]
fn discard_gives_space_back_and_write_zeroes_writes_zero() {
    let service = Service::disk(4 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    // Not truncated: the device has the image open and knows its size.
    let mut disk = std::fs::File::options().write(true).open(service.disk_path()).unwrap();
    disk.write_all(&vec![0x55; 4 << 20]).unwrap();
    let blocks = || std::fs::metadata(service.disk_path()).unwrap().blocks();
    let before = blocks();

    driver.put(BUFFERS, &[range(0, 2048, 0), range(0, 0, 0)].concat());
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 32, false)]), OK);
    assert!(blocks() < before, "the file still has {} of {before} blocks", blocks());

    driver.put(BUFFERS, &[range(2048, 2048, 1), range(4097, 3, 0)].concat());
    assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &[(BUFFERS, 32, false)]), OK);
    let disk = std::fs::read(service.disk_path()).unwrap();
    assert_eq!(disk.len(), 4 << 20);
    assert!(disk[..4096 * 512].iter().all(|byte| *byte == 0));
    let after = 4097 * 512;
    assert!(disk[after - 512..after].iter().all(|byte| *byte == 0x55));
    assert!(disk[after..after + 3 * 512].iter().all(|byte| *byte == 0));
    assert!(disk[after + 3 * 512..].iter().all(|byte| *byte == 0x55));

    for (bytes, status) in [
        (range(8192, 1, 0), IOERR),
        (range(u64::MAX, 1, 0), IOERR),
        (range(0, u32::MAX, 0), IOERR),
        (range(0, 1, 2), UNSUPP),
    ] {
        driver.put(BUFFERS, &bytes);
        assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &[(BUFFERS, 16, false)]), status);
    }
    driver.put(BUFFERS, &range(0, 1, 1));
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 16, false)]), UNSUPP, "discard with unmap");
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 15, false)]), IOERR, "half a range");
    assert_eq!(request(&mut driver, DISCARD, 0, &[]), IOERR, "no range");
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let service = Service::disk(4 << 20, &["--num-queues", "3", "--block-size", "4096"]);
    let mut driver = Driver::unstarted(service.connect(), 3);
    driver.set_up(0, u64::MAX);
    let mut space = [0xaa; 64];
    driver.frontend.get_config(0, &mut space).unwrap();
    assert_eq!(space[..8], 8192u64.to_le_bytes());
    assert_eq!(space[20..24], 4096u32.to_le_bytes());
    assert_eq!(space[32], 1, "write-back");
    assert_eq!(space[34..36], 3u16.to_le_bytes());
    assert_eq!(space[60..], [0; 4], "beyond the end");
    driver.frontend.set_config(32, &[0]).unwrap();
    driver.frontend.get_config(0, &mut space).unwrap();
    assert_eq!(space[32], 0, "write-through");
    assert!(driver.frontend.set_config(0, &[1]).is_err(), "the capacity is not the driver's");
    assert_eq!(driver.frontend.max_queues(), 3);
}

#[test]
fn a_driver_that_knows_no_flush_writes_through() {
    let service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::unstarted(service.connect(), 1);
    driver.set_up(0, !(1 << 9 | 1 << 11));
    driver.start(None);
    let mut space = [0; 33];
    driver.frontend.get_config(0, &mut space).unwrap();
    assert_eq!(space[32], 0);
    assert_eq!(request(&mut driver, WRITE, 0, &[(BUFFERS, 4096, false)]), OK);
    driver.put(BUFFERS, &range(0, 8, 0));
    assert_eq!(request(&mut driver, DISCARD, 0, &[(BUFFERS, 16, false)]), OK);
}

#[test]
fn a_full_host_disk_is_an_io_error_and_one_line_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let log = directory.path().join("log");
    let script = "mount -t tmpfs -o size=1m none /mnt && truncate -s 64M /mnt/disk && \
         exec \"$0\" blk --socket-path \"$1\" --blk-file /mnt/disk 2>\"$2\"";
    // Not as a user namespace's root: the jail needs a user that is none.
    let root = nix::unistd::geteuid().is_root();
    let rights: &[&str] = if root { &[] } else { &["--map-current-user", "--keep-caps"] };
    let child = Command::new("unshare")
        .args(rights)
        .args(["-m", "sh", "-c", script, PROGRAM])
        .args([&socket, &log])
        .spawn()
        .unwrap();
    let service = Service { child, socket, directory };
    let mut driver = Driver::new(service.connect(), 1);
    let mut statuses = Vec::new();
    for index in 0..8 {
        statuses.push(request(&mut driver, WRITE, index * 2048, &[(BUFFERS, 1 << 20, false)]));
    }
    assert_eq!(statuses.last(), Some(&IOERR), "{statuses:?}");
    assert_eq!(request(&mut driver, READ, 0, &[(BUFFERS, 4096, true)]), OK, "reads go on");
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(log.matches("the disk failed").count(), 1, "{log}");
    assert!(log.contains("No space left"), "{log}");
}

#[test]
fn a_stopped_ring_has_finished_everything_and_goes_on_where_it_was() {
    let service = Service::disk(64 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    for round in 0..10u64 {
        for index in 0..32u64 {
            let at = HEADER + index * 16;
            driver.put(at, &header(WRITE, index * 2048));
            driver.queues[0].submit(
                &driver.ram,
                &[(at, 16, false), (BUFFERS, 1 << 20, false), (STATUS + index, 1, true)],
            );
        }
        driver.queues[0].kick();
        let base = driver.frontend.get_vring_base(0).unwrap();
        let ram = driver.ram.clone();
        let mut finished = 0;
        while driver.queues[0].finished(&ram).is_some() {
            finished += 1;
        }
        let queue = &driver.queues[0];
        assert_eq!(base, queue.last_used, "round {round}: base and used ring disagree");
        driver.start(None);
        while finished < 32 {
            driver.queues[0].wait(&ram);
            finished += 1;
        }
    }
    assert!(u64::from(SIZE) < 32 * 10, "the ring wrapped");
}
