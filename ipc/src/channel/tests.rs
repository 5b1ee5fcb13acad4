//! The channel against peers that send what they like.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use proptest::prelude::*;

use super::message::*;
use super::{Channel, ChannelError, MAX_DESCRIPTORS, MAX_MESSAGE, packet};
use crate::jail::{Enforcement, PolicyName, open_descriptors};
use crate::log::LogLevel;

const SOON: Option<Duration> = Some(Duration::from_millis(500));

fn start() -> ToDevice {
    ToDevice::Start(DeviceStart {
        id: "disk0".into(),
        machine: "m".into(),
        log: LogLevel::Debug,
        enforcement: Enforcement::Supervised,
        socket: FdIndex(0),
        config: DeviceConfig::Blk(BlkConfig {
            disk: FdIndex(1),
            read_only: true,
            serial: "s".into(),
            queues: 2,
            logical_block_size: 512,
            options: BlkOptions::default(),
        }),
        metrics: None,
    })
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn raw(channel: &Channel, bytes: &[u8]) {
    send(channel.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
}

/// Tests of this process run side by side, so descriptors are looked at one by one.
fn is_close_on_exec(descriptor: &OwnedFd) -> bool {
    nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_GETFD).unwrap() & libc::FD_CLOEXEC != 0
}

#[test]
fn a_message_arrives_with_its_descriptors_close_on_exec() {
    let (ours, theirs) = Channel::pair().unwrap();
    let (first, second) = (null(), null());
    ours.send(&start(), &[first.as_fd(), second.as_fd()]).unwrap();
    let (message, descriptors) = theirs.recv::<ToDevice>(SOON).unwrap();
    assert_eq!(message, start());
    assert_eq!(descriptors.len(), 2);
    assert!(descriptors.iter().all(is_close_on_exec));
    assert!(is_close_on_exec(&ours.into_fd()));
}

#[test]
fn the_most_descriptors_and_the_longest_message_fit() {
    let (ours, theirs) = Channel::pair().unwrap();
    let null = null();
    let most: Vec<BorrowedFd<'_>> = vec![null.as_fd(); MAX_DESCRIPTORS];
    // A string of this length is encoded with three bytes of length and one of the variant.
    let longest = FromDevice::Failed("x".repeat(MAX_MESSAGE - 4));
    ours.send(&longest, &most).unwrap();
    let (message, descriptors) = theirs.recv::<FromDevice>(SOON).unwrap();
    assert_eq!(message, longest);
    assert_eq!(descriptors.len(), MAX_DESCRIPTORS);
}

#[test]
fn one_byte_or_descriptor_more_is_not_sent() {
    let (ours, _theirs) = Channel::pair().unwrap();
    let null = null();
    let message = FromDevice::Failed("x".repeat(MAX_MESSAGE - 3));
    assert!(
        matches!(ours.send(&message, &[]), Err(ChannelError::TooLong { length }) if length == MAX_MESSAGE + 1)
    );
    let many: Vec<BorrowedFd<'_>> = vec![null.as_fd(); MAX_DESCRIPTORS + 1];
    assert!(matches!(ours.send(&ToDevice::Stop, &many), Err(ChannelError::TooManyDescriptors)));
}

#[test]
fn silence_ends_at_the_deadline() {
    let (_ours, theirs) = Channel::pair().unwrap();
    let before = Instant::now();
    assert!(matches!(theirs.recv::<ToDevice>(Some(Duration::from_millis(30))), Err(ChannelError::Deadline)));
    assert!(before.elapsed() >= Duration::from_millis(30));
    assert!(matches!(theirs.recv::<ToDevice>(Some(Duration::ZERO)), Err(ChannelError::Deadline)));
}

#[test]
fn a_peer_that_does_not_read_cannot_hold_the_sender() {
    let (ours, _theirs) = Channel::pair().unwrap();
    let message = FromDevice::Failed("x".repeat(30_000));
    let before = Instant::now();
    let refused = (0..100).find_map(|_| ours.send(&message, &[]).err());
    assert!(matches!(refused, Some(ChannelError::Deadline)), "{refused:?}");
    let refused = ours.send_within(&message, &[], Duration::from_millis(30));
    assert!(matches!(refused, Err(ChannelError::Deadline)), "{refused:?}");
    assert!(before.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_closed_peer_is_told_from_every_other_error() {
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send(&ToDevice::Stop, &[]).unwrap();
    drop(ours);
    // What was sent before still arrives.
    assert!(matches!(theirs.recv::<ToDevice>(SOON), Ok((ToDevice::Stop, _))));
    assert!(matches!(theirs.recv::<ToDevice>(None), Err(ChannelError::PeerClosed)));
    assert!(matches!(theirs.send(&ToDevice::Stop, &[]), Err(ChannelError::PeerClosed)));
}

#[test]
fn an_empty_packet_means_closed_and_its_descriptors_do_not_leak() {
    let (ours, theirs) = Channel::pair().unwrap();
    let (end, pipe) = nix::unistd::pipe().unwrap();
    packet::send(ours.as_fd(), &[], &[pipe.as_fd()]).unwrap();
    drop(pipe);
    assert!(matches!(theirs.recv::<ToDevice>(SOON), Err(ChannelError::PeerClosed)));
    assert_is_closed(&end);
}

/// Every write end of the pipe is gone.
fn assert_is_closed(end: &OwnedFd) {
    nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    assert_eq!(nix::unistd::read(end, &mut [0]), Ok(0));
}

#[test]
fn a_packet_that_is_too_long_is_refused_and_the_next_one_is_not() {
    let (ours, theirs) = Channel::pair().unwrap();
    raw(&ours, &vec![0; MAX_MESSAGE + 5]);
    ours.send(&ToDevice::Stop, &[]).unwrap();
    let refused = theirs.recv::<ToDevice>(SOON);
    assert!(
        matches!(refused, Err(ChannelError::TooLong { length }) if length == MAX_MESSAGE + 5),
        "{refused:?}"
    );
    assert!(matches!(theirs.recv::<ToDevice>(SOON), Ok((ToDevice::Stop, _))));
}

#[test]
fn a_rest_behind_the_message_is_refused() {
    let (ours, theirs) = Channel::pair().unwrap();
    let mut bytes = postcard::to_stdvec(&ToDevice::Stop).unwrap();
    bytes.push(0);
    raw(&ours, &bytes);
    assert!(matches!(theirs.recv::<ToDevice>(SOON), Err(ChannelError::TrailingBytes(1))));
}

#[test]
fn more_descriptors_than_fit_are_refused_and_none_leaks() {
    let (ours, theirs) = Channel::pair().unwrap();
    let (end, pipe) = nix::unistd::pipe().unwrap();
    send_many(&ours, &postcard::to_stdvec(&ToDevice::Stop).unwrap(), &vec![pipe.as_raw_fd(); 200]);
    drop(pipe);
    assert!(matches!(theirs.recv::<ToDevice>(SOON), Err(ChannelError::TooManyDescriptors)));
    assert_is_closed(&end);
}

/// As a hostile peer sends them: more than our own sender allows.
fn send_many(channel: &Channel, bytes: &[u8], descriptors: &[i32]) {
    use nix::sys::socket::{ControlMessage, sendmsg};
    let iov = [std::io::IoSlice::new(bytes)];
    let control = [ControlMessage::ScmRights(descriptors)];
    sendmsg::<()>(channel.as_fd().as_raw_fd(), &iov, &control, MsgFlags::empty(), None).unwrap();
}

#[test]
fn descriptors_of_a_malformed_message_do_not_leak() {
    let (ours, theirs) = Channel::pair().unwrap();
    let (end, pipe) = nix::unistd::pipe().unwrap();
    send_many(&ours, &[0xFF; 40], &[pipe.as_raw_fd(); 3]);
    drop(pipe);
    assert!(matches!(theirs.recv::<ToDevice>(SOON), Err(ChannelError::Malformed(_))));
    assert_is_closed(&end);
}

#[test]
fn each_descriptor_is_handed_out_once_and_none_is_left_over() {
    let mut descriptors = Descriptors::from(vec![null(), null()]);
    assert!(descriptors.take(FdIndex(1)).is_ok());
    assert!(matches!(descriptors.take(FdIndex(1)), Err(ChannelError::NoSuchDescriptor { index: 1 })));
    assert!(matches!(descriptors.take(FdIndex(2)), Err(ChannelError::NoSuchDescriptor { index: 2 })));
    assert!(matches!(descriptors.finish(), Err(ChannelError::UnusedDescriptors { count: 1 })));
}

#[test]
fn open_descriptors_names_a_new_one_and_not_a_closed_one() {
    let descriptor = null();
    // A number that no other test takes meanwhile.
    let high = nix::fcntl::fcntl(&descriptor, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(700)).unwrap();
    assert!(open_descriptors().unwrap().contains(&high));
    assert_eq!(nix::unistd::close(high), Ok(()));
    assert!(!open_descriptors().unwrap().contains(&high));
    assert_eq!(nix::unistd::close(high), Err(Errno::EBADF));
}

/// `poll` takes them for closed.
#[test]
fn open_descriptors_names_those_opened_as_paths() {
    use nix::fcntl::{OFlag, open};
    let path = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty()).unwrap();
    assert!(open_descriptors().unwrap().contains(&path.as_raw_fd()));
}

fn any_from_device() -> impl Strategy<Value = FromDevice> {
    let policy = (0..PolicyName::ALL.len()).prop_map(|index| PolicyName::ALL[index]);
    prop_oneof![
        proptest::collection::vec(policy, 0..8).prop_map(|policies| FromDevice::Ready { policies }),
        ".{0,200}".prop_map(FromDevice::Failed),
    ]
}

proptest! {
    #[test]
    fn whatever_is_sent_arrives(message in any_from_device()) {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.send(&message, &[]).unwrap();
        prop_assert_eq!(theirs.recv::<FromDevice>(SOON).unwrap().0, message);
    }

    #[test]
    fn random_packets_are_refused_or_mean_themselves(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (ours, theirs) = Channel::pair().unwrap();
        raw(&ours, &bytes);
        if let Ok((message, descriptors)) = theirs.recv::<ToCore>(SOON) {
            prop_assert!(descriptors.is_empty());
            // Decoding and encoding again may shorten overlong integers, never lengthen.
            prop_assert!(postcard::to_stdvec(&message).unwrap().len() <= bytes.len());
        }
        raw(&ours, &bytes);
        let _ = theirs.recv::<FromCore>(SOON);
        raw(&ours, &bytes);
        let _ = theirs.recv::<ToDevice>(SOON);
    }

    #[test]
    fn a_damaged_message_never_panics(position in 0_usize..200, value in any::<u8>(), cut in 0_usize..200) {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut bytes = postcard::to_stdvec(&start()).unwrap();
        let (position, cut) = (position % bytes.len(), cut % bytes.len());
        bytes[position] = value;
        raw(&ours, &bytes);
        let _ = theirs.recv::<ToDevice>(SOON);
        raw(&ours, &bytes[..cut]);
        let _ = theirs.recv::<ToDevice>(SOON);
    }
}
