//! `bulkhead run -- COMMAND …`: a command in a guest that sees the host's files, without any configuration.
//!
//! An installed kernel starts with an initial RAM file system that is made here: `bulkhead-init`, the modules that lead to the root,
//! and a plan. The root is the host's (or any unpacked tree), shared for reading only, with an overlay in the guest's memory above it: the
//! guest may change what it likes, and nothing of it stays but what `--rw` names. The exit status comes back by the debug exit port.
//!
//! All of it is options of `bulkhead run` ([`prepare`] fills them in): there is no machine here that could not be written out.

mod cpio;
mod kernel;
mod modules;
mod network;
mod words;

use std::env;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use cpio::Archive;
use kernel::Kernel;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::utsname::uname;
use nix::unistd::write;
use thiserror::Error;
use words::{Given, words};

use super::cli::{EndAction, LogLevel, RunArgs, Switch};
use super::config::{CpuSpec, FsSpec, Size, StreamTarget};
use super::terminal;

/// Tag of the root.
const ROOT: &str = "root";
/// Memory of such a guest, bytes, unless something is said; less where the host is small.
const MEMORY: u64 = 1 << 30;
/// Most CPUs unless something is said.
const CPUS: usize = 8;
/// Variables that the command gets from this process's environment.
const PASSED: [&str; 9] = ["PATH", "TERM", "COLORTERM", "LANG", "LANGUAGE", "HOME", "SHELL", "EDITOR", "TZ"];

