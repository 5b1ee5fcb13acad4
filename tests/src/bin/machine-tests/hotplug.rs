//! Devices that come and go while the guest runs: what the guest sees, and that nothing stays behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, exit};
use bulkhead_tests::pattern::Stream;
use bulkhead_tests::processes::Process;

/// How often a disk is plugged in and out of a real guest, and of one that does not listen.
const ROUNDS: usize = 50;
const BARE_ROUNDS: usize = 10;
/// The size of these disks, bytes.
const DISK: usize = 256 << 10;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bare", "hot-plug: pulled-out devices leave nothing behind", 60, pulled_out),
        Case::new("bare", "hot-plug: what makes no sense is refused", 60, refused),
        Case::new("stock", "processors come and go, and sit where --cpus says", 120, processors),
        Case::new("stock", "hot-plug: a disk comes and goes 50 times under load", 180, under_load),
    ]
}

/// Runs `bulkhead device …` and returns its exit code and what it said.
fn device(context: &Context, arguments: &[&str]) -> Outcome<(i32, String)> {
    let output = bulkhead(context).arg("device").args(arguments).output().map_err(|e| e.to_string())?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    context.log(&format!("device {arguments:?}: {} {said}", output.status));
    Ok((output.status.code().unwrap_or(-1), said))
}

fn succeed(context: &Context, arguments: &[&str]) -> Outcome {
    let (code, said) = device(context, arguments)?;
    ensure!(code == exit::SUCCESS, "device {arguments:?} ended with {code}: {said}");
    Ok(())
}

fn refuse(context: &Context, arguments: &[&str], words: &str) -> Outcome {
    let (code, said) = device(context, arguments)?;
    ensure!(code != exit::SUCCESS && said.contains(words), "device {arguments:?} ended with {code}: {said}");
    Ok(())
}

/// What the processes of a machine hold: of each its name, and how many descriptors (of each kind) and threads it has.
fn holdings(running: &Running) -> Outcome<BTreeMap<String, String>> {
    let count = |process: &Process| -> Outcome<(String, String)> {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        for link in process.descriptors()?.into_values() {
            let kind = link.split([':', '(', ' ']).next().unwrap_or_default().to_owned();
            *kinds.entry(kind).or_default() += 1;
        }
        Ok((process.title(), format!("{kinds:?}, {} threads", process.threads()?.len())))
    };
    running.processes().iter().map(count).collect()
}

