//! Two cards of one guest, each at a tap of its own: ours, and QEMU's in its own process.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{PATIENCE, named, print, time, turns};
use crate::QEMU;
use crate::guest::{Guest, Service};
use crate::traffic::{archive, modules, run as command, text};

/// MiB that go to the guest, and that come from it, in one run.
const DOWN: u32 = 64;
const UP: u32 = 32;
/// Packets that the guest sends in one run, and seconds in which those that it receives are counted.
const PACKETS: u32 = 40_000;
const SECONDS: u32 = 2;

/// Serves what the guest loads at port 8000, and takes what it sends to 8001.
fn serve() -> Result<(), String> {
    let bytes = vec![0x5A; usize::try_from(DOWN << 20).map_err(text)?];
    let down = TcpListener::bind("0.0.0.0:8000").map_err(text)?;
    thread::spawn(move || down.incoming().flatten().for_each(|mut to| drop(to.write_all(&bytes))));
    let up = TcpListener::bind("0.0.0.0:8001").map_err(text)?;
    thread::spawn(move || {
        for mut from in up.incoming().flatten() {
            let mut bytes = vec![0; 1 << 20];
            while matches!(from.read(&mut bytes), Ok(1..)) {}
            let _heard = from.write_all(b"end");
        }
    });
    Ok(())
}

/// Packets of 60 bytes by the kernel's own generator in the guest, to a station that nobody is.
fn generator(card: &str) -> String {
    format!(
        "echo rem_device_all >/proc/net/pktgen/kpktgend_0; echo add_device {card} >/proc/net/pktgen/kpktgend_0; \
         for it in 'count {PACKETS}' 'pkt_size 60' 'delay 0' 'clone_skb 0' 'dst 10.9.9.9' 'dst_mac 02:00:00:00:00:99'; do echo \"$it\" >/proc/net/pktgen/{card}; done; \
         echo start >/proc/net/pktgen/pgctrl; grep -q 'Result: OK' /proc/net/pktgen/{card}"
    )
}

/// Packets a second that the guest receives while this machine sends as many as it can.
fn receive(guest: &mut Guest, number: usize) -> Result<f64, String> {
    let stop = Arc::new(AtomicBool::new(false));
    let heard = Arc::clone(&stop);
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    let target = format!("10.9.{number}.2:9");
    socket.connect(&target).map_err(text)?;
    let sender = thread::spawn(move || {
        while !heard.load(Ordering::Relaxed) {
            let _full_or_refused = socket.send(&[0; 18]);
        }
    });
    let count = format!("cat /sys/class/net/$card{number}/statistics/rx_packets");
    let counted =
        guest.run(&format!("before=$({count}); sleep {SECONDS}; after=$({count}); echo $((after - before))"));
    stop.store(true, Ordering::Relaxed);
    let _ended = sender.join();
    counted?.trim().parse::<f64>().map(|count| count / f64::from(SECONDS)).map_err(text)
}

pub fn run(rounds: usize) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let service =
        Service::start(folder.path(), "net", "net.sock", &["--tap", "ours", "--mac", "52:54:00:77:00:01"]);
    command("ip", "tuntap add theirs mode tap vnet_hdr")?;
    for (number, tap) in [(1, "ours"), (2, "theirs")] {
        command("ip", &format!("addr add 10.9.{number}.1/24 dev {tap}"))?;
        command("ip", &format!("link set {tap} up"))?;
    }
    serve()?;
    let disk = modules(folder.path())?;
    let mut options = [
        "-chardev",
        &format!("socket,id=c,path={}", service.socket.display()),
        "-netdev",
        "vhost-user,id=n,chardev=c",
        "-device",
        "virtio-net-pci,netdev=n,vectors=0,mac=52:54:00:77:00:01",
        "-netdev",
        "tap,id=t,ifname=theirs,script=no,downscript=no,vhost=off",
        "-device",
        "virtio-net-pci,netdev=t,mac=52:54:00:77:00:02",
    ]
    .map(str::to_owned)
    .to_vec();
    options.extend(archive(&disk));
    let mut guest = Guest::start(QEMU, &folder, "net", &options)?;
    guest.set_patience(PATIENCE);
    guest.boot()?;
    guest.run("for it in /sys/class/net/eth*; do name=${it##*/}; number=$(cat $it/address); number=${number#*:*:*:*:*:0}; ip addr add 10.9.$number.2/24 dev $name; ip link set $name up; \
        if [ $number = 1 ]; then card1=$name; else card2=$name; fi; done; \
        ping -c 1 -W 10 10.9.1.1 >/dev/null && ping -c 1 -W 10 10.9.2.1 >/dev/null; dd if=/dev/zero of=/tmp/file bs=1M count=32 2>/dev/null; \
        cd /tmp && tar -xf /dev/vda && insmod pktgen.ko")?;
    let peer = format!("{}, in its process, tap", named(QEMU));
    let pids = [Some(service.child.id()), None];
    let show = |what: &str, unit: &str, figures: Vec<super::Figures>| {
        if let [ours, theirs] = figures.as_slice() {
            print(what, &peer, unit, ours, theirs, 1.0);
        }
    };
    for (what, mebi, line) in [
        ("net, TCP to the guest", DOWN, "nc 10.9.@.1 8000 </dev/null >/dev/null"),
        ("net, TCP from the guest", UP, "nc 10.9.@.1 8001 </tmp/file >/dev/null"),
    ] {
        let figures = turns(rounds, &pids, |turn| {
            Ok(f64::from(mebi) / time(&mut guest, &line.replace('@', &(turn + 1).to_string()))?)
        })?;
        show(what, "MiB/s", figures);
    }
    let figures = turns(rounds, &pids, |turn| {
        Ok(f64::from(PACKETS) / time(&mut guest, &generator(&format!("$card{}", turn + 1)))?)
    })?;
    show("net, packets of 60 bytes from the guest", "1/s", figures);
    let figures = turns(rounds, &pids, |turn| receive(&mut guest, turn + 1))?;
    show("net, packets of 60 bytes to the guest", "1/s", figures);
    Ok(())
}
