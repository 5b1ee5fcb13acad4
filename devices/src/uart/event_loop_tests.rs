//! The real device thread behind a socket pair, without a jail.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use bulkhead_ipc::vfio_user::shadow::ShadowPage;
use bulkhead_ipc::vfio_user::{Client, Fault};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::stream::{CAPACITY, Ends, HISTORY};

const DEADLINE: Duration = Duration::from_secs(2);

struct Rig {
    client: Client,
    control: Channel,
    interrupt: EventFd,
    thread: JoinHandle<Result<(), UartError>>,
}

/// Starts a UART with these descriptors, its interrupt connected.
fn rig(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Rig {
    let (core, socket) = UnixStream::pair().unwrap();
    let (control, channel) = Channel::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let connection = Connection::new(socket.into(), DEADLINE)?;
        let device = UartDevice::new(ShadowPage::create().ok(), Ends::new(input, output));
        EventLoop::new(connection, device, &channel)?.run()
    });
    let mut client = Client::connect(core.into(), "uart", DEADLINE).unwrap();
    let interrupt = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    client.set_irq(0, Some(interrupt.as_fd())).unwrap();
    Rig { client, control, interrupt, thread }
}

impl Rig {
    fn read(&mut self, offset: u64) -> u8 {
        let mut data = [0];
        self.client.read(0, offset, &mut data).unwrap();
        data[0]
    }

    fn post(&mut self, offset: u64, value: u8) {
        self.client.post(0, offset, &[value]).unwrap();
    }

    /// FIFOs with trigger level 14, OUT2, these interrupts.
    fn set_up(&mut self, interrupts: u8) {
        self.post(2, 0xc1);
        self.post(4, 0x0b);
        self.post(1, interrupts);
    }

    fn interrupted(&self) -> bool {
        let mut entry = [PollFd::new(self.interrupt.as_fd(), PollFlags::POLLIN)];
        poll(&mut entry, PollTimeout::from(5000_u16)).unwrap() > 0 && self.interrupt.read().is_ok()
    }

    /// Prints as a kernel does: waits for THRE before each character.
    fn print(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            while self.read(5) & 0x20 == 0 {}
            self.post(0, byte);
        }
    }

    fn stop(self) -> Result<(), UartError> {
        self.control.send(&ToDevice::Stop, &[]).unwrap();
        self.thread.join().unwrap()
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 % 251).to_le_bytes()[0]).collect()
}

#[test]
fn loopback_works_over_the_wire() {
    let mut rig = rig(None, None);
    rig.set_up(0);
    rig.post(4, 0x1b);
    for byte in b"ping" {
        rig.post(0, *byte);
    }
    let received: Vec<u8> = (0..4).map(|_| rig.read(0)).collect();
    assert_eq!(received, b"ping");
    rig.stop().unwrap();
}

#[test]
fn the_transmitter_interrupt_arrives_on_the_eventfd() {
    let mut rig = rig(None, None);
    rig.set_up(0x02);
    assert!(rig.interrupted());
    assert_eq!(rig.read(2), 0xc2);
    assert_eq!(rig.read(2), 0xc1);
    for byte in 0..16 {
        rig.post(0, byte);
    }
    assert!(rig.interrupted(), "empty again");
    rig.stop().unwrap();
}

#[test]
fn a_single_character_of_input_interrupts_by_timeout() {
    let (mut peer, input) = UnixStream::pair().unwrap();
    let mut rig = rig(Some(input.into()), None);
    rig.set_up(0x01);
    assert_eq!(rig.read(2), 0xc1, "set up before the character comes");
    peer.write_all(b"x").unwrap();
    assert!(rig.interrupted());
    assert_eq!(rig.read(2), 0xcc);
    assert_eq!(rig.read(5) & 1, 1);
    assert_eq!(rig.read(0), b'x');
    assert_eq!(rig.read(5) & 1, 0);
    rig.stop().unwrap();
}

#[test]
fn what_is_left_in_the_fifo_interrupts_again() {
    let (mut peer, input) = UnixStream::pair().unwrap();
    let mut rig = rig(Some(input.into()), None);
    rig.set_up(0x01);
    rig.read(2);
    peer.write_all(b"ab").unwrap();
    assert!(rig.interrupted());
    while rig.read(5) & 1 == 0 {}
    assert_eq!(rig.read(0), b'a');
    assert!(rig.interrupted(), "four character times later");
    assert_eq!(rig.read(0), b'b');
    rig.stop().unwrap();
}

