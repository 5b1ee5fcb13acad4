//! Disks: our device process beside qemu-storage-daemon (io_uring, an iothread), both under one load generator.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_tests::harness::{Outcome, Places};
use bulkhead_tests::processes::descendants;
use tempfile::TempDir;

use crate::blk_fio;
use crate::blk_load::{Generator, Load};
use crate::table::{self, median};

/// Size of the disk, bytes.
const DISK: u64 = 256 << 20;
/// One measurement.
const TIME: Duration = Duration::from_millis(400);
/// Requests a second are to be this many times the peer's.
const FASTER: f64 = 1.5;
/// CPU time for each request is to be at most this part of the peer's.
const CHEAPER: f64 = 0.7;

/// What the tables cannot say.
const EXPLANATION: &str = "\
fio moves the same blocks of the same file by itself, without device and driver, to and from shared memory: by io_uring with a registered
file and buffers, and where the page cache is in play also by pread and pwrite, of which the better counts. It sleeps where our driver does not, so a device
that looks before it sleeps may be ahead of it. Where a miss says `fio 1.06`, fio itself comes to 1.06 times the requests, or the CPU
time, of qemu-storage-daemon, and misses the aim, too.";

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

/// Medians of one load: requests a second, and µs of CPU for each.
struct Figures {
    load: Load,
    ours: (f64, f64),
    theirs: (f64, f64),
    fio: (f64, f64),
}

impl Figures {
    /// The contenders take turns, and in every other round the other way round: the disk of a virtual machine has its moods.
    fn measure(
        load: Load,
        rounds: usize,
        (ours, theirs): (&Service, &Service),
        fio: impl Fn(Load) -> Outcome<(f64, f64)>,
    ) -> Outcome<Self> {
        let turns: [&dyn Fn() -> Outcome<(f64, f64)>; 3] =
            [&|| ours.measure(load), &|| fio(load), &|| theirs.measure(load)];
        let mut lists: [Vec<(f64, f64)>; 3] = Default::default();
        for round in 0..rounds {
            let mut turns: Vec<_> = turns.iter().zip(&mut lists).collect();
            if round % 2 == 1 {
                turns.reverse();
            }
            for (measure, list) in turns {
                list.push(measure()?);
            }
        }
        let [ours, fio, theirs] = lists.map(|list| {
            let (rates, costs): (Vec<_>, Vec<_>) = list.into_iter().unzip();
            (median(&rates), median(&costs))
        });
        Ok(Self { load, ours, theirs, fio })
    }

    fn row(&self) -> Vec<String> {
        let ((rate, cpu), (their_rate, their_cpu)) = (self.ours, self.theirs);
        let (faster, fio_faster) = (rate / their_rate, self.fio.0 / their_rate);
        let (cheaper, fio_cheaper) = (cpu / their_cpu, self.fio.1 / their_cpu);
        // An aim that the kernel itself misses is no less missed; but a reader is told.
        let verdict = |ratio: f64, holds: bool, fio: f64, fio_holds: bool| match (holds, fio_holds) {
            (true, _) => format!("{ratio:.2}, holds"),
            (false, true) => format!("{ratio:.2}, **missed**"),
            (false, false) => format!("{ratio:.2}, **missed**, fio {fio:.2}"),
        };
        vec![
            describe(self.load),
            format!("{:.1}", rate / 1e3),
            format!("{:.1}", their_rate / 1e3),
            verdict(faster, faster >= FASTER, fio_faster, fio_faster >= FASTER),
            format!("{cpu:.1}"),
            format!("{their_cpu:.1}"),
            verdict(cheaper, cheaper <= CHEAPER, fio_cheaper, fio_cheaper <= CHEAPER),
            format!("{:.1}", self.fio.0 / 1e3),
            format!("{:.1}", self.fio.1),
            format!("{:.2}", rate / self.fio.0),
        ]
    }
}

fn compare(
    places: &Places,
    (rounds, only): (usize, &str),
    title: &str,
    folder: &Path,
    direct: bool,
) -> Outcome {
    let disk: PathBuf = folder.join("bench-disk");
    make(&disk).map_err(|error| format!("{}: {error}", disk.display()))?;
    let start = |name| Service::start(name, places, &disk, direct);
    let (ours, theirs) = (start("bulkhead")?, start("qemu-storage-daemon")?);
    let fio = |load| blk_fio::requests(&disk, DISK, load, direct, TIME);
    let wanted = |load: &Load| only.is_empty() || describe(*load).contains(only);
    let figures: Outcome<Vec<_>> = loads()
        .into_iter()
        .filter(wanted)
        .map(|load| Figures::measure(load, rounds, (&ours, &theirs), fio))
        .collect();
    drop((ours, theirs));
    let _ = std::fs::remove_file(&disk);
    table::print(
        title,
        &[
            "load",
            "bulkhead-device, 1000/s",
            "qemu-storage-daemon, 1000/s",
            &format!("ratio (aim ≥ {FASTER})"),
            "CPU each, µs",
            "theirs, µs",
            &format!("ratio (aim ≤ {CHEAPER})"),
            "fio, 1000/s",
            "fio's CPU each, µs",
            "ours ÷ fio",
        ],
        &figures?.iter().map(Figures::row).collect::<Vec<_>>(),
    );
    Ok(())
}

/// A file whose blocks are all written.
fn make(disk: &Path) -> std::io::Result<()> {
    let mut file = File::create(disk)?;
    for _ in 0..DISK >> 20 {
        file.write_all(&[1; 1 << 20])?;
    }
    file.sync_all()
}

/// `only` selects loads by a part of their description.
pub fn run(places: &Places, rounds: usize, only: &str) -> Outcome {
    let rounds = (rounds, only);
    let root = places.programs.ancestors().nth(3).ok_or("no root of the repository")?.join("build");
    std::fs::create_dir_all(&root).map_err(|error| error.to_string())?;
    println!("\n## Disk processes and the kernel itself\n\n{EXPLANATION}");
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
