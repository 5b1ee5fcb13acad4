//! Our services under QEMU, with the drivers of a stock kernel.

use std::fs;

use crate::guest::{Guest, Service, random_file, sha256};
use crate::{Case, Outcome, Peer, QEMU};

pub const CASES: &[Case] = &[
    Case { ours: "blk", peer: QEMU, what: "read, write, flush; killed under load, reconnects", run: blk },
    Case { ours: "rng", peer: QEMU, what: "reads of /dev/hwrng", run: rng },
];

const SIZE: usize = 32 << 20;
/// Says to a socket of QEMU that it is to be connected again; QEMU 11 has another word, which [`Guest::start`] puts in its place.
pub const RECONNECT: &str = ",reconnect=1";

/// A device of QEMU's that connects to a service, and does so again when it has lost it.
pub fn device(id: &str, service: &Service, kind: &str) -> Vec<String> {
    [
        "-chardev".to_owned(),
        format!("socket,id={id},path={}{RECONNECT}", service.socket.display()),
        "-device".to_owned(),
        format!("{kind},chardev={id}"),
    ]
    .to_vec()
}

fn blk(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let image = folder.path().join("disk");
    random_file(&image, SIZE);
    let before = sha256(&image);
    let file = image.display().to_string();
    let options = ["--blk-file", &file, "--persistent", "--num-queues", "2"];
    let service = Service::start(folder.path(), "blk", "blk.sock", &options);
    let mut guest = Guest::start(qemu, &folder, "blk", &device("c", &service, "vhost-user-blk-pci"))?;
    guest.boot()?;
    let read = guest.run("sha256sum </dev/vda")?;
    if !read.contains(&before) {
        return Err(format!("the guest reads {read}, the image is {before}"));
    }
    // Random data to the first 16 MiB, again and again, while the device dies.
    guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null")?;
    guest.run("(for n in 1 2 3 4 5 6 7 8; do dd if=/tmp/data of=/dev/vda bs=64k oflag=direct 2>/dev/null || echo bad >>/tmp/bad; done; echo end >/tmp/end) & true")?;
    let mut kills = 0;
    for _ in 0..3 {
        kills += u32::from(service.kill_device());
        // It is served again before the next blow.
        guest.run(
            "dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct skip=$((RANDOM % 4096)) 2>/dev/null",
        )?;
    }
    guest.run("while [ ! -e /tmp/end ]; do sleep 0.1; done; [ ! -e /tmp/bad ]")?;
    guest.run("sync; echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/tmp/back bs=1M count=16 iflag=direct 2>/dev/null; cmp /tmp/data /tmp/back")?;
    let inside = guest.run("sha256sum </dev/vda")?;
    drop(guest);
    drop(service);
    let after = sha256(&image);
    if !inside.contains(&after) || after == before {
        return Err(format!("the guest reads {inside}, the image is {after}"));
    }
    if kills < 3 {
        return Err(format!("only {kills} of 3 kills met a device:\n{}", log(folder.path())));
    }
    Ok("SHA-256 equal on both sides; 3 kills under load, no I/O error".to_owned())
}

fn log(folder: &std::path::Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}

fn rng(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let service = Service::start(folder.path(), "rng", "rng.sock", &["--persistent"]);
    // QEMU 7.2 ends with an assertion when this device's socket may be connected to again.
    let options = device("c", &service, "vhost-user-rng-pci").into_iter();
    let options: Vec<String> = options.map(|option| option.replace(RECONNECT, "")).collect();
    let mut guest = Guest::start(qemu, &folder, "rng", &options)?;
    guest.boot()?;
    let current = guest.run("cat /sys/devices/virtual/misc/hw_random/rng_current")?;
    if !current.starts_with("virtio_rng") {
        return Err(format!("the kernel's source is {current}"));
    }
    let mut sums = Vec::new();
    for _ in 0..3 {
        sums.push(guest.run("dd if=/dev/hwrng bs=512 count=8 2>/dev/null | sha256sum")?);
    }
    sums.dedup();
    if sums.len() == 3 { Ok("12 KiB, no two blocks alike".to_owned()) } else { Err(format!("{sums:?}")) }
}
