//! The load programs that users measure with, `fio` and `iperf3`, as commands of `bulkhead run -- COMMAND`: what is written is what
//! is read, and devices of one limit group move no more than its rate together.

use std::fs::{self, File};
use std::io;
use std::process::{Command, Stdio};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use serde_json::Value;

use super::disk::qemu_img;
use super::guest_command::in_guest;
use super::network::{run, separate};

const MIB: u64 = 1 << 20;
/// Size of each disk.
const DISK: u64 = 24 * MIB;
/// What the disks of a group may do together, far less than any host can. What they may save up is a tenth of a second's.
const REQUESTS: f64 = 100.0;
const DISK_BYTES: f64 = 2e6;
/// What the cards of a group may move together, bytes a second.
const CARD_BYTES: f64 = 4e6;

/// What fio does, after all of one paragraph the next: disks of a group with small requests, which their number limits, with large ones,
/// which their bytes do, and one while the other is idle; then contents, by each interface and with blocks of all sizes.
const JOBS: &str = "
[global]
direct=1
ioengine=libaio
iodepth=8
rw=randrw
bs=4k
time_based
runtime=5

[small-a]
filename=/dev/vdc
[small-b]
filename=/dev/vdd

[large-a]
stonewall
filename=/dev/vdc
bs=64k
[large-b]
filename=/dev/vdd
bs=64k

[alone]
stonewall
filename=/dev/vdc

[global]
time_based=0
runtime=0
verify=crc32c
verify_fatal=1

[raw-small]
stonewall
filename=/dev/vda
size=4m
iodepth=16
[raw-large]
filename=/dev/vda
offset=4m
size=16m
bs=128k
ioengine=io_uring
[raw-mixed]
filename=/dev/vda
offset=20m
size=4m
bsrange=512-64k
ioengine=psync
iodepth=1

[qcow2-small]
filename=/dev/vdb
size=4m
iodepth=16
[qcow2-large]
filename=/dev/vdb
offset=4m
size=16m
bs=128k
ioengine=io_uring
[qcow2-mixed]
filename=/dev/vdb
offset=20m
size=4m
bsrange=512-64k
ioengine=psync
iodepth=1
";

