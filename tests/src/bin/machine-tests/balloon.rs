//! A stock guest gives memory back: what it frees, by itself, and what it is asked for.

use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Context, Outcome};
use bulkhead_tests::machine::{Running, bulkhead};
use serde_json::Value;

/// What the guest frees, less what it may use for something else, bytes.
const FREED: u64 = 72 << 20;
/// What it is asked for, and what it is short of then at least.
const BALLOON: u64 = 16 << 20;
const SHORT: u64 = 12 << 20;

/// Memory that the guest's RAM costs the host, bytes: the blocks of its file.
fn resident(running: &Running) -> Outcome<u64> {
    for process in running.processes() {
        for (number, link) in process.descriptors()? {
            if link.contains("memfd:guest-ram") {
                let file = process.file("fd").join(number.to_string());
                return Ok(std::fs::metadata(file).map_err(|error| error.to_string())?.blocks() * 512);
            }
        }
    }
    Err("nobody holds the guest's memory".into())
}

/// Runs `bulkhead balloon` and returns what it says.
fn balloon(context: &Context, running: &Running, size: &[&str]) -> Outcome<Value> {
    let command = bulkhead(context).arg("balloon").arg(&running.name).args(size).arg("--json").output();
    let output = command.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    context.log(&format!("balloon {size:?}: {}", said.split_whitespace().collect::<Vec<_>>().join(" ")));
    ensure!(output.status.success(), "bulkhead balloon {size:?}: {said}");
    serde_json::from_str(&said).map_err(|error| error.to_string())
}

/// Waits until the balloon has the size that was asked for.
fn wait_for(context: &Context, running: &Running, size: u64) -> Outcome<Value> {
    loop {
        let now = balloon(context, running, &[])?;
        if now["actual"] == size {
            return Ok(now);
        }
        ensure!(!context.left().is_zero(), "the balloon does not get {size} bytes: {now}");
        thread::sleep(Duration::from_millis(300));
    }
}

/// The guest runs the test `balloon`, with `--balloon`.
pub fn gives_memory_back(context: &Context, running: &mut Running) -> Outcome {
    running.wait_for("guest: balloon used 100663296", 1)?;
    let full = resident(running)?;
    running.wait_for("guest: balloon freed", 1)?;
    while resident(running)? + FREED > full {
        ensure!(!context.left().is_zero(), "{full} bytes were used and {} are now", resident(running)?);
        thread::sleep(Duration::from_millis(100));
    }
    context.log(&format!("{full} bytes before the guest freed, {} after", resident(running)?));
    let before = balloon(context, running, &[])?;
    // With deflate on OOM, Linux does not take the balloon out of its total.
    let free = |balloon: &Value| balloon["statistics"]["free"].as_u64().unwrap_or(0);
    ensure!(free(&before) > 64 << 20, "the guest does not say what it has: {before}");
    balloon(context, running, &["16M"])?;
    let after = wait_for(context, running, BALLOON)?;
    ensure!(free(&before) - free(&after) > SHORT, "the guest has {before} and then {after}");
    let restart = bulkhead(context).args(["device", "restart", &running.name, "balloon"]).status();
    ensure!(restart.is_ok_and(|status| status.success()), "the balloon cannot be restarted");
    let successor = balloon(context, running, &[])?;
    ensure!(successor["actual"] == BALLOON && successor["target"] == BALLOON, "a successor says {successor}");
    let refused = balloon(context, running, &["1T"]).err().ok_or("a balloon of 1T is accepted")?;
    ensure!(refused.contains("less than the guest's 256M"), "{refused}");
    balloon(context, running, &["0"])?;
    wait_for(context, running, 0)?;
    Ok(())
}
