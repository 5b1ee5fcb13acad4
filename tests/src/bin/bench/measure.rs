//! Starts a program and takes the time until something appears on one of its streams.

use std::fs;
use std::io::{IoSliceMut, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_tests::harness::Outcome;
use bulkhead_tests::processes::{Process, descendants};
use nix::sys::socket::sockopt::ReceiveTimestampns;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt};
use nix::sys::time::TimeSpec;

/// How long the processes of a contender that was killed may take to end.
const END_LIMIT: Duration = Duration::from_secs(20);

/// A program that was started, killed when this is dropped.
pub struct Started {
    /// The program.
    pub child: Child,
    /// Milliseconds from just before the start to the text.
    pub milliseconds: f64,
}

impl Drop for Started {
    /// Waits for the whole tree, and for what the kernel still takes down after it (namespaces, memory): both would slow the next
    /// contender.
    fn drop(&mut self) {
        let tree = descendants(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        let end = Instant::now() + END_LIMIT;
        while tree.iter().any(Process::is_alive) && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        until_idle(end);
    }
}

/// Returns when this machine's CPUs were idle for a moment, at the latest at `end`.
fn until_idle(end: Instant) {
    const MOMENT: Duration = Duration::from_millis(300);
    const IDLE_SHARE: f64 = 0.93;
    let mut before = cpu_ticks();
    while Instant::now() < end {
        thread::sleep(MOMENT);
        let now = cpu_ticks();
        if (now.idle - before.idle) / (now.all - before.all) > IDLE_SHARE {
            return;
        }
        before = now;
    }
}

/// What all CPUs together did since they started, in ticks.
struct CpuTicks {
    all: f64,
    idle: f64,
}

/// The first line of `/proc/stat` (proc(5)).
fn cpu_ticks() -> CpuTicks {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).take(8).collect();
    // The fourth and fifth are the time without work, and without work but waiting for a disk.
    CpuTicks { all: ticks.iter().sum(), idle: ticks.iter().skip(3).take(2).sum() }
}

/// Where the text appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output: the guest's serial port.
    Output,
    /// `$NOTIFY_SOCKET`: what the monitor tells a service manager.
    Manager,
}

/// Starts `command` and waits until it tells its service manager `text`.
fn until_told(mut command: Command, text: &str, limit: Duration) -> Outcome<Started> {
    let failed = |error: std::io::Error| format!("a service manager's socket: {error}");
    let folder = tempfile::tempdir().map_err(failed)?;
    let path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&path).map_err(failed)?;
    manager.set_read_timeout(Some(limit)).map_err(failed)?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).env("NOTIFY_SOCKET", &path);
    setsockopt(&manager, ReceiveTimestampns, &true).map_err(|errno| failed(errno.into()))?;
    let start = SystemTime::now();
    let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let mut started = Started { child, milliseconds: 0.0 };
    loop {
        let (said, at) = receive(&manager)
            .map_err(|error| format!("{command:?} did not tell '{text}' within {limit:?}: {error}"))?;
        started.milliseconds = at.duration_since(start).unwrap_or_default().as_secs_f64() * 1000.0;
        if said.contains(text) {
            return Ok(started);
        }
    }
}

/// A datagram and when it was sent, which the kernel notes (SO_TIMESTAMPNS, socket(7)): until this program wakes up to read it, time passes
/// that is not the sender's.
fn receive(socket: &UnixDatagram) -> std::io::Result<(String, SystemTime)> {
    let (mut bytes, mut control) = ([0; 256], nix::cmsg_space!(TimeSpec));
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::empty())?;
    let noted = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmTimestampns(at) => Some(UNIX_EPOCH + Duration::from(at)),
        _ => None,
    });
    let length = received.bytes;
    let said = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned();
    Ok((said, noted.unwrap_or_else(SystemTime::now)))
}

/// Starts `command` and waits for `text` on the stream.
pub fn until(mut command: Command, stream: Stream, text: &str, limit: Duration) -> Outcome<Started> {
    if stream == Stream::Manager {
        return until_told(command, text, limit);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let (sender, receiver) = mpsc::channel();
    let needle = text.as_bytes().to_vec();
    if let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) {
        follow(errors, Vec::new(), None);
        follow(output, needle, Some(sender));
    }
    let found = receiver.recv_timeout(limit);
    let mut started = Started { child, milliseconds: 0.0 };
    match found {
        Ok(Ok(at)) => {
            started.milliseconds = at.duration_since(start).as_secs_f64() * 1000.0;
            Ok(started)
        }
        Ok(Err(seen)) => Err(format!("'{text}' did not come from {command:?}, which ended with: {seen}")),
        Err(_) => Err(format!("'{text}' did not come from {command:?} within {limit:?}")),
    }
}

/// Reads until the end, so that the writer never waits; reports when `needle` has come, or what came instead.
fn follow(
    mut stream: impl Read + Send + 'static,
    needle: Vec<u8>,
    report: Option<mpsc::Sender<Result<Instant, String>>>,
) {
    thread::spawn(move || {
        let (mut seen, mut buffer, mut report) = (Vec::new(), [0; 4096], report);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            let now = Instant::now();
            if report.is_none() {
                continue;
            }
            // Only the part that is new, and as much before it as the text may reach back.
            let from = seen.len().saturating_sub(needle.len());
            seen.extend_from_slice(buffer.get(..count).unwrap_or_default());
            let new = seen.get(from..).unwrap_or_default();
            if new.windows(needle.len().max(1)).any(|window| window == needle)
                && let Some(sender) = report.take()
            {
                let _ = sender.send(Ok(now));
            }
        }
        if let Some(sender) = report {
            let text = String::from_utf8_lossy(&seen).into_owned();
            let _ = sender.send(Err(text.lines().rev().take(5).collect::<Vec<_>>().join(" / ")));
        }
    });
}
