//! Limits of the processes by cgroup v2: device processes that use up all they can get, and what is left of the groups.
//!
//! This program is then the device program as well. It does not seal itself, so no seccomp policy and no rlimit stands between
//! it and its cgroup, as if both had failed. Contains unsafe code: a process that forks and fills memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::channel::message::ToDevice;
use bulkhead_ipc::jail;
use bulkhead_ipc::jail::cgroup::{Controller, Parent};
use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, Running, bulkhead, exit, expect_gone};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, fork, pause};

use crate::bare;

const MIB: usize = 1 << 20;
/// What the device processes may use, in MiB, and what guest RAM adds to it.
const MEMORY: usize = 32;
const PIDS: usize = 9;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("stock", "a memory bomb in a device process stays within its cgroup", 60, memory_bomb),
        Case::new("stock", "a fork bomb in a device process stays within its cgroup", 60, fork_bomb),
        Case::new("stock", "each process has a cgroup with limits, gone with the machine", 60, groups),
        Case::new("stock", "cgroups of a killed supervisor are removed by the next", 60, leftovers),
    ]
}

/// The device process that turned hostile before it was sealed.
pub fn hostile_device() {
    let Ok(channel) = jail::enter().map(Channel::from_fd) else { return };
    // Kept open, so that the core does not see it end first.
    let Ok((ToDevice::Start(start), _descriptors)) = channel.recv::<ToDevice>(Some(Duration::from_secs(10)))
    else {
        return;
    };
    match start.id.as_str() {
        "serial" => fill_memory(),
        "forks" => println!("INFO forked {} times", fork_all()),
        _ => {}
    }
}

fn fork_all() -> usize {
    for count in 0..1000 {
        // SAFETY: the child makes system calls only.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => pause(),
            Ok(ForkResult::Parent { .. }) => {}
            Err(_) => return count,
        }
    }
    1000
}

/// Shared memory, which counts neither as data nor as a file of the process.
fn fill_memory() {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    for step in 1..=512 / 4 {
        let Some(length) = std::num::NonZeroUsize::new(4 * MIB) else { return };
        // SAFETY: a new mapping, of which one byte in each page is written.
        unsafe {
            let Ok(memory) = mmap_anonymous(None, length, protection, MapFlags::MAP_SHARED) else { return };
            for page in (0..4 * MIB).step_by(4096) {
                memory.as_ptr().cast::<u8>().add(page).write_volatile(1);
            }
        }
        println!("INFO filled {} MiB", step * 4);
    }
}

/// Whether limits of memory and threads can be set here. The lab can, whatever it runs on.
fn possible(context: &Context) -> Outcome<bool> {
    let wanted = [Controller::Memory, Controller::Pids];
    let why = match Parent::find(&wanted) {
        Ok(parent) if parent.controllers == wanted => return Ok(true),
        Ok(parent) => format!("only {:?}", parent.controllers),
        Err(error) => error.to_string(),
    };
    ensure!(std::env::var_os("BULKHEAD_IN_LAB").is_none(), "the lab's kernel has no cgroup limits: {why}");
    println!("    not tried here: {why}");
    context.log(&why);
    Ok(false)
}

/// A machine with the real supervisor and core, whose devices are this program.
fn hostile(context: &Context, arguments: &[&str]) -> Outcome<Running> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let programs = &context.places.programs;
    for (from, name) in [
        (programs.join("bulkhead"), "bulkhead"),
        (programs.join("bulkhead-vmm"), "bulkhead-vmm"),
        (own, "bulkhead-device"),
    ] {
        fs::copy(&from, context.folder.join(name)).map_err(|error| format!("{}: {error}", from.display()))?;
    }
    let image = context.folder.join("disk");
    fs::write(&image, [0; 4096]).map_err(|error| error.to_string())?;
    let mut command = Command::new(context.folder.join("bulkhead"));
    command.args(["run", "--memory", "64M", "--require", "cgroup", "--restart", "never", "--kernel"]);
    command.arg(context.places.payloads.join("first_byte.elf")).args(arguments);
    command.current_dir(&context.folder);
    Machine::from_command(context, command).start()
}

/// The number in the last message that begins so.
fn last_number(running: &Running, before: &str) -> Option<usize> {
    running
        .messages()
        .iter()
        .rev()
        .find_map(|line| line.split_once(before)?.1.split_whitespace().next()?.parse().ok())
}

fn memory_bomb(context: &Context) -> Outcome {
    if !possible(context)? {
        return Ok(());
    }
    let serial = format!("file={}", context.folder.join("serial").display());
    let limit = format!("serial:memory={MEMORY}M");
    let mut running = hostile(context, &["--serial", &serial, "--limit", &limit, "--name", "memory-bomb"])?;
    let processes = running.processes();
    running.expect_exit(exit::PROCESS)?;
    let filled = last_number(&running, "filled ").ok_or("it did not fill any memory")?;
    ensure!((MEMORY / 2..=MEMORY).contains(&filled), "it filled {filled} MiB with a limit of {MEMORY}");
    let messages = running.messages().join("\n");
    ensure!(messages.contains("reached the memory limit of its cgroup"), "not explained: {messages}");
    no_groups("memory-bomb")?;
    expect_gone(&processes, Duration::from_secs(1))
}

