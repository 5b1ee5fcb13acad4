//! Bare-metal payloads: they run on any KVM, also where the CPU offers no virtualization.

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{fs, thread};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Machine, Running, bulkhead, exit, expect_gone};
use nix::sys::signal::Signal;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bare", "garbage to every port and register", 300, garbage),
        Case::new("bare", "RAM on both sides of the hole", 60, memory),
        Case::new("bare", "PAM flipped while another vCPU runs from it", 120, |context| {
            expect_lines(context, "pam", &["pam ends"])
        }),
        Case::new("bare", "RTC and PM timer interrupt by themselves", 60, |context| {
            expect_lines(context, "timers", &["rtc interrupts", "pm timer interrupts", "timers end"])
        }),
        Case::new(
            "bare",
            "as many CPUs as KVM has run, and get interrupts by their x2APIC ids",
            180,
            processors,
        ),
        Case::new("bare", "a guest that KVM cannot run is reported with registers", 60, bad_fetch),
        Case::new("bare", "killed supervisor leaves nothing of a bare guest", 60, |context| {
            let (mut running, _) = waiting(context, &[])?;
            let processes = running.processes();
            running.signal(Signal::SIGKILL)?;
            expect_gone(processes.get(1..).unwrap_or_default(), Duration::from_secs(1))?;
            running.expect_exit(137)
        }),
        Case::new(
            "bare",
            "what the loader fills is on huge pages, unless the user wants none",
            60,
            huge_pages,
        ),
        Case::new("bare", "SIGTERM at any moment of the launch leaves nothing", 120, interrupted_launch),
    ]
}

/// A machine with four devices whose guest has written one byte to the UART and waits. Also the file of the UART.
pub fn waiting(context: &Context, arguments: &[&str]) -> Outcome<(Running, PathBuf)> {
    let serial = context.folder.join("serial");
    let (machine, _) = Machine::bare(context, &context.places.payloads.join("first_byte.elf"))?
        .empty_disk_named("data.ext4", 1)?;
    let target = format!("file={}", serial.display());
    let running = machine
        .arguments(&["--memory", "256M", "--rng", "--console", "--serial", &target])
        .arguments(arguments)
        .start()?;
    while fs::read(&serial).unwrap_or_default().is_empty() {
        ensure!(!context.left().is_zero(), "the payload's byte did not reach the UART");
        thread::sleep(Duration::from_millis(5));
    }
    Ok((running, serial))
}

