//! Throughput of our devices beside that of others, in stock guests in QEMU's emulation. Contenders take turns; figures are medians.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};

use crate::guest::{Guest, Service, random_file};
use crate::ours::{RECONNECT, device};
use crate::traffic::{dial, modules, run as command, text};
use crate::{DEVICE_VSOCK, NEW_VIRTIOFSD, Peer, QEMU, VIRTIOFSD};

/// MiB of the file on a share, of what goes through a network card, and through a stream and back.
const FILE: u64 = 64;
const NET: u64 = 64;
const VSOCK: usize = 16;
/// Small files that are looked up and read.
const SMALL: usize = 300;

/// What was measured, with both contenders' figures.
struct Line {
    what: String,
    peer: String,
    unit: &'static str,
    ours: Vec<f64>,
    theirs: Vec<f64>,
    limit: f64,
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// All of it, as a Markdown table.
pub fn run(rounds: usize) -> Result<String, String> {
    let alone = move || unshare(CloneFlags::CLONE_NEWNET).map_err(text).and_then(|()| net(rounds));
    let mut lines = thread::spawn(alone).join().map_err(|_| "panicked")??;
    lines.extend(fs(rounds)?);
    lines.extend(vsock(rounds)?);
    let mut table = "\n## Devices under QEMU\n\nThe guest is Debian's kernel in QEMU's emulation, which takes most of the time: ratios are nearer to 1 than the \
        devices themselves are.\n\n| load | other | bulkhead-device | other | | ratio | |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for line in &mut lines {
        let (ours, theirs) = (median(&mut line.ours), median(&mut line.theirs));
        let ratio = ours / theirs;
        let verdict = if ratio >= line.limit { "holds" } else { "**missed**" };
        let Line { what, peer, unit, limit, .. } = line;
        let _infallible = writeln!(
            table,
            "| {what} | {peer} | {ours:.1} | {theirs:.1} | {unit} | {ratio:.2} | {verdict} (limit {limit}) |"
        );
    }
    Ok(table)
}

fn named(peer: Peer) -> String {
    format!("{} {}", peer.name, peer.version().unwrap_or_default())
}

/// Seconds that a line of shell takes in the guest.
fn time(guest: &mut Guest, line: &str) -> Result<f64, String> {
    let begin = Instant::now();
    guest.run(line)?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Two cards of one guest, each at a tap of its own: ours, and QEMU's in its own process.
fn net(rounds: usize) -> Result<Vec<Line>, String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let service =
        Service::start(folder.path(), "net", "net.sock", &["--tap", "ours", "--mac", "52:54:00:77:00:01"]);
    command("ip", "tuntap add theirs mode tap vnet_hdr")?;
    for (number, tap) in [(1, "ours"), (2, "theirs")] {
        command("ip", &format!("addr add 10.9.{number}.1/24 dev {tap}"))?;
        command("ip", &format!("link set {tap} up"))?;
    }
    let bytes = vec![0x5A; usize::try_from(NET << 20).unwrap()];
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
    let chardev = format!("socket,id=c,path={}", service.socket.display());
    let options = [
        "-chardev",
        &chardev,
        "-netdev",
        "vhost-user,id=n,chardev=c",
        "-device",
        "virtio-net-pci,netdev=n,vectors=0,mac=52:54:00:77:00:01",
        "-netdev",
        "tap,id=t,ifname=theirs,script=no,downscript=no,vhost=off",
        "-device",
        "virtio-net-pci,netdev=t,mac=52:54:00:77:00:02",
    ];
    let mut guest = Guest::start(QEMU, &folder, "net", &options.map(str::to_owned))?;
    guest.boot()?;
    guest.run("for it in /sys/class/net/eth*; do name=${it##*/}; number=$(cat $it/address); number=${number#*:*:*:*:*:0}; ip addr add 10.9.$number.2/24 dev $name; ip link set $name up; done; \
        ping -c 1 -W 10 10.9.1.1 >/dev/null && ping -c 1 -W 10 10.9.2.1 >/dev/null; dd if=/dev/zero of=/tmp/file bs=1M count=32 2>/dev/null")?;
    let mut lines = Vec::new();
    for (what, mebi, line) in [
        ("net, TCP to the guest", NET as f64, "nc 10.9.@.1 8000 </dev/null >/dev/null"),
        ("net, TCP from the guest", 32.0, "nc 10.9.@.1 8001 </tmp/file >/dev/null"),
    ] {
        let mut figures = [Vec::new(), Vec::new()];
        for round in 0..rounds * 2 {
            let turn = usize::from(round % 4 == 1 || round % 4 == 2);
            figures[turn].push(mebi / time(&mut guest, &line.replace('@', &(turn + 1).to_string()))?);
        }
        let [ours, theirs] = figures;
        let peer = format!("{}, in its process, tap", named(QEMU));
        lines.push(Line { what: what.to_owned(), peer, unit: "MiB/s", ours, theirs, limit: 1.0 });
    }
    Ok(lines)
}

