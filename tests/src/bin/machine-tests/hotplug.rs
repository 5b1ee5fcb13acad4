//! Devices that come and go while the guest runs: what the guest sees, and that nothing stays behind.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::ensure;
use bulkhead_tests::harness::{Case, Context, Outcome};
use bulkhead_tests::machine::{Kernel, Machine, Running, bulkhead, exit};
use bulkhead_tests::pattern::{SECTOR, fill};
use bulkhead_tests::processes::Process;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::serial;

/// How often a disk is plugged in and out of a guest; of a real one in the lab, where a round takes seconds, without a word; and of
/// a guest that does not listen.
const ROUNDS: usize = 50;
const STOCK_ROUNDS: usize = 3;
const BARE_ROUNDS: usize = 10;
/// The size of these disks, bytes.
const DISK: usize = 64 << 10;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "bare",
            "hot-plug: a guest ejects a disk 50 times, and a reset finishes what it did not",
            60,
            ejected,
        ),
        Case::new("bare", "hot-plug: CPUs come and go", 60, bare_processors),
        Case::new("bare", "hot-plug: pulled-out devices leave nothing behind", 60, pulled_out),
        Case::new("bare", "hot-plug: what makes no sense is refused", 60, refused),
        Case::new("stock", "processors come and go, and sit where --cpus says", 120, processors),
        Case::new("stock", "processors beyond 8-bit APIC ids come, run and get messages", 120, wide_ids),
        Case::new("stock", "hot-plug: a disk comes and goes under load", 300, |context| {
            under_load(context, STOCK_ROUNDS)
        }),
        Case::new("stock", "hot-plug: a disk comes and goes fifty times under load", 900, |context| {
            under_load(context, ROUNDS)
        })
        .long_in_lab(),
    ]
}

/// Runs `bulkhead device …` and returns its exit code and what it said.
fn device(context: &Context, arguments: &[&str]) -> Outcome<(i32, String)> {
    let output = bulkhead(context).arg("device").args(arguments).output().map_err(|e| e.to_string())?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    context.log(&format!("device {arguments:?}: {} {said}", output.status));
    Ok((output.status.code().unwrap_or(-1), said))
}

fn succeed(context: &Context, arguments: &[&str]) -> Outcome {
    let (code, said) = device(context, arguments)?;
    ensure!(code == exit::SUCCESS, "device {arguments:?} ended with {code}: {said}");
    Ok(())
}

fn refuse(context: &Context, arguments: &[&str], words: &str) -> Outcome {
    let (code, said) = device(context, arguments)?;
    ensure!(code != exit::SUCCESS && said.contains(words), "device {arguments:?} ended with {code}: {said}");
    Ok(())
}

/// What the processes of a machine hold: of each its name, and how many descriptors (of each kind) and threads it has.
fn holdings(running: &Running) -> Outcome<BTreeMap<String, String>> {
    let count = |process: &Process| -> Outcome<(String, String)> {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        for link in process.descriptors()?.into_values() {
            let kind = link.split([':', '(', ' ']).next().unwrap_or_default().to_owned();
            *kinds.entry(kind).or_default() += 1;
        }
        Ok((process.title(), format!("{kinds:?}, {} threads", process.threads()?.len())))
    };
    running.processes().iter().map(count).collect()
}

/// What they hold once that changes no more: the kernel takes down what io_uring had after the process itself.
fn settled(running: &Running) -> Outcome<BTreeMap<String, String>> {
    thread::sleep(Duration::from_millis(200));
    holdings(running)
}

/// Waits until the processes hold what they held before; what the kernel takes down for io_uring takes a moment.
fn expect_holdings(running: &Running, before: &BTreeMap<String, String>) -> Outcome {
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        let now = holdings(running)?;
        if now == *before {
            return Ok(());
        }
        ensure!(Instant::now() < end, "before the first device: {before:#?}, after the last: {now:#?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Makes an image that holds what belongs to this round, and returns its path.
fn image(folder: &Path, name: &str, round: u64) -> Outcome<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, content(round, 0)).map_err(|error| error.to_string())?;
    Ok(path)
}

