//! The kernel's own limit: `fio` on the same file, without a device and a driver between.
//!
//! It is what io_uring comes to with a registered file and registered buffers. Where the page cache is in play that may be far from the
//! limit: what a file system cannot do without waiting (any access on tmpfs, a write on ext4) goes through kernel threads then. So
//! `pread` and `pwrite` are tried there, too, and the better counts. Buffers are shared memory, as a guest's RAM is: copies to private memory, which
//! has huge pages, are a tenth faster.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_tests::harness::Outcome;
use serde_json::Value;

use crate::blk_load::Load;

/// Requests a second that fio comes to on the first `size` bytes of `file` in `time`, and µs of CPU for each.
///
/// # Errors
/// There is no fio, or it did nothing.
pub fn requests(file: &Path, size: u64, load: Load, direct: bool, time: Duration) -> Outcome<(f64, f64)> {
    let engines: &[&str] = if direct { &["io_uring"] } else { &["io_uring", "psync"] };
    let mut best = (0.0, 0.0);
    for engine in engines {
        let figures = run(engine, file, size, load, direct, time)?;
        if figures.0 > best.0 {
            best = figures;
        }
    }
    Ok(best)
}

fn run(
    engine: &str,
    file: &Path,
    size: u64,
    load: Load,
    direct: bool,
    time: Duration,
) -> Outcome<(f64, f64)> {
    let kind = if load.writes { "write" } else { "read" };
    let place = if load.sequential { "" } else { "rand" };
    let mut fio = Command::new("fio");
    // Left alone it would empty the page cache before it begins, note which blocks it has had, and draw the same numbers each time.
    fio.args(["--name=limit", "--invalidate=0", "--norandommap", "--randrepeat=0", "--output-format=json"]);
    fio.arg(format!("--filename={}", file.display())).arg(format!("--size={size}"));
    fio.arg(format!("--rw={place}{kind}")).arg(format!("--bs={}", load.size));
    fio.arg("--time_based").arg(format!("--runtime={}ms", time.as_millis()));
    fio.arg(format!("--ioengine={engine}")).arg(format!("--direct={}", u8::from(direct)));
    fio.arg("--iomem=mmapshared");
    if engine == "io_uring" {
        fio.args(["--registerfiles", "--fixedbufs"]).arg(format!("--iodepth={}", load.depth));
    }
    let output = fio.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("fio, which tells the kernel's limit: {error}"))?;
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let number = |path: &str| told.pointer(&format!("/jobs/0/{path}")).and_then(Value::as_f64);
    let rate = number(&format!("{kind}/iops")).filter(|rate| output.status.success() && *rate > 0.0);
    // Percent of one CPU.
    let used = number("usr_cpu").zip(number("sys_cpu")).map(|(user, system)| user + system);
    rate.zip(used)
        .map(|(rate, used)| (rate, used * 1e4 / rate))
        .ok_or_else(|| format!("fio at {load:?}: {}", String::from_utf8_lossy(&output.stderr).trim_end()))
}
