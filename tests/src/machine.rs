//! Starts machines with the real `bulkhead` and watches them from outside.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Context, Outcome};
use crate::processes::{Process, descendants};

/// Exit codes of `bulkhead run`, as its help documents them.
pub mod exit {
    /// Powered off.
    pub const SUCCESS: i32 = 0;
    /// Wrong option, value or file.
    pub const USAGE: i32 = 2;
    /// The host lacks something.
    pub const HOST: i32 = 3;
    /// A process of the machine died.
    pub const PROCESS: i32 = 4;
    /// The guest panicked.
    pub const PANIC: i32 = 5;
    /// `stop --force`.
    pub const FORCED: i32 = 6;
    /// No such machine.
    pub const NO_MACHINE: i32 = 7;
}

/// Which form of the guest's kernel to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// `bzImage`, entered by the Linux boot protocol.
    BzImage,
    /// `vmlinux`, entered by PVH.
    Elf,
}

/// A `bulkhead` command with the program's path.
#[must_use]
pub fn bulkhead(context: &Context) -> Command {
    Command::new(context.places.programs.join("bulkhead"))
}

/// A machine to be started: the guest kernel with a test chosen by its command line.
pub struct Machine<'a> {
    context: &'a Context,
    command: Command,
    cmdline: String,
    name: String,
}

impl<'a> Machine<'a> {
    /// A machine that boots the stock kernel and runs `test` from `tests/guests/tests/`.
    pub fn stock(context: &'a Context, kernel: Kernel, test: &str) -> Outcome<Self> {
        let file = match kernel {
            Kernel::BzImage => "bzImage",
            Kernel::Elf => "vmlinux",
        };
        let guest = &context.places.guest;
        let (kernel, initrd) = (guest.join(file), guest.join("initramfs"));
        for file in [&kernel, &initrd] {
            if !file.exists() {
                return Err(format!("{} is missing: run `make guest`", file.display()));
            }
        }
        let mut machine = Self::bare(context, &kernel)?;
        machine.command.arg("--initrd").arg(initrd);
        machine.cmdline = format!("console=ttyS0 quiet panic=1 bulkhead.test={test}");
        Ok(machine)
    }

    /// A machine with this kernel and nothing else.
    pub fn bare(context: &'a Context, kernel: &Path) -> Outcome<Self> {
        let program = context.places.programs.join("bulkhead");
        for file in [&program, kernel] {
            if !file.exists() {
                return Err(format!("{} is missing", file.display()));
            }
        }
        let folder = context.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = folder.trim_start_matches("bulkhead-").replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let mut command = Command::new(program);
        command.arg("run").arg("--kernel").arg(kernel);
        Ok(Self { context, command, cmdline: String::new(), name })
    }

    /// A machine that firmware of Debian's packages starts, with 256 MiB.
    pub fn firmware(context: &'a Context, firmware: &str) -> Outcome<Self> {
        let mut machine = Self::bare(context, &context.places.programs.join("bulkhead"))?;
        machine.command = bulkhead(context);
        machine.command.args(["run", "--memory", "256M", "--firmware", firmware]);
        Ok(machine)
    }

    /// Adds a copy of a disk that `tools/make-boot-disks` made.
    pub fn boot_disk(mut self, name: &str) -> Outcome<Self> {
        let source = self.context.places.boot.join(name);
        let path = self.context.folder.join(name);
        fs::copy(&source, &path)
            .map_err(|error| format!("{}: {error}: run `make guest`", source.display()))?;
        self.command.arg("--disk").arg(format!("path={}", path.display()));
        Ok(self)
    }

    /// A machine, or the attempt of one, that this command describes completely.
    #[must_use]
    pub fn from_command(context: &'a Context, command: Command) -> Self {
        Self { context, command, cmdline: String::new(), name: String::new() }
    }