#[test]
fn a_megabyte_reaches_a_slow_reader_in_order() {
    let (mut peer, output) = UnixStream::pair().unwrap();
    let mut rig = rig(None, Some(output.into()));
    let sent = pattern(1 << 20);
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            match peer.read(&mut buffer).unwrap() {
                0 => return received,
                count => received.extend_from_slice(&buffer[..count]),
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    rig.set_up(0);
    // As the 8250 driver fills the FIFO: sixteen characters for each look at the LSR.
    for chunk in sent.chunks(16) {
        while rig.read(5) & 0x20 == 0 {}
        for byte in chunk {
            rig.post(0, *byte);
        }
    }
    rig.read(5);
    rig.stop().unwrap();
    let received = reader.join().unwrap();
    assert_eq!(received.len(), sent.len());
    assert!(received == sent);
}

#[test]
fn all_of_64_kib_of_input_arrives() {
    let (mut peer, input) = UnixStream::pair().unwrap();
    let mut rig = rig(Some(input.into()), None);
    rig.set_up(0x01);
    rig.read(2);
    let sent = pattern(64 * 1024);
    let copy = sent.clone();
    let writer = std::thread::spawn(move || peer.write_all(&copy).unwrap());
    let mut received = Vec::new();
    while received.len() < sent.len() {
        assert!(rig.interrupted(), "after {} bytes", received.len());
        // Linux's handler: until IIR says that nothing is pending.
        while rig.read(2) & 1 == 0 {
            while rig.read(5) & 1 != 0 {
                received.push(rig.read(0));
            }
        }
    }
    assert!(received == sent);
    writer.join().unwrap();
    rig.stop().unwrap();
}

#[test]
fn a_reader_that_is_stuck_does_not_stop_the_guest_for_good() {
    let (peer, output) = UnixStream::pair().unwrap();
    let mut rig = rig(None, Some(output.into()));
    rig.set_up(0);
    let begin = Instant::now();
    let total = CAPACITY * 8;
    for chunk in pattern(total).chunks(16) {
        while rig.read(5) & 0x20 == 0 {
            assert!(begin.elapsed() < Duration::from_secs(20), "the guest hangs");
        }
        for byte in chunk {
            rig.post(0, *byte);
        }
    }
    assert!(begin.elapsed() >= Duration::from_secs(1), "the reader was waited for");
    drop(peer);
    rig.stop().unwrap();
}

#[test]
fn the_newest_64_kib_are_kept_for_the_first_peer() {
    let mut rig = rig(None, None);
    rig.set_up(0);
    let sent = pattern(HISTORY + 5000);
    for byte in &sent {
        rig.post(0, *byte);
    }
    rig.read(5);
    let (mut peer, theirs) = UnixStream::pair().unwrap();
    rig.control.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let mut received = vec![0; HISTORY];
    peer.read_exact(&mut received).unwrap();
    assert!(received == sent[5000..]);
    // Both directions, then the peer leaves and another comes.
    rig.print(*b"out");
    peer.read_exact(&mut received[..3]).unwrap();
    assert_eq!(&received[..3], b"out");
    peer.write_all(b"in").unwrap();
    while rig.read(5) & 1 == 0 {}
    assert_eq!(rig.read(0), b'i');
    assert_eq!(rig.read(0), b'n');
    drop(peer);
    rig.print(*b"kept");
    let (mut peer, theirs) = UnixStream::pair().unwrap();
    rig.control.send(&ToDevice::Attach, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    rig.print(*b"!");
    let mut received = Vec::new();
    while !received.ends_with(b"!") {
        let mut byte = [0];
        peer.read_exact(&mut byte).unwrap();
        received.push(byte[0]);
    }
    assert!(b"kept!".ends_with(&received[received.len().saturating_sub(5)..]));
    rig.stop().unwrap();
}

#[test]
fn output_goes_to_a_file_and_a_pipe_and_input_comes_from_a_file() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"typed").unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut rig = rig(Some(file.into()), Some(writer));
    while rig.read(5) & 1 == 0 {}
    let received: Vec<u8> = (0..5).map(|_| rig.read(0)).collect();
    assert_eq!(received, b"typed");
    rig.print(*b"printed");
    rig.stop().unwrap();
    let mut received = String::new();
    std::fs::File::from(reader).read_to_string(&mut received).unwrap();
    assert_eq!(received, "printed");
}

#[test]
fn a_reader_that_goes_away_costs_nothing_but_its_output() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut rig = rig(None, Some(writer));
    drop(reader);
    rig.print(pattern(200));
    assert_eq!(rig.read(7), 0);
    rig.stop().unwrap();
}

#[test]
fn the_core_closing_its_stream_ends_the_process() {
    let rig = rig(None, None);
    drop(rig.client);
    rig.thread.join().unwrap().unwrap();
}

#[test]
fn a_core_that_breaks_the_protocol_ends_the_process() {
    let rig = rig(None, None);
    nix::sys::socket::send(
        std::os::fd::AsRawFd::as_raw_fd(&rig.client.as_fd()),
        &[0xff; 64],
        nix::sys::socket::MsgFlags::empty(),
    )
    .unwrap();
    assert!(matches!(rig.thread.join().unwrap(), Err(UartError::Registers(_))));
}

#[test]
fn the_supervisor_leaving_ends_the_process() {
    let rig = rig(None, None);
    drop(rig.control);
    rig.thread.join().unwrap().unwrap();
}

#[test]
fn an_eventfd_that_is_full_does_not_block_the_device() {
    let mut rig = rig(None, None);
    let full = EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap();
    full.write(u64::MAX - 1).unwrap();
    rig.client.set_irq(0, Some(full.as_fd())).unwrap();
    rig.set_up(0x02);
    assert_eq!(rig.read(2), 0xc2);
    rig.stop().unwrap();
}

#[test]
fn no_eight_byte_access_reaches_past_the_ports() {
    let mut rig = rig(None, None);
    let mut data = [0; 8];
    rig.client.read(0, 0, &mut data).unwrap();
    assert_eq!(data[5], 0x60);
    for offset in [1, 7, 15, crate::uart::REGION_SIZE, u64::MAX - 3] {
        assert_eq!(rig.client.read(0, offset, &mut data).unwrap_err().fault, Fault::Refused(22));
        assert_eq!(rig.client.write(0, offset, &data).unwrap_err().fault, Fault::Refused(22));
    }
    rig.stop().unwrap();
}
