//! Our network card, vsock and shared directory under QEMU: the host's kernel and its programs are at the other end.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::guest::{Guest, Service, kernel, random_file, sha256, wait};
use crate::ours::{RECONNECT, device};
use crate::{Case, Outcome, Peer, QEMU, program};

pub const CASES: &[Case] = &[
    Case {
        ours: "net",
        peer: QEMU,
        what: "`vectors=0`, at a tap: files by TCP both ways; killed under load, reconnects",
        run: net,
    },
    Case { ours: "vsock", peer: QEMU, what: "streams both ways", run: vsock },
    Case { ours: "fs", peer: QEMU, what: "a tree read, changed and compared", run: fs },
];

/// Bytes of a file.
const SIZE: usize = 24 << 20;
/// Streams of the guest at a time.
const STREAMS: &str = "32";
/// How long a stream may say nothing.
const SILENCE: Duration = Duration::from_secs(30);

pub fn text(error: impl ToString) -> String {
    error.to_string()
}

pub fn run(program: &str, arguments: &str) -> Result<(), String> {
    let output = Command::new(program).args(arguments.split(' ')).output().map_err(text)?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {arguments}: {said}")) }
}

/// On a thread of its own, whose network nobody else has.
fn net(qemu: Peer) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err("not run: a network of its own and a tap need root".to_owned());
    }
    let alone = move || unshare(CloneFlags::CLONE_NEWNET).map_err(text).and_then(|()| net_alone(qemu));
    thread::spawn(alone).join().map_err(|_| "panicked")?
}

fn net_alone(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    let options = ["--persistent", "--tap", "wire", "--mac", "52:54:00:77:00:01"];
    let service = Service::start(folder.path(), "net", "net.sock", &options);
    run("ip", "addr add 10.9.0.1/24 dev wire")?;
    let bytes = random_file(&folder.path().join("down"), SIZE);
    let down = TcpListener::bind("10.9.0.1:8000").map_err(text)?;
    thread::spawn(move || down.incoming().flatten().for_each(|mut to| drop(to.write_all(&bytes))));
    let up = TcpListener::bind("10.9.0.1:8001").map_err(text)?;
    let target = folder.path().join("up");
    let upload = thread::spawn(move || {
        let mut bytes = Vec::new();
        up.accept()
            .and_then(|(mut from, _)| from.read_to_end(&mut bytes))
            .and_then(|_| fs::write(target, bytes))
    });
    let chardev = format!("socket,id=c,path={}{RECONNECT}", service.socket.display());
    let options = ["-chardev", &chardev, "-netdev", "vhost-user,id=n,chardev=c", "-device"];
    let mut options: Vec<String> = options.map(str::to_owned).to_vec();
    options.push("virtio-net-pci,netdev=n,vectors=0,mac=52:54:00:77:00:01".to_owned());
    let mut guest = Guest::start(qemu, &folder, "net", &options)?;
    guest.boot()?;
    guest.run(
        "ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 10 10.9.0.1 >/dev/null",
    )?;
    let mut kills = 0;
    for (way, line) in
        [("down", "nc 10.9.0.1 8000 </dev/null >/tmp/file"), ("up", "nc 10.9.0.1 8001 </tmp/file")]
    {
        guest.run(&format!("rm -f /tmp/end; ({line}; echo end >/tmp/end) & true"))?;
        for _ in 0..2 {
            // QEMU connects again after a second.
            wait("a device", || Ok(service.kill_device()))?;
            kills += 1;
            guest
                .run("sleep 0.2; [ ! -e /tmp/end ]")
                .map_err(|_| format!("{way}: too short for {kills} kills"))?;
        }
        guest
            .run("while [ ! -e /tmp/end ]; do sleep 0.1; done")
            .map_err(|error| format!("{way}: {error}"))?;
    }
    let came = guest.run("sha256sum </tmp/file")?;
    upload.join().map_err(|_| "panicked")?.map_err(text)?;
    let sent = sha256(&folder.path().join("down"));
    let back = sha256(&folder.path().join("up"));
    if !came.contains(&sent) || back != sent {
        return Err(format!("{sent} was sent, {came} came, {back} came back"));
    }
    Ok(format!("{} MiB each way with equal SHA-256; {kills} kills under load", SIZE >> 20))
}

fn echo(mut stream: UnixStream) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
}

/// Connects to a port of the guest (Firecracker's convention).
pub fn dial(path: &Path, port: u32) -> Result<UnixStream, String> {
    let mut stream = UnixStream::connect(path).map_err(text)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(text)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(text)?;
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\n") {
        stream.read_exact(&mut byte).map_err(text)?;
        line.extend(byte);
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(format!("port {port}: {line:?}")) }
}

/// Answers the guest at the ports that `guest-vsock` calls, by the socket `path`.
pub fn serve_vsock(path: &Path) -> Result<(), String> {
    for port in [52, 53] {
        let listener = UnixListener::bind(format!("{}_{port}", path.display())).map_err(text)?;
        // The guest waits for the end of the second one, which comes at once.
        thread::spawn(move || {
            for stream in listener.incoming().flatten().filter(|_| port == 52) {
                thread::spawn(|| echo(stream));
            }
        });
    }
    Ok(())
}