    /// Runs `bulkhead` as this user and group, without supplementary groups. The programs and all files named so far are
    /// copied into the case's folder, which becomes the user's: the repository may lie where only its owner may look.
    pub fn as_user(mut self, id: u32) -> Outcome<Self> {
        let folder = &self.context.folder;
        let copy = |path: &Path| -> Outcome<PathBuf> {
            let target = folder.join(path.file_name().unwrap_or_default());
            if target != path {
                fs::copy(path, &target).map_err(|error| format!("{}: {error}", path.display()))?;
            }
            std::os::unix::fs::chown(&target, Some(id), Some(id))
                .map_err(|error| format!("chown: {error}"))?;
            Ok(target)
        };
        for program in ["bulkhead", "bulkhead-vmm", "bulkhead-device", "bulkhead-init"] {
            copy(&self.context.places.programs.join(program))?;
        }
        std::os::unix::fs::chown(folder, Some(id), Some(id)).map_err(|error| format!("chown: {error}"))?;
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={id}")).arg(format!("--regid={id}")).arg("--clear-groups");
        command.arg(folder.join("bulkhead"));
        for argument in self.command.get_args() {
            let path = Path::new(argument);
            let disk = argument
                .to_string_lossy()
                .strip_prefix("path=")
                .and_then(|rest| rest.split(',').next())
                .map(PathBuf::from);
            if let Some(disk) = disk.filter(|disk| disk.is_file()) {
                copy(&disk)?;
            }
            if path.is_file() {
                command.arg(copy(path)?)
            } else {
                command.arg(argument)
            };
        }
        self.command = command;
        Ok(self)
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// Gives it another name than the one made from the case's folder.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Adds words to the kernel command line.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline).trim().to_owned();
        self
    }

    /// Adds a copy of the data disk that `tools/make-guest` made, and returns its path.
    pub fn data_disk(mut self) -> Outcome<(Self, PathBuf)> {
        let path = self.context.folder.join("data.ext4");
        let source = self.context.places.guest.join("data.ext4");
        fs::copy(&source, &path).map_err(|error| format!("{}: {error}", source.display()))?;
        self.command.arg("--disk").arg(format!("path={},id=data", path.display()));
        Ok((self, path))
    }

    /// Adds an empty disk of `mib` MiB, and returns its path.
    pub fn empty_disk(self, mib: u64) -> Outcome<(Self, PathBuf)> {
        self.empty_disk_named("empty.img", mib)
    }

    /// Adds an empty disk of `mib` MiB in a file of this name; its id is `data` as that of [`Self::data_disk`].
    pub fn empty_disk_named(mut self, name: &str, mib: u64) -> Outcome<(Self, PathBuf)> {
        let path = self.context.folder.join(name);
        fs::File::create(&path)
            .and_then(|file| file.set_len(mib << 20))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        self.command.arg("--disk").arg(format!("path={},id=data", path.display()));
        Ok((self, path))
    }

    /// Starts it.
    pub fn start(mut self) -> Outcome<Running> {
        if !self.name.is_empty() {
            self.command.arg("--name").arg(&self.name);
        }
        if !self.cmdline.is_empty() {
            self.command.arg("--cmdline").arg(&self.cmdline);
        }
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.context.log(&format!("{:?}", self.command));
        let mut child = self.command.spawn().map_err(|error| format!("cannot start bulkhead: {error}"))?;
        self.context.remember(child.id());
        let output = Arc::new(Output::default());
        if let Some(stream) = child.stdout.take() {
            output.follow(stream, Source::Serial, self.context);
        }
        if let Some(stream) = child.stderr.take() {
            output.follow(stream, Source::Messages, self.context);
        }
        Ok(Running { child, output, name: self.name, end: self.context.end, started: Instant::now() })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Serial,
    Messages,
}

/// Lines that came so far.
#[derive(Default)]
struct Output {
    lines: Mutex<Vec<(Source, String)>>,
    changed: Condvar,
}

impl Output {
    fn follow(self: &Arc<Self>, stream: impl Read + Send + 'static, source: Source, context: &Context) {
        let (output, context) = (Arc::clone(self), context.clone());
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut bytes = Vec::new();
            while reader.read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned();
                bytes.clear();
                context.log(&format!("{} {line}", if source == Source::Serial { "|" } else { "!" }));
                output.lines.lock().unwrap_or_else(PoisonError::into_inner).push((source, line));
                output.changed.notify_all();
            }
        });
    }
}