/// Three shares of one guest, of the same tree.
fn fs(rounds: usize) -> Result<Vec<Line>, String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let at = |name: &str| folder.path().join(name);
    let tree = at("tree");
    std::fs::create_dir_all(tree.join("small")).map_err(text)?;
    random_file(&tree.join("file"), usize::try_from(FILE << 20).unwrap());
    for number in 0..SMALL {
        std::fs::write(tree.join(format!("small/{number}")), vec![b'x'; 2000]).map_err(text)?;
    }
    let ours = Service::start(folder.path(), "fs", "ours.sock", &["--shared-dir", tree.to_str().unwrap()]);
    let mut old = Command::new(VIRTIOFSD.path());
    old.arg(format!("--socket-path={}", at("old.sock").display()))
        .arg("-o")
        .arg(format!("source={}", tree.display()));
    let old = Service::other(old, at("old.sock"))?;
    let mut new = Command::new(NEW_VIRTIOFSD.path());
    new.arg("--socket-path").arg(at("new.sock")).arg("--shared-dir").arg(&tree).args(["--sandbox", "chroot"]);
    let new = Service::other(new, at("new.sock"))?;
    let mut options = Vec::new();
    for (tag, service) in [("ours", &ours), ("old", &old), ("new", &new)] {
        let device = device(tag, service, &format!("vhost-user-fs-pci,tag={tag}"));
        options.extend(device.into_iter().map(|option| option.replace(RECONNECT, "")));
    }
    let disk = modules(folder.path())?;
    options.extend(["-drive".to_owned(), format!("file={},if=virtio,format=raw", disk.display())]);
    let mut guest = Guest::start(QEMU, &folder, "fs", &options)?;
    guest.boot()?;
    guest.run("cd /tmp && tar -xf /dev/vda && insmod fuse.ko; insmod virtiofs.ko; for it in ours old new; do mkdir /$it && mount -t virtiofs $it /$it || exit 1; done")?;
    let mut lines = Vec::new();
    for (what, unit, amount, line) in [
        ("fs, a file read by 1 MiB", "MiB/s", FILE as f64, "dd if=/@/file of=/dev/null bs=1M 2>/dev/null"),
        (
            "fs, a file written by 1 MiB",
            "MiB/s",
            32.0,
            "dd if=/dev/zero of=/@/new bs=1M count=32 2>/dev/null",
        ),
        ("fs, small files looked up and read", "1/s", SMALL as f64, "cat /@/small/* >/dev/null"),
    ] {
        let mut figures = [Vec::new(), Vec::new(), Vec::new()];
        for round in 0..rounds {
            for turn in 0..3 {
                let turn = (turn + round) % 3;
                let tag = ["ours", "old", "new"][turn];
                guest.run("echo 3 >/proc/sys/vm/drop_caches")?;
                figures[turn].push(amount / time(&mut guest, &line.replace('@', tag))?);
            }
        }
        let [ours, old, new] = figures;
        for (peer, theirs) in [(VIRTIOFSD, old), (NEW_VIRTIOFSD, new)] {
            lines.push(Line {
                what: what.to_owned(),
                peer: named(peer),
                unit,
                ours: ours.clone(),
                theirs,
                limit: 1.0,
            });
        }
    }
    Ok(lines)
}

/// A guest with a vsock that serves an echo at port 7000.
fn echoing(folder: &tempfile::TempDir, name: &str, service: &Service, uds: &Path) -> Result<Guest, String> {
    let options = device("c", service, "vhost-user-vsock-pci").into_iter();
    let options: Vec<String> = options.map(|option| option.replace(RECONNECT, "")).collect();
    for port in [52, 53] {
        let listener = UnixListener::bind(format!("{}_{port}", uds.display())).map_err(text)?;
        // Connections to the second one stay.
        thread::spawn(move || {
            let mut kept = Vec::new();
            for mut stream in listener.incoming().flatten() {
                if port == 53 {
                    kept.push(stream);
                    continue;
                }
                thread::spawn(move || {
                    let mut from = stream.try_clone()?;
                    std::io::copy(&mut from, &mut stream)
                });
            }
        });
    }
    let mut guest = Guest::start(QEMU, folder, name, &options)?;
    guest.boot()?;
    guest.run("for it in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do insmod /modules/$it.ko; done; guest-vsock --streams 1 --kib 1 >/tmp/said 2>&1 & \
        while ! grep -q 'streams ok' /tmp/said; do sleep 0.1; done")?;
    Ok(guest)
}

/// MiB a second there and back.
fn echo(uds: &Path) -> Result<f64, String> {
    let mut stream = dial(uds, 7000)?;
    let mut end = stream.try_clone().map_err(text)?;
    let begin = Instant::now();
    let writer = thread::spawn(move || end.write_all(&vec![0x5A; VSOCK << 20]));
    let mut back = vec![0; VSOCK << 20];
    stream.read_exact(&mut back).map_err(text)?;
    writer.join().map_err(|_| "panicked")?.map_err(text)?;
    Ok(VSOCK as f64 / begin.elapsed().as_secs_f64())
}

fn vsock(rounds: usize) -> Result<Vec<Line>, String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let at = |name: &str| folder.path().join(name);
    let uds = at("ours");
    let options = ["--guest-cid", "3", "--uds-path", uds.to_str().unwrap()];
    let ours = Service::start(folder.path(), "vsock", "ours.sock", &options);
    let mut other = Command::new(DEVICE_VSOCK.path());
    other.args(["--guest-cid", "4", "--socket"]).arg(at("theirs.sock")).arg("--uds-path").arg(at("theirs"));
    let theirs = Service::other(other, at("theirs.sock"))?;
    let _one = echoing(&folder, "one", &ours, &uds)?;
    let _two = echoing(&folder, "two", &theirs, &at("theirs"))?;
    let mut figures = [Vec::new(), Vec::new()];
    for round in 0..rounds * 2 {
        let turn = usize::from(round % 4 == 1 || round % 4 == 2);
        figures[turn].push(echo(&at(["ours", "theirs"][turn]))?);
    }
    let [ours, theirs] = figures;
    let what = "vsock, a stream to the guest and back".to_owned();
    Ok(vec![Line { what, peer: named(DEVICE_VSOCK), unit: "MiB/s", ours, theirs, limit: 2.0 }])
}
