//! Kills of a serial port while somebody types at it and while it prints: each character arrives once. Characters have numbers, and
//! what was not answered, or not passed on, is done again under them, as the core does it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, UartConfig};
use bulkhead_ipc::vfio_user::Client;
use bulkhead_ipc::vfio_user::shadow::ShadowView;
use nix::fcntl::OFlag;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::driver::Random;
use crate::storm_registers::Victim;
use crate::storm_typed::{byte, memory, type_on, way};
use crate::supervised::LIMIT;

const KILLS: u32 = 100;
/// Length of a line that the guest prints.
const LINE: usize = 16;

/// Character of this number that the guest prints: lines that are numbered from 0.
fn said_as(number: u64) -> u8 {
    let at = number - 1;
    let line = format!("{:0width$}\n", at / LINE as u64, width = LINE - 1);
    line.as_bytes()[at as usize % LINE]
}

/// Line status: a character is there, and there is room for one.
const DATA_READY: u8 = 1;
const EMPTY: u8 = 1 << 5;
/// Offsets: the number of a character stands above the port.
const NUMBER_SHIFT: u32 = 3;
const FIFO_CONTROL: u64 = 2;
const LINE_STATUS: u64 = 5;
/// FIFOs on; the core writes that to a successor before it reads.
const FIFOS: u8 = 0xC1;

fn typed(pipe: bool) {
    let (mut typing, end) = way(pipe);
    let kept = memory();
    let resources = [&end, &kept];
    let (input, typed) = (Some(FdIndex(1)), Some(FdIndex(2)));
    let config = DeviceConfig::Uart(UartConfig { input, output: None, typed, own_file: false });
    let mut victim = Victim::killed(KILLS, "uart", config, &resources);
    let set_up = |victim: &mut Victim<'_>| {
        while !victim.access(|chip| chip.write(0, FIFO_CONTROL, &[FIFOS]).is_ok()) {}
    };
    set_up(&mut victim);
    let (mut typed, mut seen, mut end) = (0, 0, None);
    loop {
        if victim.kills < KILLS {
            type_on(&mut typing, &mut typed, seen);
        } else if seen == typed {
            break;
        } else {
            assert!(Instant::now() < *end.get_or_insert(Instant::now() + LIMIT), "{seen} of {typed}");
        }
        let (mut status, mut found) = ([0], [0]);
        if !victim.access(|chip| chip.read(0, LINE_STATUS, &mut status).is_ok()) {
            set_up(&mut victim);
            continue;
        }
        if status[0] & DATA_READY == 0 {
            continue;
        }
        // The guest has seen that there is one.
        let at = (seen + 1) << NUMBER_SHIFT;
        while !victim.access(|chip| chip.read(0, at, &mut found).is_ok()) {
            set_up(&mut victim);
        }
        assert_eq!(found[0], byte(seen), "character {seen}");
        seen += 1;
    }
    let what = if pipe { "a pipe" } else { "a socket" };
    victim.end(&format!("{typed} characters from {what}, none lost or twice"));
}

#[test]
fn a_storm_of_kills_brings_what_is_typed_at_a_serial_port_once() {
    typed(false);
    typed(true);
}

/// Whom the guest prints to.
#[derive(Clone, Copy, Debug)]
enum Reader {
    Socket,
    Pipe,
    Terminal,
    File,
}

impl Reader {
    /// The device's end, and who says what came once nobody has it open any more.
    fn open(self) -> (OwnedFd, Box<dyn FnOnce() -> Vec<u8>>) {
        let read_all = |mut from: File| {
            let reader = std::thread::spawn(move || {
                let (mut all, mut piece) = (Vec::new(), [0; 4096]);
                // EIO: a terminal's other end was closed.
                while let Ok(count @ 1..) = from.read(&mut piece) {
                    all.extend_from_slice(&piece[..count]);
                }
                all
            });
            Box::new(move || reader.join().unwrap()) as Box<dyn FnOnce() -> Vec<u8>>
        };
        match self {
            Self::Socket => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                (theirs.into(), read_all(OwnedFd::from(ours).into()))
            }
            Self::Pipe => {
                let (from, to) = nix::unistd::pipe().unwrap();
                (to, read_all(from.into()))
            }
            Self::Terminal => {
                let ends = nix::pty::openpty(None, None).unwrap();
                let mut settings = tcgetattr(&ends.slave).unwrap();
                cfmakeraw(&mut settings);
                tcsetattr(&ends.slave, SetArg::TCSANOW, &settings).unwrap();
                (ends.slave, read_all(ends.master.into()))
            }
            Self::File => {
                let mut file = tempfile::NamedTempFile::new().unwrap();
                let flags = OFlag::O_WRONLY | OFlag::O_APPEND;
                let end = nix::fcntl::open(file.path(), flags, nix::sys::stat::Mode::empty()).unwrap();
                let read = move || {
                    let mut all = Vec::new();
                    file.read_to_end(&mut all).unwrap();
                    all
                };
                (end, Box::new(read))
            }
        }
    }
}

