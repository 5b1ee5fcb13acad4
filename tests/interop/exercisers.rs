//! Programs that others wrote to find faults of file systems, on our shared directory in a stock guest.

use std::path::Path;

use crate::guest::{Guest, Service};
use crate::ours::device;
use crate::traffic::{archive, modules, run, text};
use crate::{Case, Outcome, Peer, QEMU, root};

pub const CASES: &[Case] = &[
    Case {
        ours: "fs",
        peer: QEMU,
        what: "fsx: reads, writes, truncates and maps a file at random",
        run: fsx,
    },
    Case {
        ours: "fs",
        peer: QEMU,
        what: "pjdfstest: what POSIX says of files and directories",
        run: pjdfstest,
    },
];

/// Ends the names of tests that begin by making a device node, which no guest of ours may do on the host.
const DEVICES: [&str; 2] = ["::block", "::char"];
/// Operations of each of the two runs of fsx.
const OPERATIONS: u32 = 4000;

/// Boots a guest that has the program on a disk and our directory at /mnt. Its /etc names users.
fn boot(qemu: Peer, folder: &tempfile::TempDir, program: &str) -> Result<(Service, Guest), String> {
    let file = root().join("build/peers/bin").join(program);
    if !file.exists() {
        return Err(format!("not run: no {} (tools/make-peers)", file.display()));
    }
    let shared = folder.path().join("shared");
    std::fs::create_dir_all(&shared).map_err(text)?;
    let service = Service::start(folder.path(), "fs", "fs.sock", &["--shared-dir", shared.to_str().unwrap()]);
    let disk = modules(folder.path())?;
    let bin = file.parent().unwrap_or(Path::new("/")).display().to_string();
    run("tar", &format!("-rf {} -C {bin} {program}", disk.display()))?;
    let mut options: Vec<String> = device("c", &service, "vhost-user-fs-pci,tag=home");
    options.iter_mut().for_each(|option| *option = option.replace(crate::ours::RECONNECT, ""));
    options.extend(archive(&disk));
    let mut guest = Guest::start(qemu, folder, program, &options)?;
    guest.boot()?;
    guest.run(
        "cd /tmp && tar -xf /dev/vda && insmod fuse.ko; insmod virtiofs.ko && mount -t virtiofs home /mnt",
    )?;
    guest.run("mkdir -p /etc; printf 'root:x:0:0::/:/bin/sh\\nnobody:x:65534:65534::/:/bin/sh\\ntests:x:1001:1001::/:/bin/sh\\n' >/etc/passwd; \
        printf 'root:x:0:\\nnobody:x:65534:nobody\\ntests:x:1001:tests\\n' >/etc/group")?;
    Ok((service, guest))
}

fn fsx(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    let (_service, mut guest) = boot(qemu, &folder, "fsx")?;
    for seed in [1, 2] {
        guest.run(&format!(
            "cd /mnt && /tmp/fsx -N {OPERATIONS} -S {seed} file >/tmp/said 2>&1 || {{ tail -n 30 /tmp/said; false; }}"
        ))?;
    }
    Ok(format!("two runs of {OPERATIONS} operations, nothing amiss"))
}

fn pjdfstest(qemu: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    let (_service, mut guest) = boot(qemu, &folder, "pjdfstest")?;
    guest.run("printf '[features]\\n[dummy_auth]\\nentries = [[\"nobody\", \"nobody\"], [\"tests\", \"tests\"]]\\n' >/tmp/config; mkdir /mnt/work")?;
    // What fails on a file system of the kernel itself is no fault of ours.
    for place in ["/tmp", "/mnt"] {
        let line = "mkdir -p @/work; /tmp/pjdfstest -c /tmp/config -p @/work >@.said 2>&1; grep FAILED @.said | sed 's/ .*//' | sort >@.failed";
        guest.run(&line.replace('@', place))?;
    }
    let summary = guest.run("grep Summary /mnt.said || { tail -n 20 /mnt.said; false; }")?;
    let passed = summary.split(", ").find(|part| part.ends_with(" passed")).unwrap_or_default().to_owned();
    let failed = guest.run("while read -r it; do grep -qx $it /tmp.failed || echo $it; done </mnt.failed")?;
    let (devices, others): (Vec<&str>, Vec<&str>) =
        failed.lines().map(str::trim).partition(|name| DEVICES.iter().any(|end| name.ends_with(end)));
    let as_tmpfs = guest.run("grep -cxFf /tmp.failed /mnt.failed; true")?;
    let told = format!(
        "{passed}, {} refused because they make device nodes, {as_tmpfs} failed as on the guest's tmpfs",
        devices.len()
    );
    if others.is_empty() {
        Ok(told)
    } else {
        Err(format!("{told}, {} more: {}", others.len(), others.join(" ")))
    }
}
