//! What a server does with a client that breaks the rules: it ends the connection, or refuses; never hangs or panics.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use proptest::prelude::*;

use super::super::wire::*;
use super::super::*;
use super::{DEADLINE, Memory, pair, serve};

/// A message with this payload.
fn message(command: u16, kind: Kind, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + payload.len()).unwrap();
    let mut bytes = Header { id: 7, command, size, kind }.encode().to_vec();
    bytes.extend(payload);
    bytes
}

fn version() -> Vec<u8> {
    message(1, Kind::Command, &Version { major: 0, minor: 0 }.encode())
}

fn send_with(stream: &UnixStream, bytes: &[u8], count: usize) {
    let file = std::fs::File::open("/dev/null").unwrap();
    let numbers = vec![file.as_raw_fd(); count];
    let rights = [ControlMessage::ScmRights(&numbers)];
    let parts = [std::io::IoSlice::new(bytes)];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
}

/// Sends `bytes` after a good VERSION (if asked), closes, and returns how the server ended.
fn outcome(negotiate: bool, bytes: &[u8], descriptors: usize) -> Result<(), ServerError> {
    let (mut client, theirs) = pair();
    let (device, _told) = Memory::new(0);
    let server = serve(theirs.into(), device);
    if negotiate {
        client.write_all(&version()).unwrap();
    }
    if descriptors > 0 {
        send_with(&client, bytes, descriptors);
    } else {
        let _ = client.write_all(bytes);
    }
    let _ = client.shutdown(std::net::Shutdown::Write);
    let _ = client.read_to_end(&mut Vec::new());
    server.join().unwrap()
}

