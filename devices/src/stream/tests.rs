use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use nix::poll::PollFd;
use nix::pty::openpty;
use nix::sys::epoll::{EpollCreateFlags, EpollEvent, EpollTimeout};

use super::super::{CAPACITY, HISTORY, PATIENCE};
use super::*;

/// A stream with the loop that watches it.
struct Rig {
    peer: Peer,
    epoll: Epoll,
}

impl Rig {
    fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        Self { peer: Peer::new(Ends::new(input, output)), epoll }
    }

    fn attach(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        self.peer.attach(End::from(OwnedFd::from(ours)));
        theirs
    }

    fn say(&mut self, bytes: &[u8]) {
        self.peer.say(bytes);
        self.peer.flush();
    }

    /// What the guest hears, as far as it is there.
    fn hear(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        while let Some(input) = self.peer.ready_input() {
            let mut bytes = [0; 64];
            let result = nix::unistd::read(input, &mut bytes);
            let count = self.peer.settle_read(result.map_err(io::Error::from));
            heard.extend_from_slice(&bytes[..count]);
        }
        heard
    }

    /// A turn of the loop: whether something was reported within the time.
    fn turn(&mut self, milliseconds: u16) -> bool {
        self.peer.watch(&self.epoll, |flags| EpollEvent::new(flags, 7));
        let mut events = [EpollEvent::empty(); 4];
        let count = self.epoll.wait(&mut events, EpollTimeout::from(milliseconds)).unwrap();
        if count > 0 {
            self.peer.woken();
        }
        count > 0
    }

    /// Says as much as an attached peer that does not read has room for.
    fn fill(&mut self) {
        let mut said = 0usize;
        while self.peer.room() > 0 {
            let piece = self.peer.room().min(4096);
            self.say(&vec![b'a'; piece]);
            said += piece;
            assert!(said < 64 << 20, "a peer that reads nothing has unbounded room");
        }
    }
}

fn exactly(stream: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A pipe; what is read from it must be there.
fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (reader.into(), writer)
}

#[test]
fn the_newest_output_waits_for_the_first_peer() {
    let mut rig = Rig::new(None, None);
    rig.say(b"lost");
    (0..HISTORY / 1024).for_each(|_| rig.say(&[b'x'; 1024]));
    assert!(rig.peer.room() > 0, "nobody is waited for");
    let mut peer = rig.attach();
    assert!(exactly(&mut peer, HISTORY).iter().all(|byte| *byte == b'x'));
}

#[test]
fn a_peer_that_does_not_read_delays_the_guest_and_then_loses_the_oldest() {
    let mut rig = Rig::new(None, None);
    let mut peer = rig.attach();
    rig.fill();
    let deadline = rig.peer.deadline().unwrap();
    assert!(deadline <= Instant::now() + PATIENCE);
    rig.peer.expire(deadline - PATIENCE / 2);
    assert_eq!(rig.peer.room(), 0, "not yet");
    rig.peer.expire(deadline);
    assert!(rig.peer.room() > 0 && rig.peer.deadline().is_none());
    rig.say(b"newest");
    assert_eq!(rig.peer.waiting(), HISTORY);

    assert!(!rig.turn(0), "the peer has no room");
    let mut seen = Vec::new();
    while !seen.ends_with(b"newest") {
        let mut bytes = [0; 65536];
        let count = peer.read(&mut bytes).unwrap();
        seen.extend_from_slice(&bytes[..count]);
        rig.turn(0);
        rig.peer.flush();
    }
    rig.fill();
    assert!(rig.peer.deadline().is_some(), "a peer that reads again is waited for again");
}

#[test]
fn a_peer_that_makes_room_is_reported_once() {
    let mut rig = Rig::new(None, None);
    let mut peer = rig.attach();
    rig.fill();
    rig.turn(0);
    assert!(!rig.turn(0));
    exactly(&mut peer, 150_000);
    assert!(rig.turn(5000), "room");
    rig.peer.flush();
    assert!(rig.peer.room() > 0);
}