/// What the core keeps of a guest that prints.
struct Printer<'a> {
    victim: Victim<'a>,
    shadow: ShadowView,
    /// Characters said, and the last of them.
    said: u64,
    last: VecDeque<u8>,
}

fn shadow(chip: &mut Client) -> Option<ShadowView> {
    chip.map_shadow(1).ok().flatten()
}

impl Printer<'_> {
    /// The characters that may be lost with the process: they go to a successor, until one has them.
    fn replay(&mut self) {
        loop {
            let count = usize::try_from(self.said - self.shadow.delivered().min(self.said)).unwrap();
            self.last.drain(..self.last.len().saturating_sub(count));
            let first = self.said - self.last.len() as u64 + 1;
            let Self { victim, shadow: view, last, .. } = self;
            let done = victim.access(|chip| {
                let Some(new) = shadow(chip) else { return false };
                *view = new;
                chip.post(0, FIFO_CONTROL, &[FIFOS]).is_ok()
                    && (first..).zip(&*last).all(|(number, character)| {
                        chip.post(0, number << NUMBER_SHIFT, &[*character]).is_ok()
                    })
                    && chip.read(0, LINE_STATUS, &mut [0]).is_ok()
            });
            if done {
                return;
            }
        }
    }

    /// The guest says so many characters more, if there is room for one.
    fn print(&mut self, count: u64) {
        let (mut status, first) = ([0], self.said + 1);
        if !self.victim.access(|chip| chip.read(0, LINE_STATUS, &mut status).is_ok()) {
            return self.replay();
        }
        if status[0] & EMPTY == 0 {
            return;
        }
        self.said += count;
        self.last.extend((first..=self.said).map(said_as));
        self.last.drain(..self.last.len().saturating_sub(64 << 10));
        let posted = self.victim.access(|chip| {
            (first..first + count)
                .all(|number| chip.post(0, number << NUMBER_SHIFT, &[said_as(number)]).is_ok())
        });
        if !posted {
            self.replay();
        }
    }
}

fn printed(to: Reader) {
    let (end, read) = to.open();
    let kept = memory();
    let resources = [&end, &kept];
    let (output, typed, own_file) = (Some(FdIndex(1)), Some(FdIndex(2)), matches!(to, Reader::File));
    let config = DeviceConfig::Uart(UartConfig { input: None, output, typed, own_file });
    let mut victim = Victim::killed(KILLS, "uart", config, &resources);
    let mut view = None;
    while !victim.access(|chip| {
        view = shadow(chip);
        view.is_some() && chip.write(0, FIFO_CONTROL, &[FIFOS]).is_ok()
    }) {}
    let shadow = view.take().unwrap();
    let mut printer = Printer { victim, shadow, said: 0, last: VecDeque::new() };
    let mut random = Random(0x1234_5678_9abc_def1);
    while printer.victim.kills < KILLS {
        let most = if random.below(8) == 0 { 400 } else { 16 };
        printer.print(1 + random.below(most));
    }
    let end_at = Instant::now() + LIMIT;
    while printer.shadow.delivered() != printer.said {
        assert!(Instant::now() < end_at, "{} of {}", printer.shadow.delivered(), printer.said);
        std::thread::sleep(Duration::from_millis(1));
    }
    let said = printer.said;
    let what = format!("{said} characters to {to:?}");
    let victim = printer.victim;
    let kills = u64::from(victim.kills);
    victim.end(&what);
    drop(end);
    let found = read();
    let most = match to {
        Reader::Socket | Reader::File => 0,
        Reader::Pipe => 4096,
        Reader::Terminal => 256,
    };
    if most == 0 {
        let different = found.iter().zip(1..).find(|(found, number)| **found != said_as(*number));
        assert_eq!((different, found.len() as u64), (None, said), "{to:?}");
        return println!("uart: none of them lost or twice");
    }
    // A pipe and a terminal do not say what they have got: what was being written in the instant of a death comes again.
    let matches = |at: usize, number: u64| {
        let following = found[at..].iter().take(3 * LINE);
        following.zip(number..).all(|(found, number)| *found == said_as(number))
    };
    let (mut next, mut repeats, mut twice) = (1_u64, 0_u64, 0_u64);
    for (at, character) in found.iter().enumerate() {
        if *character != said_as(next) {
            let back = (1..=most.min(next - 1)).find(|back| matches(at, next - back));
            let back = back.unwrap_or_else(|| panic!("{to:?}: character {next} is missing"));
            (next, repeats, twice) = (next - back, repeats + 1, twice + back);
        }
        next += 1;
    }
    assert_eq!(next - 1, said, "{to:?}: characters are missing at the end");
    assert!(repeats <= kills, "{to:?}: {repeats} writes come twice");
    println!("uart: none of them lost, {twice} twice in {repeats} writes");
}

#[test]
fn a_storm_of_kills_prints_each_character_of_a_serial_port_once_to_a_socket_or_file() {
    printed(Reader::Socket);
    printed(Reader::File);
}

#[test]
fn a_storm_of_kills_loses_no_character_that_a_serial_port_prints_to_a_pipe_or_terminal() {
    printed(Reader::Pipe);
    printed(Reader::Terminal);
}
