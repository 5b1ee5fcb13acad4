//! Device services at rest: how long one takes to be ready, and what it occupies.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::harness::{Outcome, Places};
use bulkhead_tests::processes::descendants;

use crate::measure::{Started, Stream, until};
use crate::table::{head, median, row, spread, verdict};

/// For a start.
const LIMIT: Duration = Duration::from_secs(10);
/// After this time without a message a process lets go of what only its start needed.
const REST: Duration = Duration::from_millis(1500);
/// Between two starts.
const PAUSE: Duration = Duration::from_millis(100);
/// What a process occupies hardly varies.
const MEMORY_ROUNDS: usize = 3;
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
    // What a program of this kind needs to begin and to end, whatever it does.
    let empty: Vec<_> = (0..rounds).map(|_| nothing(places)).collect::<Outcome<_>>()?;
    head(
        "Device services at rest",
        &[
            "type",
            "the device's process: start to READY, ms",
            "the service: exec to READY=1, ms",
            "proportional memory, KiB: waiting, with a front end",
            "private dirty memory, KiB: waiting, with a front end",
        ],
    );
    for (kind, options) in types {
        let socket = format!("{here}/socket");
        let command = || {
            // The kernel still takes apart what was before.
            std::thread::sleep(PAUSE);
            let mut command = Command::new(places.programs.join("bulkhead-device"));
            command.args([kind, "--socket-path", &socket]).args(&options);
            command
        };
        let begin = || until(command(), Stream::Manager, "READY=1", LIMIT);
        // The first brings the program's pages back, where the host has taken them.
        drop(begin()?);
        let service = (0..rounds).map(|_| Ok(begin()?.milliseconds)).collect::<Outcome<Vec<_>>>()?;
        let process = (0..rounds).map(|_| process_start(command())).collect::<Outcome<Vec<_>>>()?;
        let mut memory: [Vec<f64>; 4] = Default::default();
        for _ in 0..MEMORY_ROUNDS {
            let started = begin()?;
            let waiting = heaviest(started.child.id(), 1)?;
            let _front_end = front_end(&socket)?;
            let used = heaviest(started.child.id(), 2)?;
            let values = [waiting.0, used.0, waiting.1, used.1];
            memory.iter_mut().zip(values).for_each(|(list, value)| list.push(value));
        }
        let [waiting, used, waiting_dirty, used_dirty] = memory.map(|list| median(&list));
        let pair =
            |one: f64, two: f64, limit| format!("{one:.0}, {two:.0}: {}", verdict(one.max(two), limit));
        row(&[
            kind.to_owned(),
            format!("{:.1} ({}), {}", median(&process), spread(&process), verdict(median(&process), START)),
            format!("{:.1} ({})", median(&service), spread(&service)),
            pair(waiting, used, MEMORY.0),
            pair(waiting_dirty, used_dirty, MEMORY.1),
        ]);
    }
    println!(
        "\nA service starts its program twice: once to listen, and once as the jailed process of a device, which it rehearses before it says READY=1. \
         The same program\nneeds {:.1} ms ({}) to say its version and end: under a hypervisor the C library's start traps for each of its CPUID \
         instructions.",
        median(&empty),
        spread(&empty)
    );
    Ok(())
}

/// Milliseconds in which the program begins, says its version and ends.
fn nothing(places: &Places) -> Outcome<f64> {
    std::thread::sleep(PAUSE);
    let begin = Instant::now();
    let output = Command::new(places.programs.join("bulkhead-device")).arg("--version").output();
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(begin.elapsed().as_secs_f64() * 1000.0)
    } else {
        Err("no version".to_owned())
    }
}

/// Milliseconds from the creation of the device's process until it is sealed, which the service's log tells.
fn process_start(mut command: Command) -> Outcome<f64> {
    command.args(["--log-level", "debug"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let mut started = Started { child, milliseconds: 0.0 };
    let lines = started.child.stderr.take().into_iter().flat_map(|log| BufReader::new(log).lines());
    let line = lines.map_while(Result::ok).find(|line| line.contains("sealed and ready"));
    let line = line.ok_or_else(|| format!("{command:?} did not say when it was ready"))?;
    let number = line.rsplit_once("microseconds=").and_then(|(_, number)| number.trim().parse::<f64>().ok());
    number.map(|number| number / 1000.0).ok_or(line)
}

/// A front end that has asked for the features (GET_FEATURES, version 1) and got an answer: the device's process serves.
fn front_end(socket: &str) -> Outcome<UnixStream> {
    let said = |error: std::io::Error| error.to_string();
    let mut stream = UnixStream::connect(socket).map_err(said)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(said)?;
    stream.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).map_err(said)?;
    stream.read_exact(&mut [0; 20]).map_err(said)?;
    Ok(stream)
}

/// Proportional and private dirty memory, KiB, of the process that has most, once there are so many of them and they are at rest.
fn heaviest(pid: u32, count: usize) -> Outcome<(f64, f64)> {
    let end = Instant::now() + LIMIT;
    while descendants(pid).len() < count {
        if Instant::now() > end {
            return Err(format!("there are not {count} processes"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(REST);
    let (mut proportional, mut dirty) = (0, 0);
    for process in descendants(pid) {
        let memory = process.memory_without_ram()?;
        (proportional, dirty) = (proportional.max(memory.0), dirty.max(memory.1));
    }
    Ok((proportional as f64, dirty as f64))
}
