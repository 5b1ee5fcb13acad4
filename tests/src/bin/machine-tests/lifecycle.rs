//! Every way in which a machine ends: the exit code, and that nothing stays behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, exit, expect_gone};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// However a machine ends, its processes are gone this soon.
const GONE: Duration = Duration::from_secs(1);

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new(
            "bare",
            "killed core leaves nothing, and the image unlocked, within a second",
            30,
            |context| bare_killed(context, "core"),
        ),
        Case::new("bare", "so does a killed supervisor", 30, |context| bare_killed(context, "supervisor")),
        Case::new("bare", "so does one that the host's OOM killer ends", 30, out_of_memory),
        // The lab has cgroup v2, whatever it runs on.
        Case::new("stock", "so does one that the OOM killer ends in the lab's cgroup v2", 30, |context| {
            let two = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
            ensure!(two || std::env::var_os("BULKHEAD_IN_LAB").is_none(), "the lab has no cgroup v2");
            out_of_memory(context)
        }),
        Case::new("bare", "stopped core is found and ends the machine, by name", 60, stopped_core),
        Case::new("stock", "power button lets the guest shut down", 120, power_button),
        Case::new("stock", "stop --force ends at once", 120, stop_forced),
        Case::new("stock", "panic ends with its own exit code", 120, |context| {
            ends(context, "panic", "", exit::PANIC)
        }),
        Case::new("stock", "reboot starts the machine again", 180, reboot_restarts),
        Case::new("stock", "killed supervisor leaves nothing", 120, |context| {
            signalled(context, Signal::SIGKILL, 137)
        }),
        Case::new("stock", "SIGTERM ends the machine", 120, |context| {
            signalled(context, Signal::SIGTERM, 143)
        }),
        Case::new("stock", "SIGINT ends the machine", 120, |context| signalled(context, Signal::SIGINT, 130)),
        Case::new(
            "stock",
            "killed device ends the machine with --restart never, by name",
            120,
            killed_device,
        ),
        Case::new("stock", "killed core is reported", 120, killed_core),
        Case::new("stock", "ps shows each process", 120, ps),
        Case::new("stock", "locked disk is refused to a second machine", 120, locked_disk),
    ];
    for (way, what) in
        [("a", "ACPI"), ("p", "CF9"), ("k", "the keyboard controller"), ("t", "a triple fault")]
    {
        cases.push(Case::new(
            "stock",
            format!("reboot by {what} ends with --on-reboot exit"),
            120,
            move |context| ends(context, "reboot", &format!("reboot={way}"), exit::SUCCESS),
        ));
    }
    cases
}

/// A machine that waits for its power button.
fn idle(context: &Context) -> Outcome<Running> {
    idle_with(context, &[])
}

fn idle_with(context: &Context, arguments: &[&str]) -> Outcome<Running> {
    let (machine, _) = Machine::stock(context, Kernel::Elf, "idle")?.data_disk()?;
    let machine = machine.arguments(&["--memory", "256M", "--rng", "--console"]).arguments(arguments);
    let mut running = machine.start()?;
    let line = running.wait_for("guest: idle", 1)?;
    ensure!(!line.contains("missing"), "the guest sees no power button");
    Ok(running)
}

fn ends(context: &Context, test: &str, words: &str, code: i32) -> Outcome {
    let machine = Machine::stock(context, Kernel::Elf, test)?.words(words);
    let mut running = machine.arguments(&["--on-reboot", "exit"]).start()?;
    running.wait_for("guest: init", 1)?;
    let processes = running.processes();
    running.expect_exit(code)?;
    expect_gone(&processes, GONE)
}

fn power_button(context: &Context) -> Outcome {
    let mut running = idle(context)?;
    let processes = running.processes();
    let stop = bulkhead(context).args(["stop", &running.name]).status().map_err(|error| error.to_string())?;
    ensure!(stop.success(), "bulkhead stop ended with {stop}");
    running.expect_exit(exit::SUCCESS)?;
    running.wait_for("guest: power button pressed", 1)?;
    expect_gone(&processes, GONE)
}

fn stop_forced(context: &Context) -> Outcome {
    let mut running = idle(context)?;
    let processes = running.processes();
    let stop = bulkhead(context).args(["stop", "--force", &running.name]).status();
    ensure!(stop.is_ok_and(|status| status.success()), "bulkhead stop --force failed");
    running.expect_exit(exit::FORCED)?;
    expect_gone(&processes, GONE)?;
    let again =
        bulkhead(context).args(["stop", &running.name]).status().map_err(|error| error.to_string())?;
    ensure!(again.code() == Some(exit::NO_MACHINE), "stop of a machine that is gone ended with {again}");
    Ok(())
}

