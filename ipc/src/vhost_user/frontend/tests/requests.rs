//! What goes over the wire when all is well.

use std::fs::File;

use super::*;
use crate::vhost_user::message::VRING_NO_FD;

fn memory_file(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

fn sealed_memory(size: u64) -> File {
    let file = memfd::MemfdOptions::new().allow_sealing(true).create("memory").unwrap();
    file.as_file().set_len(size).unwrap();
    file.add_seals(&[memfd::FileSeal::SealShrink]).unwrap();
    file.into_file()
}

#[test]
fn negotiation_takes_what_both_sides_know() {
    let (mut frontend, peer) = with_peer(LONG, good_peer);
    frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).unwrap();
    assert_eq!(frontend.offered_features(), FEATURES);
    assert_eq!(frontend.protocol_features(), SUPPORTED_PROTOCOL_FEATURES);
    assert_eq!(frontend.max_queues(), 4);
    drop(frontend);
    let seen = requests(&peer.join().unwrap());
    assert_eq!(
        seen,
        [
            FrontendReq::GET_FEATURES,
            FrontendReq::GET_PROTOCOL_FEATURES,
            FrontendReq::SET_PROTOCOL_FEATURES,
            FrontendReq::SET_OWNER,
            FrontendReq::GET_QUEUE_NUM,
            FrontendReq::GET_MAX_MEM_SLOTS,
        ]
    );
}

#[test]
fn every_request_reaches_a_good_peer() {
    let (mut frontend, peer) = with_peer(LONG, good_peer);
    frontend.negotiate(SUPPORTED_PROTOCOL_FEATURES).unwrap();
    let file = memory_file(0x1000);
    let ring = RingAddresses { descriptors: 0x1000, available: 0x2000, used: 0x3000 };
    frontend.set_features(1 << 32 | 1 << 30).unwrap();
    frontend.set_vring_num(1, 256).unwrap();
    frontend.set_vring_base(1, 5).unwrap();
    frontend.set_vring_addr(1, &ring, Some(0x3000)).unwrap();
    frontend.set_vring_kick(1, file.as_fd()).unwrap();
    frontend.set_vring_call(1, None).unwrap();
    frontend.set_vring_err(1, file.as_fd()).unwrap();
    frontend.set_vring_enable(1, true).unwrap();
    assert_eq!(frontend.get_vring_base(1).unwrap(), 77);
    let mut config = [0; 8];
    frontend.get_config(4, &mut config).unwrap();
    assert_eq!(config, [0xAB; 8]);
    frontend.set_config(4, &[1, 2]).unwrap();
    frontend.set_status(15).unwrap();
    assert_eq!(frontend.get_status().unwrap(), 15);
    frontend.reset_device().unwrap();
    assert_eq!(frontend.features(), Some(1 << 32 | 1 << 30));
    drop(frontend);

    let seen = peer.join().unwrap();
    let of =
        |request: FrontendReq| seen.iter().find(|message| message.request == u32::from(request)).unwrap();
    let addr: Vec<u8> = [1u32, 1]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain([0x1000u64, 0x3000, 0x2000, 0x3000].iter().flat_map(|word| word.to_le_bytes()))
        .collect();
    assert_eq!(of(FrontendReq::SET_VRING_ADDR).payload, addr);
    assert_eq!(of(FrontendReq::SET_VRING_KICK).descriptors.len(), 1);
    assert_eq!(of(FrontendReq::SET_VRING_KICK).payload, 1u64.to_le_bytes());
    assert_eq!(of(FrontendReq::SET_VRING_CALL).payload, (1 | VRING_NO_FD).to_le_bytes());
    assert_eq!(of(FrontendReq::SET_VRING_CALL).descriptors.len(), 0);
    assert_eq!(&of(FrontendReq::SET_CONFIG).payload[12..], [1, 2]);
}

#[test]
fn memory_slots_carry_only_the_difference_and_guest_addresses() {
    let (frontend, peer) = with_peer(LONG, good_peer);
    let mut frontend = negotiated(frontend, ALL);
    let file = memory_file(0x10000);
    let region =
        |guest_address| MemoryRegion { guest_address, size: 0x1000, offset: 0x2000, file: file.as_fd() };
    frontend.set_memory(&[region(0), region(0x10000)]).unwrap();
    frontend.set_memory(&[region(0), region(0x10000)]).unwrap();
    frontend.set_memory(&[region(0x10000), region(0x20000)]).unwrap();
    drop(frontend);
    let seen = peer.join().unwrap();
    let (add, remove) = (FrontendReq::ADD_MEM_REG, FrontendReq::REM_MEM_REG);
    assert_eq!(requests(&seen), [add, add, remove, add]);
    let fields: Vec<u64> =
        seen[1].payload.chunks(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap())).collect();
    // padding, guest-physical address, size, user address, offset
    assert_eq!(fields, [0, 0x10000, 0x1000, 0x10000, 0x2000]);
    let descriptors: Vec<usize> = seen.iter().map(|message| message.descriptors.len()).collect();
    assert_eq!(descriptors, [1, 1, 0, 1]);
}