fn fork_bomb(context: &Context) -> Outcome {
    if !possible(context)? {
        return Ok(());
    }
    let limit = format!("forks:pids={PIDS}");
    let disk = ["--disk", "path=disk,id=forks", "--serial", "off", "--limit", &limit, "--name", "fork-bomb"];
    let mut running = hostile(context, &disk)?;
    running.expect_exit(exit::PROCESS)?;
    let forked = last_number(&running, "forked ").ok_or("it did not say how often it forked")?;
    ensure!(forked == PIDS - 1, "it forked {forked} times with a limit of {PIDS} processes");
    no_groups("fork-bomb")
}

/// Folder of the machine's group.
fn group_of(running: &Running) -> Outcome<PathBuf> {
    let processes = running.processes();
    let core = processes.get(1).ok_or("no core")?;
    let pid = i32::try_from(core.pid).map_err(|error| error.to_string())?;
    let leaf = jail::cgroup::folder_of(pid).ok_or("the core's cgroup cannot be read")?;
    ensure!(leaf.ends_with("core"), "the core is in {}", leaf.display());
    Ok(leaf.parent().map(PathBuf::from).unwrap_or_default())
}

fn no_groups(machine: &str) -> Outcome {
    let parent = Parent::any().map_err(|error| error.to_string())?;
    let folder = parent.folder().join(format!("bulkhead-{machine}"));
    ensure!(!folder.exists(), "{} is left", folder.display());
    Ok(())
}

fn groups(context: &Context) -> Outcome {
    if !possible(context)? {
        return Ok(());
    }
    let limits = ["--limit", "rng:memory=16M,pids=5,cpu=50", "--require", "cgroup,landlock,distinct-uids"];
    let (mut running, _) = bare::waiting(context, &limits)?;
    let folder = group_of(&running)?;
    let read = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default().trim().to_owned();
    let processes = running.processes();
    for (process, leaf) in processes.iter().skip(1).zip(["core", "data", "rng", "console", "serial"]) {
        // KVM's own worker is in the core's group beside it.
        let members = read(&format!("{leaf}/cgroup.procs"));
        ensure!(
            members.lines().any(|it| it == process.pid.to_string()),
            "{leaf} is not in its cgroup: {members}"
        );
        let (memory, pids) = (read(&format!("{leaf}/memory.max")), read(&format!("{leaf}/pids.max")));
        context.log(&format!("{leaf}: memory.max {memory}, pids.max {pids}"));
        ensure!(memory.parse::<u64>().is_ok() && pids.parse::<u64>().is_ok(), "{leaf}: {memory}, {pids}");
    }
    // Guest RAM of 256 MiB may be charged to it, and 4 MiB of tables for it.
    ensure!(read("rng/memory.max") == ((16 + 256 + 4) << 20).to_string(), "rng: {}", read("rng/memory.max"));
    ensure!(read("rng/pids.max") == "5", "rng: {}", read("rng/pids.max"));
    ensure!(read("rng/cpu.max") == "50000 100000", "rng: {}", read("rng/cpu.max"));
    let shown = bulkhead(context).args(["ps", &running.name, "--security"]).output();
    let shown = String::from_utf8_lossy(&shown.map_err(|error| error.to_string())?.stdout).into_owned();
    context.log(&shown);
    ensure!(shown.contains("rng: memory.max 289406976, memory.current "), "{shown}");
    added(context, &running, &folder)?;
    running.signal(Signal::SIGTERM)?;
    running.wait()?;
    ensure!(!folder.exists(), "{} is left", folder.display());
    Ok(())
}

/// The limits of a device that is added later, and what is left of them when it is removed.
fn added(context: &Context, running: &Running, folder: &Path) -> Outcome {
    let device = |arguments: &[&str]| -> Outcome {
        let output = bulkhead(context).arg("device").args(arguments).output().map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "device {arguments:?}: {said}");
        Ok(())
    };
    let image = context.folder.join("hot.img");
    fs::write(&image, [0; 65536]).map_err(|error| error.to_string())?;
    let spec = format!("path={},id=hot", image.display());
    let read = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default().trim().to_owned();
    for (limit, pids, cpu) in [("pids=9,cpu=40", "9", "40000 100000"), ("pids=8", "8", "max 100000")] {
        device(&["add", &running.name, "--disk", &spec, "--limit", limit])?;
        ensure!(read("hot/pids.max") == pids, "{limit}: {}", read("hot/pids.max"));
        ensure!(read("hot/cpu.max") == cpu, "{limit}: {}", read("hot/cpu.max"));
        device(&["remove", &running.name, "hot", "--force"])?;
        ensure!(!folder.join("hot").exists(), "the group of the removed device is left");
    }
    Ok(())
}

fn leftovers(context: &Context) -> Outcome {
    if !possible(context)? {
        return Ok(());
    }
    let (mut running, _) = bare::waiting(context, &[])?;
    let (folder, processes) = (group_of(&running)?, running.processes());
    running.signal(Signal::SIGKILL)?;
    running.wait()?;
    expect_gone(&processes, Duration::from_secs(1))?;
    ensure!(folder.exists(), "{} went by itself: nothing is shown", folder.display());
    let command = Command::new(context.places.programs.join("bulkhead"));
    let mut other = Machine::from_command(context, command)
        .arguments(&["run", "--serial", "off", "--memory", "64M", "--name", "another", "--kernel"])
        .arguments(&[&context.places.payloads.join("first_byte.elf").to_string_lossy()])
        .start()?;
    while folder.exists() {
        ensure!(!context.left().is_zero(), "{} is still there", folder.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    other.signal(Signal::SIGTERM)?;
    other.wait()?;
    no_groups("another")
}
