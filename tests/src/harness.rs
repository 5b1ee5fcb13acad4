//! The runner of the machine tests: many cases in one program, so that the lab starts once for all of them.
//!
//! Each case has a folder for its files, a log that is kept, and a deadline. When the deadline passes, every process that the
//! case has started is killed and the next case runs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a case returns: a sentence that says what did not hold.
pub type Outcome<T = ()> = Result<T, String>;

/// Returns the formatted sentence as an error unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err(format!($($sentence)+));
        }
    };
}

/// Where the built programs and guests are.
#[derive(Clone)]
pub struct Places {
    /// Folder of the programs: where this one is.
    pub programs: PathBuf,
    /// Folder that `tools/make-guest` made.
    pub guest: PathBuf,
    /// Folder of the lab, with a kernel that has every driver, which `tools/lab --prepare` made.
    pub lab: PathBuf,
    /// Folder of the bare-metal payloads.
    pub payloads: PathBuf,
    /// Folder of the disks that firmware boots, which `tools/make-boot-disks` made.
    pub boot: PathBuf,
    /// Folder for logs that are kept.
    pub logs: PathBuf,
}

impl Places {
    /// Finds them from the place of the running program, `target/TARGET/PROFILE/`.
    pub fn find() -> Outcome<Self> {
        let program = env::current_exe().map_err(|error| format!("this program's own path: {error}"))?;
        let programs = program.parent().ok_or("no folder of programs")?.to_path_buf();
        let root = programs.ancestors().nth(3).ok_or("the programs are not below target/")?;
        let build = root.join("build");
        Ok(Self {
            guest: build.join("guest"),
            lab: build.join("lab"),
            payloads: build.join("payloads"),
            boot: build.join("boot"),
            logs: build.join("machine-tests"),
            programs,
        })
    }
}

/// One case.
pub struct Case {
    /// What holds when it passes; also what the command line selects it by.
    pub name: String,
    /// How long it may take.
    pub deadline: Duration,
    /// What it needs: a word that the command line selects by, `stock` or `bare`.
    pub group: &'static str,
    /// Why it cannot run here; it is named and counted as skipped then.
    pub skip: Option<&'static str>,
    /// Runs only when a word selects it.
    pub long: bool,
    /// The test.
    pub run: Arc<dyn Fn(&Context) -> Outcome + Send + Sync>,
}

impl Case {
    /// A case of `group` that may take `seconds`.
    pub fn new(
        group: &'static str,
        name: impl Into<String>,
        seconds: u64,
        run: impl Fn(&Context) -> Outcome + Send + Sync + 'static,
    ) -> Self {
        let (name, deadline) = (name.into(), Duration::from_secs(seconds));
        Self { name, deadline, group, skip: None, long: false, run: Arc::new(run) }
    }

    /// The same case, which is skipped in the lab for this reason.
    #[must_use]
    pub fn not_in_lab(mut self, reason: &'static str) -> Self {
        self.skip = env::var_os("BULKHEAD_IN_LAB").map(|_| reason);
        self
    }

    /// The same case, which in the lab needs QEMU to take a lock that it forgets (`tools/lab-qemu.c`).
    #[must_use]
    pub fn with_lock_in_lab(mut self) -> Self {
        let lab = env::var_os("BULKHEAD_IN_LAB").filter(|how| how != "locked");
        self.skip = lab.map(|_| "the lab's QEMU would abort, and is not one that tools/lab-qemu.c knows");
        self
    }

    /// The same case, which the lab runs only when a word of the command line selects it.
    #[must_use]
    pub fn long_in_lab(mut self) -> Self {
        self.long = env::var_os("BULKHEAD_IN_LAB").is_some();
        self
    }
}

/// What a case works with.
#[derive(Clone)]
pub struct Context {
    /// Programs and guests.
    pub places: Places,
    /// A fresh folder, removed afterwards.
    pub folder: PathBuf,
    /// When the case has to be done.
    pub end: Instant,
    started: Arc<Mutex<Vec<u32>>>,
    log: Arc<Mutex<String>>,
}

impl Context {
    fn new(places: &Places, folder: &Path, deadline: Duration) -> Self {
        Self {
            places: places.clone(),
            folder: folder.to_path_buf(),
            end: Instant::now() + deadline,
            started: Arc::default(),
            log: Arc::default(),
        }
    }

