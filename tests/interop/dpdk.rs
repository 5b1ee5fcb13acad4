//! Our network card under DPDK's virtio-user.

use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::guest::Service;
use crate::traffic::{run, text};
use crate::{Case, Outcome, Peer, TESTPMD};

pub const CASES: &[Case] = &[Case {
    ours: "net",
    peer: Peer { name: "DPDK virtio-user", ..TESTPMD },
    what: "testpmd passes packets from one of ours to another and back, both at taps of one bridge",
    run: both_ways,
}];

/// How long packets go round.
const TIME: Duration = Duration::from_secs(4);
/// Few enough packets a second to mean that they stand still.
const LEAST: u64 = 1000;

/// What testpmd is started with everywhere: no huge pages, no PCI, nothing shared with other runs.
pub fn testpmd(peer: Peer, name: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-sKILL", "240"]).arg(peer.path()).args(["--lcores", "0@0,1@0", "--no-huge", "-m", "128"]);
    command.args(["--no-pci", "--no-telemetry"]).arg(format!("--file-prefix={name}-{}", std::process::id()));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// On a thread of its own, whose network nobody else has.
fn both_ways(peer: Peer) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err("not run: a network of its own and taps need root".to_owned());
    }
    let alone = move || unshare(CloneFlags::CLONE_NEWNET).map_err(text).and_then(|()| both_ways_alone(peer));
    thread::spawn(alone).join().map_err(|_| "panicked")?
}

fn both_ways_alone(peer: Peer) -> Outcome {
    let folder = tempfile::tempdir().map_err(text)?;
    run("ip", "link add bridge type bridge")?;
    let mut services = Vec::new();
    let mut command = testpmd(peer, "virtio-user");
    for (number, tap) in ["left", "right"].into_iter().enumerate() {
        let service =
            Service::start(folder.path(), "net", &format!("{tap}.sock"), &["--persistent", "--tap", tap]);
        run("ip", &format!("link set {tap} master bridge up"))?;
        let socket = service.socket.display();
        command.arg(format!("--vdev=net_virtio_user{number},path={socket},queues=1,queue_size=256"));
        services.push(service);
    }
    run("ip", "link set bridge up")?;
    command.args(["--", "--total-num-mbufs=4096", "--no-mlockall", "-i"]);
    let mut child = command.spawn().map_err(text)?;
    let mut keyboard = child.stdin.take().ok_or("no standard input")?;
    keyboard.write_all(b"set fwd io\nstart tx_first 4\n").map_err(text)?;
    thread::sleep(TIME);
    keyboard.write_all(b"stop\nquit\n").map_err(text)?;
    let output = child.wait_with_output().map_err(text)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let total =
        said.split("Accumulated forward statistics").nth(1).ok_or_else(|| format!("testpmd says {said}"))?;
    let count = |word: &str| {
        let rest = total.split_once(word).and_then(|(_, rest)| rest.split_whitespace().next());
        rest.and_then(|number| number.parse::<u64>().ok()).ok_or_else(|| format!("no {word} in {total}"))
    };
    let (received, sent) = (count("RX-packets:")?, count("TX-packets:")?);
    let rate = received.min(sent) / TIME.as_secs();
    if rate < LEAST {
        Err(format!("{rate} packets a second: {total}"))
    } else {
        Ok(format!("{rate} packets a second each way through both"))
    }
}
