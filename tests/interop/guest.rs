//! A stock Debian kernel with a shell in QEMU's emulation, spoken to by its serial port; and our services beside it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::ours::RECONNECT;
use crate::{NEW_QEMU, Peer, program, root};

/// For anything that happens in a guest.
const PATIENCE: Duration = Duration::from_secs(75);
/// What each new shell of the guest reads first.
const KEPT: &str = "/tmp/kept";
/// What the guest does first: its folders, and the modules of its devices.
const SET_UP: &str = "PS1=; /bin/busybox mkdir -p /proc /sys /dev /bin /sbin /tmp /mnt; /bin/busybox --install -s /bin; \
     export PATH=/bin:/sbin; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null; \
     mount -t tmpfs tmpfs /tmp; while read -r module rest; do insmod /modules/$module.ko $rest 2>/dev/null; done </modules/order; \
     stty -echo 2>/dev/null; true";

/// The rest of the kernel's command line: a shell is its first process.
pub const SHELL: &str = "quiet nosoftlockup no_timer_check panic=-1 rdinit=/bin/busybox -- sh";
/// Begins the error of a guest whose kernel has died.
pub const DIED: &str = "the guest's kernel has died: ";
/// What a kernel says then.
const LAST_WORDS: [&str; 3] = ["kernel BUG at", "Oops: ", "Kernel panic"];

/// A service of ours, ended when dropped.
pub struct Service {
    pub child: Child,
    pub socket: PathBuf,
}

