//! A stock guest under our core with back ends of many others at once, each used by the guest's own driver. Needs hardware
//! virtualization, or the lab.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::dpdk::testpmd;
use crate::foreign::Daemon;
use crate::guest::{Guest, SHELL, kernel, random_file, sha256, wait};
use crate::table::Row;
use crate::traffic::{modules, run as command, serve_vsock, talk, text};
use crate::{
    DEVICE_RNG, DEVICE_VSOCK, NEW_VIRTIOFSD, Outcome, PASST, Peer, STORAGE_DAEMON, TESTPMD, VIRTIOFSD,
    program, root,
};

/// Seconds for all of it in the lab.
const LIMIT: &str = "230";
/// Bytes of the file that comes through passt.
const FILE: usize = 2 << 20;

/// A back end that is ended when dropped.
struct Peers {
    children: Vec<Child>,
    folder: PathBuf,
}

impl Drop for Peers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ended = child.kill();
            let _reaped = child.wait();
        }
    }
}

impl Peers {
    fn start(&mut self, mut command: Command, socket: &str) -> Result<&mut Child, String> {
        let log = fs::File::create(self.folder.join(format!("{socket}.log"))).map_err(text)?;
        command.stderr(log).stdout(Stdio::null());
        let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
        self.children.push(child);
        let path = self.folder.join(socket);
        wait(&format!("{socket} of {command:?}"), || Ok(path.exists()))?;
        self.children.last_mut().ok_or_else(|| "no child".to_owned())
    }

    fn all(&mut self) -> Outcome {
        let at = |name: &str| self.folder.join(name).display().to_string();
        let (one, two) = (at("one"), at("two"));
        let mut fs = Command::new(VIRTIOFSD.path());
        fs.args([format!("--socket-path={}", at("fs1.sock")), "-o".to_owned(), format!("source={one}")]);
        let mut new_fs = Command::new(NEW_VIRTIOFSD.path());
        new_fs.args(["--socket-path", &at("fs2.sock"), "--shared-dir", &two, "--sandbox", "chroot"]);
        let mut rng = Command::new(DEVICE_RNG.path());
        rng.args(["--socket-path", &at("rng.sock")]);
        let mut vsock = Command::new(DEVICE_VSOCK.path());
        vsock.args(["--guest-cid", "3", "--socket", &at("vsock.sock"), "--uds-path", &at("v")]);
        let mut passt = Command::new(PASST.path());
        passt.args(["--vhost-user", "--foreground", "--runas", "0:0", "-s", &at("passt.sock")]);
        passt.args(["-a", "10.7.0.5", "-n", "24", "-g", "10.7.0.1", "--map-host-loopback", "10.7.0.1", "-4"]);
        let mut dpdk = testpmd(TESTPMD, "vhost");
        dpdk.arg(format!("--vdev=net_vhost0,iface={},queues=1", at("dpdk.sock")));
        dpdk.args(["--", "--total-num-mbufs=4096", "--no-mlockall", "--forward-mode=icmpecho", "-i"]);
        self.start(fs, "fs1.sock")?;
        self.start(new_fs, "fs2.sock")?;
        self.start(rng, "rng.sock0")?;
        self.start(vsock, "vsock.sock")?;
        self.start(passt, "passt.sock")?;
        self.start(dpdk, "dpdk.sock")?;
        Ok(String::new())
    }
}

fn machine(folder: &Path, modules: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-sKILL", "200"]).arg(program("bulkhead")).args(["run", "--memory", "512M", "--kernel"]);
    command.arg(kernel("vmlinux")).arg("--initrd").arg(kernel("initramfs"));
    command.args(["--cmdline", &format!("console=ttyS0 {SHELL}"), "--name", "interop-lab"]);
    command.args(["--disk", &format!("path={},readonly=on,id=modules", modules.display())]);
    command.args(["--disk", "vhost-user=socket", "--net", "vhost-user=passt.sock,mac=52:54:00:00:00:01"]);
    command.args(["--net", "vhost-user=dpdk.sock,mac=52:54:00:00:00:02"]);
    command.args(["--fs", "tag=one,vhost-user=fs1.sock", "--fs", "tag=two,vhost-user=fs2.sock"]);
    command.args([
        "--vhost-user",
        "type=rng,socket=rng.sock0",
        "--vhost-user",
        "type=vsock,socket=vsock.sock",
    ]);
    command.current_dir(folder).stderr(fs::File::create(folder.join("log")).unwrap());
    command
}

