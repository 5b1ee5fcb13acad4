//! Kills of devices behind registers: the flash chip and the keyboard. A thread kills at a random moment while accesses go on;
//! what was not answered is done again, as the core does it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{
    DeviceConfig, FdIndex, FlashConfig, FromDevice, Key, KeyboardConfig, ToDevice, WatchdogConfig,
};
use bulkhead_ipc::jail::Enforcement;
use bulkhead_ipc::memory::GuestRam;
use bulkhead_ipc::vfio_user::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::driver::Random;
use crate::storm::{OTHER_KILLS, check_pause};
use crate::supervised::{LIMIT, Supervised};

/// A device that is killed by a thread while it is accessed.
pub struct Victim<'a> {
    kind: &'static str,
    config: DeviceConfig,
    resources: &'a [&'a OwnedFd],
    process: Supervised,
    client: Client,
    killer: Option<JoinHandle<Instant>>,
    pub kills: u32,
    /// How often it is to be killed.
    most: u32,
    longest: Duration,
    random: Random,
}

impl<'a> Victim<'a> {
    pub fn new(kind: &'static str, config: DeviceConfig, resources: &'a [&'a OwnedFd]) -> Self {
        Self::killed(OTHER_KILLS, kind, config, resources)
    }

    pub fn killed(most: u32, kind: &'static str, config: DeviceConfig, resources: &'a [&'a OwnedFd]) -> Self {
        let (process, client) = Self::start(kind, &config, resources);
        let random = Random(0x7777_1234_8888_4321);
        let mut victim = Self {
            kind,
            config,
            resources,
            process,
            client,
            killer: None,
            kills: 0,
            most,
            longest: Duration::ZERO,
            random,
        };
        victim.threaten();
        victim
    }

    fn start(kind: &str, config: &DeviceConfig, resources: &[&OwnedFd]) -> (Supervised, Client) {
        let mut process = Supervised::start(kind, config.clone(), resources, Enforcement::Supervised);
        let stream = process.stream.take().unwrap();
        (process, Client::connect(stream.into(), kind, LIMIT).unwrap())
    }

    /// Somebody kills the process in a while, unless it was killed often enough.
    fn threaten(&mut self) {
        if self.kills < self.most {
            let (pid, micros) = (self.process.pid(), self.random.below(4000));
            self.killer = Some(spawn(move || {
                sleep(Duration::from_micros(micros));
                kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
                Instant::now()
            }));
        }
    }

    /// An access that is answered, or the start of a successor.
    pub fn access(&mut self, access: impl FnOnce(&mut Client) -> bool) -> bool {
        if access(&mut self.client) {
            return true;
        }
        let killed = self.killer.take().expect("the process ended by itself").join().unwrap();
        self.process.kill();
        (self.process, self.client) = Self::start(self.kind, &self.config, self.resources);
        self.longest = self.longest.max(killed.elapsed());
        self.kills += 1;
        self.threaten();
        false
    }

    pub fn end(self, what: &str) {
        println!("{}: {} kills under {what}: pause at most {:.1?}", self.kind, self.kills, self.longest);
        check_pause(self.longest);
        self.process.stop();
    }
}

#[test]
fn a_storm_of_kills_leaves_every_byte_in_the_flash_chip_that_was_programmed() {
    const SIZE: u64 = 64 << 10;
    const BLOCK: u64 = 4096;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![0xFF; SIZE as usize], 0).unwrap();
    let memory = GuestRam::create_at(0, SIZE).unwrap();
    let shown: OwnedFd = memory.regions().next().unwrap().fd.try_clone_to_owned().unwrap();
    let stored: OwnedFd = file.try_clone().unwrap().into();
    let resources = [&stored, &shown];
    let config = FlashConfig { file: FdIndex(1), memory: FdIndex(2), size: SIZE };
    let mut victim = Victim::new("flash", DeviceConfig::Flash(config), &resources);
    let mut model = vec![0xFF_u8; SIZE as usize];
    let mut random = Random(0x1029_3847_5665_7483);
    let mut commands = 0_u64;
    while victim.kills < OTHER_KILLS {
        // A byte is programmed, or sometimes a block erased: two writes, which a successor is told from the first on.
        let erase = random.below(40) == 0;
        let (at, first, second) = if erase {
            (random.below(SIZE / BLOCK) * BLOCK, 0x20, 0xD0)
        } else {
            (random.below(SIZE), 0x40, random.below(256) as u8)
        };
        while ![first, second]
            .into_iter()
            .all(|byte| victim.access(|client| client.write(0, at, &[byte]).is_ok()))
        {}
        if erase {
            model[at as usize..(at + BLOCK) as usize].fill(0xFF);
        } else {
            model[at as usize] &= second;
        }
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        assert_eq!(byte[0], model[at as usize], "what was acknowledged is not in the file");
        while !victim.access(|client| client.write(0, at, &[0xFF]).is_ok()) {}
        commands += 1;
    }
    for of in [&file, &File::from(shown.try_clone().unwrap())] {
        let mut found = vec![0; SIZE as usize];
        of.read_exact_at(&mut found, 0).unwrap();
        assert!(found == model, "the chip holds something else");
    }
    victim.end(&format!("{commands} commands"));
}

/// Ports of the controller in its region.
const DATA: u64 = 0;
const COMMAND: u64 = 1;

/// The guest at the keyboard, whose accesses have numbers, and the supervisor, whose keys have.
struct Typist<'a> {
    victim: Victim<'a>,
    number: u8,
    /// The keys struck last, until a process has taken them.
    unread: Option<(u64, Vec<Key>)>,
    /// How often they were sent again.
    again: u64,
}