/// A machine that was started.
pub struct Running {
    child: Child,
    output: Arc<Output>,
    /// Its name, for `bulkhead ps` and others.
    pub name: String,
    end: Instant,
    /// When.
    pub started: Instant,
}

impl Running {
    /// Number of the supervisor.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the `count`th line of the serial port that contains `text`, and returns it.
    pub fn wait_for(&mut self, text: &str, count: usize) -> Outcome<String> {
        loop {
            let ended = self.child.try_wait().map_err(|error| error.to_string())?;
            if ended.is_some() {
                // What it wrote last is still on its way through the pipe.
                thread::sleep(Duration::from_millis(200));
            }
            let lines = self.output.lines.lock().unwrap_or_else(PoisonError::into_inner);
            let mut found =
                lines.iter().filter(|(source, line)| *source == Source::Serial && line.contains(text));
            if let Some((_, line)) = found.nth(count.saturating_sub(1)) {
                return Ok(line.clone());
            }
            if let Some(status) = ended {
                return Err(format!("bulkhead ended ({status}) before '{text}' appeared"));
            }
            let left = self.end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("'{text}' did not appear on the serial port in time"));
            }
            drop(self.output.changed.wait_timeout(lines, left.min(Duration::from_millis(200))));
        }
    }

    /// What follows `key` in the first line of the guest that begins `guest: KEY`.
    #[must_use]
    pub fn guest(&self, key: &str) -> Option<String> {
        let prefix = format!("guest: {key} ");
        self.serial().iter().find_map(|line| line.strip_prefix(&prefix).map(str::to_owned))
    }

    /// The lines of the serial port so far.
    #[must_use]
    pub fn serial(&self) -> Vec<String> {
        self.lines(Source::Serial)
    }

    /// The lines of standard error so far.
    #[must_use]
    pub fn messages(&self) -> Vec<String> {
        self.lines(Source::Messages)
    }

    fn lines(&self, wanted: Source) -> Vec<String> {
        let lines = self.output.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|(source, _)| *source == wanted).map(|(_, line)| line.clone()).collect()
    }

    /// The processes of the machine, the supervisor first.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        descendants(self.pid())
    }

    /// The process that owns KVM.
    ///
    /// # Errors
    /// It is not there.
    pub fn core(&self) -> Outcome<Process> {
        let core = self.processes().into_iter().find(|process| process.title().contains("bulkhead-vmm["));
        core.ok_or_else(|| "no core".to_owned())
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: Signal) -> Outcome {
        let pid = i32::try_from(self.pid()).map_err(|error| error.to_string())?;
        kill(Pid::from_raw(pid), signal).map_err(|error| format!("kill: {error}"))
    }

    /// Waits until `bulkhead` has ended by itself.
    pub fn wait(&mut self) -> Outcome<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait().map_err(|error| error.to_string())? {
                // What it wrote last is still on its way through the pipe.
                thread::sleep(Duration::from_millis(100));
                return Ok(status);
            }
            if Instant::now() >= self.end {
                return Err("bulkhead did not end in time".into());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the end and compares the exit code (signals as shells count them).
    pub fn expect_exit(&mut self, code: i32) -> Outcome {
        let status = self.wait()?;
        let found = status.code().or(status.signal().map(|signal| 128 + signal));
        if found == Some(code) { Ok(()) } else { Err(format!("bulkhead ended with {status}, not {code}")) }
    }
}

/// Waits up to `limit` until none of the processes is left.
pub fn expect_gone(processes: &[Process], limit: Duration) -> Outcome {
    let end = Instant::now() + limit;
    loop {
        let left: Vec<_> = processes.iter().filter(|process| process.is_alive()).collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            let titles: Vec<_> =
                left.iter().map(|process| format!("{} {}", process.pid, process.title())).collect();
            return Err(format!("still there after {limit:?}: {}", titles.join("; ")));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
