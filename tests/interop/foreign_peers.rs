//! The back ends of others that a stock guest under our core uses, and how each is shown to work.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::thread;

use crate::dpdk::testpmd;
use crate::foreign_guest::Stage;
use crate::guest::{random_file, sha256};
use crate::traffic::{talk, text};
use crate::{
    DEVICE_RNG, DEVICE_VSOCK, NEW_VIRTIOFSD, Outcome, PASST, Peer, STORAGE_DAEMON, TESTPMD, VIRTIOFSD,
};

/// Bytes of the file that comes through passt.
const FILE: usize = 2 << 20;

/// A back end, and what it is used for.
#[derive(Clone, Copy)]
pub struct Foreign {
    pub peer: Peer,
    /// What it listens at, in the folder of the run.
    pub socket: &'static str,
    /// Starts it.
    pub command: fn(&Path) -> Command,
    /// How the machine attaches it.
    pub options: [&'static str; 2],
    pub what: &'static str,
    pub show: fn(&mut Stage) -> Outcome,
}

pub const ALL: &[Foreign] = &[
    Foreign {
        peer: STORAGE_DAEMON,
        socket: "socket",
        command: crate::foreign::daemon,
        options: ["--disk", "vhost-user=socket"],
        what: "its disk",
        show: disk,
    },
    Foreign {
        peer: VIRTIOFSD,
        socket: "fs1.sock",
        command: old_fs,
        options: ["--fs", "tag=one,vhost-user=fs1.sock"],
        what: "its directory",
        show: |stage| share(stage, "one"),
    },
    Foreign {
        peer: NEW_VIRTIOFSD,
        socket: "fs2.sock",
        command: new_fs,
        options: ["--fs", "tag=two,vhost-user=fs2.sock"],
        what: "its directory",
        show: |stage| share(stage, "two"),
    },
    Foreign {
        peer: DEVICE_RNG,
        socket: "rng.sock0",
        command: entropy,
        options: ["--vhost-user", "type=rng,socket=rng.sock0"],
        what: "its entropy",
        show: rng,
    },
    Foreign {
        peer: DEVICE_VSOCK,
        socket: "vsock.sock",
        command: streams,
        options: ["--vhost-user", "type=vsock,socket=vsock.sock"],
        what: "its streams, both ways",
        show: vsock,
    },
    Foreign {
        peer: PASST,
        socket: "passt.sock",
        command: user_network,
        options: ["--net", "vhost-user=passt.sock,mac=52:54:00:00:00:01"],
        what: "its network",
        show: passt,
    },
    Foreign {
        peer: TESTPMD,
        socket: "dpdk.sock",
        command: net_vhost,
        options: ["--net", "vhost-user=dpdk.sock,mac=52:54:00:00:00:02"],
        what: "its network card (net_vhost)",
        show: dpdk,
    },
];

fn at(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

fn old_fs(folder: &Path) -> Command {
    let mut command = Command::new(VIRTIOFSD.path());
    command.arg(format!("--socket-path={}", at(folder, "fs1.sock")));
    command.args(["-o", &format!("source={}", at(folder, "one"))]);
    command
}

fn new_fs(folder: &Path) -> Command {
    let mut command = Command::new(NEW_VIRTIOFSD.path());
    command.args(["--socket-path", &at(folder, "fs2.sock"), "--shared-dir", &at(folder, "two")]);
    command.args(["--sandbox", "chroot"]);
    command
}

/// It adds a number to the name of its socket.
fn entropy(folder: &Path) -> Command {
    let mut command = Command::new(DEVICE_RNG.path());
    command.args(["--socket-path", &at(folder, "rng.sock")]);
    command
}

fn streams(folder: &Path) -> Command {
    let mut command = Command::new(DEVICE_VSOCK.path());
    command.args(["--guest-cid", "3", "--socket", &at(folder, "vsock.sock"), "--uds-path", &at(folder, "v")]);
    command
}

fn user_network(folder: &Path) -> Command {
    let mut command = Command::new(PASST.path());
    command.args(["--vhost-user", "--foreground", "--runas", "0:0", "-s", &at(folder, "passt.sock")]);
    command.args(["-a", "10.7.0.5", "-n", "24", "-g", "10.7.0.1", "--map-host-loopback", "10.7.0.1", "-4"]);
    command
}

fn net_vhost(folder: &Path) -> Command {
    let mut command = testpmd(TESTPMD, "vhost");
    command.arg(format!("--vdev=net_vhost0,iface={},queues=1", at(folder, "dpdk.sock")));
    command.args(["--", "--total-num-mbufs=4096", "--no-mlockall", "--forward-mode=icmpecho", "-i"]);
    command
}

fn disk(stage: &mut Stage) -> Outcome {
    let Stage { guest, folder, .. } = stage;
    let before = sha256(&folder.join("disk"));
    let read = guest.run_within(30, "sha256sum </dev/$foreign")?;
    if !read.contains(&before) {
        return Err(format!("the guest reads {read}, the image is {before}"));
    }
    guest.run_within(
        30,
        "dd if=/dev/urandom of=/dev/$foreign bs=64k count=32 oflag=direct 2>/dev/null; sync",
    )?;
    let inside = guest.run_within(30, "echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/$foreign")?;
    let after = sha256(&folder.join("disk"));
    if inside.contains(&after) && after != before {
        Ok("read and written, SHA-256 equal on both sides".to_owned())
    } else {
        Err(format!("the guest reads {inside}, the image is {after}"))
    }
}

fn share(stage: &mut Stage, tag: &str) -> Outcome {
    let Stage { guest, folder, .. } = stage;
    let sum = sha256(&folder.join(tag).join("file"));
    guest.run_within(20, &format!("mkdir -p /{tag} && mount -t virtiofs {tag} /{tag}"))?;
    let read = guest.run_within(20, &format!("sha256sum </{tag}/file"))?;
    if !read.contains(&sum) {
        return Err(format!("the guest reads {read}, the host has {sum}"));
    }
    guest.run_within(30, &format!("dd if=/dev/urandom of=/{tag}/new bs=64k count=16 2>/dev/null && mv /{tag}/new /{tag}/moved && sync"))?;
    let written = guest.run_within(20, &format!("sha256sum </{tag}/moved"))?;
    let host = sha256(&folder.join(tag).join("moved"));
    if written.contains(&host) {
        Ok("a file read, one written and renamed, SHA-256 equal on both sides".to_owned())
    } else {
        Err(format!("the guest wrote {written}, the host has {host}"))
    }
}

fn rng(stage: &mut Stage) -> Outcome {
    let guest = &mut stage.guest;
    let current = guest.run("cat /sys/devices/virtual/misc/hw_random/rng_current")?;
    let one = guest.run_within(15, "dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sha256sum")?;
    let two = guest.run_within(15, "dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sha256sum")?;
    if current.starts_with("virtio_rng") && one != two {
        Ok("reads of /dev/hwrng, no two alike".to_owned())
    } else {
        Err(format!("{current}: {one}, {two}"))
    }
}

/// It does not pass on that a direction has ended.
fn vsock(stage: &mut Stage) -> Outcome {
    talk(&mut stage.guest, &stage.folder, &stage.folder.join("v"), "8 --half-close 0")
}

fn passt(stage: &mut Stage) -> Outcome {
    let Stage { guest, folder, .. } = stage;
    let listener = TcpListener::bind("127.0.0.1:8000").map_err(text)?;
    let bytes = random_file(&folder.join("down"), FILE);
    thread::spawn(move || listener.incoming().flatten().for_each(|mut to| drop(to.write_all(&bytes))));
    let sum = sha256(&folder.join("down"));
    guest.run_within(30, "ip link set $card up; printf '#!/bin/sh\\n[ \"$1\" = bound ] && ip addr add $ip/24 dev $interface && ip route add default via $router\\ntrue\\n' >/tmp/lease; chmod +x /tmp/lease; \
        udhcpc -i $card -n -q -t 5 -s /tmp/lease >/dev/null 2>&1")
        .map_err(|error| format!("DHCP: {error}"))?;
    let came = guest.run_within(40, "nc 10.7.0.1 8000 </dev/null | sha256sum")?;
    if came.contains(&sum) {
        Ok(format!("an address by DHCP, {} MiB by TCP with equal SHA-256", FILE >> 20))
    } else {
        Err(format!("{sum} was sent, {came} came"))
    }
}

/// Its thread sleeps until it is told to start: from then on it polls, and takes what it can of the only CPU. So it comes last.
fn dpdk(stage: &mut Stage) -> Outcome {
    let mut keyboard = stage.keyboard(TESTPMD)?;
    keyboard.write_all(b"start\n").map_err(text)?;
    let guest = &mut stage.guest;
    guest.run_within(10, "ip link set $other up && ip addr add 10.8.0.2/24 dev $other")?;
    let said = guest.run_within(40, "ping -c 10 -i 0.2 -s 1000 10.8.0.9 | grep received");
    let _stopped = keyboard.write_all(b"stop\nshow port stats all\n");
    let said = said?;
    if said.contains(" 0% packet loss") {
        Ok("10 of 10 echoes of 1000 bytes by its icmpecho".to_owned())
    } else {
        Err(said)
    }
}

/// What the run needs in its folder.
pub fn files(folder: &Path) -> Result<(), String> {
    for tag in ["one", "two"] {
        fs::create_dir(folder.join(tag)).map_err(text)?;
        random_file(&folder.join(tag).join("file"), 1 << 20);
    }
    random_file(&folder.join("disk"), 8 << 20);
    crate::traffic::serve_vsock(&folder.join("v"))
}