impl Typist<'_> {
    fn strike(&mut self, number: u64, keys: Vec<Key>) {
        (self.unread, self.again) = (Some((number, keys)), 0);
        self.send();
    }

    fn send(&self) {
        if let Some((number, keys)) = self.unread.clone() {
            // A process that has just died takes the message along.
            let _sent =
                self.victim.process.channel.send(&ToDevice::Keys { number, newest: number, keys }, &[]);
        }
    }

    /// An access with its number, again by a successor until it is answered.
    fn access(&mut self, port: u64, write: Option<u8>) -> u8 {
        self.number = self.number.wrapping_add(1);
        let offset = u64::from(self.number) * 256 + port;
        let mut byte = [0];
        loop {
            let channel = &self.victim.process.channel;
            while let Ok((FromDevice::KeysTaken(number), _)) = channel.recv(Some(Duration::ZERO)) {
                self.unread.take_if(|(unread, _)| *unread <= number);
            }
            let answered = self.victim.access(|client| match write {
                Some(value) => client.write(0, offset, &[value]).is_ok(),
                None => client.read(0, offset, &mut byte).is_ok(),
            });
            if answered {
                return byte[0];
            }
            self.again += u64::from(self.unread.is_some());
            self.send();
        }
    }

    /// The next byte from the keyboard.
    fn next(&mut self) -> u8 {
        let end = Instant::now() + LIMIT;
        while self.access(COMMAND, None) & 1 == 0 {
            assert!(Instant::now() < end, "a key is lost");
        }
        self.access(DATA, None)
    }
}

#[test]
fn a_storm_of_kills_loses_no_key_and_strikes_none_twice() {
    /// Letters A to H: scan code set 2, and what the controller makes of it.
    const KEYS: [(u16, u8); 8] = [
        (0x1C, 0x1E),
        (0x32, 0x30),
        (0x21, 0x2E),
        (0x23, 0x20),
        (0x24, 0x12),
        (0x2B, 0x21),
        (0x34, 0x22),
        (0x33, 0x23),
    ];
    let state = tempfile::tempfile().unwrap();
    let state: OwnedFd = state.into();
    let resources = [&state];
    let config = DeviceConfig::Keyboard(KeyboardConfig { state: FdIndex(1) });
    let mut typist =
        Typist { victim: Victim::new("keyboard", config, &resources), number: 0, unread: None, again: 0 };
    // Translated, with an interrupt.
    typist.access(COMMAND, Some(0x60));
    typist.access(DATA, Some(0x41));
    let (mut keys, mut again) = (0_u64, 0_u64);
    while typist.victim.kills < OTHER_KILLS {
        let (code, translated) = KEYS[(keys % 8) as usize];
        keys += 1;
        let strokes = [true, false].map(|pressed| Key { code, pressed }).to_vec();
        typist.strike(keys, strokes);
        assert_eq!(typist.next(), translated, "key {keys}");
        assert_eq!(typist.next(), translated | 0x80, "key {keys} is stuck");
        again += typist.again;
    }
    assert_eq!(typist.access(COMMAND, None) & 1, 0, "more than was typed");
    assert!(again > 0, "no key was ever unread when a process died");
    typist.victim.end(&format!("{keys} keys, {again} of which a successor was told again, none lost"));
}

#[test]
fn a_storm_of_kills_carries_out_each_access_to_the_watchdog_once() {
    const RELOAD: u64 = 0x0C;
    const UNLOCK: [u32; 2] = [0x80, 0x86];
    let state: OwnedFd = tempfile::tempfile().unwrap().into();
    let resources = [&state];
    let config = WatchdogConfig { state: FdIndex(1), expired: false, interrupt: false };
    let mut victim = Victim::new("watchdog", DeviceConfig::Watchdog(config), &resources);
    let mut number = 0_u8;
    let mut access = |victim: &mut Victim<'_>, register: u64, write: Option<u32>| {
        number = number.wrapping_add(1);
        let (offset, mut word) = (u64::from(number) << 8 | register, [0; 4]);
        while !victim.access(|client| match write {
            Some(value) => client.write(0, offset, &value.to_le_bytes()).is_ok(),
            None => client.read(0, offset, &mut word).is_ok(),
        }) {}
        u32::from_le_bytes(word)
    };
    let mut writes = 0_u32;
    while victim.kills < OTHER_KILLS {
        let (register, value) = (u64::from(writes % 2) * 4, writes.wrapping_mul(7919) & 0xF_FFFF);
        for word in UNLOCK {
            access(&mut victim, RELOAD, Some(word));
        }
        access(&mut victim, register, Some(value));
        assert_eq!(access(&mut victim, register, None), value, "write {writes} is lost");
        // An unlocking that is carried out twice would let this one pass.
        access(&mut victim, register, Some(!value & 0xF_FFFF));
        assert_eq!(access(&mut victim, register, None), value, "write {writes}: unlocked twice");
        writes += 1;
    }
    victim.end(&format!("{writes} writes, each after two that unlock it"));
}