fn field(result: Result<(), ServerError>) -> &'static str {
    match result.unwrap_err().fault {
        Fault::Message(DecodeError::Value { field, .. } | DecodeError::Short { field, .. })
        | Fault::Unexpected { field, .. } => field,
        Fault::Descriptors { .. } => "descriptors",
        Fault::Capabilities(_) => "capabilities",
        Fault::Closed => "closed",
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_message_before_version_ends_the_connection() {
    assert_eq!(field(outcome(false, &message(13, Kind::Command, &[]), 0)), "command");
}

#[test]
fn a_second_version_ends_the_connection() {
    assert_eq!(field(outcome(true, &version(), 0)), "command");
}

#[test]
fn another_major_version_ends_the_connection() {
    let other = message(1, Kind::Command, &Version { major: 1, minor: 0 }.encode());
    assert_eq!(field(outcome(false, &other, 0)), "version major");
}

#[test]
fn version_data_that_is_not_json_ends_the_connection() {
    assert_eq!(field(outcome(false, &message(1, Kind::Command, b"\0\0\0\0nonsense\0"), 0)), "capabilities");
}

#[test]
fn messages_of_the_wrong_size_end_the_connection() {
    for command in [4, 5, 7, 8, 9, 13] {
        for size in [1, 3, 15, 17, 40] {
            let result = outcome(true, &message(command, Kind::Command, &vec![0; size]), 0);
            assert!(result.is_err(), "command {command} with {size} bytes");
        }
    }
    let mut huge = message(9, Kind::Command, &[]);
    huge[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert_eq!(field(outcome(true, &huge, 0)), "message size");
}

#[test]
fn a_count_that_differs_from_the_data_ends_the_connection() {
    let access = RegionAccess { offset: 0, region: 0, count: 2 }.encode();
    for data in [&[][..], &[1], &[1, 2, 3]] {
        let write = message(10, Kind::Posted, &[&access, data].concat());
        assert_eq!(field(outcome(true, &write, 0)), "count");
    }
    let access = RegionAccess { offset: 0, region: 0, count: 4097 }.encode();
    assert_eq!(field(outcome(true, &message(9, Kind::Command, &access), 0)), "count");
}

#[test]
fn replies_and_posted_questions_end_the_connection() {
    let access = RegionAccess { offset: 0, region: 0, count: 1 }.encode();
    for kind in [Kind::Reply, Kind::ErrorReply(1), Kind::Posted] {
        assert_eq!(field(outcome(true, &message(9, kind, &access), 0)), "flags", "{kind:?}");
    }
}

#[test]
fn descriptors_where_none_belong_end_the_connection() {
    let access = RegionAccess { offset: 0, region: 0, count: 1 }.encode();
    assert_eq!(field(outcome(true, &message(9, Kind::Command, &access), 1)), "descriptors");
    assert_eq!(field(outcome(false, &version(), 1)), "descriptors");
    let none = IrqSet { flags: IrqSet::DATA_NONE | IrqSet::ACTION_TRIGGER, ..IrqSet::default() };
    assert_eq!(field(outcome(true, &message(8, Kind::Command, &none.encode()), 1)), "descriptors");
    let one = IrqSet { flags: IrqSet::DATA_EVENTFD | IrqSet::ACTION_TRIGGER, count: 1, ..none };
    assert_eq!(field(outcome(true, &message(8, Kind::Command, &one.encode()), 2)), "descriptors");
    assert_eq!(field(outcome(true, &message(8, Kind::Command, &one.encode()), 60)), "descriptors");
}

#[test]
fn a_message_that_is_cut_off_by_the_end_is_reported() {
    assert_eq!(field(outcome(true, &message(9, Kind::Command, &[0; 16])[..20], 0)), "closed");
    assert_eq!(field(outcome(false, &[1, 0, 0], 0)), "closed");
}

#[test]
fn an_unknown_command_is_refused_and_its_descriptors_are_closed() {
    let (mut client, theirs) = pair();
    let (device, _told) = Memory::new(0);
    let server = serve(theirs.into(), device);
    client.write_all(&version()).unwrap();
    let mut reply = [0; 16];
    client.read_exact(&mut reply).unwrap();
    let size = Header::decode(&reply).unwrap().payload_size();
    client.read_exact(&mut vec![0; size]).unwrap();
    // DMA_MAP, as a client with memory to share sends it.
    send_with(&client, &message(2, Kind::Command, &[0; 32]), 1);
    client.read_exact(&mut reply).unwrap();
    assert_eq!(Header::decode(&reply).unwrap().kind, Kind::ErrorReply(95));
    drop(client);
    assert_eq!(server.join().unwrap(), Ok(()));
}

#[test]
fn descriptors_go_to_their_message_in_a_batch() {
    let (client, theirs) = pair();
    let (device, told) = Memory::new(0);
    let set = IrqSet { flags: IrqSet::DATA_EVENTFD | IrqSet::ACTION_TRIGGER, count: 1, ..IrqSet::default() };
    let access = RegionAccess { offset: 1, region: 0, count: 1 }.encode();
    let posted = message(10, Kind::Posted, &[&access[..], &[9]].concat());
    // All of it is there before the server looks, so that it comes in as few pieces as the kernel makes of it.
    (&client).write_all(&version()).unwrap();
    (&client).write_all(&posted).unwrap();
    send_with(&client, &message(8, Kind::Posted, &set.encode()), 1);
    (&client).write_all(&posted).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(serve(theirs.into(), device).join().unwrap(), Ok(()));
    let told: Vec<_> = told.iter().collect();
    assert_eq!(
        told,
        [super::Told::Wrote(1, vec![9]), super::Told::Irq(true), super::Told::Wrote(1, vec![9])]
    );
}

#[test]
fn a_client_that_does_not_read_is_dropped_at_the_deadline() {
    let (client, theirs) = pair();
    let (device, _told) = Memory::new(0);
    let server = serve(theirs.into(), device);
    (&client).write_all(&version()).unwrap();
    client.set_write_timeout(Some(DEADLINE * 10)).unwrap();
    let read = message(9, Kind::Command, &RegionAccess { offset: 0, region: 0, count: 4096 }.encode());
    while (&client).write_all(&read).is_ok() {}
    assert_eq!(server.join().unwrap().unwrap_err().fault, Fault::Deadline(DEADLINE));
    assert!(client.as_fd().as_raw_fd() > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn random_messages_never_panic_or_hang(
        messages in proptest::collection::vec((0_u16..16, 0_usize..2, proptest::collection::vec(any::<u8>(), 0..48)), 0..8)
    ) {
        let bytes: Vec<u8> = messages
            .iter()
            .flat_map(|(command, kind, payload)| {
                message(*command, [Kind::Command, Kind::Posted][*kind], payload)
            })
            .collect();
        let _ = outcome(true, &bytes, 0);
    }
}
