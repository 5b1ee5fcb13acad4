//! Stock kernels boot, see what they should see, and their devices work.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, exit, expect_gone};

/// The functions that each machine of these tests has (datasheets 290549, 290550, 290562).
const CHIPSET: [&str; 3] = [
    "0000:00:00.0 8086:1237 class 060000",
    "0000:00:01.0 8086:7000 class 060100",
    "0000:00:01.3 8086:7113 class 068000",
];

/// Modern virtio functions have the device identifier 1040 + virtio device type (virtio 1.2, 4.1.2.1).
const VIRTIO: [&str; 3] = ["1af4:1042", "1af4:1044", "1af4:1043"];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (kernel, name) in [(Kernel::BzImage, "bzImage"), (Kernel::Elf, "ELF")] {
        for cpus in [1, 4] {
            cases.push(Case::new("stock", format!("boot {name} with {cpus} vCPUs"), 120, move |context| {
                smoke(context, kernel, cpus, "", None)
            }));
        }
    }
    cases.push(Case::new("stock", "boot with pci=nomsi", 120, |context| {
        smoke(context, Kernel::Elf, 2, "pci=nomsi", None)
    }));
    cases.push(Case::new("stock", "boot as an unprivileged user", 120, |context| {
        smoke(context, Kernel::BzImage, 1, "", Some(65534))
    }));
    cases.push(Case::new("stock", "boot with the console on hvc0 and no serial port", 120, console_only));
    cases
}

fn smoke(context: &Context, kernel: Kernel, cpus: u32, words: &str, user: Option<u32>) -> Outcome {
    let hvc = context.folder.join("hvc0");
    let (machine, disk) = Machine::stock(context, kernel, "smoke")?.words(words).data_disk()?;
    let console = format!("--console=file={}", hvc.display());
    let cpu_count = cpus.to_string();
    let mut machine = machine
        .arguments(&["--cpus", &cpu_count, "--memory", "512M", "--rng", &console, "--serial", "stdio"]);
    if let Some(user) = user {
        machine = machine.as_user(user)?;
    }
    let mut running = machine.start()?;
    running.wait_for("guest: init", 1)?;
    let processes = running.processes();
    ensure!(processes.len() == 6, "{} processes, not supervisor, core and four devices", processes.len());
    if kernel == Kernel::BzImage {
        // What the loader filled is a third of this: the rest is where the kernel has unpacked itself.
        let huge = running.core()?.ram_on_huge_pages()?;
        ensure!(huge >= 64 << 10, "{huge} KiB of guest RAM are on huge pages");
    }
    running.expect_exit(exit::SUCCESS)?;
    expect_gone(&processes, Duration::from_secs(1))?;

    let failed: Vec<_> = running.serial().into_iter().filter(|line| line.contains("FAILED")).collect();
    ensure!(failed.is_empty(), "in the guest: {}", failed.join("; "));
    ensure!(
        running.serial().iter().any(|line| line == "guest: done smoke"),
        "the script did not reach its end"
    );
    expect_guest(&running, cpus, words)?;
    let text = std::fs::read_to_string(&hvc).map_err(|error| format!("{}: {error}", hvc.display()))?;
    ensure!(text.contains("guest: hello from the virtio console"), "the console's file holds '{text}'");
    let sum = running.guest("sha256 from-guest").ok_or("the guest printed no checksum")?;
    expect_file_on_disk(context, &disk, &sum)
}

/// What the guest says about the machine.
fn expect_guest(running: &Running, cpus: u32, words: &str) -> Outcome {
    ensure!(running.guest("cpus") == Some(cpus.to_string()), "cpus {:?}", running.guest("cpus"));
    let serial = running.serial();
    let functions: Vec<_> = serial.iter().filter_map(|line| line.strip_prefix("guest: pci ")).collect();
    for function in CHIPSET {
        ensure!(functions.contains(&function), "no PCI function {function} among {functions:?}");
    }
    for id in VIRTIO {
        ensure!(functions.iter().any(|line| line.contains(id)), "no {id} among {functions:?}");
    }
    for driver in ["virtio_blk", "virtio_rng", "virtio_console"] {
        let bound = |line: &String| line.starts_with("guest: virtio ") && line.ends_with(driver);
        ensure!(serial.iter().any(bound), "no device bound to {driver}");
    }
    ensure!(
        running.guest("rng").is_some_and(|rng| rng.starts_with("virtio_rng")),
        "{:?}",
        running.guest("rng")
    );
    let vectors = serial.iter().filter(|line| line.starts_with("guest: msi-x ")).count();
    let pins = running.guest("intx").unwrap_or_default();
    if words.contains("nomsi") {
        ensure!(vectors == 0 && pins != "0", "{vectors} MSI-X vectors and {pins} pins with pci=nomsi");
    } else {
        ensure!(vectors >= 6 && pins == "0", "{vectors} MSI-X vectors and {pins} pins");
    }
    let clock = running.guest("clocksource").unwrap_or_default();
    ensure!(clock == "kvm-clock" || clock == "tsc", "clock source {clock}");
    let guest_time: u64 = running.guest("time").and_then(|text| text.parse().ok()).unwrap_or(0);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs());
    ensure!(guest_time.abs_diff(now) < 120, "guest's clock says {guest_time}, the host's {now}");
    Ok(())
}

/// Takes the file that the guest wrote out of the image, without mounting it, and compares its checksum.
fn expect_file_on_disk(context: &Context, disk: &Path, sum: &str) -> Outcome {
    let copy = context.folder.join("from-guest");
    let check =
        Command::new("e2fsck").arg("-fn").arg(disk).output().map_err(|error| format!("e2fsck: {error}"))?;
    ensure!(check.status.success(), "e2fsck: {}", String::from_utf8_lossy(&check.stdout));
    Command::new("debugfs")
        .arg("-R")
        .arg(format!("dump /from-guest {}", copy.display()))
        .arg(disk)
        .output()
        .map_err(|error| format!("debugfs: {error}"))?;
    let output =
        Command::new("sha256sum").arg(&copy).output().map_err(|error| format!("sha256sum: {error}"))?;
    let found = String::from_utf8_lossy(&output.stdout);
    ensure!(found.starts_with(sum), "the guest wrote {sum}, the disk holds {found}");
    Ok(())
}

fn console_only(context: &Context) -> Outcome {
    let mut running = Machine::stock(context, Kernel::BzImage, "report")?
        .words("bulkhead.console=hvc0")
        .arguments(&["--serial", "off", "--console=stdio"])
        .start()?;
    running.expect_exit(exit::SUCCESS)?;
    ensure!(running.guest("kernel").is_some(), "nothing came through the console");
    Ok(())
}