/// An initrd of 9 MiB covers four huge pages at least, wherever it begins.
fn huge_pages(context: &Context) -> Outcome {
    let doctor = bulkhead(context).arg("doctor").output().map_err(|error| error.to_string())?;
    let there = String::from_utf8_lossy(&doctor.stdout).contains("MADV_COLLAPSE is there");
    ensure!(there, "`bulkhead doctor` finds no MADV_COLLAPSE: this needs Linux 6.1 or later");
    let initrd = context.folder.join("initrd");
    fs::write(&initrd, vec![0x5A; 9 << 20]).map_err(|error| error.to_string())?;
    for (thp, least, most) in [("on", 4 * 2048, u64::MAX), ("off", 0, 0)] {
        let arguments = ["--thp", thp, "--initrd", &initrd.display().to_string()];
        let (mut running, _) = waiting(context, &arguments)?;
        let found = running.core()?.ram_on_huge_pages()?;
        ensure!((least..=most).contains(&found), "--thp {thp}: {found} KiB of guest RAM are on huge pages");
        running.signal(Signal::SIGTERM)?;
        running.expect_exit(143)?;
        fs::remove_file(context.folder.join("serial")).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// All that `KVM_CAP_MAX_VCPUS` allows, at the start and later, and fewer with ids far apart.
fn processors(context: &Context) -> Outcome {
    let doctor = bulkhead(context).arg("doctor").output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let most = said.split_once("up to ").and_then(|(_, rest)| rest.split_once(" CPUs"));
    let most: u32 =
        most.and_then(|(most, _)| most.parse().ok()).ok_or("`bulkhead doctor` tells no number of CPUs")?;
    let most = most.min(4096);
    let mut machines = vec![("most", most.to_string(), most, most - 1)];
    if most >= 300 {
        machines.push(("sparse", "300,sockets=60,cores=5".to_owned(), 300, 59 * 8 + 4));
    } else {
        eprintln!("KVM has {most} CPUs here: 300 of them with ids far apart are left out");
    }
    for (name, cpus, count, last) in machines {
        let machine = Machine::bare(context, &context.places.payloads.join("processors.elf"))?;
        let arguments = ["--memory", "64M", "--rng", "--cpus", &cpus];
        let mut running = machine.named(name).arguments(&arguments).start()?;
        running.expect_exit(exit::SUCCESS)?;
        let first = format!("{count} processors, the last has the id {last}");
        let lines = running.serial();
        ensure!(lines == [&first, "a message reached it", "processors end"], "{cpus}: {lines:?}");
    }
    let machine = Machine::bare(context, &context.places.payloads.join("processors.elf"))?;
    let mut running = machine.named("more").arguments(&["--cpus", &(most + 1).to_string()]).start()?;
    running.expect_exit(exit::USAGE)?;
    let refused = running.messages().iter().any(|line| line.contains("is too many"));
    ensure!(refused, "{} CPUs: {:?}", most + 1, running.messages());
    // The most that may come later.
    let most = most.min(1536);
    let (mut running, _) = waiting(context, &["--cpus", &format!("1,max={most}")])?;
    let mut resize = bulkhead(context);
    resize.args(["resize", &running.name, "--cpus", &most.to_string()]);
    let output = resize.output().map_err(|error| error.to_string())?;
    ensure!(output.status.success(), "from 1 to {most} CPUs: {}", String::from_utf8_lossy(&output.stderr));
    running.signal(Signal::SIGTERM)?;
    running.expect_exit(143)
}

fn garbage(context: &Context) -> Outcome {
    let (machine, _) = Machine::bare(context, &context.places.payloads.join("garbage.elf"))?
        .empty_disk_named("data.ext4", 4)?;
    let mut running = machine.arguments(&["--memory", "64M", "--rng", "--console"]).start()?;
    running.wait_for("garbage ends", 1)?;
    running.expect_exit(exit::SUCCESS)?;
    ensure!(running.serial().iter().all(|line| !line.contains("WRONG")), "a string access is too wide");
    let bridge = running.serial().into_iter().find(|line| line.contains("host bridge")).unwrap_or_default();
    ensure!(bridge.contains("12378086"), "the host bridge answers no more: '{bridge}'");
    Ok(())
}

fn memory(context: &Context) -> Outcome {
    for (size, lower, upper) in
        [("256M", "10000000", None), ("3G", "c0000000", None), ("4G", "c0000000", Some("40000000"))]
    {
        let machine = Machine::bare(context, &context.places.payloads.join("memory.elf"))?;
        let mut running = machine.named(&format!("memory{size}")).arguments(&["--memory", size]).start()?;
        running.expect_exit(exit::SUCCESS)?;
        let lines = running.serial();
        let says =
            |start: &str, end: &str| lines.iter().any(|line| line.starts_with(start) && line.ends_with(end));
        ensure!(says("below the hole", &format!("{lower:0>16}")), "{size}: {lines:?}");
        ensure!(says("above 4 GiB", &format!("{:0>16}", upper.unwrap_or("0"))), "{size}: {lines:?}");
        let good = lines.iter().filter(|line| line.ends_with(" ok")).count();
        ensure!(good == if upper.is_some() { 5 } else { 3 }, "{size}: {lines:?}");
    }
    Ok(())
}

/// A payload with two vCPUs that says exactly this.
fn expect_lines(context: &Context, payload: &str, expected: &[&str]) -> Outcome {
    let machine = Machine::bare(context, &context.places.payloads.join(format!("{payload}.elf")))?;
    let mut running = machine.arguments(&["--memory", "64M", "--cpus", "2"]).start()?;
    running.expect_exit(exit::SUCCESS)?;
    let lines = running.serial();
    ensure!(lines.iter().eq(expected), "{lines:?}");
    Ok(())
}

fn bad_fetch(context: &Context) -> Outcome {
    let machine = Machine::bare(context, &context.places.payloads.join("bad_fetch.elf"))?;
    let mut running = machine.arguments(&["--memory", "64M"]).start()?;
    running.expect_exit(exit::PROCESS)?;
    let report = running.messages().into_iter().find(|line| line.contains("vCPU 0")).unwrap_or_default();
    ensure!(
        report.contains("rip 0xd0000000") && report.contains("rip is outside RAM"),
        "the report says '{report}'"
    );
    Ok(())
}

/// Ends the launch after 0 to 40 ms: whatever stage it has reached, nothing stays.
fn interrupted_launch(context: &Context) -> Outcome {
    for (number, after) in (0..40).zip((0..).step_by(1)) {
        let machine = Machine::bare(context, &context.places.payloads.join("first_byte.elf"))?;
        let mut running = machine
            .named(&format!("launch{number}"))
            .arguments(&["--memory", "64M", "--rng", "--console", "--serial", "off"])
            .start()?;
        thread::sleep(Duration::from_millis(after));
        let processes = running.processes();
        running.signal(if number % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL })?;
        let start = Instant::now();
        running.wait()?;
        let took = start.elapsed();
        ensure!(took < Duration::from_secs(2), "after {after} ms: took {took:?} to end");
        expect_gone(&processes, Duration::from_secs(1))
            .map_err(|sentence| format!("after {after} ms: {sentence}"))?;
    }
    Ok(())
}