#[test]
fn without_slots_the_whole_table_goes_in_one_message() {
    let (frontend, peer) = with_peer(LONG, good_peer);
    let mut frontend = negotiated(frontend, 0);
    let file = memory_file(0x10000);
    let region = |guest_address| MemoryRegion { guest_address, size: 0x1000, offset: 0, file: file.as_fd() };
    frontend.set_memory(&[region(0), region(0x10000)]).unwrap();
    frontend.set_memory(&[region(0), region(0x10000)]).unwrap();
    let many = vec![region(0); 33];
    let error = frontend.set_memory(&many).unwrap_err();
    assert!(matches!(error.problem, Problem::Parameter { value: 33, .. }));
    assert!(!frontend.is_broken());
    drop(frontend);
    let seen = peer.join().unwrap();
    assert_eq!(requests(&seen), [FrontendReq::SET_MEM_TABLE]);
    assert_eq!(seen[0].descriptors.len(), 2);
    assert_eq!(seen[0].payload.len(), 8 + 2 * 32);
}

#[test]
fn set_log_base_takes_any_answer_that_real_peers_give() {
    for size in [0, 8, 16] {
        let (frontend, peer) = with_peer(LONG, move |connection| {
            let message = connection.receive(Deadline::after(LONG)).unwrap();
            assert_eq!((message.payload.len(), message.descriptors.len()), (16, 1));
            reply(&connection, FrontendReq::SET_LOG_BASE, &vec![0xFF; size]);
        });
        let mut frontend = negotiated(frontend, ALL);
        let file = memory_file(0x1000);
        frontend.set_log_base(0x1000, 0, file.as_fd()).unwrap();
        peer.join().unwrap();
    }
}

#[test]
fn in_flight_memory_must_lie_in_its_file() {
    let ask = |size: u64, offset: u64, file_size: Option<u64>| {
        let (frontend, peer) = with_peer(LONG, move |connection| {
            connection.receive(Deadline::after(LONG)).unwrap();
            let mut payload = [size, offset].map(u64::to_le_bytes).concat();
            payload.extend([2, 0, 0, 1, 0, 0, 0, 0]);
            let file = file_size.map(sealed_memory);
            let fds: Vec<BorrowedFd<'_>> = file.iter().map(AsFd::as_fd).collect();
            let request = FrontendReq::GET_INFLIGHT_FD.into();
            connection.send(request, Kind::Reply, &payload, &fds, Deadline::after(LONG)).unwrap();
        });
        let result = negotiated(frontend, ALL).get_inflight(2, 256);
        peer.join().unwrap();
        result
    };
    let memory = ask(0x2000, 0x1000, Some(0x3000)).unwrap().unwrap();
    assert_eq!((memory.size, memory.offset, memory.queues, memory.queue_size), (0x2000, 0x1000, 2, 256));
    assert!(ask(0, 0, None).unwrap().is_none());
    assert!(ask(0, 0, Some(0x1000)).unwrap().is_none());
    for (size, offset, file) in [
        (0x2000, 0x1000, Some(0x2FFF)),
        (0x2000, u64::MAX, Some(0x3000)),
        (0x2000, 0, None),
        (u64::MAX, 0, Some(0x1000)),
        (1 << 40, 0, Some(1 << 40)),
    ] {
        assert!(matches!(ask(size, offset, file).unwrap_err().problem, Problem::Reply { .. }));
    }
}

#[test]
fn what_is_not_negotiated_is_not_sent() {
    let (frontend, peer) = with_peer(LONG, good_peer);
    let mut frontend = negotiated(frontend, 0);
    let refused = |result: Result<(), FrontendError>| {
        assert!(matches!(result.unwrap_err().problem, Problem::NotNegotiated(_)));
    };
    refused(frontend.get_config(0, &mut [0]));
    refused(frontend.set_config(0, &[0]));
    refused(frontend.set_status(0));
    refused(frontend.get_status().map(drop));
    refused(frontend.reset_device());
    refused(frontend.get_inflight(1, 1).map(drop));
    refused(frontend.open_backend_requests().map(drop));
    let file = memory_file(1);
    refused(frontend.set_log_base(1, 0, file.as_fd()));
    let error = frontend.set_features(1).unwrap_err();
    assert!(matches!(error.problem, Problem::Parameter { value: 1, .. }));
    let error = frontend.set_vring_call(256, None).unwrap_err();
    assert!(matches!(error.problem, Problem::Parameter { value: 256, .. }));
    assert!(!frontend.is_broken());
    drop(frontend);
    assert!(peer.join().unwrap().is_empty());
}