/// What is shown of each.
struct Shown<'a> {
    guest: Guest,
    folder: &'a Path,
    rows: Vec<Row>,
}

impl Shown<'_> {
    fn row(&mut self, peer: Peer, what: &str, show: impl FnOnce(&mut Guest, &Path) -> Outcome) {
        let begin = Instant::now();
        let result = show(&mut self.guest, self.folder);
        let (ours, what) = ("core".to_owned(), format!("a stock guest: {what}"));
        let row = Row { ours, peer: peer.name.to_owned(), version: peer.version(), what, result };
        row.say(begin.elapsed());
        self.rows.push(row);
    }
}

fn disk(guest: &mut Guest, folder: &Path) -> Outcome {
    let before = sha256(&folder.join("disk"));
    let read = guest.run("sha256sum </dev/$foreign")?;
    if !read.contains(&before) {
        return Err(format!("the guest reads {read}, the image is {before}"));
    }
    guest.run("dd if=/dev/urandom of=/dev/$foreign bs=64k count=32 oflag=direct 2>/dev/null; sync")?;
    let inside = guest.run("echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/$foreign")?;
    let after = sha256(&folder.join("disk"));
    if inside.contains(&after) && after != before {
        Ok("read and written, SHA-256 equal on both sides".to_owned())
    } else {
        Err(format!("the guest reads {inside}, the image is {after}"))
    }
}

fn share(tag: &'static str) -> impl FnOnce(&mut Guest, &Path) -> Outcome {
    move |guest, folder| {
        let sum = sha256(&folder.join(tag).join("file"));
        guest.run(&format!("mkdir -p /{tag} && mount -t virtiofs {tag} /{tag}"))?;
        let read = guest.run(&format!("sha256sum </{tag}/file"))?;
        if !read.contains(&sum) {
            return Err(format!("the guest reads {read}, the host has {sum}"));
        }
        guest.run(&format!("dd if=/dev/urandom of=/{tag}/new bs=64k count=16 2>/dev/null && mv /{tag}/new /{tag}/moved && sync"))?;
        let written = guest.run(&format!("sha256sum </{tag}/moved"))?;
        let host = sha256(&folder.join(tag).join("moved"));
        if written.contains(&host) {
            Ok("a file read, one written and renamed, SHA-256 equal on both sides".to_owned())
        } else {
            Err(format!("the guest wrote {written}, the host has {host}"))
        }
    }
}

fn rng(guest: &mut Guest, _: &Path) -> Outcome {
    let current = guest.run("cat /sys/devices/virtual/misc/hw_random/rng_current")?;
    let one = guest.run("dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sha256sum")?;
    let two = guest.run("dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sha256sum")?;
    if current.starts_with("virtio_rng") && one != two {
        Ok("reads of /dev/hwrng, no two alike".to_owned())
    } else {
        Err(format!("{current}: {one}, {two}"))
    }
}

fn passt(guest: &mut Guest, folder: &Path) -> Outcome {
    let listener = std::net::TcpListener::bind("127.0.0.1:8000").map_err(text)?;
    let bytes = random_file(&folder.join("down"), FILE);
    thread::spawn(move || listener.incoming().flatten().for_each(|mut to| drop(to.write_all(&bytes))));
    let sum = sha256(&folder.join("down"));
    guest.run("ip link set $card up; printf '#!/bin/sh\\n[ \"$1\" = bound ] && ip addr add $ip/24 dev $interface && ip route add default via $router\\ntrue\\n' >/tmp/lease; chmod +x /tmp/lease; \
        udhcpc -i $card -n -q -t 5 -s /tmp/lease >/dev/null 2>&1")?;
    let came = guest.run("nc 10.7.0.1 8000 </dev/null | sha256sum")?;
    if came.contains(&sum) {
        Ok(format!("an address by DHCP, {} MiB by TCP with equal SHA-256", FILE >> 20))
    } else {
        Err(format!("{sum} was sent, {came} came"))
    }
}

fn dpdk(guest: &mut Guest, _: &Path) -> Outcome {
    guest.run("ip link set $other up && ip addr add 10.8.0.2/24 dev $other")?;
    let said = guest.run("ping -c 10 -i 0.2 -s 1000 10.8.0.9 | grep received")?;
    if said.contains(" 0% packet loss") {
        Ok("10 of 10 echoes of 1000 bytes by its icmpecho".to_owned())
    } else {
        Err(said)
    }
}

