//! Messages that are wrong, early, late or unknown; and the dirty log.

use std::os::fd::AsFd;
use std::time::Duration;

use bulkhead_ipc::vhost_user::connection::{Connection, Kind};
use bulkhead_ipc::vhost_user::deadline::Deadline;
use bulkhead_ipc::vhost_user::message::{FrontendReq, VHOST_F_LOG_ALL};
use memfd::MemfdOptions;

use crate::driver::header;
use crate::driver::{BUFFERS, Driver, RAM, Service};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

struct Raw(Connection);

impl Raw {
    fn send(&self, request: FrontendReq, kind: Kind, payload: &[u8]) {
        self.0.send(request as u32, kind, payload, &[], soon()).unwrap();
    }

    fn answer(&self, request: FrontendReq) -> Vec<u8> {
        let message = self.0.receive(soon()).unwrap();
        assert_eq!((message.request, message.kind), (request as u32, Kind::Reply));
        message.payload
    }

    /// Sends with NEED_REPLY; returns whether it was accepted.
    fn accepted(&self, request: FrontendReq, payload: &[u8]) -> bool {
        self.send(request, Kind::RequestNeedingReply, payload);
        self.answer(request) == 0u64.to_ne_bytes()
    }
}

fn vring(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

#[test]
fn bad_messages_are_refused_and_the_connection_goes_on() {
    let service = Service::disk(1 << 20, &[]);
    let raw = Raw(service.connect().into());
    // Before anything is negotiated: enable a queue that was never set up, as QEMU does.
    raw.send(FrontendReq::SET_VRING_ENABLE, Kind::Request, &vring(0, 1));
    raw.send(FrontendReq::SET_PROTOCOL_FEATURES, Kind::Request, &(1u64 << 3 | 1 << 9).to_ne_bytes());

    let refused: [(FrontendReq, Vec<u8>); 14] = [
        (FrontendReq::SET_FEATURES, u64::MAX.to_ne_bytes().to_vec()),
        (FrontendReq::SET_FEATURES, vec![0; 7]),
        (FrontendReq::SET_PROTOCOL_FEATURES, u64::MAX.to_ne_bytes().to_vec()),
        (FrontendReq::SET_VRING_NUM, vring(1, 128)),
        (FrontendReq::SET_VRING_NUM, vring(0, 0)),
        (FrontendReq::SET_VRING_NUM, vring(0, 100)),
        (FrontendReq::SET_VRING_NUM, vring(0, 65536)),
        (FrontendReq::SET_VRING_BASE, vring(0, 65536)),
        (FrontendReq::SET_VRING_ENABLE, vring(7, 1)),
        (FrontendReq::SET_VRING_KICK, 0u64.to_ne_bytes().to_vec()),
        (FrontendReq::SET_MEM_TABLE, vec![1, 0, 0, 0, 0, 0, 0, 0]),
        (FrontendReq::SET_CONFIG, vec![0; 13]),
        (FrontendReq::IOTLB_MSG, vec![0; 40]),
        (FrontendReq::SET_VRING_ADDR, vec![1; 40]),
    ];
    for (request, payload) in refused {
        assert!(!raw.accepted(request, &payload), "{request:?} {payload:?}");
    }
    raw.0.send(9999, Kind::RequestNeedingReply, &[], &[], soon()).unwrap();
    assert_ne!(raw.0.receive(soon()).unwrap().payload, 0u64.to_ne_bytes());

    // What must be answered is answered, even when it cannot be done.
    raw.send(FrontendReq::GET_VRING_BASE, Kind::Request, &vring(5, 0));
    raw.answer(FrontendReq::GET_VRING_BASE);
    raw.send(FrontendReq::GET_CONFIG, Kind::Request, &[0xff; 12]);
    assert!(raw.answer(FrontendReq::GET_CONFIG).is_empty());
    raw.send(FrontendReq::GET_VRING_BASE, Kind::Request, &vring(0, 0));
    assert_eq!(raw.answer(FrontendReq::GET_VRING_BASE), vring(0, 0));
    assert!(raw.accepted(FrontendReq::SET_OWNER, &[]), "SET_OWNER may come late");
    assert!(raw.accepted(FrontendReq::SET_VRING_ENABLE, &vring(0, 1)));
    raw.send(FrontendReq::GET_FEATURES, Kind::Request, &[]);
    assert_eq!(raw.answer(FrontendReq::GET_FEATURES).len(), 8);
}

#[test]
fn the_dirty_log_has_the_pages_that_were_written_and_no_others() {
    let service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    let pages = RAM / 4096;
    let log = MemfdOptions::default().create("log").unwrap().into_file();
    log.set_len(pages / 8).unwrap();
    let dirty = || -> Vec<u64> {
        use std::os::unix::fs::FileExt;
        let mut bits = vec![0; usize::try_from(pages / 8).unwrap()];
        log.read_exact_at(&mut bits, 0).unwrap();
        log.write_all_at(&vec![0; bits.len()], 0).unwrap();
        (0..pages).filter(|page| bits[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1).collect()
    };
    let read = |driver: &mut Driver| {
        driver.put(0xf0_0000, &header(0, 0));
        driver.run(0, &[(0xf0_0000, 16, false), (BUFFERS + 100, 8192, true), (BUFFERS + 0x10_0000, 1, true)]);
    };
    let features = driver.frontend.features().unwrap();
    driver.frontend.set_log_base(pages / 8, 0, log.as_fd()).unwrap();
    read(&mut driver);
    assert!(dirty().is_empty(), "LOG_ALL is not on yet");

    driver.frontend.set_features(features | VHOST_F_LOG_ALL).unwrap();
    let addresses = driver.queues[0].addresses();
    driver.frontend.set_vring_addr(0, &addresses, Some(addresses.used)).unwrap();
    read(&mut driver);
    let first = BUFFERS / 4096;
    let expected = [addresses.used / 4096, first, first + 1, first + 2, first + 256];
    assert_eq!(dirty(), expected);

    driver.frontend.set_features(features).unwrap();
    // Once this is answered the change is made; until then the queue's thread may have said once more how far it has looked.
    driver.frontend.features().unwrap();
    dirty();
    read(&mut driver);
    assert!(dirty().is_empty(), "LOG_ALL is off again");
}

#[test]
fn memory_may_change_under_a_running_ring() {
    let service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    let extra = bulkhead_ipc::memory::GuestRam::create(1 << 20).unwrap();
    let regions = |with_extra: bool, driver: &mut Driver| {
        let ram = driver.ram.clone();
        let mut regions: Vec<_> = ram.regions().map(|region| (region.guest_address, region)).collect();
        if with_extra {
            regions.extend(extra.regions().map(|region| (RAM, region)));
        }
        let regions: Vec<_> = regions
            .into_iter()
            .map(|(guest_address, region)| bulkhead_ipc::vhost_user::frontend::MemoryRegion {
                guest_address,
                size: region.size,
                offset: region.offset,
                file: region.fd,
            })
            .collect();
        driver.frontend.set_memory(&regions).unwrap();
    };
    let run = |driver: &mut Driver, address| {
        driver.put(0xf0_0000, &header(0, 0));
        driver.run(0, &[(0xf0_0000, 16, false), (address, 512, true), (BUFFERS, 1, true)]);
    };
    run(&mut driver, BUFFERS + 4096);
    regions(true, &mut driver);
    run(&mut driver, RAM);
    regions(false, &mut driver);
    run(&mut driver, BUFFERS + 4096);
}

#[test]
fn a_reset_device_can_be_started_again() {
    let service = Service::disk(1 << 20, &[]);
    let mut driver = Driver::new(service.connect(), 1);
    driver.frontend.set_status(0xf).unwrap();
    assert_eq!(driver.frontend.get_status().unwrap(), 0xf);
    driver.frontend.reset_device().unwrap();
    assert_eq!(driver.frontend.get_status().unwrap(), 0);
    driver.start(None);
    driver.put(0xf0_0000, &header(0, 0));
    driver.run(0, &[(0xf0_0000, 16, false), (BUFFERS, 512, true), (BUFFERS + 512, 1, true)]);
}
