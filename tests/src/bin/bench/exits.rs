//! What an access costs that the core answers, against the same access in a loop that does nothing but answer.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::harness::{Outcome, Places};

use crate::{bare_kvm, table};

/// The most that an access may cost, in bare exits.
const LIMIT: f64 = 1.5;
/// Disks of the large machine; with an entropy device and a console they fill the bus.
const DISKS: usize = 28;
/// Accesses in a batch of the payload.
const BATCH: f64 = 50.0;

/// A machine whose payload has not ended by then has failed.
const DEADLINE: Duration = Duration::from_secs(120);

/// By kind of access: cycles for one, batch by batch.
type Costs = BTreeMap<String, Vec<f64>>;

fn add(costs: &mut Costs, output: &str) -> Outcome {
    if !output.contains("exits end") {
        return Err(format!("the payload did not end: {output}"));
    }
    for line in output.lines().filter_map(|line| line.strip_prefix("exits ")) {
        if let Some((kind, spent)) = line.split_once(' ')
            && let Ok(spent) = u64::from_str_radix(spent.trim(), 16)
        {
            #[expect(clippy::cast_precision_loss, reason = "cycles of a batch stay far below 2^52")]
            costs.entry(kind.to_owned()).or_default().push(spent as f64 / BATCH);
        }
    }
    Ok(())
}

/// Runs the payload in a machine of ours with so many disks, and an entropy device.
fn ours(places: &Places, folder: &Path, payload: &Path, disks: usize) -> Outcome<String> {
    let serial = folder.join("serial");
    let mut command = Command::new(places.programs.join("bulkhead"));
    command.args(["run", "--cpus", "1", "--memory", "64M", "--rng", "--kernel"]).arg(payload);
    command.arg("--serial").arg(format!("file={}", serial.display()));
    if disks > 0 {
        command.arg("--console");
    }
    for disk in 0..disks {
        let path = folder.join(format!("disk{disk}.img"));
        File::create(&path).and_then(|file| file.set_len(1 << 20)).map_err(|error| error.to_string())?;
        command.arg("--disk").arg(format!("path={},id=disk{disk}", path.display()));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let deadline = Instant::now() + DEADLINE;
    while child.try_wait().map_err(|error| error.to_string())?.is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let text = fs::read_to_string(&serial).map_err(|error| error.to_string())?;
    fs::remove_file(&serial).map_err(|error| error.to_string())?;
    Ok(text)
}

pub fn run(places: &Places, rounds: usize) -> Outcome {
    let payload = places.payloads.join("exits.elf");
    let (mut bare, mut small, mut large) = (Costs::new(), Costs::new(), Costs::new());
    for round in 1..=rounds {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        add(&mut bare, &bare_kvm::run(&payload)?)?;
        add(&mut small, &ours(places, folder.path(), &payload, 0)?)?;
        add(&mut large, &ours(places, folder.path(), &payload, DISKS)?)?;
        eprintln!("round {round} of the accesses done");
    }
    let median = |costs: &Costs, kind: &str| table::median(costs.get(kind).map_or(&[][..], Vec::as_slice));
    let rows: Vec<_> = bare
        .keys()
        .map(|kind| {
            let base = median(&bare, kind);
            let [small, large] = [&small, &large].map(|costs| median(costs, kind) / base);
            vec![
                kind.replace('-', " "),
                format!("{base:.0}"),
                format!("{small:.2}"),
                format!("{large:.2}"),
                format!("{:.0}", (large - 1.0) * base),
                table::verdict(small.max(large), LIMIT),
            ]
        })
        .collect();
    let title = format!(
        "Accesses that the core answers, on this machine's own KVM (medians of {} batches of {BATCH:.0})",
        bare.values().map(Vec::len).max().unwrap_or(0)
    );
    let header = [
        "access",
        "bare exit, TSC cycles",
        "1 virtio function, ÷ bare",
        "30 functions, ÷ bare",
        "added, cycles",
        "limit",
    ];
    table::print(&title, &header, &rows);
    Ok(())
}
