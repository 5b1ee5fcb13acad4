//! A stock guest under our core with back ends of many others at once, each used by the guest's own driver. Needs hardware
//! virtualization, or the lab.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use crate::foreign_peers::{ALL, Foreign, files};
use crate::guest::{Guest, SHELL, kernel, wait_within};
use crate::table::Row;
use crate::traffic::{modules, run as command, text};
use crate::{Peer, program, root};

/// Seconds for all of it in the lab.
const LIMIT: &str = "230";
/// For a back end to listen.
const START: Duration = Duration::from_secs(20);
/// For the guest to boot.
const BOOT: Duration = Duration::from_secs(60);

/// A running back end, ended when dropped.
struct Running {
    foreign: Foreign,
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Running {
    fn start(foreign: Foreign, folder: &Path) -> Result<Self, String> {
        if foreign.peer.version().is_none() {
            return Err(format!("not run: {} is not there ({})", foreign.peer.program, foreign.peer.package));
        }
        let log = fs::File::create(log_of(&foreign, folder)).map_err(text)?;
        let mut command = (foreign.command)(folder);
        command.stdin(Stdio::piped()).stdout(log.try_clone().map_err(text)?).stderr(log);
        let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
        let mut running = Self { foreign, child };
        let socket = folder.join(foreign.socket);
        wait_within(START, "its socket", || match running.child.try_wait() {
            Ok(Some(status)) => Err(format!("it has ended: {status}")),
            _ => Ok(socket.exists()),
        })
        .map_err(|error| format!("{error}; it said: {}", tail(&log_of(&foreign, folder))))?;
        Ok(running)
    }
}

fn log_of(foreign: &Foreign, folder: &Path) -> PathBuf {
    folder.join(format!("{}.log", foreign.socket))
}

/// The last that was said there.
fn tail(path: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<_> = text.lines().rev().take(6).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}

/// The guest, and who serves it.
pub struct Stage {
    pub guest: Guest,
    pub folder: PathBuf,
    running: Vec<Running>,
}

impl Stage {
    /// The standard input of a back end.
    pub fn keyboard(&mut self, peer: Peer) -> Result<ChildStdin, String> {
        let running = self.running.iter_mut().find(|running| running.foreign.peer == peer);
        running.and_then(|running| running.child.stdin.take()).ok_or_else(|| "no keyboard".to_owned())
    }
}

fn machine(folder: &Path, modules: &Path, running: &[Running]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-sKILL", "200"]).arg(program("bulkhead")).args(["run", "--memory", "512M", "--kernel"]);
    command.arg(kernel("vmlinux")).arg("--initrd").arg(kernel("initramfs"));
    command.args(["--cmdline", &format!("console=ttyS0 {SHELL}"), "--name", "interop-lab"]);
    command.args(["--disk", &format!("path={},readonly=on,id=modules", modules.display())]);
    for running in running {
        command.args(running.foreign.options);
    }
    command.current_dir(folder).stderr(fs::File::create(folder.join("log")).unwrap());
    command
}

fn hand_over(foreign: &Foreign, result: crate::Outcome, begin: Instant) {
    let (ours, peer) = ("core".to_owned(), foreign.peer.name.to_owned());
    let what = format!("a stock guest: {}", foreign.what);
    Row { ours, peer, version: foreign.peer.version(), what, result, time: begin.elapsed() }.hand_over();
}

fn network() -> Result<(), String> {
    let _there_or_built_in = Command::new("modprobe").arg("tun").output();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(text)?;
    for line in
        ["link set lo up", "tuntap add wire mode tap", "addr add 10.7.0.5/24 dev wire", "link set wire up"]
    {
        command("ip", line)?;
    }
    // passt takes what it does not get told from the interface with the default route.
    command("ip", "route add default via 10.7.0.1 dev wire")
}

/// Boots it and uses those whose names contain one of the words. Rows are handed over as they come.
pub fn run(words: &[&String]) {
    let wanted =
        |foreign: &&Foreign| words.is_empty() || words.iter().any(|word| foreign.peer.name.contains(*word));
    let all: Vec<Foreign> = ALL.iter().filter(wanted).copied().collect();
    let begin = Instant::now();
    let mut left = all.clone();
    if let Err(error) = show(&all, &mut left) {
        left.iter().for_each(|foreign| hand_over(foreign, Err(error.clone()), begin));
    }
}

/// What is `left` at the end was not shown.
fn show(all: &[Foreign], left: &mut Vec<Foreign>) -> Result<(), String> {
    network()?;
    let temporary = tempfile::tempdir().map_err(text)?;
    let folder = temporary.path();
    files(folder)?;
    let modules = modules(folder)?;
    let mut running = Vec::new();
    for foreign in all {
        let begin = Instant::now();
        match Running::start(*foreign, folder) {
            Ok(started) => running.push(started),
            Err(error) => {
                left.retain(|other| other.peer != foreign.peer);
                hand_over(foreign, Err(error), begin);
            }
        }
    }
    let machine = machine(folder, &modules, &running);
    let guest = Guest::spawn(machine, folder.join("monitor"))?;
    let mut stage = Stage { guest, folder: folder.to_owned(), running };
    let log = folder.join("log");
    stage.guest.set_patience(BOOT);
    stage.guest.boot().map_err(|error| format!("{error}; the log: {}", tail(&log)))?;
    stage.guest.run("for it in /sys/block/vd*; do name=${it##*/}; if [ \"$(cat $it/serial)\" = modules ]; then tar -xf /dev/$name -C /tmp; else foreign=$name; fi; done; \
        for it in /sys/class/net/eth*; do case $(cat $it/address) in *01) card=${it##*/} ;; *02) other=${it##*/} ;; esac; done; \
        export foreign card other; echo \"PS1=; export foreign=$foreign card=$card other=$other\" >$ENV; insmod /tmp/fuse.ko; insmod /tmp/virtiofs.ko")?;
    for foreign in left.clone() {
        let begin = Instant::now();
        let result = (foreign.show)(&mut stage).map_err(|error| {
            let theirs = tail(&log_of(&foreign, folder));
            format!("{error}; the log: {}; its own: {theirs}", tail(&log))
        });
        hand_over(&foreign, result, begin);
        left.retain(|other| other.peer != foreign.peer);
    }
    Ok(())
}

/// Starts this program in the lab, where there has to be one. What did not come out of it failed.
pub fn in_lab(words: &[&String]) -> Vec<Row> {
    let mut command = Command::new(root().join("tools/lab"));
    command.args(["--auto", "--timeout", LIMIT, "--"]).arg(std::env::current_exe().unwrap()).arg("--in-lab");
    command.args(words).stdout(Stdio::piped());
    let mut rows = Vec::new();
    let failed = |error: String| Row {
        ours: "core".to_owned(),
        peer: "all at once".to_owned(),
        version: None,
        what: "a stock guest in the lab".to_owned(),
        result: Err(error),
        time: Duration::ZERO,
    };
    let mut lab = match command.spawn() {
        Ok(lab) => lab,
        Err(error) => return vec![failed(error.to_string())],
    };
    let output = lab.stdout.take().map(BufReader::new);
    for line in output.into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
        if let Some(row) = Row::take_over(&line) {
            row.say();
            rows.push(row);
        }
    }
    match lab.wait() {
        Ok(status) if status.success() => {}
        status => rows.push(failed(format!("the lab ended with {status:?}"))),
    }
    rows
}
