//! Kills of a network card's process whose way out is passt, under a TCP connection of a guest. The guest is Linux's own network
//! stack in a network of its own: what its tap sends goes through the card's queues, and the other way round.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::message::{DeviceConfig, FdIndex, NetBackend, NetConfig};
use bulkhead_ipc::tap::Tap;
use nix::sched::{CloneFlags, unshare};

use crate::driver::{BUFFERS, Driver, Random};
use crate::net::{config, memory, skipped};
use crate::storm::{OTHER_KILLS, Victim, check_pause};
use crate::storm_net::{DEPTH, RECEIVE, TRANSMIT};
use crate::supervised::LIMIT;

/// Room for a packet with its header.
const ROOM: u64 = 4096;
const IN: u64 = BUFFERS + DEPTH * ROOM;
/// Bytes that are sent at once; each is eight numbers that count on.
const PIECE: usize = 64;
/// passt takes connections to the gateway to the host.
const GATEWAY: &str = "10.8.0.1";

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn piece(number: u64) -> Vec<u8> {
    (0..PIECE as u64 / 8)
        .flat_map(|word| (number * 8 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

/// Sends until it is enough.
fn serve(listener: &TcpListener, enough: &AtomicBool) -> u64 {
    let (mut stream, _) = listener.accept().unwrap();
    let mut sent = 0;
    while !enough.load(Ordering::Relaxed) {
        let bytes: Vec<u8> = (sent..sent + 16).flat_map(piece).collect();
        stream.write_all(&bytes).unwrap();
        sent += 16;
    }
    sent
}

/// In the guest: reads to the end; how many pieces came, which must be those that were sent.
fn download(port: u16) -> u64 {
    let mut stream = TcpStream::connect((GATEWAY, port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (mut bytes, mut came) = ([0; PIECE], 0);
    loop {
        match stream.read(&mut bytes[..1]).unwrap() {
            0 => return came,
            _ => stream.read_exact(&mut bytes[1..]).unwrap(),
        }
        assert!(bytes[..] == piece(came), "piece {came} is another");
        came += 1;
    }
}

/// A guest's network, and what it downloads from a port of the host.
fn guest(port: u16) -> (File, JoinHandle<u64>) {
    let (tell, told) = mpsc::channel();
    let guest = spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let tap = Tap::open("eth", 1).unwrap();
        tap.configure(None).unwrap();
        ip("addr add 10.8.0.2/24 dev eth");
        tell.send(tap.queues.into_iter().next().unwrap()).unwrap();
        download(port)
    });
    (told.recv().unwrap(), guest)
}

/// passt as the supervisor starts it, and the card's end of the stream.
fn passt() -> (Child, OwnedFd) {
    let (device, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--fd", "0", "-a", "10.8.0.2", "-n", "24", "-g", GATEWAY]);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    (command.spawn().unwrap(), device.into())
}

/// The guest's tap at the card's queues.
struct Guest {
    tap: File,
    free_in: Vec<u64>,
    free_out: Vec<u64>,
    flying: [Vec<(u16, u64)>; 2],
}

impl Guest {
    fn done(&mut self, driver: &Driver, queue: usize, (head, len): (u16, u32)) {
        let at =
            self.flying[queue].iter().position(|(flying, _)| *flying == head).expect("it comes back twice");
        let (_, address) = self.flying[queue].swap_remove(at);
        if queue == TRANSMIT {
            self.free_out.push(address);
            return;
        }
        // It may be down for a moment, as any interface.
        let _taken = self.tap.write(&driver.get(address, len as usize));
        self.free_in.push(address);
    }

    fn turn(&mut self, driver: &mut Driver) {
        let ram = driver.ram.clone();
        let mut packet = [0; ROOM as usize];
        while let Some(address) = self.free_out.last().copied() {
            let Ok(count) = self.tap.read(&mut packet) else { break };
            self.free_out.pop();
            driver.put(address, &packet[..count]);
            let head = driver.queues[TRANSMIT].submit(&ram, &[(address, count as u32, false)]);
            self.flying[TRANSMIT].push((head, address));
        }
        while let Some(address) = self.free_in.pop() {
            let head = driver.queues[RECEIVE].submit(&ram, &[(address, ROOM as u32, true)]);
            self.flying[RECEIVE].push((head, address));
        }
        for queue in [RECEIVE, TRANSMIT] {
            driver.queues[queue].kick();
            while let Some(finished) = driver.queues[queue].finished(&ram) {
                self.done(driver, queue, finished);
            }
        }
    }
}

#[test]
fn a_storm_of_kills_breaks_no_connection_through_passt() {
    if skipped("a_storm_of_kills_breaks_no_connection_through_passt", &["passt", "ip"]) {
        return;
    }
    // The host's side has a network of its own, too, so that no port is anybody else's.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    for words in
        ["link set lo up", "tuntap add way mode tap", "addr add 10.8.0.2/24 dev way", "link set way up"]
    {
        ip(words);
    }
    ip("route add default via 10.8.0.1 dev way");
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let enough = Arc::new(AtomicBool::new(false));
    let heard = enough.clone();
    let server = spawn(move || serve(&listener, &heard));
    let (mut passt, end) = passt();
    let (tap, downloads) = guest(port);

    let kept = memory();
    let resources = [&end, &kept];
    let backend = NetBackend::Stream(Some(FdIndex(1)));
    let card = NetConfig { backend, kept: Some(FdIndex(2)), ..config() };
    let mut victim = Victim::new("net", DeviceConfig::Net(card), &resources, 3);
    let buffers = |from: u64| (0..DEPTH).map(|slot| from + slot * ROOM).collect();
    let (free_in, free_out) = (buffers(IN), buffers(BUFFERS));
    let mut guest = Guest { tap, free_in, free_out, flying: [Vec::new(), Vec::new()] };
    let mut random = Random(0x1357_2468_9bdf_ace0);
    let mut longest = Duration::ZERO;
    for kill in 0..OTHER_KILLS {
        // The connection is made before the first.
        let micros = if kill == 0 { 300_000 } else { 2000 + random.below(15_000) };
        let until = Instant::now() + Duration::from_micros(micros);
        while Instant::now() < until {
            guest.turn(&mut victim.driver);
        }
        longest = longest.max(victim.kill(|driver, queue, done| guest.done(driver, queue, done)));
    }
    enough.store(true, Ordering::Relaxed);
    let end = Instant::now() + 2 * LIMIT;
    while !downloads.is_finished() {
        guest.turn(&mut victim.driver);
        assert!(Instant::now() < end, "the download never ends");
    }
    let (sent, came) = (server.join().unwrap(), downloads.join().unwrap());
    assert_eq!(came, sent);
    assert!(came > u64::from(OTHER_KILLS), "the connection stood still: {came} pieces");
    assert!(passt.try_wait().unwrap().is_none(), "passt has ended");
    println!(
        "passt: {OTHER_KILLS} kills under one connection that brought {} KiB: pause at most {longest:.1?}",
        (came * PIECE as u64) >> 10
    );
    check_pause(longest);
    passt.kill().unwrap();
    passt.wait().unwrap();
    victim.process.kill();
}
