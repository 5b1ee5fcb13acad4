//! Keys that a user strikes from the host, and the process between.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, exit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::firmware::two_disks;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "bare",
            "keyboard: the boot menu of SeaBIOS takes keys while the process is killed",
            90,
            menu,
        ),
        Case::new("stock", "keyboard: a guest hears keys while the process is killed", 120, guest),
        Case::new("stock", "keyboard: a guest hears scan code set 3", 120, raw_guest),
    ]
}

/// Runs `bulkhead sendkey …` and returns its exit code and what it said.
fn sendkey(context: &Context, running: &Running, keys: &[&str]) -> Outcome<(i32, String)> {
    let output = bulkhead(context).arg("sendkey").arg(&running.name).args(keys).output();
    let output = output.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    context.log(&format!("sendkey {keys:?}: {} {said}", output.status));
    Ok((output.status.code().unwrap_or(-1), said))
}

fn strike(context: &Context, running: &Running, keys: &[&str]) -> Outcome {
    // A process that was killed a moment ago is not replaced yet.
    for _ in 0..100 {
        let (code, said) = sendkey(context, running, keys)?;
        if code == exit::SUCCESS {
            return Ok(());
        }
        ensure!(said.contains("does not serve now"), "sendkey says '{said}'");
        thread::sleep(Duration::from_millis(10));
    }
    Err("the keyboard's process is not replaced".to_owned())
}

/// Kills the keyboard's process and waits for the next one.
fn kill_keyboard(context: &Context, running: &Running) -> Outcome {
    let find = || {
        let processes = running.processes();
        processes.iter().find(|process| process.title().contains("/keyboard]")).map(|process| process.pid)
    };
    let old = find().ok_or("there is no process for the keyboard")?;
    kill(Pid::from_raw(i32::try_from(old).unwrap_or(0)), Signal::SIGKILL)
        .map_err(|error| error.to_string())?;
    while find().is_none_or(|pid| pid == old) {
        ensure!(!context.left().is_zero(), "the keyboard's process is not replaced");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until firmware has said this on its debug port.
fn wait_for(context: &Context, log: &Path, words: &str) -> Outcome {
    while !fs::read_to_string(log).unwrap_or_default().contains(words) {
        ensure!(!context.left().is_zero(), "firmware does not say '{words}'");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn menu(context: &Context) -> Outcome {
    let log = context.folder.join("firmware.log");
    let debug = log.display().to_string();
    let arguments = ["--boot-menu", "--keyboard", "--serial", "off", "--debug-port", &debug];
    let mut running = two_disks(context, &arguments)?.start()?;
    wait_for(context, &log, "Press ESC for boot menu")?;
    kill_keyboard(context, &running)?;
    strike(context, &running, &["esc"])?;
    wait_for(context, &log, "2. Virtio disk")?;
    kill_keyboard(context, &running)?;
    let (code, said) = sendkey(context, &running, &["f99"])?;
    ensure!(code != exit::SUCCESS && said.contains("no key 'f99'"), "sendkey says '{said}'");
    strike(context, &running, &["2"])?;
    running.expect_exit(0x11 * 2 + 1)
}

fn guest(context: &Context) -> Outcome {
    let machine = Machine::stock(context, Kernel::BzImage, "keyboard")?;
    let mut running = machine.words("bulkhead.keys=6").arguments(&["--keyboard"]).start()?;
    running.wait_for("guest: ready for keys", 1)?;
    strike(context, &running, &["a"])?;
    kill_keyboard(context, &running)?;
    strike(context, &running, &["shift-b", "delete"])?;
    kill_keyboard(context, &running)?;
    strike(context, &running, &["f7", "alt_r"])?;
    heard(&mut running, "AT Translated Set 2 keyboard", STROKES)
}

/// Without the controller's translation, and the set that no firmware chooses: its release codes are two bytes, its codes its own.
fn raw_guest(context: &Context) -> Outcome {
    let machine = Machine::stock(context, Kernel::BzImage, "keyboard")?;
    let words = "bulkhead.keys=6 i8042.direct=1 atkbd.set=3";
    let mut running = machine.words(words).arguments(&["--keyboard"]).start()?;
    running.wait_for("guest: ready for keys", 1)?;
    strike(context, &running, &["a", "shift-b", "delete"])?;
    succeed_keyboard(context, &running)?;
    strike(context, &running, &["f7", "alt_r"])?;
    heard(&mut running, "AT Raw Set 3 keyboard", STROKES)
}

/// Replaces the keyboard's process in order.
fn succeed_keyboard(context: &Context, running: &Running) -> Outcome {
    let restart = bulkhead(context).args(["device", "restart", &running.name, "keyboard"]).output();
    let restart = restart.map_err(|error| error.to_string())?;
    ensure!(restart.status.success(), "restart: {}", String::from_utf8_lossy(&restart.stderr));
    Ok(())
}

/// Linux's numbers: A, left Shift, B, Delete, F7, right Alt.
const STROKES: &str = "30 1 30 0 42 1 48 1 48 0 42 0 111 1 111 0 65 1 65 0 100 1 100 0";

fn heard(running: &mut Running, keyboard: &str, expected: &str) -> Outcome {
    running.wait_for("guest: done keyboard", 1)?;
    running.expect_exit(exit::SUCCESS)?;
    let name = running.guest("keyboard").unwrap_or_default();
    ensure!(name == keyboard, "the guest has a keyboard '{name}'");
    let keys: Vec<String> = running
        .serial()
        .iter()
        .filter_map(|line| line.strip_prefix("guest: key ").map(|key| key.trim().to_owned()))
        .collect();
    ensure!(keys.join(" ") == expected, "the guest heard {keys:?}");
    Ok(())
}
