//! The disk under load: contents byte for byte, errors of the host, the data path beside the core.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, exit};
use bulkhead_tests::pattern::Digest;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("stock", "disk holds 256 MiB of random I/O with MSI-X", 300, |context| {
            iotest(context, 256, "")
        }),
        Case::new("stock", "disk holds 64 MiB of random I/O with pci=nomsi", 240, |context| {
            iotest(context, 64, "pci=nomsi")
        }),
        Case::new("stock", "disk in qcow2 over a backing image holds random I/O", 180, qcow2),
        Case::new("stock", "disk full on the host is an error in the guest", 180, disk_full),
        Case::new("stock", "data path does not run through the core", 180, data_path),
    ]
}

fn iotest(context: &Context, mib: u64, words: &str) -> Outcome {
    let arguments = format!("bulkhead.io=verify,--mib,{mib},--depth,32 {words}");
    let (machine, disk) = Machine::stock(context, Kernel::Elf, "iotest")?.words(&arguments).empty_disk(64)?;
    let mut running = machine.arguments(&["--cpus", "2", "--memory", "512M"]).start()?;
    running.expect_exit(exit::SUCCESS)?;
    expect_digest(&running, &disk)
}

fn qcow2(context: &Context) -> Outcome {
    let path = |name: &str| context.folder.join(name).display().to_string();
    let (base, top, raw) = (path("base.img"), path("top.qcow2"), path("flat.img"));
    File::create(&base).and_then(|file| file.set_len(32 << 20)).map_err(|error| error.to_string())?;
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top])?;
    let disk = format!("path={top},format=qcow2,backing={base}:raw,iops=20000");
    let machine =
        Machine::stock(context, Kernel::Elf, "iotest")?.words("bulkhead.io=verify,--mib,16,--depth,32");
    let mut running = machine.arguments(&["--cpus", "2", "--memory", "512M", "--disk", &disk]).start()?;
    running.expect_exit(exit::SUCCESS)?;
    qemu_img(&["check", "-q", &top])?;
    qemu_img(&["convert", "-O", "raw", &top, &raw])?;
    expect_digest(&running, Path::new(&raw))
}

pub fn qemu_img(arguments: &[&str]) -> Outcome {
    let output =
        Command::new("qemu-img").args(arguments).output().map_err(|error| format!("qemu-img: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "qemu-img {arguments:?}: {text}");
    Ok(())
}

/// The guest found no error, and its disk holds what it wrote.
pub fn expect_digest(running: &Running, disk: &Path) -> Outcome {
    let status = running.guest("iotest status").unwrap_or_default();
    ensure!(status == "0", "guest-io ended with '{status}'");
    let guest = running.guest("io digest").ok_or("no digest from the guest")?;
    let host = format!("{:016x}", digest(disk)?);
    ensure!(guest == host, "the guest's digest of the disk is {guest}, the host's {host}");
    Ok(())
}

fn digest(path: &Path) -> Outcome<u64> {
    let describe = |error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(describe)?;
    let (mut digest, mut buffer) = (Digest::default(), vec![0; 1 << 20]);
    loop {
        let count = file.read(&mut buffer).map_err(describe)?;
        if count == 0 {
            return Ok(digest.value());
        }
        digest.update(buffer.get(..count).unwrap_or_default());
    }
}

fn disk_full(context: &Context) -> Outcome {
    let small = context.folder.join("small");
    std::fs::create_dir(&small).map_err(|error| error.to_string())?;
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&small).status();
    ensure!(mount.is_ok_and(|status| status.success()), "cannot mount a small tmpfs (needs root)");
    let outcome = on_small_file_system(context, &small);
    // The folder of the case cannot be removed while this is mounted.
    let _ = Command::new("umount").arg("-l").arg(&small).status();
    outcome
}

fn on_small_file_system(context: &Context, small: &Path) -> Outcome {
    let image = small.join("disk.img");
    File::create(&image).and_then(|file| file.set_len(32 << 20)).map_err(|error| error.to_string())?;
    let disk = format!("path={},id=small", image.display());
    let mut running =
        Machine::stock(context, Kernel::Elf, "iotest")?.arguments(&["--disk", &disk]).start()?;
    running.expect_exit(exit::SUCCESS)?;
    let told =
        running.serial().iter().any(|line| line.contains("guest-io: write") && line.contains("failed"));
    ensure!(told, "the guest saw no error");
    let said: Vec<_> = running.messages().into_iter().filter(|line| line.contains("small")).collect();
    let about_space = said.iter().filter(|line| line.to_lowercase().contains("no space")).count();
    ensure!(about_space >= 1, "the log does not say that the host is out of space: {said:?}");
    ensure!(about_space <= 3, "the log says it {about_space} times");
    Ok(())
}

/// Turns on a CPU that the heartbeats of [`data_path`]'s 5 s may take, in which the disk serves thousands of requests.
const MOST_WAKES: u64 = 6;

/// Threads of the core other than vCPUs stay off the CPU while a disk is under load: a thread that is not scheduled makes no
/// system calls. The main thread answers the supervisor's heartbeat, every 2 s, whatever the load.
fn data_path(context: &Context) -> Outcome {
    let (machine, _) =
        Machine::stock(context, Kernel::Elf, "busy-disk")?.words("bulkhead.seconds=15").data_disk()?;
    let mut running = machine.arguments(&["--cpus", "1", "--memory", "512M"]).start()?;
    running.wait_for("guest: load begins", 1)?;
    thread::sleep(Duration::from_secs(3));
    let core = running.core()?;
    let count = || -> Outcome<Vec<(String, u64)>> {
        core.threads()?.iter().map(|thread| Ok((thread.name(), thread.times_scheduled()?))).collect()
    };
    let before = count()?;
    thread::sleep(Duration::from_secs(5));
    let after = count()?;
    ensure!(!running.serial().iter().any(|line| line.contains("load ends")), "the load was over too early");
    running.expect_exit(exit::SUCCESS)?;
    let requests = running.serial().iter().find(|line| line.contains("io read")).cloned().unwrap_or_default();
    context.log(&format!("{requests}\nbefore {before:?}\nafter  {after:?}"));
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let ran = after - before;
        let heartbeats = if name == "bulkhead-vmm" { MOST_WAKES } else { 0 };
        ensure!(
            name.starts_with("vcpu") || ran <= heartbeats,
            "thread {name} of the core ran {ran} times under disk load"
        );
    }
    ensure!(
        before.iter().any(|(name, _)| name.starts_with("vcpu")),
        "no thread of the core is named vcpu: {before:?}"
    );
    Ok(())
}
