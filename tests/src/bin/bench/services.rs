//! Device services at rest: how long one takes to be ready, and what it occupies.

use std::process::Command;
use std::time::Duration;

use bulkhead_tests::harness::{Outcome, Places};
use bulkhead_tests::processes::descendants;

use crate::measure::{Stream, until};
use crate::table::{median, print, verdict};

/// For a start.
const LIMIT: Duration = Duration::from_secs(10);
/// Milliseconds to READY.
const START: f64 = 3.0;
/// KiB of proportional and of private dirty memory.
const MEMORY: (f64, f64) = (1536.0, 307.0);

/// Measures each type so many times.
pub fn run(places: &Places, rounds: usize) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).map_err(|error| error.to_string())?;
    let (disk, here) = (disk.display().to_string(), folder.path().display().to_string());
    let peer = folder.path().join("peer");
    let _peer = std::os::unix::net::UnixListener::bind(&peer).map_err(|error| error.to_string())?;
    let (stream, uds) = (peer.display().to_string(), format!("{here}/uds"));
    let types: [(&str, Vec<&str>); 6] = [
        ("blk", vec!["--blk-file", &disk]),
        ("rng", vec![]),
        ("console", vec![]),
        ("vsock", vec!["--guest-cid", "3", "--uds-path", &uds]),
        ("net", vec!["--stream", &stream]),
        ("fs", vec!["--shared-dir", &here]),
    ];
    let mut rows = Vec::new();
    for (kind, options) in types {
        let mut figures: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            let mut command = Command::new(places.programs.join("bulkhead-device"));
            command.args([kind, "--socket-path", &format!("{here}/socket")]).args(&options);
            let started = until(command, Stream::Manager, "READY=1", LIMIT)?;
            std::thread::sleep(Duration::from_millis(50));
            // The one that is the heaviest.
            let (mut proportional, mut dirty) = (0, 0);
            for process in descendants(started.child.id()) {
                let memory = process.memory_without_ram()?;
                (proportional, dirty) = (proportional.max(memory.0), dirty.max(memory.1));
            }
            let values = [started.milliseconds, proportional as f64, dirty as f64];
            figures.iter_mut().zip(values).for_each(|(list, value)| list.push(value));
        }
        let [start, proportional, dirty] = figures.map(|list| median(&list));
        rows.push(vec![
            kind.to_owned(),
            format!("{start:.1}, {}", verdict(start, START)),
            format!("{proportional:.0}, {}", verdict(proportional, MEMORY.0)),
            format!("{dirty:.0}, {}", verdict(dirty, MEMORY.1)),
        ]);
    }
    print(
        "Device services at rest",
        &["type", "start to READY, ms", "proportional memory, KiB", "private dirty memory, KiB"],
        &rows,
    );
    Ok(())
}