#[test]
fn a_peer_that_leaves_loses_nothing_for_the_next() {
    let mut rig = Rig::new(None, None);
    drop(rig.attach());
    rig.say(b"hello");
    assert_eq!(exactly(&mut rig.attach(), 5), b"hello");
    let first = rig.attach();
    rig.fill();
    let waiting = rig.peer.waiting();
    drop(first);
    assert!(rig.turn(5000), "leaving is reported");
    assert_eq!(rig.hear(), b"");
    assert!(rig.peer.room() > 0, "nobody is waited for");
    assert_eq!(waiting, CAPACITY);
    assert_eq!(exactly(&mut rig.attach(), HISTORY), vec![b'a'; HISTORY]);
}

#[test]
fn peers_come_one_after_another() {
    let mut rig = Rig::new(None, None);
    for round in 0..5u8 {
        let mut peer = rig.attach();
        rig.say(&[round]);
        assert_eq!(exactly(&mut peer, 1), [round]);
        peer.write_all(&[round, 3]).unwrap();
        assert!(rig.turn(5000));
        assert_eq!(rig.hear(), [round, 3]);
        if round % 2 == 0 {
            drop(peer);
            rig.turn(5000);
            rig.hear();
        }
    }
}

#[test]
fn a_peer_that_is_replaced_sees_the_end() {
    let mut rig = Rig::new(None, None);
    let mut first = rig.attach();
    rig.turn(0);
    let _second = rig.attach();
    rig.turn(0);
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_first_ends_serve_again_when_the_attached_peer_leaves() {
    let (mut shown, output) = pipe();
    let (typed, mut keyboard) = UnixStream::pair().unwrap();
    let mut rig = Rig::new(Some(typed.into()), Some(output));
    rig.say(b"before");
    assert_eq!(exactly(&mut shown, 6), b"before");
    let mut peer = rig.attach();
    rig.say(b"during");
    assert_eq!(exactly(&mut peer, 6), b"during");
    keyboard.write_all(b"keys").unwrap();
    peer.write_all(b"peer's").unwrap();
    rig.turn(5000);
    assert_eq!(rig.hear(), b"peer's", "one at a time");
    drop(peer);
    assert!(rig.turn(5000), "leaving is reported");
    assert_eq!(rig.hear(), b"keys");
    rig.say(b"after");
    assert_eq!(exactly(&mut shown, 5), b"after");
}

#[test]
fn what_a_stuck_peer_did_not_take_goes_to_the_first_output() {
    let file = tempfile::tempfile().unwrap();
    let mut shown = file.try_clone().unwrap();
    let mut rig = Rig::new(None, Some(file.into()));
    let peer = rig.attach();
    rig.fill();
    rig.say(b"end");
    drop(peer);
    rig.turn(5000);
    rig.hear();
    rig.peer.flush();
    let mut text = Vec::new();
    shown.rewind().unwrap();
    shown.read_to_end(&mut text).unwrap();
    assert!(text.len() >= CAPACITY - 3 && text.ends_with(b"aend"));
}

#[test]
fn a_peer_that_has_said_all_still_listens_and_what_it_said_is_heard_after_it_left() {
    let mut rig = Rig::new(None, None);
    let mut peer = rig.attach();
    peer.write_all(b"command\n").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    rig.turn(5000);
    assert_eq!(rig.hear(), b"command\n");
    rig.say(b"answer");
    assert_eq!(exactly(&mut peer, 6), b"answer");

    peer = rig.attach();
    peer.write_all(b"last words").unwrap();
    drop(peer);
    rig.say(b"kept");
    assert_eq!(rig.hear(), b"last words");
    assert_eq!(exactly(&mut rig.attach(), 4), b"kept");
}

#[test]
fn a_hang_up_wakes_the_loop_once() {
    let mut rig = Rig::new(None, None);
    let mut peer = rig.attach();
    peer.write_all(b"unread").unwrap();
    drop(peer);
    assert!(rig.turn(5000));
    // The guest takes nothing for now.
    assert!(rig.peer.ready_input().is_some());
    assert!(!rig.turn(20));
    assert_eq!(rig.hear(), b"unread");
}

#[test]
fn input_is_offered_only_when_there_is_some() {
    let mut rig = Rig::new(None, None);
    assert!(rig.peer.ready_input().is_none());
    let mut peer = rig.attach();
    assert!(rig.peer.ready_input().is_none());
    peer.write_all(b"x").unwrap();
    assert!(rig.peer.ready_input().is_none(), "nothing was reported yet");
    assert!(rig.turn(5000));
    assert!(rig.peer.ready_input().is_some());
}

#[test]
fn input_comes_from_a_file_without_being_watched() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'i'; 200]).unwrap();
    file.rewind().unwrap();
    let mut rig = Rig::new(Some(file.into()), None);
    assert!(!rig.turn(0));
    assert_eq!(rig.hear(), [b'i'; 200]);
    assert!(rig.peer.places.first.input.is_none(), "its end is final");
}

