//! Throughput of our devices beside that of others, in stock guests in QEMU's emulation. Contenders take turns; figures are medians.
//!
//! Each part has its own limits, and its rows are printed as they come: one that fails takes nothing from the others.
//!
//! - `net`: a tap, beside QEMU's own card; `fs`: a tree, beside both virtiofsd; `vsock`: streams, beside vhost-device-vsock; `vsock-driver`: the same
//!   without guests, which leaves the back ends themselves.

mod fs;
mod net;
mod vsock;
mod vsock_driver;
mod vsock_load;

use std::io::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use bulkhead_tests::processes::descendants;

use crate::Peer;
use crate::guest::Guest;
use crate::traffic::text;

/// After so long no further round of one load is begun.
const LOAD_LIMIT: Duration = Duration::from_secs(25);
/// How long a guest may be silent.
const PATIENCE: Duration = Duration::from_secs(45);

/// What was measured of one contender.
#[derive(Default)]
struct Figures {
    /// In the load's unit; more is better.
    rates: Vec<f64>,
    /// CPU milliseconds of the back end's processes for one run; none where it lives in QEMU's own.
    cpu: Vec<f64>,
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// A row of the table.
fn print(what: &str, peer: &str, unit: &str, ours: &Figures, theirs: &Figures, limit: f64) {
    let (Some(mine), Some(other)) = (median(&ours.rates), median(&theirs.rates)) else { return };
    let ratio = mine / other;
    let verdict = if ratio >= limit { "holds" } else { "**missed**" };
    let cpu = match (median(&ours.cpu), median(&theirs.cpu)) {
        (Some(ours), Some(theirs)) => format!("{ours:.0} / {theirs:.0}"),
        (Some(ours), None) => format!("{ours:.0} / -"),
        _ => "-".to_owned(),
    };
    println!(
        "| {what} | {peer} | {mine:.1} | {other:.1} | {unit} | {ratio:.2}, {verdict} (limit {limit}) | {cpu} |"
    );
    let _flushed = std::io::stdout().flush();
}

fn named(peer: Peer) -> String {
    format!("{} {}", peer.name, peer.version().unwrap_or_default())
}

/// CPU milliseconds that the program and all below it have used.
fn cpu_of(pid: u32) -> f64 {
    let mut sum = 0.0;
    for process in descendants(pid) {
        for task in std::fs::read_dir(process.file("task")).into_iter().flatten().flatten() {
            let told = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let used = told.split_ascii_whitespace().next().and_then(|word| word.parse::<f64>().ok());
            sum += used.unwrap_or(0.0) / 1e6;
        }
    }
    sum
}

/// Lets contenders take turns, so many rounds or until the time is used up. `run` gives the rate of the one with this number; `pids`
/// are their back ends'.
fn turns(
    rounds: usize,
    pids: &[Option<u32>],
    mut run: impl FnMut(usize) -> Result<f64, String>,
) -> Result<Vec<Figures>, String> {
    let mut figures: Vec<Figures> = pids.iter().map(|_| Figures::default()).collect();
    let begin = Instant::now();
    for round in 0..rounds {
        if begin.elapsed() > LOAD_LIMIT {
            break;
        }
        for turn in 0..pids.len() {
            let turn = (turn + round) % pids.len();
            let (Some(pid), Some(figures)) = (pids.get(turn), figures.get_mut(turn)) else { continue };
            let before = pid.map(cpu_of);
            figures.rates.push(run(turn)?);
            figures.cpu.extend(pid.zip(before).map(|(pid, before)| cpu_of(pid) - before));
        }
    }
    Ok(figures)
}

/// Seconds that a line of shell takes in the guest.
fn time(guest: &mut Guest, line: &str) -> Result<f64, String> {
    let begin = Instant::now();
    guest.run(line)?;
    Ok(begin.elapsed().as_secs_f64())
}

const HEAD: &str = "
## Devices under QEMU

The guest is Debian's kernel in QEMU's emulation, which takes most of the time: ratios are nearer to 1 than the devices themselves are. The CPU
time of the back ends' processes for one run of the load stands beside it, where they have processes of their own. Rows with a driver have no
guest: rings, packets and credit are those of Linux, made by the benchmark, so that the back ends themselves are compared.

| load | other | bulkhead-device | other | | ratio | CPU ms, ours / other |
| --- | --- | --- | --- | --- | --- | --- |";

/// A part: its name, and what measures it.
type Part = (&'static str, fn(usize) -> Result<(), String>);

/// Measures the parts with one of these names, or all; prints a Markdown table. False: one of them failed.
pub fn run(rounds: usize, words: &[&String]) -> bool {
    println!("{HEAD}");
    let parts: [Part; 4] =
        [("net", net::run), ("fs", fs::run), ("vsock-driver", vsock::by_driver), ("vsock", vsock::by_guests)];
    let mut good = true;
    for (name, part) in parts {
        if !words.is_empty() && !words.iter().any(|word| *word == name) {
            continue;
        }
        // On a thread of its own, whose network nobody else has.
        let alone = move || unshare(CloneFlags::CLONE_NEWNET).map_err(text).and_then(|()| part(rounds));
        let result = thread::spawn(alone).join().unwrap_or_else(|_| Err("panicked".to_owned()));
        if let Err(error) = result {
            good = false;
            let error = error.replace(['|', '\n'], " ");
            println!("| {name} | - | - | - | - | **not measured**: {error} | - |");
        }
    }
    good
}
