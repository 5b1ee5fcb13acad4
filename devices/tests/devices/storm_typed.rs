//! Kills of a console at which somebody types: what is on its way to the guest arrives, each byte once.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{ConsoleConfig, DeviceConfig, FdIndex, TYPED};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::driver::{BUFFERS, Random};
use crate::storm::{OTHER_KILLS, Victim, check_pause};

/// Bytes typed ahead.
const AHEAD: u64 = 200;
/// Buffers of the guest, and bytes of each.
const DEPTH: u64 = 8;
const ROOM: u64 = 24;

pub fn byte(number: u64) -> u8 {
    (number * 7 % 251) as u8
}

pub fn memory() -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * TYPED).unwrap();
    file.into()
}

/// A pipe or a socket pair: the end that is typed at, which does not wait, and that of the device.
pub fn way(pipe: bool) -> (File, OwnedFd) {
    let (typing, device) = if pipe {
        let (device, typing) = nix::unistd::pipe().unwrap();
        (typing, device)
    } else {
        let (typing, device) = UnixStream::pair().unwrap();
        (typing.into(), device.into())
    };
    fcntl(&typing, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    (typing.into(), device)
}

/// Types some bytes more.
pub fn type_on(typing: &mut File, typed: &mut u64, seen: u64) {
    while *typed < seen + AHEAD && typing.write(&[byte(*typed), byte(*typed + 1)]).is_ok() {
        *typed += 2;
    }
}

fn console(pipe: bool) {
    let (mut typing, end) = way(pipe);
    let kept = memory();
    let resources = [&end, &kept];
    let (input, typed) = (Some(FdIndex(1)), Some(FdIndex(2)));
    let config = DeviceConfig::Console(ConsoleConfig { input, output: None, size: None, typed });
    let mut victim = Victim::new("console", config, &resources, 2);
    let mut free: Vec<u64> = (0..DEPTH).map(|slot| BUFFERS + slot * ROOM).collect();
    let mut posted = HashMap::new();
    let (mut typed, mut seen, mut longest) = (0, 0, Duration::ZERO);
    let mut random = Random(0x2222_4444_6666_8889);
    for kill in 0..=OTHER_KILLS {
        let last = kill == OTHER_KILLS;
        let end = Instant::now()
            + Duration::from_micros(random.below(4000))
            + if last { crate::supervised::LIMIT } else { Duration::ZERO };
        let mut back = Vec::new();
        while Instant::now() < end && !(last && seen == typed) {
            if !last {
                type_on(&mut typing, &mut typed, seen);
            }
            let ram = victim.driver.ram.clone();
            let driver = &mut victim.driver;
            while let Some(address) = free.pop() {
                let head = driver.queues[0].submit(&ram, &[(address, ROOM as u32, true)]);
                posted.insert(head, address);
            }
            driver.queues[0].kick();
            back.extend(std::iter::from_fn(|| driver.queues[0].finished(&ram)));
            take(&victim, &mut posted, &mut free, &mut back, &mut seen);
        }
        if !last {
            longest = longest.max(victim.kill(|_, _, done| back.push(done)));
            take(&victim, &mut posted, &mut free, &mut back, &mut seen);
        }
    }
    assert_eq!(seen, typed, "bytes are lost");
    let what = if pipe { "a pipe" } else { "a socket" };
    println!(
        "console, {what}: {OTHER_KILLS} kills under {typed} bytes, none lost or twice: pause at most {longest:.1?}"
    );
    check_pause(longest);
    victim.process.stop();
}

fn take(
    victim: &Victim<'_>,
    posted: &mut HashMap<u16, u64>,
    free: &mut Vec<u64>,
    back: &mut Vec<(u16, u32)>,
    seen: &mut u64,
) {
    for (head, len) in back.drain(..) {
        let address = posted.remove(&head).expect("a buffer comes back twice");
        for found in victim.driver.get(address, len as usize) {
            assert_eq!(found, byte(*seen), "byte {seen}");
            *seen += 1;
        }
        free.push(address);
    }
}

#[test]
fn a_storm_of_kills_takes_nothing_from_what_is_typed_at_a_console() {
    console(false);
    console(true);
}
