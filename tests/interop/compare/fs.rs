//! Three shares of one guest, of the same tree.

use std::process::Command;

use super::{CLOSE, Contender, PATIENCE, named, print, time, turns};
use crate::guest::{Guest, Service, random_file};
use crate::ours::{RECONNECT, device};
use crate::traffic::{archive, modules, text};
use crate::{NEW_VIRTIOFSD, QEMU, VIRTIOFSD};

/// MiB of the file that is read, and of the one that is written.
const FILE: u32 = 64;
const NEW: u32 = 32;
/// Small files that are looked up and read.
const SMALL: u32 = 300;
/// Where the guest has them. As long as each other: a letter more on the guest's serial port takes milliseconds, a hundredth of a run.
const TAGS: [&str; 3] = ["our", "old", "new"];

pub fn run(rounds: usize) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let at = |name: &str| folder.path().join(name);
    let tree = at("tree");
    std::fs::create_dir_all(tree.join("small")).map_err(text)?;
    random_file(&tree.join("file"), usize::try_from(FILE << 20).map_err(text)?);
    for number in 0..SMALL {
        std::fs::write(tree.join(format!("small/{number}")), vec![b'x'; 2000]).map_err(text)?;
    }
    let ours = Service::start(folder.path(), "fs", "ours.sock", &["--shared-dir", tree.to_str().unwrap()]);
    let mut old = Command::new(VIRTIOFSD.path());
    old.arg(format!("--socket-path={}", at("old.sock").display()));
    old.arg("-o").arg(format!("source={}", tree.display()));
    let old = Service::other(old, at("old.sock"))?;
    let mut new = Command::new(NEW_VIRTIOFSD.path());
    new.arg("--socket-path").arg(at("new.sock")).arg("--shared-dir").arg(&tree).args(["--sandbox", "chroot"]);
    let new = Service::other(new, at("new.sock"))?;
    let mut options = Vec::new();
    for (tag, service) in TAGS.into_iter().zip([&ours, &old, &new]) {
        let device = device(tag, service, &format!("vhost-user-fs-pci,tag={tag}"));
        options.extend(device.into_iter().map(|option| option.replace(RECONNECT, "")));
    }
    let disk = modules(folder.path())?;
    options.extend(archive(&disk));
    let mut guest = Guest::start(QEMU, &folder, "fs", &options)?;
    guest.set_patience(PATIENCE);
    guest.boot()?;
    guest.run(&format!(
        "cd /tmp && tar -xf /dev/vda && insmod fuse.ko; insmod virtiofs.ko; for it in {}; do mkdir /$it && mount -t virtiofs $it /$it || exit 1; done",
        TAGS.join(" ")
    ))?;
    let contenders = [&ours, &old, &new]
        .map(|service| Contender { back_end: Some(service.child.id()), guest: Some(guest.pid()) });
    for (what, unit, amount, line) in [
        ("fs, a file read by 1 MiB", "MiB/s", FILE, "dd if=/@/file of=/dev/null bs=1M 2>/dev/null"),
        ("fs, a file written by 1 MiB", "MiB/s", NEW, "dd if=/dev/zero of=/@/new bs=1M count=32 2>/dev/null"),
        ("fs, small files looked up and read", "1/s", SMALL, "cat /@/small/* >/dev/null"),
    ] {
        let figures = turns(CLOSE * rounds, &contenders, |turn| {
            let tag = TAGS.get(turn).copied().unwrap_or_default();
            guest.run("echo 3 >/proc/sys/vm/drop_caches")?;
            Ok(f64::from(amount) / time(&mut guest, &line.replace('@', tag))?)
        })
        .map_err(|error| format!("{what}: {error}"))?;
        if let [ours, old, new] = figures.as_slice() {
            print(what, &named(VIRTIOFSD), unit, ours, old, 1.0);
            print(what, &named(NEW_VIRTIOFSD), unit, ours, new, 1.0);
        }
    }
    Ok(())
}