/// What a disk holds after it was written so often.
fn content(round: u64, writes: u32) -> Vec<u8> {
    let mut bytes = vec![0; DISK];
    fill(round, 0, &[writes; DISK / SECTOR], &mut bytes);
    bytes
}

/// A guest that knows nothing of ACPI and goes on for ever.
fn deaf(context: &Context) -> Outcome<Running> {
    let machine = Machine::bare(context, &context.places.payloads.join("echo.elf"))?;
    let serial = format!("unix={}", context.folder.join("serial").display());
    let (machine, _) = machine.arguments(&["--memory", "64M", "--serial", &serial]).empty_disk(1)?;
    let running = machine.start()?;
    let end = Instant::now() + Duration::from_secs(20);
    while !running.messages().iter().any(|line| line.contains("are ready")) {
        ensure!(Instant::now() < end, "the machine does not start");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(running)
}

/// A guest that handles the registers of hot-plug, and a connection to its serial port.
fn handling(context: &Context, arguments: &[&str]) -> Outcome<(Running, UnixStream)> {
    let machine = Machine::bare(context, &context.places.payloads.join("hotplug.elf"))?;
    let path = context.folder.join("serial");
    let target = format!("unix={}", path.display());
    let machine = machine.arguments(&["--memory", "64M", "--serial", &target]).arguments(arguments);
    let running = machine.start()?;
    let mut stream = serial::connect(context, &path)?;
    serial::read_until(&mut stream, "hotplug begins\n")?;
    Ok((running, stream))
}

fn ejected(context: &Context) -> Outcome {
    let group = ["--limit-group", "id=slow,bps=1M,iops=1000:10"];
    let (mut running, mut stream) = handling(context, &group)?;
    let name = running.name.clone();
    let name = name.as_str();
    let image = image(&context.folder, "hot.img", 1)?;
    // More often than a group has members.
    let spec = format!("path={},id=hot,limit-group=slow", image.display());
    let mut before = BTreeMap::new();
    for round in 0..ROUNDS {
        succeed(context, &["add", name, "--disk", &spec])?;
        serial::read_until(&mut stream, "in 02\n")?;
        succeed(context, &["remove", name, "hot"])?;
        serial::read_until(&mut stream, "out 02\n")?;
        if round == 0 {
            before = settled(&running)?;
        }
    }
    expect_holdings(&running, &before)?;
    succeed(context, &["add", name, "--disk", &spec])?;
    serial::read_until(&mut stream, "in 02\n")?;
    let path = context.folder.join("serial");
    let say =
        |stream: &mut UnixStream, byte: &[u8]| stream.write_all(byte).map_err(|error| error.to_string());
    // A machine that starts anew has a new serial port.
    say(&mut stream, b"r")?;
    serial::read_until(&mut stream, "no more").err().ok_or("the port is still open")?;
    let mut stream = serial::connect(context, &path)?;
    serial::read_until(&mut stream, "has 02\nhotplug begins\n")?;
    say(&mut stream, b"d")?;
    hear(&mut stream, &["deaf\n"])?;
    refuse(context, &["remove", name, "hot", "--timeout", "1"], "did not let go of hot within 1 s")?;
    let remove = bulkhead(context).args(["device", "remove", name, "hot"]).spawn();
    let mut remove = remove.map_err(|error| error.to_string())?;
    thread::sleep(Duration::from_millis(300));
    say(&mut stream, b"r")?;
    serial::read_until(&mut stream, "no more").err().ok_or("the port is still open")?;
    let mut stream = serial::connect(context, &path)?;
    let said = serial::read_until(&mut stream, "hotplug begins\n")?;
    ensure!(!said.contains("has 02"), "it is still there: {said}");
    let status = remove.wait().map_err(|error| error.to_string())?;
    ensure!(status.success(), "who wanted it removed heard that {status}");
    succeed(context, &["add", name, "--disk", &spec])?;
    serial::read_until(&mut stream, "in 02\n")?;
    succeed(context, &["remove", name, "hot", "--force"])?;
    serial::read_until(&mut stream, "pulled out 02\n")?;
    stream.write_all(b"q").map_err(|error| error.to_string())?;
    running.expect_exit(exit::SUCCESS)
}

/// Reads until all these lines came, in whatever order.
fn hear(stream: &mut UnixStream, lines: &[&str]) -> Outcome {
    let mut all = String::new();
    let mut part = [0; 256];
    while !lines.iter().all(|line| all.contains(line)) {
        let count = stream.read(&mut part).map_err(|error| format!("after '{all}': {error}"))?;
        ensure!(count > 0, "closed after '{all}'");
        all.push_str(&String::from_utf8_lossy(part.get(..count).unwrap_or_default()));
    }
    Ok(())
}

fn bare_processors(context: &Context) -> Outcome {
    let (mut running, mut stream) = handling(context, &["--cpus", "1,max=3"])?;
    let name = running.name.clone();
    let resize = |count: &str, limit: &str| {
        let arguments = ["resize", &name, "--cpus", count, "--timeout", limit];
        let output = bulkhead(context).args(arguments).output().map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok::<_, String>((output.status.success(), said))
    };
    for _ in 0..10 {
        ensure!(resize("3", "5")?.0, "not up to 3");
        hear(&mut stream, &["cpu in 01\n", "cpu in 02\n"])?;
        ensure!(resize("1", "5")?.0, "not down to 1");
        hear(&mut stream, &["cpu out 01\n", "cpu out 02\n"])?;
    }
    let (done, said) = resize("4", "5")?;
    ensure!(!done && said.contains("1 to 3 CPUs"), "4 of 3: {said}");
    ensure!(resize("2", "5")?.0, "not up to 2");
    hear(&mut stream, &["cpu in 01\n"])?;
    stream.write_all(b"d").map_err(|error| error.to_string())?;
    hear(&mut stream, &["deaf\n"])?;
    let (done, said) = resize("1", "1")?;
    ensure!(!done && said.contains("did not go down to 1 CPUs within 1 s"), "a deaf guest: {said}");
    stream.write_all(b"q").map_err(|error| error.to_string())?;
    running.expect_exit(exit::SUCCESS)
}

/// Where the processes that a machine began with have users of their own, those that came later do, too.
fn expect_own_users(running: &Running) -> Outcome {
    let user = |process: &Process| -> Outcome<String> {
        process.threads()?.first().ok_or("no thread")?.status("Uid")
    };
    let mut users = running.processes().iter().skip(1).map(user).collect::<Outcome<Vec<String>>>()?;
    let own = user(running.processes().first().ok_or("no process")?)?;
    if users.first() == Some(&own) {
        return Ok(());
    }
    let count = users.len();
    users.sort();
    users.dedup();
    ensure!(users.len() == count, "{count} processes have the users {users:?}");
    Ok(())
}

fn pulled_out(context: &Context) -> Outcome {
    let running = deaf(context)?;
    let path = image(&context.folder, "hot.img", 1)?;
    let name = running.name.as_str();
    let spec = format!("path={},id=hot", path.display());
    let base = running.processes().len();
    let mut before = BTreeMap::new();
    for round in 0..BARE_ROUNDS {
        succeed(context, &["add", name, "--disk", &spec])?;
        succeed(context, &["add", name, "--rng"])?;
        succeed(context, &["add", name, "--console"])?;
        ensure!(running.processes().len() == base + 3, "a process is missing");
        expect_own_users(&running)?;
        for device in ["hot", "rng", "console"] {
            succeed(context, &["remove", name, device, "--force"])?;
        }
        if round == 0 {
            before = settled(&running)?;
        }
    }
    expect_holdings(&running, &before)?;
    // As many as there are slots, the first of them taken, and one more.
    for number in 0..29 {
        let path = image(&context.folder, &format!("{number}.img"), number)?;
        succeed(context, &["add", name, "--disk", &format!("path={}", path.display())])?;
    }
    refuse(context, &["add", name, "--rng"], "no PCI slot is free")?;
    for number in 0..29 {
        succeed(context, &["remove", name, &format!("disk{number}"), "--force"])?;
    }
    expect_holdings(&running, &before)
}

fn refused(context: &Context) -> Outcome {
    let mut running = deaf(context)?;
    let name = running.name.clone();
    let name = name.as_str();
    let path = image(&context.folder, "hot.img", 1)?;
    let spec = format!("path={},id=hot", path.display());
    refuse(context, &["remove", name, "hot"], "no device that can be removed")?;
    refuse(context, &["remove", name, "serial"], "no device that can be removed")?;
    refuse(context, &["add", name, "--disk", "path=/nowhere"], "no such file")?;
    refuse(context, &["add", name, "--disk", &format!("{spec},readonly=maybe")], "readonly=on")?;
    let grouped = format!("{spec},limit-group=none");
    refuse(context, &["add", name, "--disk", &grouped], "there is no limit group 'none'")?;
    image_grows(context, name)?;
    for id in ["core", "serial", "data", "console"] {
        refuse(context, &["add", name, "--disk", &format!("path={},id={id}", path.display())], "belongs to")?;
    }
    for (limit, words) in [
        ("cpu=0", "the least is 1"),
        ("read=1M", "read and write are for disks"),
        ("memroy=1M", "did you mean 'memory'?"),
        ("pids=many", "is not a whole number"),
    ] {
        refuse(context, &["add", name, "--rng", "--limit", limit], words)?;
    }
    refuse(context, &["add", name, "--disk", &format!("{spec},addr=1e.1")], "choose function 0")?;
    refuse(context, &["add", name, "--disk", &format!("{spec},addr=02")], "a slot of its own")?;
    succeed(context, &["add", name, "--disk", &format!("{spec},addr=1e")])?;
    refuse(context, &["add", name, "--rng=addr=1e"], "a slot of its own")?;
    refuse(context, &["add", name, "--pmem", "path=x"], "from the start")?;
    ports_come_and_go(context, name)?;
    refuse(context, &["add", name, "--console=pty"], "is for `bulkhead console`")?;
    succeed(context, &["add", name, "--console=addr=1d"])?;
    refuse(context, &["add", name, "--rng=addr=1d.0"], "a slot of its own")?;
    succeed(context, &["remove", name, "console", "--force"])?;
    succeed(context, &["add", name, "--rng=addr=1d"])?;
    refuse(context, &["add", name, "--disk", &spec], "already belongs")?;
    for (option, device) in [
        ("--net", "socket=wire"),
        ("--fs", "tag=t,path=/"),
        ("--vhost-user", "type=rng,socket=none"),
        ("--vsock", "cid=77,path=v"),
    ] {
        for id in ["hot", "data", "core", "rng"] {
            refuse(context, &["add", name, option, &format!("{device},id={id}")], "already belongs")?;
        }
    }
    refuse(context, &["add", name, "--balloon=id=hot"], "already belongs")?;
    let again = format!("path={},id=again", path.display());
    refuse(context, &["add", name, "--disk", &again], "already the image of disk hot")?;
    refuse(context, &["remove", name, "hot", "--timeout", "1"], "did not let go of hot within 1 s")?;
    while_added(context, &running, &again)?;
    // One who asks while another waits.
    let mut waiting =
        bulkhead(context).args(["device", "remove", name, "hot"]).spawn().map_err(|e| e.to_string())?;
    thread::sleep(Duration::from_millis(300));
    refuse(context, &["remove", name, "hot"], "is being removed already")?;
    refuse(context, &["add", name, "--disk", &spec], "is being removed already")?;
    succeed(context, &["remove", name, "hot", "--force"])?;
    let status = waiting.wait().map_err(|error| error.to_string())?;
    ensure!(status.success(), "who asked first heard that {status}");
    succeed(context, &["add", name, "--disk", &again])?;
    ensure!(bulkhead(context).args(["stop", "--force", name]).status().is_ok_and(|s| s.success()), "no stop");
    running.expect_exit(exit::FORCED)
}

/// All ports of a machine are one device, which is added and removed as a whole.
fn ports_come_and_go(context: &Context, name: &str) -> Outcome {
    let port = |name: &str| format!("name={name},unix={}", context.folder.join(name).display());
    let (one, two) = (port("one"), port("two"));
    refuse(context, &["add", name, "--port", "name=one"], "needs a target")?;
    refuse(context, &["add", name, "--port", &one, "--port", &one], "two ports")?;
    for _ in 0..2 {
        succeed(context, &["add", name, "--port", &one, "--port", &two])?;
        refuse(context, &["add", name, "--port", &port("three")], "device remove")?;
        let peer = UnixStream::connect(context.folder.join("two"));
        peer.map_err(|error| format!("nobody listens at an added port: {error}"))?;
        succeed(context, &["remove", name, "ports", "--force"])?;
        ensure!(UnixStream::connect(context.folder.join("two")).is_err(), "its socket is still there");
    }
    Ok(())
}

/// A qcow2 image that is added grows, as its own process sees fit.
fn image_grows(context: &Context, name: &str) -> Outcome {
    let path = context.folder.join("grows.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
    ensure!(made.is_ok_and(|status| status.success()), "qemu-img makes no image");
    succeed(context, &["add", name, "--disk", &format!("path={},id=grows,format=qcow2", path.display())])?;
    refuse(context, &["resize", name, "grows"], "name the new SIZE")?;
    refuse(context, &["resize", name, "grows", "512K"], "only grows")?;
    refuse(context, &["resize", name, "grows", "5T"], "qemu-img resize")?;
    succeed(context, &["resize", name, "grows", "3G"])?;
    succeed(context, &["remove", name, "grows", "--force"])?;
    let said = Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    ensure!(said.contains(&format!("\"virtual-size\": {}", 3_u64 << 30)), "the image says {said}");
    Ok(())
}

/// Asks for a device to go while it comes: the core, which has to plug it in, stands still for that moment.
fn while_added(context: &Context, running: &Running, image: &str) -> Outcome {
    let spec = image.replace("hot.img", "slow.img").replace("id=again", "id=slow");
    self::image(&context.folder, "slow.img", 2)?;
    let name = running.name.as_str();
    let processes = running.processes();
    let core = processes.iter().find(|it| it.title().contains("bulkhead-vmm")).ok_or("there is no core")?.pid;
    let core = Pid::from_raw(i32::try_from(core).map_err(|error| error.to_string())?);
    kill(core, Signal::SIGSTOP).map_err(|error| error.to_string())?;
    let add = bulkhead(context).args(["device", "add", name, "--disk", &spec]).spawn();
    let refused = (|| {
        let end = Instant::now() + Duration::from_secs(1);
        while device(context, &["remove", name, "slow"])?.1.contains("no device that can be removed") {
            ensure!(Instant::now() < end, "nobody adds the device");
        }
        refuse(context, &["remove", name, "slow", "--force"], "is being added")?;
        refuse(context, &["add", name, "--disk", &spec], "is being added")
    })();
    kill(core, Signal::SIGCONT).map_err(|error| error.to_string())?;
    refused?;
    let status = add.and_then(|mut add| add.wait()).map_err(|error| error.to_string())?;
    ensure!(status.success(), "who added it heard that {status}");
    succeed(context, &["remove", name, "slow", "--force"])
}

/// The processes that every machine has: what they hold does not depend on what the guest does with its disks.
fn constant(running: &Running) -> Outcome<BTreeMap<String, String>> {
    let mut all = holdings(running)?;
    all.retain(|title, _| !title.contains("/data]") && !title.contains("/serial]"));
    Ok(all)
}

fn under_load(context: &Context, rounds: usize) -> Outcome {
    let (machine, _) = Machine::stock(context, Kernel::Elf, "hotplug")?
        .words(&format!("bulkhead.rounds={}", rounds + 1))
        .empty_disk(2)?;
    let mut running = machine.arguments(&["--cpus", "2", "--memory", "256M"]).start()?;
    running.wait_for("guest: ready for disks", 1)?;
    grow(context, &mut running)?;
    let mut times = [Duration::ZERO; 3];
    let mut before = BTreeMap::new();
    for round in 1..=rounds + 1 {
        let parts = plug_and_unplug(context, &mut running, round)?;
        times.iter_mut().zip(parts).for_each(|(time, part)| *time += part);
        if round == 1 {
            before = constant(&running)?;
        } else if round == rounds {
            let now = constant(&running)?;
            ensure!(now == before, "after the first disk: {before:#?}, after the last: {now:#?}");
        }
    }
    let mean = |time: Duration| time.as_secs_f64() * 1e3 / f64::from(u32::try_from(rounds + 1).unwrap_or(1));
    let [plugged, used, unplugged] = times.map(mean);
    context.log(&format!(
        "on average plugged in within {plugged:.0} ms, used {used:.0} ms, out {unplugged:.0} ms"
    ));
    running.expect_exit(exit::SUCCESS)?;
    ensure!(running.guest("swap status").is_some_and(|status| status == "0"), "the guest found an error");
    ensure!(!running.serial().iter().any(|line| line.contains("FAILED")), "the load found an error");
    ensure!(running.guest("load passed").is_some(), "the load did not end");
    Ok(())
}

/// The guest sees that its disk, which is under load, grows; and a successor of its process has the new size, too.
fn grow(context: &Context, running: &mut Running) -> Outcome {
    let name = running.name.clone();
    refuse(context, &["resize", &name, "data", "1M"], "say --shrink")?;
    refuse(context, &["resize", &name, "dta", "4M"], "did you mean 'data'?")?;
    succeed(context, &["resize", &name, "data", "4M"])?;
    running.wait_for("guest: vda has 8192 sectors", 1)?;
    succeed(context, &["restart", &name, "data"])
}

/// How long it took until the disk was plugged in, used by the guest, and out again.
fn plug_and_unplug(context: &Context, running: &mut Running, round: usize) -> Outcome<[Duration; 3]> {
    let seed = u64::try_from(round).unwrap_or(0);
    let path = image(&context.folder, "hot.img", seed)?;
    let (name, id) = (running.name.clone(), format!("hot{round}"));
    let start = Instant::now();
    succeed(context, &["add", &name, "--disk", &format!("path={},id={id}", path.display())])?;
    let added = start.elapsed();
    running.wait_for(&format!("guest: disk {round} {id} holds what the host wrote"), 1)?;
    let used = start.elapsed();
    succeed(context, &["remove", &name, &id])?;
    let removed = start.elapsed();
    let written = fs::read(&path).map_err(|error| error.to_string())?;
    ensure!(written == content(seed, 1), "round {round}: the image is not what the guest wrote");
    Ok([added, used.saturating_sub(added), removed.saturating_sub(used)])
}

/// Five threads of five cores leave gaps: the fifth package begins with the id 256, after 100 processors. Linux takes two of its
/// ids, one from the MADT and one that comes by hot-plug, and a device sends its messages there. The others wait: each start
/// takes long in the lab.
fn wide_ids(context: &Context) -> Outcome {
    let arguments = ["--cpus", "101,sockets=5,cores=5,threads=5", "--memory", "256M", "--rng"];
    let machine = Machine::stock(context, Kernel::Elf, "many-processors")?;
    let mut running = machine.words("maxcpus=1").arguments(&arguments).start()?;
    running.wait_for("guest: ready for another", 1)?;
    let mut resize = bulkhead(context);
    let resized =
        resize.args(["resize", &running.name, "--cpus", "102"]).output().map_err(|e| e.to_string())?;
    ensure!(resized.status.success(), "no 102 CPUs: {}", String::from_utf8_lossy(&resized.stderr));
    running.wait_for("guest: done many-processors", 1)?;
    running.expect_exit(exit::SUCCESS)?;
    for (what, expected) in [
        ("present", "0-100"),
        ("apic id of 100 is", "256"),
        ("100 is in package", "4"),
        ("serial may interrupt", "0"),
        ("apic id of 101 is", "257"),
        ("101 is in package", "4"),
    ] {
        let found = running.guest(what).unwrap_or_default();
        ensure!(found == expected, "{what} {found}, not {expected}");
    }
    for cpu in ["100", "101"] {
        let counts = running.guest(&format!("messages to {cpu}:")).unwrap_or_default();
        let counts = counts
            .split_once(", then ")
            .and_then(|(before, after)| Some((before.parse::<u32>().ok()?, after.parse().ok()?)));
        ensure!(
            counts.is_some_and(|(before, after)| before < after),
            "no message reached CPU {cpu}: {counts:?}"
        );
    }
    let lines = running.serial();
    let online: Vec<_> = lines.iter().filter(|line| line.starts_with("guest: online ")).collect();
    ensure!(online == ["guest: online 0,100", "guest: online 0,100-101"], "{online:?}");
    Ok(())
}

/// What the guest says of its processors, one line each.
fn topology(running: &Running) -> Vec<String> {
    let lines = running.serial();
    lines.iter().filter_map(|line| line.strip_prefix("guest: processor ").map(str::to_owned)).collect()
}

fn processors(context: &Context) -> Outcome {
    let mut running = Machine::stock(context, Kernel::Elf, "processors")?
        .words("bulkhead.wait")
        .arguments(&["--cpus", "4,max=8,sockets=2,threads=2", "--cpu-model", "x86-64-v2", "--memory", "256M"])
        .start()?;
    running.wait_for("guest: online 0-3", 1)?;
    let expected = [
        "0: package 0 core 0 threads 0-1",
        "1: package 0 core 0 threads 0-1",
        "2: package 0 core 1 threads 2-3",
        "3: package 0 core 1 threads 2-3",
    ];
    ensure!(topology(&running) == expected, "the guest says {:?}", topology(&running));
    let flags = running.guest("flags").unwrap_or_default();
    for (flag, seen) in
        [("sse4_2", true), ("popcnt", true), ("avx", false), ("rdrand", false), ("svm", false)]
    {
        ensure!(flags.split(' ').any(|word| word == flag) == seen, "{flag} is wrong: {flags}");
    }
    ensure!(running.guest("possible").is_some_and(|text| text.starts_with("0-7")), "not 8 are possible");
    let name = running.name.clone();
    let resize = |count: &str| bulkhead(context).args(["resize", &name, "--cpus", count]).output();
    let ok = |count| resize(count).is_ok_and(|output| output.status.success());
    ensure!(ok("6"), "no 6 CPUs");
    running.wait_for("guest: online 0-5", 1)?;
    let refused = resize("9").map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("1 to 8 CPUs"), "9 CPUs: {said}");
    ensure!(ok("2"), "not down to 2");
    running.wait_for("guest: online 0-1", 1)?;
    ensure!(ok("3"), "not up to 3");
    running.wait_for("guest: online 0-2", 1)?;
    ensure!(ok("1"), "not down to 1");
    running.expect_exit(exit::SUCCESS)
}
