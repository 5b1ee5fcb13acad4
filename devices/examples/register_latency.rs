//! What a register access costs when the UART is another process: `cargo run --release --example register_latency`.
//!
//! Prints nanoseconds for a posted write, a synchronous read, a read from the shadow page, and for one character printed
//! as a kernel does it (LSR, then THR) with and without the shadow page, on all CPUs and on one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark stops at the first surprise")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_devices::stream::Ends;
use bulkhead_devices::uart::{EventLoop, REGION_PORTS, REGION_SHADOW, UartDevice};
use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::vfio_user::shadow::{ShadowPage, ShadowView};
use bulkhead_ipc::vfio_user::{Client, Connection};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const ROUNDS: u32 = 20_000;
const DEADLINE: Duration = Duration::from_secs(5);

/// Time between two accesses of a guest, for the measurement that is not a burst.
const GAP: Duration = Duration::from_micros(15);

fn main() {
    if std::env::args().nth(1).as_deref() == Some("serve") {
        return serve();
    }
    for (name, one_cpu) in [("all CPUs", false), ("one CPU", true)] {
        if one_cpu {
            let mut cpus = CpuSet::new();
            cpus.set(0).unwrap();
            sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
        }
        println!("{name}");
        measure();
    }
}

/// The device's process: the core's stream is standard input.
fn serve() {
    let socket: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let (_control, channel) = Channel::pair().unwrap();
    let connection = Connection::new(socket, DEADLINE).unwrap();
    let null: File = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let device = UartDevice::new(ShadowPage::create().ok(), Ends::new(None, Some(null.into())));
    let events = EventLoop::new(connection, device, &channel).unwrap();
    events.prefer_batches();
    events.run().unwrap();
}

struct Rig {
    child: Child,
    client: Client,
    shadow: ShadowView,
    posted: u16,
}

impl Rig {
    fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs: OwnedFd = theirs.into();
        let program = std::env::current_exe().unwrap();
        let child = Command::new(program).arg("serve").stdin(Stdio::from(theirs)).spawn().unwrap();
        let mut client = Client::connect(ours.into(), "uart", DEADLINE).unwrap();
        let shadow = client.map_shadow(REGION_SHADOW).unwrap().unwrap();
        Self { child, client, shadow, posted: 0 }
    }

    fn post(&mut self) {
        self.client.post(REGION_PORTS, 0, b"x").unwrap();
        self.posted = self.posted.wrapping_add(1);
    }

    fn read(&mut self) -> u8 {
        let mut data = [0];
        self.client.read(REGION_PORTS, 5, &mut data).unwrap();
        data[0]
    }

    fn shadow(&mut self) -> u8 {
        match self.shadow.load().answer(0, self.posted, u32::MAX) {
            Some(value) => value,
            None => self.read(),
        }
    }
}

fn spin() {
    let begin = Instant::now();
    while begin.elapsed() < GAP {
        std::hint::spin_loop();
    }
}

fn time(name: &str, rig: &mut Rig, gap: Duration, mut access: impl FnMut(&mut Rig)) {
    let mut each: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let begin = Instant::now();
            access(rig);
            begin.elapsed().saturating_sub(gap)
        })
        .collect();
    rig.read();
    each.sort_unstable();
    let median = each.get(each.len() / 2).copied().unwrap_or_default();
    let mean = each.iter().sum::<Duration>() / ROUNDS;
    println!("  {name:<48} median {:>6} ns, mean {:>7} ns", median.as_nanos(), mean.as_nanos());
}

fn measure() {
    let mut rig = Rig::start();
    time("posted write, burst", &mut rig, Duration::ZERO, Rig::post);
    time("posted write, one each 15 us", &mut rig, GAP, |rig| {
        rig.post();
        spin();
    });
    time("read, round trip", &mut rig, Duration::ZERO, |rig| assert_eq!(rig.read(), 0x60));
    time("read, shadow page", &mut rig, Duration::ZERO, |rig| assert_eq!(rig.shadow(), 0x60));
    time("character, LSR by round trip, 30 us apart", &mut rig, GAP * 2, |rig| {
        rig.read();
        spin();
        rig.post();
        spin();
    });
    time("character, LSR from the shadow page, 30 us apart", &mut rig, GAP * 2, |rig| {
        rig.shadow();
        spin();
        rig.post();
        spin();
    });
    drop(rig.client);
    assert!(rig.child.wait().unwrap().success());
}