/// Why a command cannot be run.
#[derive(Debug, Error)]
pub enum CommandError {
    /// Options that mean something to a command alone.
    #[error("{0} is for `bulkhead run -- COMMAND`")]
    NoCommand(&'static str),
    /// Options that a command has no use for.
    #[error("{0} does not go together with `-- COMMAND`")]
    NotWith(&'static str),
    /// No kernel is installed.
    #[error(
        "no kernel is installed that can be started (neither /boot/vmlinuz-RELEASE nor /lib/modules/RELEASE/vmlinuz): install one, or name one with --kernel FILE"
    )]
    NoKernel,
    /// A folder that cannot be shared.
    #[error("{option}: '{path}': {source}", path = path.display())]
    Folder {
        /// Which option.
        option: &'static str,
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A path that cannot be said to the guest.
    #[error("{option}: '{path}' has a comma or is not UTF-8, which cannot be shared this way", path = path.display())]
    Path {
        /// Which option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The modules of the kernel.
    #[error("the modules of the kernel cannot be found out: {0}")]
    Modules(String),
    /// A file for the initial RAM file system.
    #[error("cannot read '{path}' for the initial RAM file system: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be written where the user wants it.
    #[error("--save-initrd: cannot write '{path}': {source}", path = path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The initial RAM file system cannot be held.
    #[error("cannot hold the initial RAM file system: {0}")]
    Hold(io::Error),
}

/// A run that is filled in.
#[derive(Debug)]
pub struct Prepared {
    /// The command that it stands for, and what is in the initial RAM file system.
    pub words: String,
    /// Only that was asked for.
    pub dry_run: bool,
    /// Show it before the run.
    pub verbose: bool,
    /// What the user is to know.
    pub warning: Option<String>,
    /// The initial RAM file system, as long as the options name it.
    _initrd: OwnedFd,
}

/// A directory that the guest mounts.
struct Mount {
    tag: String,
    path: String,
    read_only: bool,
}

/// Fills in the options for the command among them; `None`: there is none.
pub fn prepare(args: &mut RunArgs) -> Result<Option<Prepared>, CommandError> {
    if args.command.is_empty() {
        let alone = [
            (args.root.is_some(), "--root"),
            (!args.rw.is_empty(), "--rw"),
            (args.dry_run, "--dry-run"),
            (args.verbose, "--verbose"),
            (args.save_initrd.is_some(), "--save-initrd"),
        ];
        return match alone.into_iter().find(|(given, _)| *given) {
            Some((_, option)) => Err(CommandError::NoCommand(option)),
            None => Ok(None),
        };
    }
    let others = [
        (args.initrd.is_some(), "--initrd"),
        (args.firmware.is_some(), "--firmware"),
        (args.config.is_some(), "--config"),
        (args.console.is_some(), "--console"),
    ];
    if let Some((_, option)) = others.into_iter().find(|(given, _)| *given) {
        return Err(CommandError::NotWith(option));
    }
    let root = folder("--root", args.root.as_deref().unwrap_or(Path::new("/")))?;
    let (cwd, mounts) = share(args, &root)?;
    let kernel = kernel::find(args.kernel.as_deref(), &root)?;
    let warning = network::fill(args);
    let (archive, contents) = initial(&kernel, &plan(args, &cwd, &mounts, &root), args)?;
    let initrd =
        memfd_create(c"initramfs", MFdFlags::MFD_CLOEXEC).map_err(|it| CommandError::Hold(it.into()))?;
    let mut left = archive.as_slice();
    while !left.is_empty() {
        let count = write(&initrd, left).map_err(|errno| CommandError::Hold(errno.into()))?;
        left = left.get(count..).unwrap_or_default();
    }
    if let Some(path) = &args.save_initrd {
        let failed = |source| CommandError::Save { path: path.clone(), source };
        fs::write(path, &archive).map_err(failed)?;
    }
    args.kernel = Some(kernel.image);
    args.initrd = Some(PathBuf::from(format!("/proc/self/fd/{}", initrd.as_raw_fd())));
    fill(args);
    let words = words(args, &Given::new(env::args_os()), &contents);
    Ok(Some(Prepared { words, dry_run: args.dry_run, verbose: args.verbose, warning, _initrd: initrd }))
}

/// A folder by its one name.
fn folder(option: &'static str, path: &Path) -> Result<PathBuf, CommandError> {
    let failed = |source| CommandError::Folder { option, path: path.to_owned(), source };
    let whole = path.canonicalize().map_err(failed)?;
    if !whole.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    match whole.to_str() {
        Some(text) if !text.contains([',', '\0']) => Ok(whole),
        _ => Err(CommandError::Path { option, path: path.to_owned() }),
    }
}

/// Shares root, working directory and what is to be written. Where the command begins, and what is mounted above the root.
fn share(args: &mut RunArgs, root: &Path) -> Result<(String, Vec<Mount>), CommandError> {
    let spec = |tag: &str, path: &Path, read_only: bool| FsSpec {
        tag: tag.to_owned(),
        path: path.to_owned(),
        vhost_user: false,
        readonly: read_only,
        cache: super::config::fs::Cache::Auto,
        // Of the root all is shared that is mounted in it; whoever names a directory for writing means it alone.
        submounts: read_only,
        xattr: false,
        owner: None,
        others: 0,
        id: None,
        restart: None,
        addr: None,
    };
    args.fs.push(spec(ROOT, root, true));
    let written: Vec<PathBuf> = args.rw.iter().map(|path| folder("--rw", path)).collect::<Result<_, _>>()?;
    let here = folder("working directory", Path::new("."))?;
    // Where a directory of the host is in the guest: what is below the root has its place there.
    let inside = |path: &Path| match path.strip_prefix(root) {
        Ok(below) => Path::new("/").join(below).to_string_lossy().into_owned(),
        Err(_) => path.to_string_lossy().into_owned(),
    };
    let cwd = inside(&here);
    let hidden = !here.starts_with(root) && !written.iter().any(|path| here.starts_with(path));
    let shared = hidden.then_some((here, true)).into_iter();
    let mut mounts: Vec<Mount> = Vec::new();
    for (path, read_only) in shared.chain(written.into_iter().map(|path| (path, false))) {
        let tag = format!("mount{}", mounts.len());
        args.fs.push(spec(&tag, &path, read_only));
        mounts.push(Mount { tag, path: inside(&path), read_only });
    }
    mounts.sort_by_key(|mount| mount.path.len());
    Ok((cwd, mounts))
}

/// What `bulkhead-init` is told.
fn plan(args: &RunArgs, cwd: &str, mounts: &[Mount], root: &Path) -> Vec<(&'static str, String)> {
    let mut plan = vec![("root", ROOT.to_owned()), ("cwd", cwd.to_owned())];
    plan.extend(mounts.iter().map(|mount| {
        let mode = if mount.read_only { "ro" } else { "rw" };
        ("mount", format!("{}:{mode}:{}", mount.tag, mount.path))
    }));
    if !cwd.starts_with("/run") && !mounts.iter().any(|mount| mount.path.starts_with("/run")) {
        plan.push(("run", "tmpfs".to_owned()));
    }
    if let Ok(names) = uname() {
        plan.push(("hostname", names.nodename().to_string_lossy().into_owned()));
    }
    plan.extend(network::plan(args));
    plan.extend(args.command.iter().map(|word| ("arg", word.clone())));
    let own = |name: &str| env::var(name).ok().map(|value| format!("{name}={value}"));
    let variables = PASSED.into_iter().filter(|name| *name != "HOME" || root == Path::new("/"));
    plan.extend(variables.filter_map(own).map(|variable| ("env", variable)));
    let locale = env::vars().filter(|(name, _)| name.starts_with("LC_"));
    plan.extend(locale.map(|(name, value)| ("env", format!("{name}={value}"))));
    if env::var("PATH").is_err() {
        plan.push(("env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()));
    }
    if root != Path::new("/") {
        plan.push(("env", "HOME=/root".to_owned()));
    }
    plan.push(("env", "USER=root".to_owned()));
    plan.extend((!io::stdout().is_terminal()).then(|| ("raw", "yes".to_owned())));
    plan.extend((!terminal::stdin_is_ours()).then(|| ("no-input", "yes".to_owned())));
    plan
}

/// The initial RAM file system, and a line that says what is in it.
fn initial(
    kernel: &Kernel,
    plan: &[(&'static str, String)],
    args: &RunArgs,
) -> Result<(Vec<u8>, String), CommandError> {
    let read =
        |path: &Path| fs::read(path).map_err(|source| CommandError::Read { path: path.to_owned(), source });
    let init = env::current_exe().map_err(CommandError::Hold)?.with_file_name("bulkhead-init");
    let mut archive = Archive::default();
    for folder in ["dev", "bulkhead"] {
        archive.folder(folder);
    }
    // A Rust program wants descriptors 0 to 2, and there is no console before its driver is loaded.
    archive.device("dev/null", 1, 3);
    archive.file("init", &read(&init)?, 0o755);
    let mut text = Vec::new();
    let mut names = Vec::new();
    if let Some(folder) = &kernel.modules {
        for file in modules::to_load(folder, args).map_err(CommandError::Modules)? {
            let name = file.rsplit('/').next().unwrap_or(&file).to_owned();
            archive.file(&format!("bulkhead/{name}"), &read(&folder.join(&file))?, 0o644);
            names.push(name);
        }
    }
    let loads = names.iter().map(|name| ("module", name.clone()));
    for (key, value) in loads.chain(plan.iter().cloned()) {
        text.extend_from_slice(format!("{key}={value}").as_bytes());
        text.push(0);
    }
    archive.file("bulkhead/plan", &text, 0o644);
    let modules = if names.is_empty() { "no modules".to_owned() } else { names.join(" ") };
    let contents = format!("{}, {modules}, and a plan that says what to mount and to run", init.display());
    Ok((archive.finish(), contents))
}

/// What is left to be said of the machine.
fn fill(args: &mut RunArgs) {
    // What the guest's kernel says stands in its log; what it says when it dies does not come this way.
    let words = "console=hvc0 quiet loglevel=1 panic=-1";
    args.cmdline = Some(match args.cmdline.take() {
        Some(given) => format!("{words} {given}"),
        None => words.to_owned(),
    });
    args.console = Some(StreamTarget::Stdio.into());
    args.serial.get_or_insert(StreamTarget::Off);
    args.debug_exit = Some(Switch::On);
    args.on_reboot.get_or_insert(EndAction::Exit);
    args.on_panic.get_or_insert(EndAction::Exit);
    args.log_level.get_or_insert(LogLevel::Warn);
    args.memory.get_or_insert(Size(MEMORY));
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get().min(CPUS));
    args.cpus.get_or_insert(CpuSpec::from(u32::try_from(cpus).unwrap_or(1)));
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::supervisor::cli::{Cli, Command};

    pub(super) fn args(words: &[&str]) -> RunArgs {
        let all = ["bulkhead", "run"].iter().chain(words);
        match Cli::try_parse_from(all).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn everything_is_for_reading_but_what_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        let mut args = args(&["--rw", path.to_str().unwrap(), "--", "sh", "-c", "exit 7"]);
        let (cwd, mounts) = share(&mut args, Path::new("/")).unwrap();
        assert_eq!(cwd, env::current_dir().unwrap().to_str().unwrap());
        assert_eq!(mounts.len(), 1);
        assert_eq!((mounts[0].path.as_str(), mounts[0].read_only), (path.to_str().unwrap(), false));
        let shared: Vec<_> = args.fs.iter().map(|fs| (fs.tag.as_str(), fs.readonly, fs.submounts)).collect();
        assert_eq!(shared, [("root", true, true), ("mount0", false, false)]);
        let plan = plan(&args, &cwd, &mounts, Path::new("/"));
        let all = |key| {
            plan.iter()
                .filter(|(other, _)| *other == key)
                .map(|(_, value)| value.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(all("arg"), ["sh", "-c", "exit 7"]);
        assert_eq!(all("mount"), [format!("mount0:rw:{}", path.display())]);
        assert_eq!(all("cwd"), [cwd]);
    }

    #[test]
    fn another_root_still_shows_the_current_directory() {
        let folder = tempfile::tempdir().unwrap();
        let mut args = args(&["--", "true"]);
        let (cwd, mounts) = share(&mut args, folder.path()).unwrap();
        assert_eq!(mounts.len(), 1);
        assert!(mounts[0].read_only);
        assert_eq!(mounts[0].path, cwd);
    }

    #[test]
    fn options_without_or_against_a_command_are_refused() {
        let refusal = |words: &[&str]| prepare(&mut args(words)).unwrap_err().to_string();
        assert!(refusal(&["--root", "/"]).contains("--root is for `bulkhead run -- COMMAND`"));
        assert!(refusal(&["--dry-run"]).contains("--dry-run"));
        assert!(refusal(&["--firmware", "seabios", "--", "true"]).contains("--firmware"));
        assert!(refusal(&["--rw", "/nonexistent", "--", "true"]).contains("/nonexistent"));
        assert!(refusal(&["--root", "/dev/null", "--", "true"]).contains("/dev/null"));
        assert!(prepare(&mut args(&["--kernel", "k"])).unwrap().is_none());
    }
}