    /// Remembers a process, to be killed when the case is over.
    pub fn remember(&self, pid: u32) {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).push(pid);
    }

    /// Adds a line to the log of the case.
    pub fn log(&self, line: &str) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(log, "{line}");
    }

    /// Time that is left.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    fn kill_all(&self) {
        for pid in self.started.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if let Ok(pid) = i32::try_from(pid) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }

    fn take_log(&self) -> String {
        std::mem::take(&mut self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Which cases to run.
#[derive(Default)]
struct Selection {
    group: Option<String>,
    words: Vec<String>,
    list: bool,
}

impl Selection {
    fn parse(arguments: impl Iterator<Item = String>) -> Self {
        let mut selection = Self::default();
        for argument in arguments {
            match argument.strip_prefix("--") {
                Some("list") => selection.list = true,
                Some(group) => selection.group = Some(group.to_owned()),
                None => selection.words.push(argument),
            }
        }
        selection
    }

    fn takes(&self, case: &Case) -> bool {
        self.group.as_deref().is_none_or(|group| group == case.group)
            && (self.words.is_empty() || self.words.iter().any(|word| case.name.contains(word.as_str())))
    }
}

/// Runs the cases that the command line selects; true if none failed and at least one passed: a skipped case shows nothing.
///
/// Arguments: `--list`, `--GROUP`, and words that a case's name must contain one of.
#[must_use]
pub fn run(cases: &[Case], arguments: impl Iterator<Item = String>) -> bool {
    let selection = Selection::parse(arguments);
    let places = match Places::find() {
        Ok(places) => places,
        Err(sentence) => {
            println!("machine-tests: {sentence}");
            return false;
        }
    };
    let _ = fs::create_dir_all(&places.logs);
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for case in cases.iter().filter(|case| selection.takes(case)) {
        if selection.list {
            println!("{} {}", case.group, case.name);
            continue;
        }
        let long = case.long && selection.words.is_empty();
        if let Some(reason) = case.skip.or(long.then_some("it takes minutes in the lab; a word selects it")) {
            skipped += 1;
            println!("test {} ... SKIPPED: {reason}", case.name);
            continue;
        }
        let start = Instant::now();
        let outcome = run_case(case, &places);
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("test {} ... ok ({seconds:.1} s)", case.name);
            }
            Err(sentence) => {
                println!(
                    "test {} ... FAILED ({seconds:.1} s)\n    {}",
                    case.name,
                    sentence.replace('\n', "\n    ")
                );
                failed.push(case.name.as_str());
            }
        }
    }
    if selection.list {
        return true;
    }
    if !failed.is_empty() {
        println!("failed: {}\nlogs are in {}", failed.join(", "), places.logs.display());
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    failed.is_empty() && passed > 0
}

fn run_case(case: &Case, places: &Places) -> Outcome {
    let folder = tempfile::Builder::new()
        .prefix("bulkhead-test-")
        .tempdir()
        .map_err(|error| format!("no folder for the case: {error}"))?;
    let context = Context::new(places, folder.path(), case.deadline);
    let (sender, receiver) = mpsc::channel();
    let (run, inner) = (Arc::clone(&case.run), context.clone());
    let worker = thread::spawn(move || {
        // The receiver is gone only when the deadline has passed, and then nobody asks any more.
        let _ = sender.send(run(&inner));
    });
    // A little more than the case itself has, so that its own, better sentence comes first.
    let outcome = match receiver.recv_timeout(case.deadline + Duration::from_secs(3)) {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => Err(format!("not done within {} s", case.deadline.as_secs())),
        Err(RecvTimeoutError::Disconnected) => Err("the case itself panicked".into()),
    };
    context.kill_all();
    drop(worker);
    let log = context.take_log();
    let path = places.logs.join(format!("{}.log", case.name.replace([' ', '/'], "-")));
    if let Err(error) = fs::write(&path, &log) {
        println!("machine-tests: {}: {error}", path.display());
    }
    outcome.map_err(|sentence| {
        let lines: Vec<_> = log.lines().collect();
        let last = lines.get(lines.len().saturating_sub(25)..).unwrap_or_default().join("\n");
        format!("{sentence}\nlast lines of its log:\n{last}")
    })
}
