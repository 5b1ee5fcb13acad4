//! A guest that moves from one QEMU to another while our disk and our network card serve it.

use std::io::Write;
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::guest::{DIED, Guest, Service, random_file, sha256, wait_within};
use crate::ours::{RECONNECT, device};
use crate::traffic::{run, text};
use crate::{Case, Outcome, Peer, QEMU};

pub const CASES: &[Case] = &[Case {
    ours: "blk, net",
    peer: QEMU,
    what: "live migration between two QEMUs under load; memory, disk and what comes by TCP checksummed",
    run: migrate,
}];

/// Reads from the disk into fresh memory and compares, and fetches a file by TCP and compares, for ever: each page that a device
/// writes and its dirty log does not name is stale on the other side.
const LOAD: &str = "(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); dd if=/dev/vda of=/tmp/load.$((n % 4)) bs=1M count=8 iflag=direct 2>/dev/null; \
     [ \"$(sha256sum </tmp/load.$((n % 4)))\" = \"$(cat /tmp/want)\" ] || echo bad >>/tmp/bad; echo $n >/tmp/rounds; done; echo end >/tmp/end) & \
     (n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); nc 10.9.0.1 8000 </dev/null >/tmp/net.$((n % 2)); \
     [ \"$(sha256sum </tmp/net.$((n % 2)))\" = \"$(cat /tmp/file)\" ] || echo net >>/tmp/bad; echo $n >/tmp/files; done; echo end >/tmp/ended) & true";

/// QEMU's emulator forgets pages that its processor writes while it migrates. The kernel finds its lists torn then, with a disk of
/// QEMU's own as well, and nothing can be said of ours.
const TRIES: u32 = 4;
/// For the move.
const MOVE: Duration = Duration::from_secs(60);
/// Bytes of the file that comes by TCP.
const FILE: usize = 4 << 20;

fn migrate(qemu: Peer) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err("not run: a network of its own and taps need root".to_owned());
    }
    let mut died = 0;
    loop {
        let alone = move || unshare(CloneFlags::CLONE_NEWNET).map_err(text).and_then(|()| migrate_once(qemu));
        match thread::spawn(alone).join().map_err(|_| "panicked")? {
            Err(text) if text.contains(DIED) && died + 1 < TRIES => died += 1,
            Ok(text) if died > 0 => {
                return Ok(format!("{text}; {died} tries before were lost by QEMU's emulator, see below"));
            }
            other => return other,
        }
    }
}

/// One side: our disk and our card, and the options of QEMU that use them.
fn side(
    folder: &tempfile::TempDir,
    name: &str,
    disk: &[&str],
) -> Result<([Service; 2], Vec<String>), String> {
    let disk = Service::start(folder.path(), "blk", &format!("{name}.blk"), disk);
    let options = ["--persistent", "--tap", name, "--mac", "52:54:00:77:00:01"];
    let card = Service::start(folder.path(), "net", &format!("{name}.net"), &options);
    run("ip", &format!("link set {name} master bridge up"))?;
    let mut options = device("c", &disk, "vhost-user-blk-pci");
    options.extend(["-chardev".to_owned(), format!("socket,id=n,path={}{RECONNECT}", card.socket.display())]);
    let others = ["-netdev", "vhost-user,id=w,chardev=n", "-device"];
    options.extend(others.map(str::to_owned));
    options.push("virtio-net-pci,netdev=w,vectors=0,mac=52:54:00:77:00:01".to_owned());
    Ok(([disk, card], options))
}

/// The host's end of the bridge, where a file is to be had.
fn network(bytes: Vec<u8>) -> Result<(), String> {
    for line in ["link add bridge type bridge", "addr add 10.9.0.1/24 dev bridge", "link set bridge up"] {
        run("ip", line)?;
    }
    let listener = TcpListener::bind("10.9.0.1:8000").map_err(text)?;
    thread::spawn(move || {
        for mut to in listener.incoming().flatten() {
            let bytes = bytes.clone();
            thread::spawn(move || to.write_all(&bytes));
        }
    });
    Ok(())
}

