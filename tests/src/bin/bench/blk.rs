//! Disks: our device process beside qemu-storage-daemon (io_uring, an iothread), both under one load generator.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_tests::harness::{Outcome, Places};
use bulkhead_tests::processes::descendants;
use tempfile::TempDir;

use crate::blk_load::{Generator, Load};
use crate::table::{self, median};

/// Size of the disk, bytes.
const DISK: u64 = 256 << 20;
/// One measurement.
const TIME: Duration = Duration::from_millis(400);

/// A back end that runs.
struct Service {
    name: &'static str,
    child: Child,
    socket: String,
    _folder: TempDir,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Service {
    fn start(name: &'static str, places: &Places, disk: &Path, direct: bool) -> Outcome<Self> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let socket = folder.path().join("socket").display().to_string();
        let disk = disk.display();
        let mut command = if name == "bulkhead" {
            let mut command = Command::new(places.programs.join("bulkhead-device"));
            command.args(["blk", "--persistent", "--socket-path", &socket, "--blk-file", &disk.to_string()]);
            if direct {
                command.args(["--cache", "none"]);
            }
            command
        } else {
            let mut command = Command::new("qemu-storage-daemon");
            let cache = if direct { "on" } else { "off" };
            command.args(["--object", "iothread,id=io", "--blockdev"]);
            command.arg(format!(
                "driver=file,node-name=d,filename={disk},aio=io_uring,locking=off,cache.direct={cache}"
            ));
            let export = "type=vhost-user-blk,id=e,node-name=d,writable=on,iothread=io,num-queues=1";
            command.arg("--export").arg(format!("{export},addr.type=unix,addr.path={socket}"));
            command
        };
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.map_err(|error| format!("{name}: {error}"))?;
        let service = Self { name, child, socket, _folder: folder };
        let end = Instant::now() + Duration::from_secs(10);
        while !Path::new(&service.socket).exists() {
            if Instant::now() > end {
                return Err(format!("{name} does not listen"));
            }
            sleep(Duration::from_millis(5));
        }
        sleep(Duration::from_millis(50));
        Ok(service)
    }

    /// CPU time of the process and the one that serves a front end for it, kernel threads that work for them included, seconds.
    fn cpu(&self) -> f64 {
        let children = descendants(self.child.id()).into_iter().map(|process| process.pid);
        [self.child.id()].into_iter().chain(children).map(cpu).sum()
    }

    /// Requests a second, and µs of CPU for each.
    fn measure(&self, load: Load) -> Outcome<(f64, f64)> {
        let failed = |error| format!("{} at {load:?}: {error}", self.name);
        let mut generator = Generator::new(&self.socket, load, DISK).map_err(failed)?;
        let before = self.cpu();
        let rate = generator.run(load, TIME).map_err(failed)?;
        let count = rate.requests.max(1) as f64;
        Ok((count / rate.time.as_secs_f64(), (self.cpu() - before) * 1e6 / count))
    }
}

/// CPU time of one process, seconds.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap_or(0.0) / 100.0).sum()
}

fn loads() -> Vec<Load> {
    let random = Load { size: 4096, depth: 1, writes: false, sequential: false, polls: true };
    let mut loads = Vec::new();
    for writes in [false, true] {
        loads.extend([1, 32, 128].map(|depth| Load { depth, writes, ..random }));
        loads.push(Load { size: 128 << 10, depth: 8, writes, sequential: true, polls: true });
    }
    loads.extend([1, 32].map(|depth| Load { depth, polls: false, ..random }));
    loads
}

fn describe(load: Load) -> String {
    let place = if load.sequential { "sequential" } else { "random" };
    let kind = if load.writes { "write" } else { "read" };
    let driver = if load.polls { "" } else { ", driver sleeps" };
    format!("{} KiB {place} {kind}, depth {}{driver}", load.size >> 10, load.depth)
}

/// Requests a second that `pread` and `pwrite` in a loop come to on the same file.
fn kernel(file: &File, load: Load) -> f64 {
    let (mut buffer, mut place, mut count) = (vec![1; load.size], 0x1357_9bdf_u64, 0u64);
    let begin = Instant::now();
    while begin.elapsed() < TIME / 4 {
        place = place.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let offset = (place >> 20) % (DISK / load.size as u64) * load.size as u64;
        let moved =
            if load.writes { file.write_at(&buffer, offset) } else { file.read_at(&mut buffer, offset) };
        if moved.is_err() {
            return 0.0;
        }
        count += 1;
    }
    count as f64 / begin.elapsed().as_secs_f64()
}

fn compare(
    places: &Places,
    (rounds, only): (usize, &str),
    title: &str,
    folder: &Path,
    direct: bool,
) -> Outcome {
    let disk: PathBuf = folder.join("bench-disk");
    let made = (|| -> std::io::Result<File> {
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&disk)?;
        for _ in 0..DISK >> 20 {
            file.write_all(&[1; 1 << 20])?;
        }
        file.sync_all()?;
        Ok(file)
    })();
    let file = made.map_err(|error| format!("{}: {error}", disk.display()))?;
    let services =
        ["bulkhead", "qemu-storage-daemon"].map(|name| Service::start(name, places, &disk, direct));
    let [ours, theirs] = services;
    let (ours, theirs) = (ours?, theirs?);
    let mut rows = Vec::new();
    let wanted = |load: &Load| only.is_empty() || describe(*load).contains(only);
    for load in loads().into_iter().filter(wanted) {
        let mut figures: [Vec<f64>; 5] = Default::default();
        for _ in 0..rounds {
            let (a, b) = (ours.measure(load)?, theirs.measure(load)?);
            let kernel = if direct { 0.0 } else { kernel(&file, load) };
            for (list, value) in figures.iter_mut().zip([a.0, b.0, a.1, b.1, kernel]) {
                list.push(value);
            }
        }
        let [rate, their_rate, cpu, their_cpu, kernel] = figures.map(|list| median(&list));
        rows.push(vec![
            describe(load),
            format!("{:.1}", rate / 1e3),
            format!("{:.1}", their_rate / 1e3),
            format!("{:.2}", rate / their_rate),
            format!("{cpu:.1}"),
            format!("{their_cpu:.1}"),
            format!("{:.2}", cpu / their_cpu),
            if direct { String::new() } else { format!("{:.1}", kernel / 1e3) },
        ]);
    }
    drop((ours, theirs));
    let _ = std::fs::remove_file(&disk);
    table::print(
        title,
        &[
            "load",
            "bulkhead-device, 1000/s",
            "qemu-storage-daemon, 1000/s",
            "ratio (aim ≥ 1.5)",
            "CPU each, µs",
            "theirs, µs",
            "ratio (aim ≤ 0.7)",
            "pread/pwrite alone, 1000/s",
        ],
        &rows,
    );
    Ok(())
}

/// `only` selects loads by a part of their description.
pub fn run(places: &Places, rounds: usize, only: &str) -> Outcome {
    let rounds = (rounds, only);
    let root = places.programs.ancestors().nth(3).ok_or("no root of the repository")?.join("build");
    std::fs::create_dir_all(&root).map_err(|error| error.to_string())?;
    let memory = Path::new("/dev/shm");
    compare(places, rounds, "Disk processes, a file on tmpfs", memory, false)?;
    compare(
        places,
        rounds,
        "Disk processes, a file on this machine's disk, in the page cache",
        &root,
        false,
    )?;
    compare(places, rounds, "Disk processes, a file on this machine's disk, O_DIRECT", &root, true)
}