#[test]
fn pipes_and_terminals_that_nobody_reads_do_not_block() {
    let (mut reader, writer) = pipe();
    let mut rig = Rig::new(None, Some(writer));
    rig.fill();
    let terminal = openpty(None, None).unwrap();
    let mut master = File::from(terminal.master);
    let mut attributes = nix::sys::termios::tcgetattr(&terminal.slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut attributes);
    nix::sys::termios::tcsetattr(&terminal.slave, nix::sys::termios::SetArg::TCSANOW, &attributes).unwrap();
    let mut on_terminal = Rig::new(None, Some(terminal.slave));
    on_terminal.fill();
    // Both go on in order once somebody reads.
    for (rig, reader) in [(&mut rig, &mut reader), (&mut on_terminal, &mut master)] {
        rig.turn(0);
        rig.peer.expire(Instant::now() + PATIENCE);
        rig.say(b"!");
        let mut last = [0];
        while last != *b"!" {
            let mut entry = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
            if poll(&mut entry, PollTimeout::from(100u16)).unwrap() > 0 {
                reader.read_exact(&mut last).unwrap();
            }
            rig.peer.flush();
        }
    }
}

#[test]
fn a_terminal_that_expands_line_ends_does_not_block_where_it_was_opened_non_blocking() {
    let terminal = openpty(None, None).unwrap();
    let path = nix::unistd::ttyname(&terminal.slave).unwrap();
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let output = File::options().write(true).custom_flags(flags).open(path).unwrap();
    let mut rig = Rig::new(None, Some(output.into()));
    while rig.peer.room() > 0 {
        rig.say(&[b'\n'; 100]);
    }
    assert!(rig.peer.deadline().is_some());
}

#[test]
fn an_output_that_breaks_is_given_up_and_the_rest_kept() {
    let (reader, writer) = pipe();
    let mut rig = Rig::new(None, Some(writer));
    drop(reader);
    rig.say(b"kept");
    assert_eq!(rig.peer.waiting(), 4);
    assert_eq!(exactly(&mut rig.attach(), 4), b"kept");
}

#[test]
fn the_last_output_has_a_moment_and_no_more() {
    let (mut reader, writer) = pipe();
    let mut rig = Rig::new(None, Some(writer));
    rig.fill();
    let begin = Instant::now();
    rig.peer.finish(Duration::from_millis(50));
    assert!(begin.elapsed() >= Duration::from_millis(50) && rig.peer.waiting() > 0);
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all.len()
    });
    rig.peer.finish(Duration::from_secs(20));
    assert_eq!(rig.peer.waiting(), 0);
    drop(rig);
    assert!(thread.join().unwrap() > CAPACITY);
}