fn migrate_once(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    let image = folder.path().join("disk");
    random_file(&image, 32 << 20);
    network(random_file(&folder.path().join("file"), FILE))?;
    let file = image.display().to_string();
    let blk = ["--blk-file", &file, "--persistent"];
    let (source_services, options) = side(&folder, "left", &blk)?;
    let mut source = Guest::start(qemu, &folder, "a", &options)?;
    let stream = folder.path().join("stream");
    let (_target_services, mut options) = side(&folder, "right", &[&blk[..], &["--unlocked"]].concat())?;
    options.extend(["-incoming".to_owned(), format!("unix:{}", stream.display())]);
    let mut target = Guest::start(qemu, &folder, "b", &options)?;
    source.boot()?;
    source.run("dd if=/dev/vda bs=1M count=8 2>/dev/null | sha256sum >/tmp/want; dd if=/dev/urandom of=/tmp/memory bs=1M count=24 2>/dev/null")?;
    source.run("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 10 10.9.0.1 >/dev/null && nc 10.9.0.1 8000 </dev/null | sha256sum >/tmp/file")?;
    let came = source.run("cat /tmp/file")?;
    if !came.contains(&sha256(&folder.path().join("file"))) {
        return Err(format!("before the move: another file came, {came}"));
    }
    let memory = source.run("sha256sum </tmp/memory")?;
    source.run(LOAD)?;
    source.run("while [ ! -e /tmp/rounds ] || [ ! -e /tmp/files ] || [ $(cat /tmp/rounds) -lt 2 ]; do sleep 0.1; done")?;
    source.monitor("migrate_set_parameter max-bandwidth 100M")?;
    source.monitor(&format!("migrate -d unix:{}", stream.display()))?;
    wait_within(MOVE, "the migration", || {
        let text = source.monitor("info migrate")?;
        let status = text.to_lowercase();
        if status.contains("status: failed") || status.contains("status: \t\tfailed") {
            return Err(text);
        }
        Ok(status.contains("status: completed") || status.contains("status: \t\tcompleted"))
    })?;
    let told = source.monitor("info migrate")?;
    let passes = ["dirty sync count: ", "dirty_syncs="].iter().find_map(|words| told.split_once(words));
    let passes =
        passes.map_or("", |(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or(""));
    let passes = format!("{passes} passes over memory");
    drop(source);
    drop(source_services);
    arrived(&mut target, &memory)?;
    let inside = target.run("sha256sum </dev/vda")?;
    drop(target);
    let outside = sha256(&image);
    if !inside.contains(&outside) {
        return Err(format!("the guest reads {inside}, the image is {outside}"));
    }
    Ok(format!("memory, buffers in flight, disk and files by TCP equal after the move ({passes})"))
}

/// Checks the same shell on the other side: its load has gone on and met nothing wrong, its memory is as it was.
fn arrived(target: &mut Guest, memory: &str) -> Result<(), String> {
    for counter in ["rounds", "files"] {
        let count: u32 = target.run(&format!("cat /tmp/{counter}"))?.parse().map_err(|_| "no count")?;
        let more = count + 3;
        target.run(&format!("while [ $(cat /tmp/{counter}) -lt {more} ]; do sleep 0.1; done"))?;
    }
    target.run("touch /tmp/stop; while [ ! -e /tmp/end ] || [ ! -e /tmp/ended ]; do sleep 0.1; done; [ ! -e /tmp/bad ]")
        .map_err(|error| format!("{error}: {}", target.run("cat /tmp/bad").unwrap_or_default()))?;
    let arrived = target.run("sha256sum </tmp/memory")?;
    if arrived != memory {
        return Err(format!("memory was {memory} and is {arrived}"));
    }
    target.run(
        "for n in 0 1 2 3; do [ \"$(sha256sum </tmp/load.$n)\" = \"$(cat /tmp/want)\" ] || exit 1; done",
    )?;
    target
        .run("dd if=/tmp/memory of=/dev/vda bs=1M seek=8 oflag=direct 2>/dev/null; sync; echo 3 >/proc/sys/vm/drop_caches")
        .map(drop)
}
