//! Stock kernels: time to init, time with all messages on the UART, memory beside guest RAM.

use std::time::Duration;

use bulkhead_tests::harness::{Outcome, Places};
use bulkhead_tests::processes::descendants;

use crate::contenders::{Contender, Guest};
use crate::measure::{self, Stream};
use crate::table;

const LIMIT: Duration = Duration::from_secs(120);
const INIT: &str = "guest: init";

/// The boot alone.
pub fn boot(places: &Places, rounds: usize, title: &str) -> Outcome {
    let quiet = Guest { cmdline: "quiet bulkhead.test=init-only", memory: 256, disk: None };
    times(places, rounds, title, &quiet, 0.65)
}

pub fn run(places: &Places, rounds: usize) -> Outcome {
    boot(places, rounds, "Time from exec to the first line of init")?;
    let verbose = Guest { cmdline: "ignore_loglevel bulkhead.test=init-only", memory: 256, disk: None };
    times(places, rounds, "The same with all kernel messages on the UART", &verbose, 1.5)?;
    memory(places, rounds)
}

/// One table: each contender in turn, `rounds` times.
fn times(places: &Places, rounds: usize, title: &str, guest: &Guest<'_>, limit: f64) -> Outcome {
    let mut results: Vec<(Contender, Vec<f64>)> =
        Contender::ALL.map(|contender| (contender, Vec::new())).into();
    for round in 1..=rounds {
        // Another one begins each time, and every other round runs backwards: nobody always follows the same.
        results.rotate_left(1);
        results.reverse();
        for (contender, values) in &mut results {
            let started = measure::until(contender.command(places, guest), Stream::Output, INIT, LIMIT)?;
            eprintln!("round {round}: {} {:.0} ms", contender.name(), started.milliseconds);
            values.push(started.milliseconds);
        }
    }
    results.sort_by_key(|(contender, _)| Contender::ALL.iter().position(|other| other == contender));
    let base = results.iter().find(|(contender, _)| *contender == Contender::QemuPc);
    let base = base.map_or(1.0, |(_, values)| table::median(values));
    let rows: Vec<_> = results
        .iter()
        .map(|(contender, values)| {
            let median = table::median(values);
            let ratio = median / base;
            let ours = matches!(contender, Contender::BulkheadBzImage | Contender::BulkheadElf);
            let verdict = if ours { table::verdict(ratio, limit) } else { String::new() };
            let name = contender.name().to_owned();
            vec![name, format!("{median:.0}"), table::spread(values), format!("{ratio:.2}"), verdict]
        })
        .collect();
    let title = format!("{title} (1 vCPU, {} MiB, median of {rounds})", guest.memory);
    table::print(&title, &["monitor", "ms", "range", "÷ QEMU pc", "limit"], &rows);
    Ok(())
}

/// Proportional and private dirty memory of every process of a machine, guest RAM left out.
fn memory(places: &Places, rounds: usize) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let disk = folder.path().join("data.ext4");
    std::fs::copy(places.guest.join("data.ext4"), &disk).map_err(|error| format!("data.ext4: {error}"))?;
    let guest = Guest { cmdline: "quiet bulkhead.test=idle", memory: 256, disk: Some(&disk) };
    let contenders = [Contender::QemuPc, Contender::BulkheadElf, Contender::QemuMicrovm];
    let mut totals: Vec<_> = contenders.map(|contender| (contender, Vec::new(), Vec::new())).into();
    let mut each = Vec::new();
    for round in 1..=rounds {
        for (contender, proportional, dirty) in &mut totals {
            let started =
                measure::until(contender.command(places, &guest), Stream::Output, "guest: idle", LIMIT)?;
            let (mut pss, mut private) = (0, 0);
            for process in descendants(started.child.id()) {
                let (process_pss, process_private) = process.memory_without_ram()?;
                pss += process_pss;
                private += process_private;
                if round == rounds {
                    // Without the folders of this machine: neither the program's nor those in its options.
                    let title = process.title();
                    let title = title.split(" --").next().unwrap_or_default();
                    let title = title.rsplit_once("release/").map_or(title, |(_, name)| name);
                    let title = title.chars().take(60).collect::<String>().replace('|', " ");
                    each.push(vec![
                        contender.name().into(),
                        title,
                        megabytes(process_pss),
                        megabytes(process_private),
                    ]);
                }
            }
            eprintln!("round {round}: {} PSS {pss} KiB, private dirty {private} KiB", contender.name());
            proportional.push(to_float(pss));
            dirty.push(to_float(private));
        }
    }
    let rows: Vec<_> = totals
        .iter()
        .map(|(contender, proportional, dirty)| {
            let (pss, private) = (table::median(proportional) / 1024.0, table::median(dirty) / 1024.0);
            let mut row = vec![contender.name().into(), format!("{pss:.1}"), format!("{private:.2}")];
            row.push(if *contender == Contender::BulkheadElf {
                format!("PSS {}, dirty {}", table::verdict(pss, 10.0), table::verdict(private, 2.5))
            } else {
                String::new()
            });
            row
        })
        .collect();
    let title = format!("Memory that is not guest RAM, all processes, four devices (median of {rounds})");
    table::print(&title, &["monitor", "PSS, MB", "private dirty, MB", "limit"], &rows);
    table::print(
        "The same by process (last round)",
        &["monitor", "process", "PSS, MB", "private dirty, MB"],
        &each,
    );
    Ok(())
}

fn megabytes(kib: u64) -> String {
    format!("{:.2}", to_float(kib) / 1024.0)
}

#[expect(clippy::cast_precision_loss, reason = "sizes in KiB are far below 2^52")]
fn to_float(value: u64) -> f64 {
    value as f64
}