/// Boots it and uses them.
pub fn run(_: &[&String]) -> Vec<Row> {
    match show() {
        Ok(rows) => rows,
        Err(error) => {
            let (ours, peer, what) = ("core", "all at once", "a stock guest boots with all of them");
            vec![Row {
                ours: ours.into(),
                peer: peer.into(),
                version: None,
                what: what.into(),
                result: Err(error),
            }]
        }
    }
}

fn network() -> Result<(), String> {
    let _there_or_built_in = Command::new("modprobe").arg("tun").output();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(text)?;
    for line in
        ["link set lo up", "tuntap add wire mode tap", "addr add 10.7.0.5/24 dev wire", "link set wire up"]
    {
        command("ip", line)?;
    }
    // passt takes what it does not get told from the interface with the default route.
    command("ip", "route add default via 10.7.0.1 dev wire")
}

fn show() -> Result<Vec<Row>, String> {
    network()?;
    let temporary = tempfile::tempdir().map_err(text)?;
    let folder = temporary.path();
    for tag in ["one", "two"] {
        fs::create_dir(folder.join(tag)).map_err(text)?;
        random_file(&folder.join(tag).join("file"), 1 << 20);
    }
    random_file(&folder.join("disk"), 8 << 20);
    serve_vsock(&folder.join("v"))?;
    let modules = modules(folder)?;
    let _daemon = Daemon::start(folder)?;
    let mut peers = Peers { children: Vec::new(), folder: folder.to_owned() };
    peers.all()?;
    let guest = Guest::spawn(machine(folder, &modules), folder.join("monitor"))?;
    let mut shown = Shown { guest, folder, rows: Vec::new() };
    let log = |error| {
        let top = Command::new("top").args(["-b", "-n", "1"]).output();
        let top = top.map(|output| output.stdout).unwrap_or_default();
        let top: Vec<_> = String::from_utf8_lossy(&top).lines().skip(6).take(8).map(str::to_owned).collect();
        let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
        format!("{error}; the log: {log}; at work: {}", top.join(" / "))
    };
    shown.guest.boot().map_err(log)?;
    shown.guest.run("for it in /sys/block/vd*; do name=${it##*/}; if [ \"$(cat $it/serial)\" = modules ]; then tar -xf /dev/$name -C /tmp; else foreign=$name; fi; done; \
        for it in /sys/class/net/eth*; do case $(cat $it/address) in *01) card=${it##*/} ;; *02) other=${it##*/} ;; esac; done; insmod /tmp/fuse.ko; insmod /tmp/virtiofs.ko")?;
    shown.row(STORAGE_DAEMON, "its disk", disk);
    shown.row(VIRTIOFSD, "its directory", share("one"));
    shown.row(NEW_VIRTIOFSD, "its directory", share("two"));
    shown.row(DEVICE_VSOCK, "its streams, both ways", |guest, folder| talk(guest, folder, &folder.join("v")));
    shown.row(PASST, "its network", passt);
    // Until now its thread slept: from here on it polls.
    let keyboard = peers.children.last_mut().and_then(|child| child.stdin.as_mut()).ok_or("no testpmd")?;
    keyboard.write_all(b"start\n").map_err(text)?;
    thread::sleep(Duration::from_millis(500));
    shown.row(TESTPMD, "its network card (net_vhost)", dpdk);
    // Last: a guest that waits for entropy answers no more.
    shown.row(DEVICE_RNG, "its entropy", rng);
    Ok(shown.rows)
}

/// Starts this program in the lab, where there has to be one.
pub fn in_lab() -> Vec<Row> {
    let this = std::env::current_exe().unwrap();
    let output = Command::new(root().join("tools/lab"))
        .args(["--auto", "--timeout", LIMIT, "--"])
        .arg(this)
        .arg("--in-lab")
        .output();
    let said = output.map(|output| {
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    });
    let said = said.unwrap_or_else(|error| error.to_string());
    said.lines()
        .filter(|line| line.contains(" ... ") && !line.contains("row\t"))
        .for_each(|line| println!("{line}"));
    let rows: Vec<Row> = said.lines().filter_map(Row::take_over).collect();
    rows.iter().filter(|row| row.result.is_err()).for_each(|row| row.say(Duration::ZERO));
    if rows.is_empty() {
        let from = said.len().saturating_sub(1500);
        let tail = said.get(from..).unwrap_or_default().to_owned();
        let (ours, peer, what) =
            ("core".to_owned(), "all at once".to_owned(), "a stock guest in the lab".to_owned());
        return vec![Row { ours, peer, version: None, what, result: Err(tail) }];
    }
    rows
}
