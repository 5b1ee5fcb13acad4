//! Two cards of one guest, each at a tap of its own: ours, and QEMU's in its own process. By the newer QEMU, since 7.2 gives a vhost-user
//! card no interrupts of its own in emulation.

use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{CLOSE, Contender, PATIENCE, named, print, turns};
use crate::NEW_QEMU;
use crate::guest::{Guest, Service};
use crate::traffic::{archive, modules, run as command, text};

/// Bytes of TCP in one run.
const STREAM: &str = "128M";
/// Packets that the guest sends in one run, and seconds in which those that it receives are counted.
const PACKETS: u32 = 100_000;
const SECONDS: u32 = 2;

/// Adds iperf3 to an archive for the guest, with its libraries and what loads them.
fn add_iperf3(archive: &Path) -> Result<(), String> {
    let script = "iperf3=$(command -v iperf3) || { echo 'iperf3 is not installed (Debian: iperf3)'; exit 1; }; \
        tar -rhf \"$0\" --transform 's:.*/::' \"$iperf3\" $(ldd \"$iperf3\" | grep -o '/[^ ]*')";
    let output = Command::new("sh").args(["-c", script]).arg(archive).output().map_err(text)?;
    let said = [output.stdout, output.stderr].concat();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&said).into_owned()) }
}

/// Mbit a second that arrived, as iperf3 says.
fn stream(guest: &mut Guest, number: usize, direction: &str) -> Result<f64, String> {
    let said = guest.run(&format!(
        "./ld-linux-x86-64.so.2 --library-path . ./iperf3 -c 10.9.{number}.1 -n {STREAM} -f m {direction} | grep receiver"
    ))?;
    let mut words = said.split_whitespace().rev().skip_while(|word| *word != "Mbits/sec").skip(1);
    words.next().and_then(|word| word.parse().ok()).ok_or(said)
}

/// Packets of 60 bytes a second that the kernel's own generator in the guest sends to a station that nobody is, as it says itself.
fn send(guest: &mut Guest, number: usize) -> Result<f64, String> {
    let card = format!("$card{number}");
    let said = guest.run(&format!(
        "echo rem_device_all >/proc/net/pktgen/kpktgend_0; echo add_device {card} >/proc/net/pktgen/kpktgend_0; \
         for it in 'count {PACKETS}' 'pkt_size 60' 'delay 0' 'clone_skb 0' 'dst 10.9.9.9' 'dst_mac 02:00:00:00:00:99'; do echo \"$it\" >/proc/net/pktgen/{card}; done; \
         echo start >/proc/net/pktgen/pgctrl; grep -A1 'Result: OK' /proc/net/pktgen/{card}"
    ))?;
    let rate = said.split_whitespace().find_map(|word| word.strip_suffix("pps"));
    rate.and_then(|rate| rate.parse().ok()).ok_or(said)
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
    let mut server = Command::new("iperf3");
    server.arg("-s");
    let _server = Service::other(server, folder.path().to_owned())?;
    let disk = modules(folder.path())?;
    add_iperf3(&disk)?;
    let mut options = [
        "-chardev",
        &format!("socket,id=c,path={}", service.socket.display()),
        "-netdev",
        "vhost-user,id=n,chardev=c",
        "-device",
        "virtio-net-pci,netdev=n,mac=52:54:00:77:00:01",
        "-netdev",
        "tap,id=t,ifname=theirs,script=no,downscript=no,vhost=off",
        "-device",
        "virtio-net-pci,netdev=t,mac=52:54:00:77:00:02",
    ]
    .map(str::to_owned)
    .to_vec();
    options.extend(archive(&disk));
    let mut guest = Guest::start(NEW_QEMU, &folder, "net", &options)?;
    guest.set_patience(PATIENCE);
    guest.boot()?;
    guest.run("for it in /sys/class/net/eth*; do name=${it##*/}; number=$(cat $it/address); number=${number#*:*:*:*:*:0}; ip addr add 10.9.$number.2/24 dev $name; ip link set $name up; \
        if [ $number = 1 ]; then card1=$name; else card2=$name; fi; done; \
        ping -c 1 -W 10 10.9.1.1 >/dev/null && ping -c 1 -W 10 10.9.2.1 >/dev/null; cd /tmp && tar -xf /dev/vda && insmod pktgen.ko")?;
    let peer = format!("{}, in its process, tap", named(NEW_QEMU));
    let contenders =
        [Some(service.child.id()), None].map(|back_end| Contender { back_end, guest: Some(guest.pid()) });
    let show = |what: &str, unit: &str, figures: Vec<super::Figures>| {
        if let [ours, theirs] = figures.as_slice() {
            print(what, &peer, unit, ours, theirs, 1.0);
        }
    };
    for (what, direction) in
        [("net, TCP to the guest, iperf3", "-R"), ("net, TCP from the guest, iperf3", "")]
    {
        let figures = turns(CLOSE * rounds, &contenders, |turn| stream(&mut guest, turn + 1, direction))?;
        show(what, "Mbit/s", figures);
    }
    let figures = turns(rounds, &contenders, |turn| send(&mut guest, turn + 1))?;
    show("net, packets of 60 bytes from the guest", "1/s", figures);
    let figures = turns(rounds, &contenders, |turn| receive(&mut guest, turn + 1))?;
    show("net, packets of 60 bytes to the guest", "1/s", figures);
    Ok(())
}
