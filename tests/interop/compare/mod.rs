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
/// So many times the rounds where the guest takes nearly all of the time, so that contenders are close.
const CLOSE: usize = 3;
/// How long a guest may be silent.
const PATIENCE: Duration = Duration::from_secs(45);

/// The name that QEMU gives the thread that emulates a guest's CPU, with `debug-threads`.
const GUEST_CPU: &str = "CPU 0/";

/// Who is measured.
#[derive(Clone, Copy, Default)]
struct Contender {
    /// The back end's process; none where it lives in QEMU's own.
    back_end: Option<u32>,
    /// What QEMU runs below; none where there is no guest.
    guest: Option<u32>,
}

/// What was measured of one contender.
#[derive(Default)]
struct Figures {
    /// In the load's unit; more is better.
    rates: Vec<f64>,
    /// CPU milliseconds of the back end's processes for one run.
    cpu: Vec<f64>,
    /// Percent of the time in which the guest's CPU worked.
    busy: Vec<f64>,
}

/// The value below which so many quarters of all lie, up to three.
fn quartile(values: &[f64], quarters: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() * quarters / 4).copied()
}

fn median(values: &[f64]) -> Option<f64> {
    quartile(values, 2)
}

/// A row of the table.
fn print(what: &str, peer: &str, unit: &str, ours: &Figures, theirs: &Figures, limit: f64) {
    let (Some(mine), Some(other)) = (median(&ours.rates), median(&theirs.rates)) else { return };
    let ratio = mine / other;
    let rounds: Vec<f64> = ours.rates.iter().zip(&theirs.rates).map(|(ours, theirs)| ours / theirs).collect();
    let [low, high] = [1, 3].map(|quarters| quartile(&rounds, quarters).unwrap_or(ratio));
    let verdict = match () {
        () if ratio >= limit => "holds",
        () if high >= limit => "**missed** by less than rounds differ",
        () => "**missed**",
    };
    let both = |ours: &[f64], theirs: &[f64]| {
        let [ours, theirs] =
            [ours, theirs].map(|it| median(it).map_or("-".to_owned(), |it| format!("{it:.0}")));
        format!("{ours} / {theirs}")
    };
    let (cpu, busy) = (both(&ours.cpu, &theirs.cpu), both(&ours.busy, &theirs.busy));
    println!(
        "| {what} | {peer} | {mine:.1} | {other:.1} | {unit} | {ratio:.2} ({low:.2}–{high:.2}), {verdict} (limit {limit}) | {cpu} | {busy} |"
    );
    let _flushed = std::io::stdout().flush();
}

fn named(peer: Peer) -> String {
    format!("{} {}", peer.name, peer.version().unwrap_or_default())
}

/// CPU milliseconds that the program and all below it have used, in threads whose names begin so.
fn cpu_of(pid: u32, name: &str) -> f64 {
    let mut sum = 0.0;
    for process in descendants(pid) {
        for task in std::fs::read_dir(process.file("task")).into_iter().flatten().flatten() {
            let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            if name.is_empty() || read("comm").starts_with(name) {
                let used =
                    read("schedstat").split_ascii_whitespace().next().and_then(|word| word.parse().ok());
                sum += used.unwrap_or(0.0) / 1e6;
            }
        }
    }
    sum
}

/// Lets contenders take turns, so many rounds or until the time is used up. `run` gives the rate of the one with this number.
fn turns(
    rounds: usize,
    contenders: &[Contender],
    mut run: impl FnMut(usize) -> Result<f64, String>,
) -> Result<Vec<Figures>, String> {
    let mut figures: Vec<Figures> = contenders.iter().map(|_| Figures::default()).collect();
    let begin = Instant::now();
    for round in 0..rounds {
        if begin.elapsed() > LOAD_LIMIT {
            break;
        }
        for turn in 0..contenders.len() {
            let turn = (turn + round) % contenders.len();
            let (Some(contender), Some(figures)) = (contenders.get(turn), figures.get_mut(turn)) else {
                continue;
            };
            let used = || {
                (
                    contender.back_end.map(|pid| cpu_of(pid, "")),
                    contender.guest.map(|pid| cpu_of(pid, GUEST_CPU)),
                )
            };
            let (before, start) = (used(), Instant::now());
            figures.rates.push(run(turn)?);
            let (after, passed) = (used(), start.elapsed().as_secs_f64() * 1000.0);
            figures.cpu.extend(after.0.zip(before.0).map(|(after, before)| after - before));
            figures
                .busy
                .extend(after.1.zip(before.1).map(|(after, before)| (after - before) / passed * 100.0));
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

The guest is Debian's kernel in QEMU's emulation, and its only CPU works most of the time, as the last column tells: a row in which it is busy for 95 % of
the time with ours could be a twentieth better with a back end that takes no time at all, and ratios are nearer to 1 than the devices themselves
are. The CPU time of the back ends' processes for one run of the load stands beside it, where they have processes of their own. Rows with a
driver have no guest: rings, packets and credit are those of Linux, made by the benchmark, so that the back ends themselves are compared.

| load | other | bulkhead-device | other | | ratio (middle half of the rounds) | CPU ms, ours / other | guest's CPU busy, %, ours / other |
| --- | --- | --- | --- | --- | --- | --- | --- |";

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
            println!("| {name} | - | - | - | - | **not measured**: {error} | - | - |");
        }
    }
    good
}
