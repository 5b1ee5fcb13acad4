//! A folder with the real `bulkhead` and stand-ins beside it.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub struct Bench {
    folder: TempDir,
    pub name: String,
}

pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: code(output.status), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or(-1)
}

impl Bench {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::tempdir().unwrap();
        let bulkhead =
            std::env::var_os("BULKHEAD_UNDER_TEST").unwrap_or(env!("CARGO_BIN_EXE_bulkhead").into());
        let programs = [
            (PathBuf::from(bulkhead), "bulkhead"),
            (std::env::current_exe().unwrap(), "bulkhead-vmm"),
            (std::env::current_exe().unwrap(), "bulkhead-device"),
        ];
        for (from, to) in programs {
            let to = folder.path().join(to);
            fs::copy(&from, &to).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(folder.path().join("kernel"), "kernel").unwrap();
        for disk in ["a.img", "b.img"] {
            fs::File::create(folder.path().join(disk)).unwrap().set_len(1 << 20).unwrap();
        }
        let name = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { folder, name }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn bulkhead(&self, arguments: &str) -> Command {
        let mut command = Command::new(self.path("bulkhead"));
        command.args(arguments.split_whitespace()).current_dir(self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn machine(&self, options: &str, cmdline: &str) -> Command {
        let mut command =
            self.bulkhead(&format!("run --kernel kernel --memory 16M --name {} {options}", self.name));
        command.args(["--cmdline", cmdline]);
        command
    }

    pub fn ask(&self, arguments: &str) -> Run {
        self.bulkhead(&arguments.replace("NAME", &self.name)).output().unwrap().into()
    }

    /// As [`Self::ask`], with a device program that describes itself so.
    pub fn ask_with(&self, arguments: &str, version: &str) -> Run {
        let mut command = self.bulkhead(&arguments.replace("NAME", &self.name));
        command.env("STAND_IN_VERSION", version).output().unwrap().into()
    }

    /// Runs a machine to its end.
    pub fn run(&self, options: &str, cmdline: &str) -> Run {
        let run = finish(self.machine(options, cmdline).spawn().unwrap());
        assert!(self.left().is_empty(), "left: {:?}", self.left());
        run
    }

    /// Starts a machine and waits until `ps` shows it running.
    pub fn start(&self, options: &str, cmdline: &str) -> Child {
        let child = self.machine(options, cmdline).spawn().unwrap();
        wait_for("the machine", || self.ask("ps NAME").out.contains(": running"));
        child
    }

    /// Processes of this machine that live.
    pub fn left(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let title = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let title = String::from_utf8_lossy(&title).into_owned();
            if title.starts_with("bulkhead-") && title.contains(&format!("[{}", self.name)) {
                found.push(pid);
            }
        }
        found
    }

    /// A process that lives, when the supervisor cannot be asked for it.
    pub fn left_named(&self, id: &str) -> i32 {
        let title = if id == "core" {
            format!("bulkhead-vmm[{}]", self.name)
        } else {
            format!("bulkhead-device[{}/{id}]", self.name)
        };
        let is = |pid: &i32| {
            let found = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&found).starts_with(&title)
        };
        self.left().into_iter().find(is).unwrap()
    }

    /// Process ids by id, as `ps` tells.
    pub fn pid(&self, id: &str) -> i32 {
        let value: serde_json::Value = serde_json::from_str(&self.ask("ps NAME --json").out).unwrap();
        let processes = value["processes"].as_array().unwrap();
        let process = processes.iter().find(|process| process["id"] == id).unwrap();
        process["pid"].as_i64().unwrap().try_into().unwrap()
    }
}

pub fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

/// The end of a machine that was told to end; one that does not is killed, and fails the test by its code.
pub fn finish(child: Child) -> Run {
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if wait.recv_timeout(Duration::from_secs(20)).is_err() {
            let _gone = kill(pid, Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    let _late = done.send(());
    watchdog.join().unwrap();
    output.into()
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "waited for {what} in vain");
        sleep(Duration::from_millis(5));
    }
}

thread_local! {
    static SKIPPED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Says that the case that runs cannot be tried here, and why.
pub fn skip(reason: &'static str) {
    SKIPPED.set(Some(reason));
}

/// Why the last case was not tried, if it was not.
pub fn skipped() -> Option<&'static str> {
    SKIPPED.take()
}
