//! The back-end channel.

use super::*;
use crate::vhost_user::message::BackendReq;

fn channel() -> (BackendRequests, Connection) {
    let (ours, theirs) = Connection::pair().unwrap();
    (BackendRequests { device: "disk0".into(), connection: ours }, theirs)
}

#[test]
fn the_channel_is_handed_over_and_carries_config_changes() {
    let (frontend, peer) = with_peer(LONG, |connection| {
        let deadline = Deadline::after(LONG);
        let message = connection.receive(deadline).unwrap();
        assert_eq!(message.request, u32::from(FrontendReq::SET_BACKEND_REQ_FD));
        let channel: Connection = message.descriptors.into_iter().next().unwrap().into();
        reply(&connection, FrontendReq::SET_BACKEND_REQ_FD, &[0; 8]);
        let change = u32::from(BackendReq::CONFIG_CHANGE_MSG);
        channel.send(change, Kind::Request, &[], &[], deadline).unwrap();
        channel.send(change, Kind::RequestNeedingReply, &[], &[], deadline).unwrap();
        let answer = channel.receive(deadline).unwrap();
        assert_eq!((answer.kind, answer.payload), (Kind::Reply, vec![0; 8]));
        drop(connection.receive(deadline));
    });
    let mut frontend = negotiated(frontend, ALL);
    let mut requests = frontend.open_backend_requests().unwrap();
    for _ in 0..2 {
        let mut fds = [nix::poll::PollFd::new(requests.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut fds, 10_000u16).unwrap(), 1);
        assert_eq!(requests.receive().unwrap(), BackendRequest::ConfigChange);
    }
    drop(frontend);
    peer.join().unwrap();
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let (mut requests, peer) = channel();
    let deadline = Deadline::after(LONG);
    for (request, payload) in [(1, &[][..]), (3, &[0; 24]), (99, &[]), (2, &[0])] {
        peer.send(request, Kind::RequestNeedingReply, payload, &[], deadline).unwrap();
        assert_eq!(requests.receive().unwrap(), BackendRequest::Refused { request });
        let answer = peer.receive(deadline).unwrap();
        assert_eq!(answer.payload, 1u64.to_le_bytes());
    }
}

#[test]
fn nonsense_ends_the_channel() {
    let (mut requests, peer) = channel();
    peer.send(2, Kind::Reply, &[], &[], Deadline::after(LONG)).unwrap();
    assert!(requests.receive().is_err());

    let (mut requests, peer) = channel();
    drop(peer);
    assert!(matches!(requests.receive(), Err(ConnectionError::Closed)));

    // Half a header, and then nothing.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut requests = BackendRequests { device: "disk0".into(), connection: ours.into() };
    std::io::Write::write_all(&mut theirs, &[2, 0, 0]).unwrap();
    assert!(matches!(requests.receive(), Err(ConnectionError::Late(_))));
}