/// What iperf3 does: one way and the other, by each card; then by two cards of a group at once, one way each.
const TRANSFERS: &str = "
for card in 0 1 2; do ip addr add 10.9.$card.2/24 dev eth$card && ip link set eth$card up || exit 2; done
measure() { name=$1; shift; iperf3 --json --logfile $name.json --connect-timeout 5000 \"$@\" || { cat $name.json; exit 1; }; }
measure tap-up --time 2 --client 10.9.0.1
measure tap-down --time 2 --client 10.9.0.1 --reverse
measure passt-up --time 2 --client 10.0.2.2
measure passt-down --time 2 --client 10.0.2.2 --reverse
(measure group-up --time 6 --client 10.9.1.1 --port 5202) &
measure group-down --time 6 --client 10.9.2.1 --port 5203 --reverse
wait $! || exit 1
";

pub fn cases() -> Vec<Case> {
    let fio =
        "fio finds all that it wrote to a raw and a qcow2 disk, and two disks of a limit group hold its rate";
    let iperf = "iperf3 both ways by a tap and by passt, and two cards of a limit group hold its rate";
    vec![Case::new("stock", fio, 180, disks), Case::new("stock", iperf, 180, cards)]
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn ensure_installed(program: &str) -> Outcome {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    ensure!(there.is_ok_and(|it| it.success()), "{program} is missing: tools/install-packages lab");
    Ok(())
}

/// What a program in the guest has left in the case's folder, as JSON.
fn result(context: &Context, name: &str) -> Outcome<Value> {
    let bytes = fs::read(context.folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{name}: {error}"))
}

/// Says a figure, in the output and in the log.
fn tell(context: &Context, line: &str) {
    println!("    {line}");
    context.log(line);
}

fn number(value: &Value, path: &str) -> Outcome<f64> {
    value.pointer(path).and_then(Value::as_f64).ok_or_else(|| format!("no {path} in {value}"))
}

/// Two devices of a group, each of which wants all, got `rates`: no more than its rate together, and neither is kept from its share.
fn ensure_shared(what: &str, rates: &[f64], limit: f64) -> Outcome {
    let sum: f64 = rates.iter().sum();
    ensure!(sum <= limit * 1.1, "{what}: {rates:.0?} a second are more than the group's {limit}");
    ensure!(sum >= limit * 0.6, "{what}: {rates:.0?} a second are much less than the group's {limit}");
    ensure!(
        rates.iter().all(|rate| *rate >= sum / 4.0),
        "{what}: {rates:.0?} a second are not shared fairly"
    );
    Ok(())
}

/// What a job of fio did.
#[derive(Debug)]
struct Done {
    requests: f64,
    read: f64,
    written: f64,
    seconds: f64,
}

impl Done {
    fn of(report: &Value, name: &str) -> Outcome<Self> {
        let jobs = report.get("jobs").and_then(Value::as_array).ok_or("no jobs in fio's report")?;
        let job = jobs.iter().find(|it| it.get("jobname").is_some_and(|other| other == name));
        let job = job.ok_or_else(|| format!("no job '{name}' in fio's report"))?;
        ensure!(number(job, "/error")? == 0.0, "fio found an error: {job}");
        let both = |field: &str| -> Outcome<[f64; 2]> {
            Ok([number(job, &format!("/read/{field}"))?, number(job, &format!("/write/{field}"))?])
        };
        let [read, written] = both("io_bytes")?;
        let milliseconds = both("runtime")?.into_iter().fold(1.0, f64::max);
        let requests = both("total_ios")?.iter().sum();
        Ok(Self { requests, read, written, seconds: milliseconds / 1000.0 })
    }

    fn requests_per_second(&self) -> f64 {
        self.requests / self.seconds
    }

    fn bytes_per_second(&self) -> f64 {
        (self.read + self.written) / self.seconds
    }
}

/// The digests of disks or images, by the program of that place.
fn digests(lines: &str) -> Vec<&str> {
    lines.lines().filter_map(|line| line.split(' ').next()).collect()
}

fn disks(context: &Context) -> Outcome {
    let path = |name: &str| context.folder.join(name).display().to_string();
    let file = |name: &str| File::create(context.folder.join(name)).map_err(text);
    for name in ["raw", "a", "b"] {
        file(name)?.set_len(DISK).map_err(text)?;
    }
    let mut random = io::Read::take(File::open("/dev/urandom").map_err(text)?, DISK);
    io::copy(&mut random, &mut file("base")?).map_err(text)?;
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "raw", &path("top")])?;
    fs::write(context.folder.join("jobs"), JOBS).map_err(text)?;
    let arguments = [
        "--limit-group".to_owned(),
        format!("id=slow,bps={DISK_BYTES},iops={REQUESTS}"),
        format!("--disk=path={}", path("raw")),
        format!("--disk=path={},format=qcow2,backing={}:raw", path("top"), path("base")),
        format!("--disk=path={},limit-group=slow", path("a")),
        format!("--disk=path={},limit-group=slow", path("b")),
    ];
    let script = "fio --eta=never --output=fio.json --output-format=json jobs || { cat fio.json; exit 1; }
        sha256sum /dev/vda /dev/vdb >digests || exit 1";
    ensure_installed("fio")?;
    in_guest(context, &arguments, script)?;

    let report = result(context, "fio.json")?;
    let shared = |jobs: [&str; 2], rate: fn(&Done) -> f64| -> Outcome<[f64; 2]> {
        let [a, b] = jobs.map(|job| Done::of(&report, job));
        Ok([rate(&a?), rate(&b?)])
    };
    let small = shared(["small-a", "small-b"], Done::requests_per_second)?;
    let large = shared(["large-a", "large-b"], Done::bytes_per_second)?;
    let alone = Done::of(&report, "alone")?.requests_per_second();
    tell(
        context,
        &format!(
            "group of disks: {small:.1?} of {REQUESTS} requests/s, {large:.0?} of {DISK_BYTES} bytes/s, alone {alone:.1} requests/s"
        ),
    );
    for disk in ["raw", "qcow2"] {
        for (kind, size) in [("small", 4), ("large", 16), ("mixed", 4)] {
            verified(
                context,
                &Done::of(&report, &format!("{disk}-{kind}"))?,
                &format!("{disk}, {kind} blocks"),
                size * MIB,
            )?;
        }
    }
    ensure_shared("small requests", &small, REQUESTS)?;
    ensure_shared("large requests", &large, DISK_BYTES)?;
    ensure!((REQUESTS * 0.6..=REQUESTS * 1.1).contains(&alone), "alone: {alone:.1} of {REQUESTS} requests/s");
    same_outside(context)
}

/// A mix of reads and writes that together make up the job's size, and all that was written read once more.
fn verified(context: &Context, done: &Done, what: &str, size: u64) -> Outcome {
    let rate = done.bytes_per_second() / MIB as f64;
    tell(context, &format!("fio, {what}: {:.0} requests/s, {rate:.1} MiB/s", done.requests_per_second()));
    let size = size as f64;
    ensure!(done.written > size / 4.0, "{what}: hardly anything was written: {done:?}");
    ensure!(done.read == size, "{what}: what was written was not read once more: {done:?}");
    Ok(())
}

/// The images hold what the guest reads from its disks.
fn same_outside(context: &Context) -> Outcome {
    let path = |name: &str| context.folder.join(name).display().to_string();
    qemu_img(&["check", "-q", &path("top")])?;
    qemu_img(&["convert", "-O", "raw", &path("top"), &path("flat")])?;
    let output = Command::new("sha256sum").args([path("raw"), path("flat")]).output().map_err(text)?;
    let (outside, inside) =
        (String::from_utf8_lossy(&output.stdout), fs::read_to_string(context.folder.join("digests")));
    let inside = inside.map_err(text)?;
    ensure!(
        digests(&outside).len() == 2 && digests(&outside) == digests(&inside),
        "the images hold\n{outside}\nand the guest read\n{inside}"
    );
    Ok(())
}

/// Starts a server of iperf3 in the network of this case.
fn serve(context: &Context, port: u16) -> Outcome {
    let log = context.folder.join(format!("server-{port}"));
    let mut server = Command::new("iperf3");
    server.args(["--server", "--port", &port.to_string(), "--logfile"]).arg(&log).stdin(Stdio::null());
    context.remember(server.spawn().map_err(|error| format!("iperf3: {error}"))?.id());
    Ok(())
}

fn cards(context: &Context) -> Outcome {
    separate()?;
    let mut arguments = vec!["--limit-group".to_owned(), format!("id=narrow,bps={CARD_BYTES}")];
    for (card, group) in ["", ",limit-group=narrow", ",limit-group=narrow"].iter().enumerate() {
        run("ip", &format!("tuntap add card{card} mode tap"))?;
        run("ip", &format!("addr add 10.9.{card}.1/24 dev card{card}"))?;
        arguments.push(format!("--net=tap=card{card}{group}"));
    }
    arguments.push("--net=user".to_owned());
    for port in [5201, 5202, 5203] {
        serve(context, port)?;
    }
    ensure_installed("iperf3")?;
    in_guest(context, &arguments, TRANSFERS)?;

    let rate = |name: &str| -> Outcome<f64> {
        let report = result(context, &format!("{name}.json"))?;
        let field = |field| number(&report, &format!("/end/sum_received/{field}"));
        Ok(field("bytes")? / field("seconds")?)
    };
    for name in ["tap-up", "tap-down", "passt-up", "passt-down"] {
        let rate = rate(name)?;
        tell(context, &format!("iperf3, {name}: {:.1} MB/s", rate / 1e6));
        ensure!(rate > 1e5, "{name}: {rate:.0} bytes/s");
    }
    let shared = [rate("group-up")?, rate("group-down")?];
    tell(context, &format!("group of cards: {shared:.0?} of {CARD_BYTES} bytes/s"));
    ensure_shared("cards", &shared, CARD_BYTES)
}
