//! Disk load with verification, run inside the test guest (`tests/guests/tests/iotest`).
//!
//! ```text
//! guest-io DEVICE [verify|read|swap] [--rounds N] [--mib N] [--depth N] [--seconds N] [--block BYTES] [--seed N]
//! ```
//!
//! `verify` (the default): first writes the whole device, then reads and writes `--mib` MiB (default 256) at random
//! places, each request 512 bytes to 1 MiB, `--depth` (default 32) at once and never two on the same sector, and compares
//! each read with what must be there; at last it reads all again, compares, and prints a digest for the host.
//!
//! `read`: random reads of `--block` bytes (default 4096) at `--depth` for `--seconds`; prints how many.
//!
//! `swap`: `--rounds` disks that come one after the other: each must hold what the host wrote for its round, is written whole,
//! and is waited for to go.
//!
//! All I/O is `O_DIRECT`. Exit status 1 and a sentence on a difference or an I/O error.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_tests::pattern::{Digest, SECTOR, Stream, fill};

/// `O_DIRECT` wants buffers aligned to the logical block; a page is enough for every device.
const ALIGNMENT: usize = 4096;
const LARGEST: usize = 1 << 20;

type Outcome<T> = Result<T, String>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Verify,
    Read,
    Swap,
}

struct Options {
    device: String,
    mode: Mode,
    rounds: u64,
    bytes: u64,
    depth: u64,
    duration: Duration,
    block: usize,
    seed: u64,
}

fn main() -> ExitCode {
    let run = |options: Options| match options.mode {
        Mode::Verify => verify(&options),
        Mode::Read => read_load(&options),
        Mode::Swap => swap(&options),
    };
    match parse(std::env::args().skip(1)).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("guest-io: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Outcome<Options> {
    let mut options = Options {
        device: arguments.next().ok_or("no device given")?,
        mode: Mode::Verify,
        rounds: 1,
        bytes: 256 << 20,
        depth: 32,
        duration: Duration::from_secs(10),
        block: 4096,
        seed: 1,
    };
    while let Some(word) = arguments.next() {
        let mut number = || -> Outcome<u64> {
            let text = arguments.next().ok_or(format!("{word} needs a number"))?;
            text.parse().map_err(|_| format!("{word}: '{text}' is not a number"))
        };
        match word.as_str() {
            "verify" => options.mode = Mode::Verify,
            "read" => options.mode = Mode::Read,
            "swap" => options.mode = Mode::Swap,
            "--rounds" => options.rounds = number()?,
            "--mib" => options.bytes = number()?.saturating_mul(1 << 20),
            "--depth" => options.depth = number()?.clamp(1, 256),
            "--seconds" => options.duration = Duration::from_secs(number()?),
            "--block" => options.block = usize::try_from(number()?).unwrap_or(4096).clamp(SECTOR, LARGEST),
            "--seed" => options.seed = number()?,
            _ => return Err(format!("unknown word {word}")),
        }
    }
    Ok(options)
}

fn open(path: &str, write: bool) -> Outcome<(File, u64)> {
    let describe = |error| format!("{path}: {error}");
    let mut file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(describe)?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(describe)?;
    Ok((file, bytes / SECTOR as u64))
}

/// A buffer whose usable part begins at a multiple of [`ALIGNMENT`].
struct Buffer {
    data: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let data = vec![0; LARGEST + ALIGNMENT];
        let start = data.as_ptr().align_offset(ALIGNMENT);
        Self { data, start }
    }

    fn first(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.start + bytes.min(LARGEST);
        self.data.get_mut(self.start..end).unwrap_or_default()
    }
}

/// Which sectors a request is on at the moment, and how often each was written.
struct Sectors {
    busy: Vec<bool>,
    generations: Vec<u32>,
}

struct Verified<'a> {
    file: &'a File,
    options: &'a Options,
    count: u64,
    sectors: Mutex<Sectors>,
    moved: AtomicU64,
    requests: AtomicU64,
}

