//! A guest that moves from one QEMU to another while our disk serves it.

use crate::guest::{DIED, Guest, Service, random_file, sha256, wait};
use crate::ours::device;
use crate::{Case, Outcome, Peer, QEMU};

pub const CASES: &[Case] = &[Case {
    ours: "blk",
    peer: QEMU,
    what: "live migration between two QEMUs under load; memory and disk checksummed",
    run: migrate,
}];

/// Reads from the disk into fresh memory and compares, for ever: each page that the device writes and its dirty log does not
/// name is stale on the other side.
const LOAD: &str = "(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); dd if=/dev/vda of=/tmp/load.$((n % 4)) bs=1M count=8 iflag=direct 2>/dev/null; \
     [ \"$(sha256sum </tmp/load.$((n % 4)))\" = \"$(cat /tmp/want)\" ] || echo bad >>/tmp/bad; echo $n >/tmp/rounds; done; echo end >/tmp/end) & true";

/// QEMU's emulator forgets pages that its processor writes while it migrates. The kernel finds its lists torn then, with a disk of
/// QEMU's own as well, and nothing can be said of ours.
const TRIES: u32 = 4;

fn migrate(qemu: Peer) -> Outcome {
    let mut died = 0;
    loop {
        match migrate_once(qemu) {
            Err(text) if text.contains(DIED) && died + 1 < TRIES => died += 1,
            Ok(text) if died > 0 => {
                return Ok(format!("{text}; {died} tries before were lost by QEMU's emulator, see below"));
            }
            other => return other,
        }
    }
}

fn migrate_once(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let image = folder.path().join("disk");
    random_file(&image, 32 << 20);
    let file = image.display().to_string();
    let source_service =
        Service::start(folder.path(), "blk", "a.sock", &["--blk-file", &file, "--persistent"]);
    let target_service =
        Service::start(folder.path(), "blk", "b.sock", &["--blk-file", &file, "--persistent", "--unlocked"]);
    let mut source = Guest::start(qemu, &folder, "a", &device("c", &source_service, "vhost-user-blk-pci"))?;
    let stream = folder.path().join("stream");
    let mut options = device("c", &target_service, "vhost-user-blk-pci");
    options.extend(["-incoming".to_owned(), format!("unix:{}", stream.display())]);
    let mut target = Guest::start(qemu, &folder, "b", &options)?;
    source.boot()?;
    source.run("dd if=/dev/vda bs=1M count=8 2>/dev/null | sha256sum >/tmp/want; dd if=/dev/urandom of=/tmp/memory bs=1M count=24 2>/dev/null")?;
    let memory = source.run("sha256sum </tmp/memory")?;
    source.run(LOAD)?;
    source.run("while [ ! -e /tmp/rounds ] || [ $(cat /tmp/rounds) -lt 2 ]; do sleep 0.1; done")?;
    source.monitor("migrate_set_parameter max-bandwidth 100M")?;
    source.monitor(&format!("migrate -d unix:{}", stream.display()))?;
    wait("the migration", || {
        let text = source.monitor("info migrate")?;
        if text.contains("status: failed") { Err(text) } else { Ok(text.contains("status: completed")) }
    })?;
    let told = source.monitor("info migrate")?;
    let passes =
        told.lines().find(|line| line.contains("dirty sync count")).unwrap_or_default().trim().to_owned();
    drop(source);
    drop(source_service);
    // The same shell, on the other side.
    let rounds: u32 = target.run("cat /tmp/rounds")?.parse().map_err(|_| "no count of rounds")?;
    target.run(&format!("while [ $(cat /tmp/rounds) -lt {} ]; do sleep 0.1; done; touch /tmp/stop; while [ ! -e /tmp/end ]; do sleep 0.1; done; [ ! -e /tmp/bad ]", rounds + 3))?;
    let arrived = target.run("sha256sum </tmp/memory")?;
    if arrived != memory {
        return Err(format!("memory was {memory} and is {arrived}"));
    }
    target.run(
        "for n in 0 1 2 3; do [ \"$(sha256sum </tmp/load.$n)\" = \"$(cat /tmp/want)\" ] || exit 1; done",
    )?;
    target.run("dd if=/tmp/memory of=/dev/vda bs=1M seek=8 oflag=direct 2>/dev/null; sync; echo 3 >/proc/sys/vm/drop_caches")?;
    let inside = target.run("sha256sum </dev/vda")?;
    drop(target);
    let outside = sha256(&image);
    if !inside.contains(&outside) {
        return Err(format!("the guest reads {inside}, the image is {outside}"));
    }
    Ok(format!("memory, buffers in flight and disk equal after the move ({passes})"))
}
