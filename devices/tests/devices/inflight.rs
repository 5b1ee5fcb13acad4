//! Requests survive the process that worked on them.

use crate::driver::header;
use crate::driver::{BUFFERS, Driver, SIZE, Service};

const HEADER: u64 = 0xf0_0000;
const STATUS: u64 = 0xe0_0000;
const REQUESTS: u64 = 32;

/// Starts 1 MiB writes, kills the process in their midst; returns how many it had taken and not finished.
fn kill_in_midst(service: &mut Service, delay_us: u64) -> u16 {
    let mut driver = Driver::unstarted(service.connect(), 1);
    driver.set_up(0, u64::MAX);
    let memory = driver.frontend.get_inflight(1, SIZE).unwrap().unwrap();
    driver.start(Some(&memory));
    for index in 0..REQUESTS {
        driver.put(BUFFERS + (index << 20), &vec![u8::try_from(index + 1).unwrap(); 1 << 20]);
        driver.put(HEADER + index * 16, &header(1, index * 2048));
        driver.put(STATUS + index, &[0xff]);
        let buffers = [
            (HEADER + index * 16, 16, false),
            (BUFFERS + (index << 20), 1 << 20, false),
            (STATUS + index, 1, true),
        ];
        driver.queues[0].submit(&driver.ram, &buffers);
    }
    driver.queues[0].kick();
    std::thread::sleep(std::time::Duration::from_micros(delay_us));
    service.child.kill().unwrap();
    service.child.wait().unwrap();

    let before = driver.queues[0].last_used;
    let used: u16 = {
        use vm_memory::{Bytes, GuestAddress};
        let at = driver.queues[0].addresses().used + 2;
        driver.ram.memory().read_obj(GuestAddress(at)).unwrap()
    };
    let unfinished = u16::try_from(REQUESTS).unwrap() - used.wrapping_sub(before);
    let disk = service.disk_path();
    let arguments = ["--blk-file".to_owned(), disk.to_str().unwrap().to_owned()];
    let _ = std::fs::remove_file(&service.socket);
    service.child = Service::spawn("blk", &service.socket, &arguments);

    let Driver { ram, queues, .. } = driver;
    let mut driver = Driver::unstarted(service.connect(), 0);
    driver.ram = ram;
    driver.queues = queues;
    driver.set_up(0, u64::MAX);
    // A base that is wrong: what the in-flight memory says must win.
    driver.start(Some(&memory));
    driver.queues[0].kick();
    let ram = driver.ram.clone();
    let mut heads = Vec::new();
    for _ in 0..REQUESTS {
        heads.push(driver.queues[0].wait(&ram).0);
    }
    heads.sort_unstable();
    heads.dedup();
    assert_eq!(heads.len() as u64, REQUESTS, "each request is finished once");
    assert!(driver.queues[0].finished(&ram).is_none());
    for index in 0..REQUESTS {
        assert_eq!(driver.get(STATUS + index, 1), [0]);
    }
    let disk = std::fs::read(service.disk_path()).unwrap();
    for index in 0..REQUESTS {
        let at = usize::try_from(index << 20).unwrap();
        assert!(disk[at..at + (1 << 20)].iter().all(|byte| u64::from(*byte) == index + 1));
    }
    unfinished
}

#[test]
fn requests_in_flight_when_the_process_dies_are_repeated_and_finished_once() {
    let mut service = Service::disk(REQUESTS << 20, &[]);
    let mut hit = 0;
    for attempt in 0..40 {
        let unfinished = kill_in_midst(&mut service, 200 + attempt * 400);
        hit += u32::from(unfinished > 0 && u64::from(unfinished) <= REQUESTS);
        if hit >= 4 {
            return;
        }
    }
    panic!("the process never died with requests in flight");
}