impl Verified<'_> {
    /// Reserves a range at random; its first sector and the generations there.
    fn reserve(&self, random: &mut Stream) -> (u64, Vec<u32>) {
        loop {
            // Sizes spread evenly over the powers of two: as many requests of one sector as of 1 MiB.
            let largest = 1_u64 << random.below(12);
            let length = (random.below(largest) + 1).min(self.count);
            let first = random.below(self.count - length + 1);
            let mut sectors = self.sectors.lock().unwrap_or_else(PoisonError::into_inner);
            let range = index(first)..index(first + length);
            let free = sectors.busy.get(range.clone()).is_some_and(|busy| !busy.contains(&true));
            if free {
                sectors.busy.get_mut(range.clone()).unwrap_or_default().fill(true);
                return (first, sectors.generations.get(range).unwrap_or_default().to_vec());
            }
        }
    }

    fn release(&self, first: u64, generations: &[u32]) {
        let mut sectors = self.sectors.lock().unwrap_or_else(PoisonError::into_inner);
        let range = index(first)..index(first) + generations.len();
        sectors.busy.get_mut(range.clone()).unwrap_or_default().fill(false);
        sectors.generations.get_mut(range).unwrap_or_default().copy_from_slice(generations);
    }

    /// One of the threads that together keep `depth` requests in flight.
    fn work(&self, number: u64) -> Outcome<()> {
        let seed = self.options.seed;
        let mut random = Stream::new(seed ^ (number << 32));
        let mut buffer = Buffer::new();
        while self.moved.load(Ordering::Relaxed) < self.options.bytes {
            let (first, mut generations) = self.reserve(&mut random);
            let bytes = generations.len() * SECTOR;
            let data = buffer.first(bytes);
            if random.below(2) == 0 {
                generations.iter_mut().for_each(|generation| *generation += 1);
                fill(seed, first, &generations, data);
                self.file
                    .write_all_at(data, first * SECTOR as u64)
                    .map_err(|e| failed("write", first, &e))?;
            } else {
                self.file
                    .read_exact_at(data, first * SECTOR as u64)
                    .map_err(|e| failed("read", first, &e))?;
                compare(seed, first, &generations, data)?;
            }
            self.release(first, &generations);
            self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn index(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}

fn failed(what: &str, sector: u64, error: &std::io::Error) -> String {
    format!("{what} at sector {sector} failed: {error}")
}

fn compare(seed: u64, first: u64, generations: &[u32], data: &[u8]) -> Outcome<()> {
    let mut expected = [0; SECTOR];
    for ((sector, generation), found) in (first..).zip(generations).zip(data.chunks_exact(SECTOR)) {
        fill(seed, sector, &[*generation], &mut expected);
        if let Some(at) = expected.iter().zip(found).position(|(a, b)| a != b) {
            return Err(format!("sector {sector} differs from byte {at} on, after {generation} writes"));
        }
    }
    Ok(())
}

fn verify(options: &Options) -> Outcome<()> {
    let (file, count) = open(&options.device, true)?;
    let generations = vec![0; index(count)];
    let step = LARGEST / SECTOR;
    let mut buffer = Buffer::new();
    for (chunk, first) in generations.chunks(step).zip((0..count).step_by(step)) {
        let data = buffer.first(chunk.len() * SECTOR);
        fill(options.seed, first, chunk, data);
        file.write_all_at(data, first * SECTOR as u64).map_err(|e| failed("write", first, &e))?;
    }
    println!("guest: io filled {} MiB", (count * SECTOR as u64) >> 20);

    let state = Verified {
        file: &file,
        options,
        count,
        sectors: Mutex::new(Sectors { busy: vec![false; generations.len()], generations }),
        moved: AtomicU64::new(0),
        requests: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        let state = &state;
        let threads: Vec<_> =
            (0..options.depth).map(|number| scope.spawn(move || state.work(number))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })?;
    file.sync_all().map_err(|error| format!("sync: {error}"))?;
    let moved = state.moved.load(Ordering::Relaxed) >> 20;
    println!("guest: io moved {moved} MiB in {} requests", state.requests.load(Ordering::Relaxed));

    let sectors = state.sectors.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut digest = Digest::default();
    for (chunk, first) in sectors.generations.chunks(step).zip((0..count).step_by(step)) {
        let data = buffer.first(chunk.len() * SECTOR);
        file.read_exact_at(data, first * SECTOR as u64).map_err(|e| failed("read", first, &e))?;
        compare(options.seed, first, chunk, data)?;
        digest.update(data);
    }
    println!("guest: io digest {:016x}", digest.value());
    Ok(())
}

fn swap(options: &Options) -> Outcome<()> {
    // Not oftener: where a timer is dear, looking takes the time of what is waited for.
    let pause = || std::thread::sleep(Duration::from_millis(20));
    let mut buffer = Buffer::new();
    let serial = options.device.replace("/dev/", "/sys/block/") + "/serial";
    for round in 1..=options.rounds {
        let (file, count) = loop {
            match open(&options.device, true) {
                Ok((file, count)) if count > 0 => break (file, count),
                _ => pause(),
            }
        };
        let data = buffer.first(index(count) * SECTOR);
        file.read_exact_at(data, 0).map_err(|e| failed("read", 0, &e))?;
        compare(round, 0, &vec![0; index(count)], data)?;
        fill(round, 0, &vec![1; index(count)], data);
        file.write_all_at(data, 0).map_err(|e| failed("write", 0, &e))?;
        file.sync_all().map_err(|error| format!("sync: {error}"))?;
        let serial = std::fs::read_to_string(&serial).map_err(|error| format!("{serial}: {error}"))?;
        println!("guest: disk {round} {} holds what the host wrote", serial.trim_end());
        drop(file);
        while std::fs::exists(&options.device).unwrap_or(true) {
            pause();
        }
    }
    Ok(())
}

fn read_load(options: &Options) -> Outcome<()> {
    let (file, count) = open(&options.device, false)?;
    let blocks = (count * SECTOR as u64) / options.block as u64;
    let requests = AtomicU64::new(0);
    let start = Instant::now();
    let work = |number| -> Outcome<()> {
        let mut random = Stream::new(options.seed ^ (number << 32));
        let mut buffer = Buffer::new();
        while start.elapsed() < options.duration {
            let offset = random.below(blocks) * options.block as u64;
            file.read_exact_at(buffer.first(options.block), offset)
                .map_err(|e| failed("read", offset / SECTOR as u64, &e))?;
            requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..options.depth).map(|number| scope.spawn(move || work(number))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })?;
    let total = requests.load(Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    println!("guest: io read {total} requests of {} bytes in {seconds:.2} s", options.block);
    Ok(())
}