impl Service {
    /// A program of somebody else, once it listens at this path.
    pub fn other(mut command: Command, socket: PathBuf) -> Result<Self, String> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
        let service = Self { child, socket };
        wait("a back end", || Ok(service.socket.exists()))?;
        Ok(service)
    }

    /// Starts it, and waits until it listens.
    pub fn start(folder: &Path, kind: &str, name: &str, options: &[&str]) -> Self {
        let socket = folder.join(name);
        let log = fs::File::options().append(true).create(true).open(folder.join("log")).unwrap();
        let mut command = Command::new(program("bulkhead-device"));
        command.arg(kind).arg("--socket-path").arg(&socket).args(options);
        let mut child = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let end = Instant::now() + PATIENCE;
        while !socket.exists() {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < end, "{kind} does not listen: {ended:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, socket }
    }

    /// Kills the process that serves the front end; false when there is none.
    pub fn kill_device(&self) -> bool {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = fs::read_to_string(path).unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        let kill = |pid| nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        pids.map(kill).filter(Result::is_ok).count() > 0
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A guest.
pub struct Guest {
    child: Child,
    keyboard: ChildStdin,
    screen: Receiver<Vec<u8>>,
    seen: String,
    monitor: PathBuf,
    patience: Duration,
}

impl Drop for Guest {
    /// `timeout` leads a process group, in which QEMU is: by itself it could not pass the signal on.
    fn drop(&mut self) {
        let leader = i32::try_from(self.child.id()).unwrap();
        let _ended = killpg(Pid::from_raw(leader), Signal::SIGKILL);
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

pub fn kernel(name: &str) -> PathBuf {
    root().join("build/guest").join(name)
}

impl Guest {
    /// Starts QEMU with a machine of 256 MiB, whose memory a back end can map, and these options.
    pub fn start(qemu: Peer, folder: &TempDir, name: &str, options: &[String]) -> Result<Self, String> {
        let monitor = folder.path().join(format!("{name}.monitor"));
        let mut command = Command::new("timeout");
        command.args(["-sKILL", "240"]).arg(qemu.path()).args(["-accel", "tcg", "-cpu", "max", "-m", "256"]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        command.args(["-name", &format!("{name},debug-threads=on")]);
        command.args([
            "-object",
            "memory-backend-memfd,id=m,size=256M,share=on",
            "-machine",
            "pc,memory-backend=m",
        ]);
        command.arg("-monitor").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        let (kernel, initrd) = (kernel("bzImage"), kernel("initramfs"));
        if !kernel.exists() {
            return Err("not run: there is no guest, `make guest` makes it".to_owned());
        }
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.arg("-append").arg(format!("console=ttyS0 {SHELL}"));
        let word = if qemu == NEW_QEMU { ",reconnect-ms=1000" } else { RECONNECT };
        command.args(options.iter().map(|option| option.replace(RECONNECT, word)));
        Self::spawn(command, monitor)
    }

    /// The process that QEMU runs below.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts a machine whose serial port is at its standard input and output. The command is `timeout`'s.
    pub fn spawn(mut command: Command, monitor: PathBuf) -> Result<Self, String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| error.to_string())?;
        let (keyboard, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (say, screen) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = output.read(&mut bytes) {
                if count == 0 || say.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, keyboard, screen, seen: String::new(), monitor, patience: PATIENCE })
    }

    /// Waits for the shell and loads the modules. What is typed from then on goes to a second shell: busybox's takes a child that ends while
    /// it waits for a line for the end of its input, and the first process inherits the children of others. Where the second ends all the
    /// same another follows, which reads [`KEPT`].
    pub fn boot(&mut self) -> Result<(), String> {
        self.until("# ")?;
        self.run(SET_UP)?;
        // What was left of the prompt.
        self.run("true")?;
        writeln!(self.keyboard, "export ENV={KEPT}; : >{KEPT}; while true; do sh; done")
            .map_err(|error| error.to_string())?;
        self.until("# ")?;
        self.run("PS1=")?;
        self.run("true").map(drop)
    }

    /// Changes how long it may take for anything from now on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    fn until(&mut self, word: &str) -> Result<String, String> {
        let end = Instant::now() + self.patience;
        loop {
            if let Some(at) = self.seen.find(word) {
                let rest = self.seen.split_off(at + word.len());
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            let dead = |line: &&str| LAST_WORDS.iter().any(|words| line.contains(words));
            if self.seen.lines().any(|line| dead(&line)) {
                // The rest of the line.
                while let Ok(bytes) = self.screen.recv_timeout(Duration::from_millis(300)) {
                    self.seen.push_str(&String::from_utf8_lossy(&bytes));
                }
                let line = self.seen.lines().find(dead).unwrap_or_default();
                return Err(format!("{DIED}{}", line.trim()));
            }
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => {
                    let from = self.seen.len().saturating_sub(600);
                    let tail = self.seen.get(from..).unwrap_or_default();
                    return Err(format!(
                        "the guest does not say {word:?}; it said: …{}",
                        tail.escape_debug()
                    ));
                }
            }
        }
    }

    /// Runs a line of shell; its output. A status other than 0 is an error.
    pub fn run(&mut self, line: &str) -> Result<String, String> {
        // What is typed does not contain what is waited for.
        writeln!(self.keyboard, "{line}; echo \"@@\"$?\"@@\"").map_err(|error| error.to_string())?;
        let within = |error| format!("`{line}`: {error}");
        let mut text = self.until("@@").map_err(within)?;
        loop {
            let status = self.until("@@").map_err(within)?;
            match status.trim_end_matches('@').parse::<i32>() {
                Ok(0) => break,
                Ok(status) => return Err(format!("`{line}` has status {status}: {}", text.escape_debug())),
                // The echo of what was typed.
                Err(_) => text = status,
            }
        }
        Ok(text.trim_end_matches('@').replace('\r', "").trim().to_owned())
    }

    /// Runs a line of shell that the guest ends after so many seconds: a device that hangs takes no more of others' time. Variables
    /// have to be exported.
    pub fn run_within(&mut self, seconds: u64, line: &str) -> Result<String, String> {
        let patience = std::mem::replace(&mut self.patience, Duration::from_secs(seconds + 10));
        let quoted = line.replace('\'', "'\\''");
        let result = self
            .run(&format!("printf '%s\\n' '{quoted}' >/tmp/step; timeout -s KILL {seconds} sh /tmp/step"));
        self.patience = patience;
        result.map_err(|error| {
            let told = error.rsplit_once('`').map_or(error.as_str(), |(_, told)| told);
            format!("`{line}`, within {seconds} s{told}")
        })
    }

    /// Says a line to QEMU's monitor; what it answers within a moment.
    pub fn monitor(&self, line: &str) -> Result<String, String> {
        let failed = |error: std::io::Error| format!("monitor: {error}");
        let mut stream = UnixStream::connect(&self.monitor).map_err(failed)?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(failed)?;
        let mut text = String::new();
        let prompt = |stream: &mut UnixStream, text: &mut String| {
            text.clear();
            let mut bytes = [0; 4096];
            while !text.ends_with("(qemu) ") {
                match stream.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(count) => text.push_str(&String::from_utf8_lossy(&bytes[..count])),
                    Err(error) => return Err(failed(error)),
                }
            }
            Ok(())
        };
        prompt(&mut stream, &mut text)?;
        stream.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
        prompt(&mut stream, &mut text)?;
        Ok(text)
    }
}

/// Tries until it holds.
pub fn wait(what: &str, holds: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    wait_within(PATIENCE, what, holds)
}

/// Tries until it holds, so long.
pub fn wait_within(
    limit: Duration,
    what: &str,
    mut holds: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let end = Instant::now() + limit;
    while !holds()? {
        if Instant::now() > end {
            return Err(format!("waited for {what} in vain"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A file of so many bytes that repeat nowhere.
pub fn random_file(path: &Path, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    fs::write(path, &bytes).unwrap();
    bytes
}

/// SHA-256 as the tool of the same name says it.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or_default().to_owned()
}