fn reboot_restarts(context: &Context) -> Outcome {
    let mut running = Machine::stock(context, Kernel::Elf, "reboot")?.start()?;
    running.wait_for("guest: init", 2)?;
    let processes = running.processes();
    let stop = bulkhead(context).args(["stop", "--force", &running.name]).status();
    ensure!(stop.is_ok_and(|status| status.success()), "bulkhead stop --force failed");
    running.expect_exit(exit::FORCED)?;
    expect_gone(&processes, GONE)
}

fn signalled(context: &Context, signal: Signal, code: i32) -> Outcome {
    let mut running = idle(context)?;
    let processes = running.processes();
    ensure!(processes.len() == 6, "{} processes, not 6", processes.len());
    running.signal(signal)?;
    expect_gone(processes.get(1..).unwrap_or_default(), GONE)?;
    running.expect_exit(code)
}

/// Kills the process whose title contains `title`; the machine ends, and the message calls it `name` and says how.
fn killed(context: &Context, title: &str, name: &str) -> Outcome {
    let mut running = idle_with(context, &["--restart", "never"])?;
    let processes = running.processes();
    let titles: Vec<_> = processes.iter().map(bulkhead_tests::processes::Process::title).collect();
    context.log(&format!("{titles:?}"));
    let children = processes.iter().zip(&titles).skip(1);
    let (victim, _) = children
        .into_iter()
        .find(|(_, found)| found.contains(title))
        .ok_or(format!("no '{title}' in {titles:?}"))?;
    let status = Command::new("kill").args(["-9", &victim.pid.to_string()]).status();
    ensure!(status.is_ok_and(|status| status.success()), "kill failed");
    running.expect_exit(exit::PROCESS)?;
    let messages = running.messages().join("\n");
    ensure!(messages.contains(name), "no message names {name}");
    ensure!(messages.contains("SIGKILL") || messages.contains("signal 9"), "no message names the signal");
    expect_gone(&processes, GONE)
}

fn killed_device(context: &Context) -> Outcome {
    killed(context, "data", "data")
}

fn killed_core(context: &Context) -> Outcome {
    killed(context, "bulkhead-vmm", "core")
}

fn ps(context: &Context) -> Outcome {
    let mut running = idle(context)?;
    let list = bulkhead(context).arg("ps").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    ensure!(list.status.success() && text.contains(&running.name), "the list of machines: {text}");
    let output = bulkhead(context).args(["ps", &running.name]).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    context.log(&text);
    ensure!(output.status.success(), "bulkhead ps ended with {}", output.status);
    for process in running.processes() {
        let pid = process.pid.to_string();
        ensure!(
            text.split_ascii_whitespace().any(|word| word == pid),
            "no line about {pid} {}",
            process.title()
        );
    }
    for role in ["supervisor", "core", "data", "rng", "console", "serial"] {
        ensure!(text.contains(role), "no line about {role}");
    }
    let json = bulkhead(context)
        .args(["ps", "--json", &running.name])
        .output()
        .map_err(|error| error.to_string())?;
    serde_json::from_slice::<serde_json::Value>(&json.stdout)
        .map_err(|error| format!("ps --json: {error}"))?;
    running.signal(Signal::SIGTERM)?;
    running.expect_exit(143)
}

/// A guest that waits for input, with a disk; returns the disk's image.
fn waiting(context: &Context, arguments: &[&str]) -> Outcome<(Running, PathBuf)> {
    let machine = Machine::bare(context, &context.places.payloads.join("echo.elf"))?;
    let (machine, disk) = machine.empty_disk(1)?;
    let serial = ["--memory", "64M", "--rng", "--console", "--serial", "attach"];
    let running = machine.arguments(&serial).arguments(arguments).start()?;
    while !running.messages().iter().any(|line| line.contains("are ready")) {
        ensure!(!context.left().is_zero(), "the machine did not start: {:?}", running.messages());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((running, disk))
}

/// Kills one of the two without which there is no machine.
fn bare_killed(context: &Context, victim: &str) -> Outcome {
    let (mut running, disk) = waiting(context, &[])?;
    let processes = running.processes();
    ensure!(processes.len() == 6, "{} processes, not 6", processes.len());
    ensure!(!can_lock(&disk)?, "the image is not locked");
    let begin = Instant::now();
    if victim == "core" {
        let pid = running.core()?.pid.try_into().map_err(|_| "no core")?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|error| error.to_string())?;
        running.expect_exit(exit::PROCESS)?;
        let messages = running.messages().join("\n");
        ensure!(messages.contains("core (process") && messages.contains("SIGKILL"), "it says {messages}");
    } else {
        running.signal(Signal::SIGKILL)?;
        running.expect_exit(137)?;
    }
    expect_gone(&processes, GONE.saturating_sub(begin.elapsed()))?;
    while !can_lock(&disk)? {
        ensure!(begin.elapsed() < GONE, "the image is still locked");
        std::thread::sleep(Duration::from_millis(5));
    }
    context.log(&format!("all gone after {:.1?}", begin.elapsed()));
    Ok(())
}

