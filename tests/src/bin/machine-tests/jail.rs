//! What the kernel says about each process of a running machine: namespaces, root, capabilities, seccomp, descriptors.

use std::collections::HashSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, expect_gone};
use bulkhead_tests::processes::Process;
use nix::sys::signal::Signal;

use crate::bare;

const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("stock", "jail holds on every process of a stock guest", 120, |context| {
            let (machine, _) = Machine::stock(context, Kernel::Elf, "idle")?.data_disk()?;
            let mut running = machine.arguments(&["--rng", "--console", "--cpus", "2"]).start()?;
            running.wait_for("guest: idle", 1)?;
            inspect(context, running)
        }),
        Case::new("bare", "jail holds on every process of a bare guest", 60, |context| {
            let (running, _) = bare::waiting(context, &[])?;
            inspect(context, running)
        }),
        Case::new("bare", "unused rules of the policies are found", 60, unused_rules),
    ]
}

/// The tool sees a bare machine load its policies, and tells what its guest needs from what it does not.
fn unused_rules(context: &Context) -> Outcome {
    let programs = &context.places.programs;
    let mut command = Command::new(programs.join("unused-rules"));
    command.arg("--calls").arg(programs.join("machine-tests"));
    let output = command.args(["--bare", "jail holds on every process of a bare"]).output();
    let output = output.map_err(|error| format!("unused-rules: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    context.log(&text);
    ensure!(text.contains("1 passed, 0 failed"), "the case did not pass under it");
    ensure!(output.status.code() == Some(1), "a machine that only waits needs every rule: {}", output.status);
    for policy in [
        "core-main",
        "core-devices",
        "core-vcpu",
        "blk-main",
        "blk-queue",
        "rng-main",
        "console-main",
        "uart-main",
    ] {
        let line = format!("seccomp-policies/{policy}.json: 1 threads");
        ensure!(text.contains(&line), "no line '{line}'");
    }
    let unused =
        |what: &str| text.lines().any(|line| line.starts_with("never used: ") && line.contains(what));
    ensure!(unused("KVM_GET_SREGS") && !unused("KVM_RUN ("), "it errs about ioctls of the vCPU");
    ensure!(!text.contains("forbidden: "), "something forbidden was called");
    Ok(())
}

fn inspect(context: &Context, mut running: Running) -> Outcome {
    let processes = running.processes();
    ensure!(processes.len() == 6, "{} processes, not supervisor, core and four devices", processes.len());
    let mut namespaces = HashSet::new();
    let mut layouts = HashSet::new();
    let mut users = HashSet::new();
    for kind in NAMESPACES {
        namespaces.insert(
            fs::read_link(format!("/proc/self/ns/{kind}")).map_or(String::new(), |l| l.display().to_string()),
        );
    }
    for process in processes.iter().skip(1) {
        let title = process.title();
        context.log(&format!("{} {title}", process.pid));
        threads(process).map_err(|sentence| format!("{title}: {sentence}"))?;
        root(process).map_err(|sentence| format!("{title}: {sentence}"))?;
        descriptors(context, process, &title).map_err(|sentence| format!("{title}: {sentence}"))?;
        limits(context, process).map_err(|sentence| format!("{title}: {sentence}"))?;
        let user = process.threads()?.first().map(|thread| thread.status("Uid")).transpose()?;
        ensure!(users.insert(user.clone()), "{title}: the user {user:?} is another process's as well");
        for kind in NAMESPACES {
            let namespace = process.namespace(kind)?;
            ensure!(namespaces.insert(namespace.clone()), "{title}: shares the namespace {namespace}");
        }
        let maps =
            fs::read_to_string(process.file("maps")).map_err(|error| format!("{title}: maps: {error}"))?;
        let first = maps.split('-').next().unwrap_or_default().to_owned();
        ensure!(layouts.insert(first.clone()), "{title}: mapped at {first} like another process");
    }
    shown(context, &running.name)?;
    running.signal(Signal::SIGTERM)?;
    running.wait()?;
    expect_gone(&processes, Duration::from_secs(1))
}

/// `bulkhead ps --security` says the same.
fn shown(context: &Context, name: &str) -> Outcome {
    let output = bulkhead(context).args(["ps", name, "--security", "--json"]).output();
    let text = output.map_err(|error| error.to_string())?.stdout;
    let shown: serde_json::Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let processes = shown["processes"].as_array().ok_or("no processes")?;
    ensure!(processes.len() == 6, "{} processes", processes.len());
    for process in processes.iter().skip(1) {
        let id = process["id"].as_str().unwrap_or_default();
        ensure!(process["own_namespaces"].as_array().is_some_and(|own| own.len() == 7), "{id}: {process}");
        ensure!(process["root_entries"] == 0, "{id}: {process}");
        ensure!(process["mounts"].as_array().is_some_and(|mounts| mounts.len() == 1), "{id}: {process}");
        ensure!(process["landlock"] == "not visible", "{id}: {process}");
        ensure!(process["descriptors"].as_u64().is_some_and(|count| count > 3), "{id}: {process}");
        let threads = process["threads"].as_array().ok_or("no threads")?;
        for thread in threads {
            let held =
                thread["seccomp"] == 2 && thread["capabilities"] == "0" && thread["no_new_privs"] == true;
            ensure!(held && !threads.is_empty(), "{id}: {thread}");
        }
    }
    Ok(())
}

fn threads(process: &Process) -> Outcome {
    for thread in process.threads()? {
        let name = thread.name();
        ensure!(
            thread.status("Seccomp")? == "2",
            "thread {name}: seccomp mode {}",
            thread.status("Seccomp")?
        );
        ensure!(thread.status("NoNewPrivs")? == "1", "thread {name}: no_new_privs is not set");
        for set in CAPABILITIES {
            let value = thread.status(set)?;
            ensure!(value.bytes().all(|digit| digit == b'0'), "thread {name}: {set} is {value}");
        }
    }
    Ok(())
}

fn root(process: &Process) -> Outcome {
    let entries = fs::read_dir(process.file("root")).map_err(|error| format!("its root: {error}"))?;
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    ensure!(names.is_empty(), "its root is not empty: {names:?}");
    // proc_pid_mountinfo(5): the fifth field is the mount point, the sixth its options.
    let mounts =
        fs::read_to_string(process.file("mountinfo")).map_err(|error| format!("mountinfo: {error}"))?;
    for mount in mounts.lines() {
        let options = mount.split_ascii_whitespace().nth(5).unwrap_or_default();
        ensure!(options.split(',').any(|option| option == "ro"), "a mount can be written: {mount}");
    }
    ensure!(mounts.lines().count() <= 1, "sees more than one mount:\n{mounts}");
    Ok(())
}

fn descriptors(context: &Context, process: &Process, title: &str) -> Outcome {
    let descriptors = process.descriptors()?;
    context.log(&format!("    {descriptors:?}"));
    let is = |word: &str| title.contains(word);
    for (number, target) in &descriptors {
        let allowed = if target.starts_with("socket:") || target.starts_with("pipe:") {
            true
        } else if target == "/dev/null" {
            *number == 0
        } else if target == "/dev/kvm" || target.starts_with("anon_inode:kvm") {
            is("bulkhead-vmm")
        } else if target.starts_with("anon_inode:") {
            true
        } else if target.starts_with("/memfd:guest-ram") {
            // The UART is reached register by register and holds no guest memory.
            !is("serial")
        } else if target.starts_with("/memfd:inflight") || target.starts_with("/memfd:shadow") {
            true
        } else if target == "/dev/urandom" {
            is("rng")
        } else if target.contains("data.ext4") {
            is("data")
        } else if target.starts_with(&*context.folder.to_string_lossy()) {
            is("serial") || is("console")
        } else {
            false
        };
        ensure!(allowed, "descriptor {number} is {target}");
    }
    Ok(())
}

fn limits(context: &Context, process: &Process) -> Outcome {
    let text = fs::read_to_string(process.file("limits")).map_err(|error| format!("limits: {error}"))?;
    let soft = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next().map(str::to_owned)
    };
    ensure!(soft("Max core file size").as_deref() == Some("0"), "may write core files:\n{text}");
    // What a guest prints to a file has no bound: the user asked for all of it.
    let prints = process.descriptors()?.values().any(|target| {
        target.starts_with(&*context.folder.to_string_lossy()) && !target.contains("data.ext4")
    });
    for name in ["Max open files", "Max processes", "Max file size"] {
        if prints && name == "Max file size" {
            continue;
        }
        let limit = soft(name).unwrap_or_default();
        ensure!(limit != "unlimited" && !limit.is_empty(), "{name} is {limit}");
    }
    Ok(())
}