/// Streams both ways between the guest and the host, compared: so many of the guest at a time, one of the host. The disk of [`modules`] is
/// unpacked in /tmp.
pub fn talk(guest: &mut Guest, folder: &Path, path: &Path, streams: &str) -> Outcome {
    guest.run_within(20, "for it in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do insmod /modules/$it.ko; done")?;
    guest.run(&format!(
        ": >/tmp/said; /tmp/guest-vsock --streams {streams} --kib 64 >/tmp/said 2>&1 & true"
    ))?;
    guest
        .run_within(60, "while [ $(grep -c 'streams ok' /tmp/said) -lt 2 ]; do sleep 0.1; done")
        .map_err(|error| format!("{error}: {}", guest.run("cat /tmp/said").unwrap_or_default()))?;
    let mut stream = dial(path, 7000)?;
    let bytes = random_file(&folder.join("sent"), 1 << 20);
    let (mut end, sent) = (stream.try_clone().map_err(text)?, bytes.clone());
    let writer = thread::spawn(move || end.write_all(&sent));
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).map_err(text)?;
    writer.join().map_err(|_| "panicked")?.map_err(text)?;
    if back != bytes {
        return Err("the guest's echo is not what was sent".to_owned());
    }
    drop(dial(path, 7001)?);
    guest.run_within(
        20,
        "while pidof guest-vsock >/dev/null; do sleep 0.1; done; ! grep -i differ /tmp/said",
    )?;
    let streams = streams.split(' ').next().unwrap_or_default();
    Ok(format!(
        "{streams} streams of the guest at a time, twice, and 1 MiB through a stream of the host, all compared"
    ))
}

fn vsock(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    let path = folder.path().join("v");
    serve_vsock(&path)?;
    let options = ["--guest-cid", "3", "--uds-path", path.to_str().unwrap()];
    let service = Service::start(folder.path(), "vsock", "vsock.sock", &options);
    // QEMU 7.2 does not connect again for this device.
    let options = device("c", &service, "vhost-user-vsock-pci").into_iter();
    let mut options: Vec<String> = options.map(|option| option.replace(RECONNECT, "")).collect();
    options.extend(archive(&modules(folder.path())?));
    let mut guest = Guest::start(qemu, &folder, "vsock", &options)?;
    guest.boot()?;
    guest.run("tar -xf /dev/vda -C /tmp")?;
    talk(&mut guest, folder.path(), &path, STREAMS).map_err(|error| {
        let said = guest.run("cat /tmp/said").unwrap_or_default();
        let log = fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        format!("{error}; the guest's program: {said}; our log: {log}")
    })
}

/// Modules of the guest's own kernel that its initramfs does not have, for a disk.
const MODULES: [&str; 3] = ["fs/fuse/fuse.ko", "fs/fuse/virtiofs.ko", "net/core/pktgen.ko"];

/// A disk with [`MODULES`] and `guest-vsock`, an archive.
pub fn modules(folder: &Path) -> Result<PathBuf, String> {
    let modules = folder.join("modules.tar");
    let release = fs::read_to_string(kernel("kernel/release")).map_err(text)?;
    let all = kernel(&format!("kernel/lib/modules/{}/kernel", release.trim()));
    let of = |module: &str| all.join(module).display().to_string();
    let mut command = Command::new("tar");
    command
        .arg("-cf")
        .arg(&modules)
        .args(["--transform", "s:.*/::"])
        .args(MODULES.map(of))
        .arg(program("guest-vsock"));
    let output = command.output().map_err(text)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(modules) } else { Err(said) }
}

/// The options of QEMU for the disk of [`modules`].
pub fn archive(disk: &Path) -> [String; 2] {
    ["-drive".to_owned(), format!("file={},if=virtio,format=raw,readonly=on", disk.display())]
}

fn fs(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    let shared = folder.path().join("shared");
    fs::create_dir_all(shared.join("a/b")).map_err(text)?;
    random_file(&shared.join("a/b/file"), 8 << 20);
    let sum = sha256(&shared.join("a/b/file"));
    let service = Service::start(folder.path(), "fs", "fs.sock", &["--shared-dir", shared.to_str().unwrap()]);
    let modules = modules(folder.path())?;
    // QEMU 7.2 does not connect again for this device.
    let options = device("c", &service, "vhost-user-fs-pci").into_iter();
    let options = options.map(|option| option.replace(RECONNECT, ""));
    let mut options: Vec<String> =
        options.map(|option| option.replace("fs-pci,", "fs-pci,tag=home,")).collect();
    options.extend(archive(&modules));
    let mut guest = Guest::start(qemu, &folder, "fs", &options)?;
    guest.boot()?;
    guest.run(
        "cd /tmp && tar -xf /dev/vda && insmod fuse.ko; insmod virtiofs.ko && mount -t virtiofs home /mnt",
    )?;
    let read = guest.run("sha256sum </mnt/a/b/file")?;
    if !read.contains(&sum) {
        return Err(format!("the guest reads {read}, the host has {sum}"));
    }
    guest.run("dd if=/dev/urandom of=/mnt/new bs=64k count=64 2>/dev/null && mv /mnt/a/b/file /mnt/a/moved && rmdir /mnt/a/b && ln -s moved /mnt/a/link && sync")?;
    let written = guest.run("sha256sum </mnt/new")?;
    let link = fs::read_link(shared.join("a/link")).map_err(text)?;
    let same = written.contains(&sha256(&shared.join("new"))) && sha256(&shared.join("a/moved")) == sum;
    if !same || link != Path::new("moved") || shared.join("a/b").exists() {
        return Err(format!("the host does not have what the guest wrote: {written}"));
    }
    guest.run("umount /mnt && mount -t virtiofs home /mnt && cmp /mnt/a/link /mnt/a/moved")?;
    Ok("8 MiB read and 4 MiB written with equal SHA-256; renamed, removed, linked; mounted again".to_owned())
}