/// Waits until the processes hold what they held before; what the kernel takes down for io_uring takes a moment.
fn expect_holdings(running: &Running, before: &BTreeMap<String, String>) -> Outcome {
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        let now = holdings(running)?;
        if now == *before {
            return Ok(());
        }
        ensure!(Instant::now() < end, "before the first device: {before:#?}, after the last: {now:#?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Fills an image with bytes of its own and returns its path and its digest.
fn image(folder: &Path, name: &str, seed: u64) -> Outcome<(PathBuf, String)> {
    let path = folder.join(name);
    let mut bytes = vec![0; DISK];
    let mut random = Stream::new(seed);
    bytes.iter_mut().for_each(|byte| *byte = u8::try_from(random.below(256)).unwrap_or(0));
    fs::write(&path, &bytes).map_err(|error| error.to_string())?;
    Ok((path.clone(), digest(&path)?))
}

fn digest(path: &Path) -> Outcome<String> {
    let output = Command::new("sha256sum").arg(path).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().next().map(str::to_owned).ok_or_else(|| "no digest".to_owned())
}

/// A guest that knows nothing of ACPI and goes on for ever.
fn deaf(context: &Context) -> Outcome<Running> {
    let machine = Machine::bare(context, &context.places.payloads.join("echo.elf"))?;
    let serial = format!("unix={}", context.folder.join("serial").display());
    let (machine, _) = machine.arguments(&["--memory", "64M", "--serial", &serial]).empty_disk(1)?;
    let running = machine.start()?;
    let end = Instant::now() + Duration::from_secs(20);
    while !running.messages().iter().any(|line| line.contains("are ready")) {
        ensure!(Instant::now() < end, "the machine does not start");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(running)
}

fn pulled_out(context: &Context) -> Outcome {
    let running = deaf(context)?;
    let (path, _) = image(&context.folder, "hot.img", 1)?;
    let name = running.name.as_str();
    let spec = format!("path={},id=hot", path.display());
    let before = holdings(&running)?;
    for _ in 0..BARE_ROUNDS {
        succeed(context, &["add", name, "--disk", &spec])?;
        succeed(context, &["add", name, "--rng"])?;
        succeed(context, &["add", name, "--console"])?;
        ensure!(running.processes().len() == before.len() + 3, "a process is missing");
        for device in ["hot", "rng", "console"] {
            succeed(context, &["remove", name, device, "--force"])?;
        }
    }
    expect_holdings(&running, &before)?;
    // As many as there are slots, the first of them taken, and one more.
    for number in 0..29 {
        let (path, _) = image(&context.folder, &format!("{number}.img"), number)?;
        succeed(context, &["add", name, "--disk", &format!("path={}", path.display())])?;
    }
    refuse(context, &["add", name, "--rng"], "no PCI slot is free")?;
    for number in 0..29 {
        succeed(context, &["remove", name, &format!("disk{number}"), "--force"])?;
    }
    expect_holdings(&running, &before)
}

fn refused(context: &Context) -> Outcome {
    let mut running = deaf(context)?;
    let name = running.name.clone();
    let name = name.as_str();
    let (path, _) = image(&context.folder, "hot.img", 1)?;
    let spec = format!("path={},id=hot", path.display());
    refuse(context, &["remove", name, "hot"], "no device that can be removed")?;
    refuse(context, &["remove", name, "serial"], "no device that can be removed")?;
    refuse(context, &["add", name, "--disk", "path=/nowhere"], "no such file")?;
    refuse(context, &["add", name, "--disk", &format!("{spec},readonly=maybe")], "readonly=on")?;
    for id in ["core", "serial", "data", "console"] {
        refuse(context, &["add", name, "--disk", &format!("path={},id={id}", path.display())], "belongs to")?;
    }
    succeed(context, &["add", name, "--disk", &spec])?;
    refuse(context, &["add", name, "--disk", &spec], "already belongs")?;
    let again = format!("path={},id=again", path.display());
    refuse(context, &["add", name, "--disk", &again], "already the image of disk hot")?;
    refuse(context, &["remove", name, "hot", "--timeout", "1"], "did not let go of hot within 1 s")?;
    // One who asks while another waits.
    let mut waiting = bulkhead(context).args(["device", "remove", name, "hot"]).spawn().map_err(|e| e.to_string())?;
    thread::sleep(Duration::from_millis(300));
    refuse(context, &["remove", name, "hot"], "is being removed already")?;
    refuse(context, &["add", name, "--disk", &spec], "is being removed already")?;
    succeed(context, &["remove", name, "hot", "--force"])?;
    let status = waiting.wait().map_err(|error| error.to_string())?;
    ensure!(status.success(), "who asked first heard that {status}");
    succeed(context, &["add", name, "--disk", &again])?;
    ensure!(bulkhead(context).args(["stop", "--force", name]).status().is_ok_and(|s| s.success()), "no stop");
    running.expect_exit(exit::FORCED)
}

fn under_load(context: &Context) -> Outcome {
    let rounds = std::env::var("BULKHEAD_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let (machine, _) = Machine::stock(context, Kernel::Elf, "hotplug")?
        .words(&format!("bulkhead.rounds={rounds}"))
        .empty_disk(8)?;
    let mut running = machine.arguments(&["--cpus", "2", "--memory", "256M"]).start()?;
    running.wait_for("guest: ready for disks", 1)?;
    let name = running.name.clone();
    let before = holdings(&running)?;
    let mut times = Vec::new();
    for round in 1..=rounds {
        let seed = u64::try_from(round).unwrap_or(0);
        let (path, content) = image(&context.folder, "hot.img", seed)?;
        let start = Instant::now();
        succeed(context, &["add", &name, "--disk", &format!("path={},id=hot{round}", path.display())])?;
        let line = running.wait_for("guest: disk ", round)?;
        let wrote = line.split_whitespace().last().unwrap_or_default().to_owned();
        let expected = format!("guest: disk {round} hot{round} read {content} wrote {wrote}");
        ensure!(line == expected, "the guest says '{line}', not '{expected}'");
        succeed(context, &["remove", &name, &format!("hot{round}")])?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        ensure!(digest(&path)? == wrote, "round {round}: the image is not what the guest wrote");
        running.wait_for("guest: gone ", round)?;
    }
    expect_holdings(&running, &before)?;
    let mean = times.iter().sum::<f64>() / f64::from(u32::try_from(times.len()).unwrap_or(1));
    context.log(&format!("plugged in, read, written and out again within {mean:.0} ms on average"));
    running.expect_exit(exit::SUCCESS)?;
    ensure!(!running.serial().iter().any(|line| line.contains("FAILED")), "the guest found an error");
    ensure!(running.guest("load passed").is_some(), "the load did not end");
    Ok(())
}

/// What the guest says of its processors, one line each.
fn topology(running: &Running) -> Vec<String> {
    let lines = running.serial();
    lines.iter().filter_map(|line| line.strip_prefix("guest: processor ").map(str::to_owned)).collect()
}

fn processors(context: &Context) -> Outcome {
    let mut running = Machine::stock(context, Kernel::Elf, "processors")?
        .words("bulkhead.wait")
        .arguments(&["--cpus", "4,max=8,sockets=2,threads=2", "--cpu-model", "x86-64-v2", "--memory", "256M"])
        .start()?;
    running.wait_for("guest: online 0-3", 1)?;
    let expected = ["0: package 0 core 0 threads 0-1", "1: package 0 core 0 threads 0-1",
        "2: package 0 core 1 threads 2-3", "3: package 0 core 1 threads 2-3"];
    ensure!(topology(&running) == expected, "the guest says {:?}", topology(&running));
    let flags = running.guest("flags").unwrap_or_default();
    for (flag, seen) in [("sse4_2", true), ("popcnt", true), ("avx", false), ("rdrand", false), ("svm", false)] {
        ensure!(flags.split(' ').any(|word| word == flag) == seen, "{flag} is wrong: {flags}");
    }
    ensure!(running.guest("possible").is_some_and(|text| text.starts_with("0-7")), "not 8 are possible");
    let name = running.name.clone();
    let resize = |count: &str| bulkhead(context).args(["resize", &name, "--cpus", count]).output();
    let ok = |count| resize(count).is_ok_and(|output| output.status.success());
    ensure!(ok("6"), "no 6 CPUs");
    running.wait_for("guest: online 0-5", 1)?;
    let refused = resize("9").map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("1 to 8 CPUs"), "9 CPUs: {said}");
    ensure!(ok("2"), "not down to 2");
    running.wait_for("guest: online 0-1", 1)?;
    ensure!(ok("3"), "not up to 3");
    running.wait_for("guest: online 0-2", 1)?;
    ensure!(ok("1"), "not down to 1");
    running.expect_exit(exit::SUCCESS)
}