/// A group of the host's, of cgroup version 2 or 1, that leaves its processes no memory; it is removed in the end.
struct NoMemory(PathBuf);

impl NoMemory {
    fn create(context: &Context) -> std::io::Result<Self> {
        let name = format!("bulkhead-oom-{}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        let two = root.join("cgroup.controllers").exists();
        if two {
            fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        }
        let folder = if two { root.join(name) } else { root.join("memory").join(name) };
        context.log(&folder.display().to_string());
        fs::create_dir(&folder)?;
        let group = Self(folder);
        let limit = if two { "memory.max" } else { "memory.limit_in_bytes" };
        fs::write(group.0.join(limit), "0")?;
        Ok(group)
    }

    /// How many processes the kernel has ended in it for want of memory.
    fn ended(&self) -> u32 {
        let counts = ["memory.events", "memory.oom_control"];
        let texts = counts.iter().filter_map(|name| fs::read_to_string(self.0.join(name)).ok());
        let count = |text: String| text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        texts.filter_map(count).next().unwrap_or(0)
    }
}

impl Drop for NoMemory {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The supervisor alone is put where it gets no memory any more, and asked for something.
fn out_of_memory(context: &Context) -> Outcome {
    let (mut running, disk) = waiting(context, &[])?;
    let processes = running.processes();
    let group = match NoMemory::create(context) {
        Ok(group) => group,
        Err(error) => {
            ensure!(std::env::var_os("BULKHEAD_IN_LAB").is_none(), "no cgroup in the lab: {error}");
            println!("    not tried here: {error}");
            running.signal(Signal::SIGTERM)?;
            return running.expect_exit(143);
        }
    };
    fs::write(group.0.join("cgroup.procs"), running.pid().to_string()).map_err(|error| error.to_string())?;
    while group.ended() == 0 {
        ensure!(!context.left().is_zero(), "the supervisor lives without memory");
        let _any = bulkhead(context).args(["ps", &running.name]).output();
    }
    let begin = Instant::now();
    running.expect_exit(137)?;
    expect_gone(&processes, GONE.saturating_sub(begin.elapsed()))?;
    while !can_lock(&disk)? {
        ensure!(begin.elapsed() < GONE, "the image is still locked");
        std::thread::sleep(Duration::from_millis(5));
    }
    context.log(&format!("all gone {:.1?} after the supervisor", begin.elapsed()));
    Ok(())
}

/// Whether another could open the image for writing now.
fn can_lock(disk: &Path) -> Outcome<bool> {
    let file = File::options().read(true).write(true).open(disk).map_err(|error| error.to_string())?;
    let lock = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap_or_default(),
        l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(format!("cannot lock: {error}")),
    }
}

fn stopped_core(context: &Context) -> Outcome {
    let (mut running, _) = waiting(context, &["--hang-deadline", "1"])?;
    let processes = running.processes();
    let pid = running.core()?.pid.try_into().map_err(|_| "no core")?;
    kill(Pid::from_raw(pid), Signal::SIGSTOP).map_err(|error| error.to_string())?;
    running.expect_exit(exit::PROCESS)?;
    let messages = running.messages().join("\n");
    ensure!(messages.contains("core hangs: it did not answer within 4 s"), "it says {messages}");
    expect_gone(&processes, GONE)
}

fn locked_disk(context: &Context) -> Outcome {
    let mut first = idle(context)?;
    let disk = format!("path={}", context.folder.join("data.ext4").display());
    let second = Machine::stock(context, Kernel::Elf, "idle")?.arguments(&["--disk", &disk]).named("second");
    let mut second = second.start()?;
    second.expect_exit(exit::USAGE)?;
    let messages = second.messages().join("\n");
    ensure!(messages.contains("data.ext4") && messages.contains("lock"), "the refusal says: {messages}");
    first.signal(Signal::SIGTERM)?;
    first.expect_exit(143)
}
