use super::*;
use nix::sys::epoll::EpollCreateFlags;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn epoll() -> Epoll {
    Epoll::new(EpollCreateFlags::empty()).unwrap()
}

fn duplex(stream: UnixStream) -> Ends {
    let fd = Arc::new(OwnedFd::from(stream));
    Ends { input: Some(fd.clone()), output: Some(fd) }
}

#[test]
fn the_newest_output_waits_for_the_first_peer() {
    let (mut peer, epoll) = (Peer::default(), epoll());
    peer.say(b"lost", &epoll);
    for _ in 0..KEPT / 1024 {
        peer.say(&[b'x'; 1024], &epoll);
    }
    assert_eq!(peer.room(), KEPT, "nobody is waited for");
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    peer.attach(duplex(ours), &epoll);
    let mut seen = vec![0; KEPT];
    theirs.read_exact(&mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == b'x'));
    assert_eq!(peer.dropped, 0, "the count was reported");
}

#[test]
fn a_peer_that_does_not_read_delays_the_guest_and_then_loses_output() {
    let (mut peer, epoll) = (Peer::default(), epoll());
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    peer.attach(duplex(ours), &epoll);
    let mut said = 0usize;
    // A socket that refused a long piece may still take a short one.
    while {
        peer.flush(&epoll);
        peer.room() > 0
    } {
        let piece = peer.room().min(4096);
        peer.say(&vec![b'a'; piece], &epoll);
        said += piece;
        assert!(said < 64 << 20, "a peer that reads nothing has unbounded room");
    }
    assert!(peer.patience().is_some_and(|left| left <= PATIENCE));
    peer.stalled = Instant::now().checked_sub(PATIENCE);
    peer.flush(&epoll);
    assert!(peer.room() > 0, "patience ends");
    peer.say(b"b", &epoll);
    assert_eq!((peer.dropped, peer.kept.len()), (1, KEPT));

    let mut sink = vec![0; 1 << 20];
    assert!(theirs.read(&mut sink).unwrap() > 0);
    peer.flush(&epoll);
    assert!(!peer.given_up && peer.dropped == 0, "a peer that reads again is waited for again");
}

#[test]
fn a_peer_that_leaves_loses_nothing_for_the_next() {
    let (mut peer, epoll) = (Peer::default(), epoll());
    let (ours, theirs) = UnixStream::pair().unwrap();
    peer.attach(duplex(ours), &epoll);
    drop(theirs);
    peer.say(b"hello", &epoll);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    peer.attach(duplex(ours), &epoll);
    let mut seen = [0; 5];
    theirs.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello");
}

#[test]
fn input_is_offered_only_when_there_is_some() {
    let (mut peer, epoll) = (Peer::default(), epoll());
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    peer.attach(duplex(ours), &epoll);
    assert!(peer.ready_input().is_none());
    theirs.write_all(b"x").unwrap();
    assert!(peer.ready_input().is_some());
}
